"""Augmentation of mixtures: polarity, time shift, speed, stretch, pitch, own.

The changes of a mixture are drawn first, then it is read from its file, longer
or shorter or from elsewhere, and last its samples are changed:

1. speed and pitch by resampling, which moves both pitch and tempo,
2. time stretch, and whatever tempo the pitch needs back, by torchaudio's phase
   vocoder,
3. polarity by the sign,
4. anything else by a callable.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torchaudio.functional import phase_vocoder

from trackformer_sb.audio import resample

# Resampling is by fractions of at most this denominator: speed goes in steps of
# half a percent, and pitch is at most 4.3 cents off. Kernels grow with its
# square: for 3 s at 44.1 kHz resampling takes 3 ms here, and 47 ms with 1000.
LARGEST_DENOMINATOR = 200

# Window of the vocoder, 2048 samples at 44.1 kHz.
WINDOW_SECONDS = 2048 / 44100
SMALLEST_WINDOW = 16
OVERLAP = 4

LARGEST = {
    "polarity_share": 1,
    "time_shift_seconds": math.inf,
    "speed_percent": 50,
    "time_stretch_percent": 50,
    "pitch_shift_semitones": 12,
}


class Change(NamedTuple):
    """What happens to one mixture; the defaults leave it as it is.

    `speed` is a factor of pitch and tempo together, `tempo` of the tempo alone
    (1.1 is 10 % faster), `semitones` is how much higher the pitch alone is, and
    `seed` that of torch's random numbers in a callable.
    """

    sign: float = 1.0
    shift_seconds: float = 0.0
    speed: float = 1.0
    tempo: float = 1.0
    semitones: float = 0.0
    seed: int = 0

    @property
    def seconds_read(self):
        """Seconds of the song that go into one second of the result."""
        return self.speed * self.tempo


@dataclass
class Augmentation:
    """Draws and applies changes of mixtures; by default there are none.

    All of a change comes from six random numbers, drawn whatever is switched
    on: switching one kind on leaves all other choices as they were.

    Arguments
    ---------
    polarity_share : float
        Share of mixtures whose sign is flipped, 0 to 1.
    time_shift_seconds : float
        The start of a segment moves by up to this much, in seconds, earlier or
        later; uniform.
    speed_percent : float
        Pitch and tempo together change by up to this much, in percent, 0 to
        50; all multiples of half a percent in the range are equally likely.
    time_stretch_percent : float
        The tempo changes by up to this much, in percent, 0 to 50; uniform. The
        pitch stays.
    pitch_shift_semitones : float
        The pitch changes by up to this much, 0 to 12; uniform. The tempo stays.
    transform : callable, optional
        Anything more, [channels, time] -> [channels, time]. Its random numbers
        should be torch's, which are seeded for each mixture.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Example
    -------
    >>> import numpy as np
    >>> augmentation = Augmentation(speed_percent=5, transform=torch.sign)
    >>> change = augmentation.draw(np.random.default_rng(3))
    >>> change.speed
    1.03
    >>> augmentation.source(change, 10.0, 4.0, song_seconds=100.0)
    (10.0, 4.12)
    >>> augmentation.apply(change, torch.full([412], 0.1), 400, 100)[:3]
    tensor([1., 1., 1.])
    """

    polarity_share: float = 0.0
    time_shift_seconds: float = 0.0
    speed_percent: float = 0.0
    time_stretch_percent: float = 0.0
    pitch_shift_semitones: float = 0.0
    transform: Callable | None = None

    def __post_init__(self):
        for key, largest in LARGEST.items():
            value = getattr(self, key)
            if not 0 <= value <= largest:
                raise ValueError(
                    f"expected {key} from 0 to {largest}, got {value}"
                )
        self.is_off = self.transform is None and not any(
            getattr(self, key) for key in LARGEST
        )

    def draw(self, rng):
        """Draws the change of one mixture: six numbers of the generator."""
        polarity, shift, speed, tempo, pitch, seed = rng.random(6).tolist()
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
            seed=int(seed * 2**53),
        )

    @staticmethod
    def source(change, start, duration, song_seconds):
        """What to read of the song for a changed segment, in seconds.

        Start and duration are those of the segment without the change; returns
        where to read from and how much. What would reach past the end of the
        song is moved back; all of a song is read if even that is too short.
        """
        if change.shift_seconds == 0 and change.seconds_read == 1:
            return start, duration
        seconds = min(duration * change.seconds_read, song_seconds)
        start = min(start + change.shift_seconds, song_seconds - seconds)
        return max(0.0, start), seconds

    def apply(self, change, sig, num_samples, sample_rate):
        """Changes what was read.

        The phase vocoder is not linear: to change a mixture, sum its tracks
        first. `sig` is what `source` told to read, [time] or [channels, time]
        at `sample_rate`; the result has `num_samples`, with zeros at the end
        where `sig` is too short.

        Example
        -------
        >>> a4 = torch.sin(torch.arange(8000) * 2 * torch.pi * 440 / 8000)
        >>> a5 = Augmentation().apply(Change(semitones=12.0), a4, 8000, 8000)
        >>> len(a5), int(torch.fft.rfft(a5).abs().argmax())
        (8000, 880)
        """
        pitch = Fraction(change.speed * 2 ** (change.semitones / 12))
        pitch = pitch.limit_denominator(LARGEST_DENOMINATOR)
        # The vocoder makes up for what resampling does to the tempo, the
        # rounding of the pitch included.
        rate = change.seconds_read / float(pitch)
        if pitch != 1:
            sig = resample(sig, pitch.numerator, pitch.denominator)
        if rate != 1:
            sig = _stretch(sig, rate, sample_rate)
        sig = torch.nn.functional.pad(sig, (0, num_samples - sig.shape[-1]))
        sig = change.sign * sig
        if self.transform is None:
            return sig
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(change.seed)
            return self.transform(torch.atleast_2d(sig)).view_as(sig)


def _within(limit, draw):
    """A number from -limit to limit for a draw in [0, 1)."""
    return 2 * limit * draw - limit


def _stretch(sig, rate, sample_rate):
    """[..., time] played faster by a factor, at its pitch."""
    exponent = round(math.log2(WINDOW_SECONDS * sample_rate))
    n_fft = max(SMALLEST_WINDOW, 2**exponent)
    hop = n_fft // OVERLAP
    window = torch.hann_window(n_fft, dtype=sig.dtype)
    spectrum = torch.stft(
        sig, n_fft, hop, window=window, pad_mode="constant", return_complex=True
    )
    advance = torch.linspace(0, math.pi * hop, n_fft // 2 + 1, dtype=sig.dtype)
    spectrum = phase_vocoder(spectrum, rate, advance.unsqueeze(-1))
    stretched = torch.istft(spectrum, n_fft, hop, window=window)
    # frames whose bins turned apart cancel in part: 2 to 4 dB of music
    level, after = (x.square().mean(-1, keepdim=True) for x in (sig, stretched))
    return stretched * (level / after.clamp(min=1e-12)).sqrt()
