"""Self-training: stems that a teacher hears in songs are mixed anew.

RemixIT (arXiv 2202.08862): what the teacher takes apart wrongly comes with
other music around it in the new mixture, so that the student, which has to
find it there again, learns what is alike in all of them.
"""

import torch
from torch.nn import functional as F

from trackformer_sb.data.remix import ITEM_RMS, LEVEL_DB
from trackformer_sb.objectives.metrics import si_snr

# Of the teacher's second pass: samples that it begins later, half a hop of
# 1024, and how much slower the song is played, by half a semitone.
OFFSET, SLOWER = 512, 2 ** (1 / 24)


def _played(sig, num_samples):
    """[batch, ..., time] in so many samples."""
    played = F.interpolate(
        sig.flatten(1, -2), num_samples, mode="linear", align_corners=True
    )
    return played.unflatten(1, sig.shape[1:-1])


def stems_and_agreement(teacher, songs):
    """Stems of songs, and how far a second pass agrees with them.

    The second pass hears the songs from another offset on and at another speed.

    Arguments
    ---------
    teacher : callable
        [batch, channels, time] -> [batch, classes, channels, time].
    songs : torch.Tensor
        [..., channels, time].

    Returns
    -------
    stems : torch.Tensor
        [..., classes, channels, time].
    agreement : torch.Tensor
        SI-SNR of the second pass, [..., classes], in dB.
    """
    kinds, songs = songs.shape[:-2], songs.flatten(0, -3)
    stems, later = teacher(songs), songs[..., OFFSET:]
    length = later.shape[-1]
    again = _played(teacher(_played(later, round(length * SLOWER))), length)
    agreement = si_snr(again.flatten(2), stems[..., OFFSET:].flatten(2))
    return stems.unflatten(0, kinds), agreement.unflatten(0, kinds)


def mixed_anew(stems, agreement, least_db, rng):
    """Stems of songs that are mixed with each other, at a level of 0.1 RMS.

    A class is that of a random song among those whose stem is sure, and left
    out where none is.

    Arguments
    ---------
    stems : torch.Tensor
        [batch, songs, classes, channels, time].
    agreement : torch.Tensor
        [batch, songs, classes] in dB, see ``stems_and_agreement``.
    least_db : float
        Agreement from which on a stem is sure.
    rng : numpy.random.Generator
        Draws songs, and levels within 6 dB.

    Returns
    -------
    torch.Tensor
        [batch, classes, channels, time].

    Example
    -------
    >>> import numpy as np
    >>> stems = torch.ones(1, 2, 3, 1, 8)
    >>> agreement = torch.tensor([[[9.0, 9, 2], [2, 9, 2]]])
    >>> mixed = mixed_anew(stems, agreement, 5.0, np.random.default_rng(0))
    >>> mixed.ne(0).all(-1).flatten().tolist()
    [True, True, False]
    """
    sure = (agreement >= least_db).to(stems)
    drawn = sure + torch.from_numpy(rng.random(sure.shape)).to(sure)
    song = drawn.argmax(1, keepdim=True)
    gain = 10 ** (rng.uniform(-LEVEL_DB, LEVEL_DB, song.shape) / 20)
    gain = torch.from_numpy(gain).to(sure) * sure.gather(1, song)
    index = song[..., None, None].expand(-1, -1, -1, *stems.shape[-2:])
    mixed = (stems.gather(1, index) * gain[..., None, None])[:, 0]
    rms = mixed.sum(1).square().mean((-2, -1)).sqrt().clamp(min=1e-4)
    return mixed * (ITEM_RMS / rms).view(-1, 1, 1, 1)
