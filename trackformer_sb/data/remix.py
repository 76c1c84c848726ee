"""Training items with named stems, remixed from songs that have them.

Variety is what carries over to music that was never heard: classes of different
songs are mixed, at other pitches, levels and colours, or left out. A share of
the items are two songs without stems, for MixIT.
"""

import functools
from collections import defaultdict
from fnmatch import fnmatchcase

import numpy as np
import scipy.fft
import torch
from speechbrain.utils.logger import get_logger

from trackformer_sb.audio import UnreadableAudio, read_segment

logger = get_logger(__name__)

# Class -> patterns of names of stems; a stem joins the first that fits.
STEM_CLASSES = {
    "drums": ["drum*", "perc*"],
    "bass": ["bass*"],
    "vocals": ["vocal*", "*voice*", "singer*"],
    "other": ["*"],
}

MAX_PITCH, MAX_SOLO_PITCH = 2.5, 4.0  # semitones
PITCH_SHARE = 0.6  # of songs that are played at another pitch and tempo
MIX_SHARE = 0.5  # of items whose classes come from different songs
SOLO_SHARE = 0.6  # of items in which a recording of one class takes its place
MISSING_SHARE = 0.25  # of items that lack a class
MONO_SHARE = 0.15  # of items that are heard in mono
WIDTH_SHARE = 0.5  # of classes whose width changes, by up to this
MAX_WIDTH = 1.6
BALANCE_DB = 3.0
PANNED_SHARE = 0.25  # of items whose classes each have a place of their own
PAN_DB, PAN_DELAY = 12.0, 30  # that channels differ by, at most; in samples
EQUALISER_SHARE = 0.5
EQUALISER_DB = 6.0
EQUALISER_POINTS = 6
LEVEL_DB = 6.0
SOLO_DB = (-10.0, 4.0)  # level of a recording of one class beside the others
ENOUGH_SOLOS = 20  # recordings of a class, fewer are used less
SILENT_ENERGY, SOFT_ENERGY = 1e-7, 1e-5  # mean squares
MAX_GAIN = 10.0  # of a class that takes another one's level, and its inverse
ITEM_RMS = 0.1
MIXTURE_RMS, MIXTURE_DB = 0.07, 3.0  # of each song of an item without stems
TRIES = 20


def stem_class(name):
    """The class of a stem by its name, the first that fits."""
    return next(
        one
        for one, patterns in STEM_CLASSES.items()
        if any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
    )


def sum_by_class(stems):
    """Class -> sum of its stems, of name -> samples.

    Example
    -------
    >>> sum_by_class({"horns": 1, "clav": 1, "bass_pad": 1})
    {'other': 2, 'bass': 1}
    """
    classes = defaultdict(int)
    for name, sig in stems.items():
        classes[stem_class(name)] += sig
    return dict(classes)


def read_stems(song, start, seconds, sample_rate):
    """Track of a song -> a part of it, [2, time], with zeros past its end."""
    what = start, seconds, sample_rate
    return {
        name: sum(read_segment(path, *what, channel="both") for path in paths)
        for name, paths in song.tracks.items()
    }


@functools.lru_cache
def _octaves(num_samples, sample_rate):
    """Place of each bin of a real FFT on the logarithmic axis of points."""
    frequency = scipy.fft.rfftfreq(num_samples, 1 / sample_rate)
    low, high = np.log2(30.0), np.log2(sample_rate / 2 + 30)
    place = (np.log2(frequency + 30) - low) / (high - low)
    return place.clip(0, 1) * (EQUALISER_POINTS - 1)


def equalise(sig, rng, sample_rate):
    """A smooth random change of colour [channels, time], within 6 dB."""
    spectrum = scipy.fft.rfft(sig, axis=-1)
    gains = rng.uniform(-EQUALISER_DB, EQUALISER_DB, EQUALISER_POINTS)
    gains = np.interp(
        _octaves(sig.shape[-1], sample_rate), np.arange(len(gains)), gains
    )
    spectrum *= 10 ** (gains / 20).astype(np.float32)
    return scipy.fft.irfft(spectrum, n=sig.shape[-1], axis=-1)


def place(sig, rng):
    """Another width [2, time], from mono to 1.6 times as wide, and balance."""
    width = rng.uniform(0, MAX_WIDTH)
    balance = db(rng.uniform(-BALANCE_DB, BALANCE_DB) / 2)
    near, far = np.float32(0.5 + width / 2), np.float32(0.5 - width / 2)
    matrix = np.array([[near, far], [far, near]])
    return (matrix * np.array([[balance], [1 / balance]])) @ sig


def pan(sig, rng):
    """One place of its own [2, time], by level and delay of a channel."""
    mid = sig.mean(0)
    difference = db(rng.uniform(-PAN_DB, PAN_DB))
    # at the same power, whatever the place
    left = np.sqrt(2 / (1 + difference**2))
    delay = int(rng.integers(-PAN_DELAY, PAN_DELAY + 1))
    panned = np.zeros_like(sig)
    panned[0, max(delay, 0) :] = left * mid[: len(mid) - max(delay, 0)]
    panned[1, max(-delay, 0) :] = mid[: len(mid) - max(-delay, 0)]
    panned[1] *= left * difference
    return panned


def play_at(sig, ratio, num_samples):
    """Plays a signal faster or slower, by linear interpolation.

    From [channels, time] of at least ``num_samples * ratio + 2`` samples.
    """
    if ratio == 1.0:
        return sig[:, :num_samples]
    place = np.arange(num_samples) * ratio
    first = place.astype(np.int64)
    share = (place - first).astype(sig.dtype)
    return sig[:, first] * (1 - share) + sig[:, first + 1] * share


def energy(sig):
    """Mean square of all samples, from every 16th."""
    return float(np.square(sig[..., ::16]).mean())


def db(value):
    """Decibels as a factor of amplitudes."""
    return np.float32(10 ** (value / 20))


class RemixedItems(torch.utils.data.Dataset):
    """Items of named stems, and items of two songs without stems.

    An item depends on seed, epoch and its number alone. A file that cannot be
    read is left out from then on, and named in `skipped`.

    Arguments
    ---------
    songs : list of Song
        Those with stems, whose tracks are classes (see ``Music.songs`` with
        `stem_groups`), make named items; of one class alone they take the place
        of that class in items of others. Those without make items of two.
    classes : sequence of str
        Names of the classes; tracks of other names are left out.
    mixture_share : float
        Share of items that are two songs without stems, in [0, 1]; all or none
        where there are no songs of the other kind.
    absent : dict, optional
        What songs without stems lack: pattern of their names, which are paths
        below the folder (* any text, ? any letter, case ignored) -> list of
        classes.
    num_items : int
        Length of an epoch.
    sample_rate : int
        In Hz.
    segment_seconds : float
        Length of an item in seconds.
    seed : int
        Of all choices.

    Raises
    ------
    ValueError
        If there are too few songs for an item, a share is out of range, or
        `absent` has other classes.
    """

    def __init__(
        self,
        songs,
        classes=tuple(STEM_CLASSES),
        mixture_share=0.25,
        absent=None,
        num_items=8000,
        sample_rate=44100,
        segment_seconds=3.0,
        seed=0,
    ):
        self.classes, self.absent = list(classes), absent or {}
        self.num_items, self.sample_rate = num_items, sample_rate
        self.num_samples, self.seed = round(segment_seconds * sample_rate), seed
        if not 0 <= mixture_share <= 1:
            raise ValueError(
                f"mixture_share: expected 0 to 1, got {mixture_share}"
            )
        if not {x for each in self.absent.values() for x in each} <= {*classes}:
            raise ValueError(
                "absent: expected {pattern: [class, ...]} with classes of "
                f"{', '.join(classes)}, got {absent}"
            )
        self.mixtures = [song for song in songs if not song.has_stems]
        named = [song for song in songs if song.has_stems]
        if not named or not self.mixtures:
            mixture_share = float(not named)
        self.mixture_share = mixture_share
        self.pieces, self.solos = [], {name: [] for name in classes}
        for song in named:
            known = [name for name in classes if name in song.tracks]
            if len(known) > 1:
                self.pieces.append(song)
            elif known:
                self.solos[known[0]].append(song)
        self.sources = {
            name: [song for song in self.pieces if name in song.tracks]
            for name in classes
        }
        if mixture_share < 1 and not self.pieces:
            raise ValueError(
                f"data_folder: expected songs of {segment_seconds} s with "
                f"stems of two of {', '.join(classes)} or more, got none"
            )
        if mixture_share > 0 and len(self.mixtures) < 2:
            raise ValueError(
                "mixtures_folder (or data_folder with dataset: mixtures): "
                f"expected two songs of {segment_seconds} s or more for a "
                f"mixture_share of {mixture_share}, got {len(self.mixtures)}"
            )
        self.skipped = {}
        self.epoch = 0

    def lacking(self, song):
        """The classes that a song without stems is known to lack."""
        return {
            name
            for pattern, names in self.absent.items()
            if fnmatchcase(song.name.lower(), pattern.lower())
            for name in names
        }

    def set_epoch(self, epoch):
        """Other items from here on; call it before the workers start."""
        self.epoch = epoch

    def __len__(self):
        return self.num_items

    def __getitem__(self, number):
        """Stems [classes, 2, time], whether they are named, and absent classes.

        Without names, stems are two songs and silence, absent what both lack.
        """
        rng = np.random.default_rng((self.seed, self.epoch, number))
        named = rng.random() >= self.mixture_share
        stems, lacking = (
            (self._named(rng), ()) if named else self._two_songs(rng)
        )
        if rng.random() < 0.5:
            stems = stems[:, ::-1]  # left and right
        if rng.random() < MONO_SHARE:
            level = energy(stems.sum(0))
            stems = stems.mean(1, keepdims=True).repeat(2, axis=1)
            stems *= np.sqrt(level / max(energy(stems.sum(0)), level / 10))
        absent = torch.tensor([name in lacking for name in self.classes])
        return torch.from_numpy(np.ascontiguousarray(stems)), named, absent

    def _read(self, song, rng, names=None):
        """Tracks of a song: name -> [2, time], None where it is unreadable."""
        ratio = 1.0
        limit = MAX_PITCH if len(song.tracks) > 1 else MAX_SOLO_PITCH
        if rng.random() < PITCH_SHARE:
            ratio = 2 ** (rng.uniform(-limit, limit) / 12)
        count = int(self.num_samples * ratio) + 2
        last = max(0.0, song.seconds - count / self.sample_rate)
        start = rng.uniform(0, last)
        tracks = {}
        what = start, count / self.sample_rate, self.sample_rate
        for name, paths in song.tracks.items():
            if names is not None and name not in names:
                continue
            if self.skipped.keys() & set(paths):
                return None
            for path in paths:
                try:
                    sig = read_segment(path, *what, channel="both").numpy()
                except UnreadableAudio as error:
                    self.skipped[path] = str(error)
                    message = f"left out from now on: {error}"
                    logger.warning(message, main_process_only=False)
                    return None
                sig = play_at(sig, ratio, self.num_samples)
                tracks[name] = tracks[name] + sig if name in tracks else sig
        return tracks

    def _draw(self, songs, rng, names=None, least=1):
        """Tracks of a drawn song of which at least so many sound."""
        for _ in range(TRIES):
            song = songs[int(rng.integers(len(songs)))]
            tracks = self._read(song, rng, names)
            if tracks and (
                sum(energy(sig) > SILENT_ENERGY for sig in tracks.values())
                >= least
            ):
                return tracks
        return {}

    def _named(self, rng):
        """[classes, 2, time], at the level of ITEM_RMS in sum."""
        for _ in range(TRIES):
            stems = self._mix(rng)
            rms = np.sqrt(energy(stems.sum(0)))
            if rms > 1e-4:
                return stems * np.float32(ITEM_RMS / rms)
        raise UnreadableAudio(
            "no sound found in the songs with stems, "
            + "; ".join(self.skipped.values())
        )

    def _mix(self, rng):
        """[classes, 2, time] of one song or several."""
        stems = np.zeros((len(self.classes), 2, self.num_samples), np.float32)
        tracks = self._draw(self.pieces, rng, self.classes, least=2)
        several = rng.random() < MIX_SHARE
        for stem, name in zip(stems, self.classes):
            sig, gain = tracks.get(name), 1.0
            if several and self.sources[name]:
                # at the level that the class has in the song, so that
                # balances and rests stay those of music
                level = 0.0 if sig is None else energy(sig)
                other = self._draw(self.sources[name], rng, (name,)).get(name)
                if other is not None:
                    sig, gain = other, np.sqrt((level + 1e-6) / energy(other))
                    gain = np.clip(gain, 1 / MAX_GAIN, MAX_GAIN)
            if sig is not None:
                stem[:] = self._coloured(sig, rng) * np.float32(gain)
        for stem, name in zip(stems, self.classes):
            solos = self.solos[name]
            share = SOLO_SHARE * min(1.0, len(solos) / ENOUGH_SOLOS)
            if rng.random() < share:
                sig = self._draw(solos, rng, (name,)).get(name)
                level = energy(stems.sum(0) - stem)
                if sig is not None and level > SILENT_ENERGY:
                    gain = np.sqrt(level / energy(sig)) * db(
                        rng.uniform(*SOLO_DB)
                    )
                    stem[:] = self._coloured(sig, rng) * np.float32(gain)
        if rng.random() < PANNED_SHARE:
            for stem in stems:
                stem[:] = pan(stem, rng)
        if rng.random() < MISSING_SHARE:
            stems[int(rng.integers(len(stems)))] = 0
        gains = rng.uniform(-LEVEL_DB, LEVEL_DB, (len(stems), 1, 1))
        return stems * 10 ** (gains / 20).astype(np.float32)

    def _coloured(self, sig, rng):
        if rng.random() < EQUALISER_SHARE:
            sig = equalise(sig, rng, self.sample_rate)
        if rng.random() < WIDTH_SHARE:
            sig = place(sig, rng)
        return sig

    def _two_songs(self, rng):
        """Two songs in the place of the first two classes; what both lack."""
        stems = np.zeros((len(self.classes), 2, self.num_samples), np.float32)
        used = set()
        for _ in range(TRIES):
            index = int(rng.integers(len(self.mixtures)))
            tracks = self._read(self.mixtures[index], rng)
            sig = sum(tracks.values()) if tracks else stems[0]
            rms = np.sqrt(energy(sig))
            if index in used or rms**2 < SOFT_ENERGY:
                continue
            level = MIXTURE_RMS * db(rng.uniform(-MIXTURE_DB, MIXTURE_DB))
            stems[len(used)] = sig * np.float32(level / rms)
            used.add(index)
            if len(used) == 2:
                lacking = [self.lacking(self.mixtures[k]) for k in used]
                return stems, set.intersection(*lacking)
        raise UnreadableAudio(
            "no two songs with sound found, " + "; ".join(self.skipped.values())
        )


class NamedWindows(torch.utils.data.Dataset):
    """Windows of songs with stems, to measure named stems on.

    `songs` is group -> list of Song. Windows of `seconds` are evenly spread, at
    most `per_song` in a song; of all, every `world_size`-th is read here.
    """

    def __init__(
        self,
        songs,
        sample_rate=44100,
        seconds=3.0,
        per_song=None,
        rank=0,
        world_size=1,
    ):
        self.sample_rate, self.seconds = sample_rate, seconds
        self.windows = []
        for group, part in songs.items():
            for song in part:
                count = int(song.seconds // seconds)
                kept = min(count, per_song or count)
                self.windows += [
                    (song, group, int((k + 0.5) * count / kept) * seconds)
                    for k in range(kept)
                ]
        self.windows = self.windows[rank::world_size]

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, number):
        """Class -> [2, time], at an RMS of 0.1 in sum; and the group."""
        song, group, start = self.windows[number]
        stems = read_stems(song, start, self.seconds, self.sample_rate)
        rms = sum(stems.values()).square().mean().sqrt()
        gain = ITEM_RMS / rms.clamp(min=1e-4)
        return {name: gain * sig for name, sig in stems.items()}, group
