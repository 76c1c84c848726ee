"""A room around dry sounds."""

import numpy as np
from scipy.signal import oaconvolve

SAMPLE_RATE = 44100


def reverb(sig, rng, seconds, predelay=0.0):
    """The room alone: noise that decays by 60 dB, as loud as what excites it.

    Arguments
    ---------
    sig : numpy.ndarray
        Dry signal [time, 2].
    rng : numpy.random.Generator
        Draws the room.
    seconds : float
        Its reverberation time.
    predelay : float
        Seconds before its first reflection.

    Returns
    -------
    numpy.ndarray
        Wet signal [time, 2].

    Example
    -------
    >>> click = np.zeros((SAMPLE_RATE, 2))
    >>> click[0] = 1.0
    >>> wet = reverb(click, np.random.default_rng(0), seconds=0.5)
    >>> print(abs(wet[1000]).max() > 100 * abs(wet[20000]).max())
    True
    """
    length = int(seconds * SAMPLE_RATE)
    decay = 10 ** (-3 * np.arange(length) / length)
    response = rng.standard_normal((length, 2)) * decay[:, None]
    response[: int(predelay * SAMPLE_RATE)] = 0
    wet = oaconvolve(sig, response.astype(sig.dtype), axes=0)[: len(sig)]
    return wet * np.sqrt(np.square(sig).mean() / np.square(wet).mean())
