"""Augmentation of mixtures: polarity, time shift, speed, stretch, pitch.

The changes of a mixture are drawn first, then it is read from its file, longer
or shorter or from elsewhere, and last its samples are changed:

1. speed and pitch by resampling, which moves both pitch and tempo,
2. time stretch, and whatever tempo the pitch needs back, by a phase vocoder,
3. polarity by the sign.

Speed alone needs no vocoder, and stretch and pitch together need it once.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torchaudio.functional import resample

from trackformer_sb.data.audio import FILTER_BETA, FILTER_ROLLOFF, FILTER_WIDTH

# Resampling is by fractions of at most this denominator: speed goes in steps of
# half a percent, and pitch is at most 4.3 cents off. Kernels grow with its
# square: for 3 s at 44.1 kHz resampling takes 3 ms here, and 47 ms with 1000.
LARGEST_DENOMINATOR = 200

# Window of the vocoder, 2048 samples at 44.1 kHz. It tells partials apart that
# are four bins, 86 Hz, from each other; a longer one would smear onsets more.
WINDOW_SECONDS = 2048 / 44100
SMALLEST_WINDOW = 16
OVERLAP = 4

# A bin is a peak if none of this many bins on either side is stronger.
PEAK_DISTANCE = 2

# Added to products of spectra, so that silence has a phase: 0. Far below 6e-8,
# the product for the rounding noise of 16 bits.
SMALLEST_PRODUCT = 1e-12


class Change(NamedTuple):
    """What happens to one mixture; the defaults leave it as it is.

    Arguments
    ---------
    sign : float
        1, or -1 for the opposite polarity.
    shift_seconds : float
        How much later in the song the segment starts.
    speed : float
        Factor of pitch and tempo together.
    tempo : float
        Factor of the tempo alone: 1.1 is 10 % faster.
    semitones : float
        How much higher the pitch alone is.

    Example
    -------
    >>> change = Change(speed=1.5, tempo=0.5)
    >>> change.seconds_read
    0.75
    """

    sign: float = 1.0
    shift_seconds: float = 0.0
    speed: float = 1.0
    tempo: float = 1.0
    semitones: float = 0.0

    @property
    def seconds_read(self):
        """Seconds of the song that go into one second of the result."""
        return self.speed * self.tempo


class Augmentation:
    """Draws and applies changes of mixtures; by default there are none.

    All of a change comes from five random numbers, drawn whatever is switched
    on: switching one kind on leaves all other choices as they were.

    Arguments
    ---------
    polarity_share : float
        Share of mixtures whose sign is flipped, 0 to 1.
    time_shift_seconds : float
        The start of a segment moves by up to this much, in seconds, earlier or
        later; uniform.
    speed_percent : float
        Pitch and tempo together change by up to this much, in percent, 0 or
        from 0.5 to below 50; all multiples of half a percent in the range are
        equally likely.
    time_stretch_percent : float
        The tempo changes by up to this much, in percent, 0 to below 50;
        uniform. The pitch stays.
    pitch_shift_semitones : float
        The pitch changes by up to this much, 0 to 12; uniform. The tempo stays.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Example
    -------
    >>> augmentation = Augmentation(speed_percent=5, time_shift_seconds=2)
    >>> change = augmentation.draw(np.random.default_rng(3))
    >>> change._replace(shift_seconds=round(change.shift_seconds, 3))
    Change(sign=1.0, shift_seconds=-1.053, speed=1.03, tempo=1.0, semitones=0.0)
    """

    def __init__(
        self,
        polarity_share=0.0,
        time_shift_seconds=0.0,
        speed_percent=0.0,
        time_stretch_percent=0.0,
        pitch_shift_semitones=0.0,
    ):
        # Each condition is false for NaN.
        smallest = 100 / LARGEST_DENOMINATOR
        ranges = (
            (
                "polarity_share",
                polarity_share,
                0 <= polarity_share <= 1,
                "from 0 to 1",
            ),
            (
                "time_shift_seconds",
                time_shift_seconds,
                0 <= time_shift_seconds < math.inf,
                "a finite number from 0",
            ),
            (
                "speed_percent",
                speed_percent,
                speed_percent == 0 or smallest <= speed_percent < 50,
                f"0, or from {smallest}, the step, to below 50",
            ),
            (
                "time_stretch_percent",
                time_stretch_percent,
                0 <= time_stretch_percent < 50,
                "from 0 to below 50",
            ),
            (
                "pitch_shift_semitones",
                pitch_shift_semitones,
                0 <= pitch_shift_semitones <= 12,
                "from 0 to 12",
            ),
        )
        for key, value, is_in_range, expected in ranges:
            if not is_in_range:
                raise ValueError(f"expected {key} {expected}, got {value}")
        self.polarity_share = polarity_share
        self.time_shift_seconds = time_shift_seconds
        self.speed_percent = speed_percent
        self.time_stretch_percent = time_stretch_percent
        self.pitch_shift_semitones = pitch_shift_semitones
        self.is_off = all(value == 0 for _, value, _, _ in ranges)

    def draw(self, rng):
        """Draws the change of one mixture.

        Arguments
        ---------
        rng : numpy.random.Generator
            Where to draw from; five numbers are taken.

        Returns
        -------
        Change
            Equal to `Change()` if all is off.
        """
        polarity, shift, speed, tempo, pitch = rng.random(5).tolist()
        steps = int(self.speed_percent * LARGEST_DENOMINATOR / 100)
        step = int(speed * (2 * steps + 1)) - steps
        return Change(
            sign=-1.0 if polarity < self.polarity_share else 1.0,
            shift_seconds=_within(self.time_shift_seconds, shift),
            # Divided once: the float next to the fraction, so that resampling
            # gives exactly this speed.
            speed=(LARGEST_DENOMINATOR + step) / LARGEST_DENOMINATOR,
            tempo=1 + _within(self.time_stretch_percent / 100, tempo),
            semitones=_within(self.pitch_shift_semitones, pitch),
        )

    @staticmethod
    def source(change, start, duration, song_seconds):
        """What to read of the song for a changed segment.

        Arguments
        ---------
        change : Change
            What will be applied.
        start : float
            Beginning of the segment without the change, in seconds.
        duration : float
            Length of the result, in seconds.
        song_seconds : float
            Length of the song, in seconds.

        Returns
        -------
        start : float
            Where to read from, in seconds, from 0.
        seconds : float
            How much to read. What would reach past the end of the song is moved
            back; all of a song is read if even that is too short. Without a
            change in time, start and duration come back as they are.

        Example
        -------
        >>> change = Change(shift_seconds=2.0, speed=1.25)
        >>> Augmentation.source(change, 10.0, 4.0, song_seconds=100.0)
        (12.0, 5.0)
        >>> Augmentation.source(change, 10.0, 4.0, song_seconds=14.0)
        (9.0, 5.0)
        """
        if change.shift_seconds == 0 and change.seconds_read == 1:
            return start, duration
        seconds = min(duration * change.seconds_read, song_seconds)
        start = min(start + change.shift_seconds, song_seconds - seconds)
        return max(0.0, start), seconds

    @staticmethod
    def apply(change, sig, num_samples, sample_rate):
        """Changes what was read.

        The phase vocoder is not linear: to change a mixture, sum its tracks
        first.

        Arguments
        ---------
        change : Change
            What to apply.
        sig : torch.Tensor
            What `source` told to read, floating point, [..., time].
        num_samples : int
            Length of the result in samples.
        sample_rate : int
            Rate of `sig` and of the result in Hz.

        Returns
        -------
        torch.Tensor
            [..., num_samples], of the type of `sig`, with zeros at the end
            where `sig` is too short. If nothing changes, `sig` itself.

        Example
        -------
        >>> a4 = torch.sin(torch.arange(8000) * 2 * torch.pi * 440 / 8000)
        >>> a5 = Augmentation.apply(Change(semitones=12.0), a4, 8000, 8000)
        >>> len(a5), int(torch.fft.rfft(a5).abs().argmax())
        (8000, 880)
        """
        if sig.numel() == 0:
            return sig.new_zeros(*sig.shape[:-1], num_samples)
        pitch = Fraction(change.speed * 2 ** (change.semitones / 12))
        pitch = pitch.limit_denominator(LARGEST_DENOMINATOR)
        # The vocoder makes up for what resampling does to the tempo, the
        # rounding of the pitch included.
        rate = change.seconds_read / float(pitch)
        if pitch != 1:
            sig = resample(
                sig.contiguous(),
                pitch.numerator,
                pitch.denominator,
                lowpass_filter_width=FILTER_WIDTH,
                rolloff=FILTER_ROLLOFF,
                resampling_method="sinc_interp_kaiser",
                beta=FILTER_BETA,
            )
        if rate != 1:
            sig = _stretch(sig, rate, num_samples, _window_size(sample_rate))
        missing = num_samples - sig.shape[-1]
        if missing:
            sig = torch.nn.functional.pad(sig, (0, missing))
        return -sig if change.sign < 0 else sig


def _within(limit, draw):
    """A number from -limit to limit for a draw in [0, 1)."""
    return 2 * limit * draw - limit


def _window_size(sample_rate):
    """The power of two that is next to the window of the vocoder."""
    exponent = round(math.log2(WINDOW_SECONDS * sample_rate))
    return max(SMALLEST_WINDOW, 2**exponent)


def _stretch(sig, rate, num_samples, n_fft):
    """Phase vocoder with identity phase locking.

    Frame k of the result is the spectrum X_k of the window around sample
    k * hop * rate, rotated so that its peaks go on from frame k - 1. With B_k
    the spectrum of the window one hop before that of X_k, a peak p has gone on
    by arg X_k(p) - arg B_k(p) in one hop of the result (Puckette, "Phase-locked
    vocoder", WASPAA 1995: no phase needs unwrapping), thus

        Y_k(f) = X_k(f) r(p) / |r(p)|,  r(p) = Y_{k-1}(p) conj(B_k(p))

    with p the peak next to f (Laroche and Dolson, "Improved phase vocoder
    time-scale modification of audio", IEEE Transactions on Speech and Audio
    Processing 7, 1999). One rotation around a peak keeps partials and onsets
    whole. With a rotation of its own for every bin frames cancel each other in
    part: five mixtures of music lost 1.4 to 3.4 dB that way, and 0.3 at most
    this way.
    """
    shape = (*sig.shape[:-1], num_samples)
    sig = sig.reshape(-1, sig.shape[-1])
    hop = n_fft // OVERLAP
    frames = math.ceil(num_samples / hop) + 1
    # In double: float32 counts the samples of six minutes only.
    centres = torch.arange(frames, dtype=torch.float64) * (hop * rate)
    begins = centres.round().long()
    # The window one hop before the first one, centred on sample 0, fits in.
    lead = n_fft // 2 + hop
    end = int(begins[-1]) + hop + n_fft
    sig = torch.nn.functional.pad(sig, (lead, end - lead - sig.shape[-1]))
    window = torch.hann_window(n_fft, dtype=sig.dtype)
    windows = sig.unfold(-1, n_fft, 1)
    before = torch.fft.rfft(windows[:, begins] * window)
    now = torch.fft.rfft(windows[:, begins + hop] * window)

    # Every frame needs the one before: a loop, faster in numpy than in torch.
    # `spectra` is the memory of `now`, whose frames become those of the result.
    peaks = _nearest_peaks(now.abs()).numpy()
    before = before.numpy().conj()
    spectra = now.numpy()
    for k in range(1, frames):
        rotation = np.take_along_axis(
            spectra[:, k - 1] * before[:, k], peaks[:, k], axis=-1
        )
        rotation += SMALLEST_PRODUCT
        rotation /= np.abs(rotation)
        spectra[:, k] *= rotation
    stretched = torch.istft(
        now.transpose(1, 2), n_fft, hop, window=window, length=num_samples
    )
    return stretched.reshape(shape)


def _nearest_peaks(magnitude):
    """Index of the peak next to every bin of [batch, frames, bins]."""
    strongest = torch.nn.functional.max_pool1d(
        magnitude, 2 * PEAK_DISTANCE + 1, stride=1, padding=PEAK_DISTANCE
    )
    bins = torch.arange(magnitude.shape[-1]).expand_as(magnitude)
    is_peak = magnitude == strongest
    # Every frame has a peak, its strongest bin; sides without one are far away.
    far = 2 * magnitude.shape[-1]
    below = torch.where(is_peak, bins, -far).cummax(dim=-1).values
    above = torch.where(is_peak, bins, 2 * far).flip(-1)
    above = above.cummin(dim=-1).values.flip(-1)
    return torch.where(bins - below <= above - bins, below, above)
