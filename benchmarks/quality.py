"""How well named stems come out of songs: models beside what needs no training.

    python benchmarks/quality.py MODEL|METHOD [...] --data FOLDER [...]

Songs are folders of stems (drums*, perc*, bass*, vocal*; all else is "other"),
whose sum is separated in windows of 3 s, one by one; what is left at the end of
a song is dropped. A MODEL is a folder or an id on the hub. A METHOD is

- mixture: a quarter of the mixture as each stem, 0 dB by definition;
- bands: the mixture in 8 bands of frequency, equally wide in mel;
- octaves: below 100 Hz, six octaves from there, and the rest;
- hpss: the percussive part as drums, the harmonic one as "other", by medians
  of the spectrogram over frequency and time (Fitzgerald, DAFx 2010);
- nmf: 8 components of a non-negative factorisation of the magnitudes, with 200
  multiplicative updates for the Kullback-Leibler divergence;
- static: the ideal filter that does not change within a window, by least
  squares from the true stems;
- irm: ideal ratio masks |S_i| / sum_j |S_j| of the true stems.

All are masks on an STFT, that of a METHOD of 2048 samples with hop 1024. Each
is measured twice, the second time with its masks averaged over the window,
weighted by the power of the mixture: what is lost is what it gains by following
the music. The measures, in dB:

- SI-SNRi: improvement of SI-SNR over the mixture, each output against the stem
  of its own class, nothing chosen; the mean of the windows in which the stem
  has between 0.1 % and 98 % of the mixture's energy. For whole songs the
  windows are put together again. Stereo is averaged to mono;
- SDR: as museval has it (BSSEval v4, images), |s|^2 / |s - s'|^2 of stereo in
  windows of 1 s, without those in which a stem or an output is digital
  silence; the median of a song, and of the songs;
- leakage: how far the output is below the mixture in windows where the true
  stem is silent (below -60 dB of it), the median; higher is better;
- oracle: SI-SNRi with outputs chosen for the single stems by the truth, one to
  one and grouped (metrics.si_snri and si_snri_grouped), the mean of windows.

Where a song has no stem for the bass, bass and "other" of the outputs are
compared with "other" together. Methods without names and songs of one class
have the oracles only. With --spatial on, the named stems of models are told
apart by their places too (inference.spatial.wiener). Seconds are of one
processor core, for a minute of music. Hydrogen and Resonate_house are for
choices; the other songs of ../shared/data/stems are looked at once for each
model that is released.
"""

import argparse
import csv
import fnmatch
import math
import pathlib
import statistics
import time
from collections import defaultdict
from fnmatch import fnmatchcase

import soundfile
import torch
from common import Record, say, table
from scipy.ndimage import median_filter
from torchaudio.functional import resample

from trackformer_sb.data.remix import STEM_CLASSES
from trackformer_sb.inference.separator import Separator
from trackformer_sb.inference.spatial import wiener
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
from trackformer_sb.objectives import metrics
from trackformer_sb.objectives.named import (
    decode_masks,
    leakage,
    named_si_snri,
    pair_by_class,
    time_averaged_masks,
)

CLASSES = tuple(STEM_CLASSES)
EXTENSIONS = (".wav", ".flac", ".ogg")
NOT_A_STEM = ("mix", "mixture")
MASKS = ("as they are", "averaged")
NAMED = {
    "si_snri": "SI-SNRi of windows: mean of windows",
    "song_si_snri": "SI-SNRi of whole songs: mean of songs",
    "sdr": "SDR: median of songs",
    "leakage": "Leakage, dB below the mixture: median of songs",
}
SINGLE = ("one_to_one", "grouped", "seconds_per_minute")


# -- songs


def read_stems(folder, sample_rate):
    """Reads the stems of a song, mono ones as stereo if any is stereo.

    Arguments
    ---------
    folder : str or Path
        Of the song; files other than audio are left out, and so is a file
        of the mixture.
    sample_rate : int
        Wanted rate, in Hz.

    Returns
    -------
    dict
        File name without extension -> [channels, time], as long as the
        shortest stem.

    Raises
    ------
    ValueError
        If there is no stem.
    """
    stems = {}
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix.lower() not in EXTENSIONS or path.stem in NOT_A_STEM:
            continue
        sig, rate = soundfile.read(path, dtype="float32", always_2d=True)
        stems[path.stem] = resample(torch.from_numpy(sig.T), rate, sample_rate)
    if not stems:
        raise ValueError(f"{folder}: expected stems as wav, flac or ogg files")
    channels = max(len(sig) for sig in stems.values())
    length = min(sig.shape[-1] for sig in stems.values())
    return {
        name: sig[:, :length].expand(channels, -1)
        for name, sig in stems.items()
    }


def sum_by_class(stems):
    """Adds the stems of each class.

    Arguments
    ---------
    stems : dict
        Name -> [channels, time].

    Returns
    -------
    dict
        Class -> [channels, time]; no class without a stem.

    Example
    -------
    >>> one = torch.ones(2, 3)
    >>> stems = sum_by_class({"horns": one, "clav": one, "bass_pad": one})
    >>> {name: float(sig[0, 0]) for name, sig in stems.items()}
    {'bass': 1.0, 'other': 2.0}
    """
    classes = {name: stem_class(name) for name in stems}
    return {
        one: sum(sig for name, sig in stems.items() if classes[name] == one)
        for one in CLASSES
        if one in classes.values()
    }


def windows(stems, length):
    """Cuts a song into windows; what is left at the end is dropped.

    Arguments
    ---------
    stems : dict
        Name -> [channels, time].
    length : int
        Of a window, in samples.

    Yields
    ------
    dict
        Name -> [channels, length].

    Example
    -------
    >>> [w["a"].tolist() for w in windows({"a": torch.arange(5)[None]}, 2)]
    [[[0, 1]], [[2, 3]]]
    """
    time = next(iter(stems.values())).shape[-1]
    for first in range(0, time - length + 1, length):
        yield {
            name: sig[:, first : first + length] for name, sig in stems.items()
        }


# -- methods: (spectrum of the mixture, those of the stems) -> masks, classes


def mixture_masks(spectrum, stems):
    """A quarter of the mixture for each class."""
    return torch.full((4, *spectrum.shape[1:]), 0.25), CLASSES


def band_masks(spectrum, stems, number=8, nyquist=22050):
    """Bands that are equally wide in mel (HTK's formula)."""
    hertz = torch.linspace(0, nyquist, spectrum.shape[1])
    mel = (1 + hertz / 700).log()
    band = (number * mel / mel[-1]).long().clamp(max=number - 1)
    masks = torch.nn.functional.one_hot(band, number).T.float()
    return masks.unsqueeze(-1).expand(-1, -1, spectrum.shape[2]), None


def octave_masks(spectrum, stems, lowest=100, number=8, nyquist=22050):
    """Octaves, which split the bass more finely than mel does."""
    hertz = torch.linspace(0, nyquist, spectrum.shape[1])
    edges = lowest * 2.0 ** torch.arange(number - 1)
    band = torch.bucketize(hertz, edges)
    masks = torch.nn.functional.one_hot(band, number).T.float()
    return masks.unsqueeze(-1).expand(-1, -1, spectrum.shape[2]), None


def hpss_masks(spectrum, stems, size=17):
    """Soft masks of what lasts in time and of what is wide in frequency."""
    magnitude = spectrum.abs().mean(0).numpy()
    harmonic, percussive = (
        torch.from_numpy(median_filter(magnitude, shape)).square()
        for shape in ((1, size), (size, 1))
    )
    drums = percussive / (harmonic + percussive).clamp(min=1e-20)
    return torch.stack([drums, 1 - drums]), ("drums", "other")


def nmf_masks(spectrum, stems, number=8, updates=200):
    """Shares of the components of a factorisation ("NMF", Lee and Seung)."""
    magnitude = spectrum.abs().mean(0) + 1e-8
    generator = torch.Generator().manual_seed(0)
    freq, frames = magnitude.shape
    w = torch.rand(freq, number, generator=generator) + 0.1
    h = torch.rand(number, frames, generator=generator) + 0.1
    h *= magnitude.mean() / (w @ h).mean()
    for _ in range(updates):
        h *= w.T @ (magnitude / (w @ h)) / w.sum(0)[:, None]
        w *= (magnitude / (w @ h)) @ h.T / h.sum(1)
        w, h = w.clamp(min=1e-10), h.clamp(min=1e-10)
    return w.T.unsqueeze(-1) * h.unsqueeze(1) / (w @ h), None


def stem_class(name):
    """The class of a stem by its name, the first that fits; or None."""
    for one, patterns in STEM_CLASSES.items():
        if any(fnmatchcase(name.lower(), pattern) for pattern in patterns):
            return one
    return None


def static_masks(spectrum, stems):
    """Gain of each bin by least squares, constant in time."""
    sig = torch.stack(list(stems.values()))
    cross = (sig * spectrum.conj()).real.sum((1, 3))
    gain = cross / spectrum.abs().square().sum((0, 2)).clamp(min=1e-20)
    masks = gain.unsqueeze(-1).expand(-1, -1, spectrum.shape[2])
    return masks, [stem_class(name) for name in stems]


def ratio_masks(spectrum, stems):
    """Magnitude of each stem as a share of those of all."""
    magnitude = torch.stack(list(stems.values())).abs().mean(1)
    masks = magnitude / magnitude.sum(0).clamp(min=1e-10)
    return masks, [stem_class(name) for name in stems]


METHODS = {
    "mixture": mixture_masks,
    "bands": band_masks,
    "octaves": octave_masks,
    "hpss": hpss_masks,
    "nmf": nmf_masks,
    "static": static_masks,
    "irm": ratio_masks,
}


class Method:
    """Separation by masks on an STFT.

    Arguments
    ---------
    masks : callable
        Spectrum of the mixture, complex [channels, freq, frames], and dict of
        those of the true stems, for the two ideal ones -> masks [slots,
        freq, frames] and class of each slot, None without names.
    encoder, decoder : callable
        [batch, time] -> complex [batch, freq, frames], and back.
    sample_rate : int
        In Hz.
    spatial : bool
        Whether channels are separated by ``wiener``.
    """

    def __init__(
        self, masks, encoder, decoder, sample_rate=44100, spatial=False
    ):
        self.masks, self.encoder, self.decoder = masks, encoder, decoder
        self.sample_rate, self.spatial = sample_rate, spatial

    def __call__(self, mix, stems):
        """mix [channels, time] -> dict of slots, masks, classes, spectrum."""
        spectrum = self.encoder(mix)
        if self.masks in (static_masks, ratio_masks):
            true = {name: self.encoder(sig) for name, sig in stems.items()}
        else:
            true = None
        masks, classes = self.masks(spectrum, true)
        slots = self.decode(masks, spectrum, mix.shape[-1])
        return {
            "slots": slots,
            "masks": masks,
            "classes": classes,
            "spectrum": spectrum,
        }

    def decode(self, masks, spectrum, length):
        """masks [slots, freq, frames] -> slots [slots, channels, time]."""
        if not self.spatial:
            return decode_masks(masks, spectrum, self.decoder, length)
        separated = wiener(masks.unsqueeze(1), spectrum.unsqueeze(0))[:, 0]
        sig = self.decoder(separated.flatten(0, 1))[:, :length]
        return sig.unflatten(0, separated.shape[:2])


def load_method(name, spatial=False):
    """A method by its name, or the model of a folder or of the hub.

    With ``spatial`` a model's named stems are filtered by their places.
    """
    if name in METHODS:
        stft = STFTEncoder(2048, 1024), STFTDecoder(2048, 1024)
        return Method(METHODS[name], *stft)
    model = Separator.from_pretrained(name)
    classes, spatial = None, spatial and model.groups is not None
    if spatial:
        classes = list(model.groups)
    elif model.groups is not None:
        classes = [name for name in model.groups for _ in model.groups[name]]

    def masks(spectrum, stems):
        if not getattr(model.masknet, "stereo", False):
            spectrum = spectrum.mean(0, keepdim=True)
        else:
            spectrum = spectrum.unsqueeze(0)
        masks = model.masknet(spectrum)[:, 0]
        if model.mixture_consistency:
            masks = masks + (1 - masks.sum(0)) / len(masks)
        if spatial:
            masks = masks.unflatten(0, (len(classes), -1)).sum(1)
        return masks, classes

    method = Method(
        masks, model.encoder, model.decoder, model.sample_rate, spatial
    )
    method.masknet = model.masknet
    return method


# -- measures


def window_sdr(est_stems, stems, length):
    """SDR of BSSEval v4 (images) in windows.

    Its parts for spatial distortion, interference and artefacts sum to the
    whole error, so that the 512 taps of its filters do not matter.

    Arguments
    ---------
    est_stems, stems : torch.Tensor
        [classes, channels, time].
    length : int
        Of a window, in samples.

    Returns
    -------
    torch.Tensor
        [classes, windows], in dB; NaN where any is digital silence.
    """
    est_stems, stems = (
        sig.unfold(-1, length, length).double() for sig in (est_stems, stems)
    )
    energy, est_energy, error = (
        sig.square().sum((1, 3))
        for sig in (stems, est_stems, est_stems - stems)
    )
    silent = (energy == 0).any(0) | (est_energy == 0).any(0)
    ratio = 10 * (energy / error).log10()
    return torch.where(silent, torch.nan, ratio)


def measure_window(slots, slot_classes, files, stems, rate, found):
    """Appends the measures of a window; returns the classes of the slots."""
    single = torch.stack([sig.mean(0) for sig in files.values()])
    mix = single.sum(0)
    for key, measure in (
        ("one_to_one", metrics.si_snri),
        ("grouped", metrics.si_snri_grouped),
    ):
        found[key].append(measure(slots.mean(1), single, mix)[0])
    if slot_classes is None or len(stems) < 2:
        return []
    names, est_stems, true = pair_by_class(slots, slot_classes, stems)
    mono = est_stems.mean(1), true.mean(1), mix
    found["si_snri"].append(named_si_snri(*mono))
    found["leakage"].append(leakage(*mono))
    found["signals"].append(mono)
    there = [i for i, name in enumerate(names) if name in stems]
    sdr = torch.full((len(names), slots.shape[-1] // rate), torch.nan)
    sdr[there] = window_sdr(est_stems[there], true[there], rate).float()
    found["sdr"].append(sdr)
    return names


def mean(values):
    """Mean of the values that there are, NaN if there are none."""
    values = [v for v in values if v is not None and not math.isnan(v)]
    return statistics.fmean(values) if values else math.nan


def median(values):
    """Median of the values that are no NaN."""
    return statistics.median([v for v in values if v == v] or [math.nan])


@torch.no_grad()
def measure_song(method, song, seconds):
    """Rows of a song: its classes, and "all" with what has no class.

    Arguments
    ---------
    method : Method
        Separates.
    song : dict
        Stem -> [channels, time].
    seconds : float
        Length of a window.

    Returns
    -------
    list of dict
        For either kind of masks.
    """
    rate, clock, number = method.sample_rate, 0.0, 0
    kinds = {kind: defaultdict(list) for kind in MASKS}
    for files in windows(song, round(seconds * rate)):
        stems, mix = sum_by_class(files), sum(files.values())
        start = time.process_time()
        out = method(mix, files)
        clock, number = clock + time.process_time() - start, number + 1
        power = out["spectrum"].abs().square().mean(0)
        masks = time_averaged_masks(out["masks"], power)
        averaged = method.decode(masks, out["spectrum"], mix.shape[-1])
        for found, slots in zip(kinds.values(), (out["slots"], averaged)):
            names = measure_window(
                slots, out["classes"], files, stems, rate, found
            )
    rows = []
    for kind, found in kinds.items():
        row = {"masks": kind, "class": "all", "windows": number}
        row |= {key: mean(found[key]) for key in SINGLE[:2]}
        row["seconds_per_minute"] = 60 * clock / (number * seconds)
        rows.append(row)
        if not found["signals"]:
            continue
        whole = [torch.cat(sig, -1) for sig in zip(*found["signals"])]
        each = zip(
            names,
            torch.stack(found["si_snri"], 1).tolist(),
            named_si_snri(*whole).tolist(),
            torch.cat(found["sdr"], 1).tolist(),
            torch.stack(found["leakage"], 1).tolist(),
        )
        for name, si_snri, song_si_snri, sdr, below in each:
            row = {"masks": kind, "class": name, "windows": number}
            row["counted"] = sum(value == value for value in si_snri)
            row |= {"si_snri": mean(si_snri), "song_si_snri": song_si_snri}
            row |= {"sdr": median(sdr), "leakage": median(below)}
            rows.append(row)
    return rows


# -- the record


def shown(value):
    """A number of dB, a word, or a dash."""
    if isinstance(value, float):
        # plus zero: no "-0.00"
        return "-" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"
    return value


def average(rows, key):
    """Of rows over songs, as ``NAMED`` says it."""
    if key in ("sdr", "leakage"):
        return median([row[key] for row in rows])
    if key == "song_si_snri":
        return mean([row[key] for row in rows])
    weight = "counted" if key == "si_snri" else "windows"
    # "* 0" of a NaN is a NaN
    some = [row for row in rows if row[weight] and row[key] == row[key]]
    total = sum(row[weight] for row in some)
    return sum(r[key] * r[weight] for r in some) / total if total else math.nan


def summary(rows, folder):
    """Tables of the averages of a folder."""
    rows = [row for row in rows if row["folder"] == folder]
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["method"], row["masks"]][row["class"]].append(row)
    blocks = [f"## {folder}: {len({row['song'] for row in rows})} songs"]
    for key, title in NAMED.items():
        lines = []
        for group, classes in groups.items():
            values = [average(classes[name], key) for name in CLASSES]
            if not math.isnan(mean(values)):
                values.append(mean(values))
                lines.append([*group, *map(shown, values)])
        header = ["method", "masks", *CLASSES, "mean of classes"]
        blocks += [f"{title}.", table(header, lines)] if lines else []
    lines = [
        [*group, *(shown(average(classes["all"], key)) for key in SINGLE)]
        for group, classes in groups.items()
    ]
    header = ["method", "masks", "one-to-one", "grouped", "seconds"]
    blocks += ["Oracles, and seconds.", table(header, lines)]
    return blocks


def main():
    """Measures, and writes a record (markdown) and all its rows (csv)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="+", metavar="MODEL|METHOD")
    parser.add_argument("--data", nargs="+", type=pathlib.Path, required=True)
    parser.add_argument("--songs", nargs="+", default=["*"], help="patterns")
    parser.add_argument("--seconds", type=float, default=3.0, help="a window")
    parser.add_argument(
        "--spatial",
        choices=("on", "off"),
        default="off",
        help="the spatial filter of models (default: %(default)s)",
    )
    parser.add_argument("--out", default="quality", help="name of the record")
    args = parser.parse_args()
    torch.set_num_threads(1)
    output = pathlib.Path("benchmarks/results/quality") / f"{args.out}.md"
    record = Record("Quality of named stems", __doc__, output, "cpu")
    songs = [
        (folder, path)
        for folder in args.data
        for path in sorted(folder.iterdir())
        if path.is_dir()
        and any(fnmatch.fnmatch(path.name, name) for name in args.songs)
    ]
    methods = {
        name: load_method(name, args.spatial == "on") for name in args.methods
    }
    rows = []
    for folder, path in songs:
        for name, method in methods.items():
            song = read_stems(path, method.sample_rate)
            labels = {"folder": folder.name, "song": path.name}
            labels["method"] = pathlib.Path(name).name
            rows += [
                {**labels, **row}
                for row in measure_song(method, song, args.seconds)
            ]
            say(path.name, name, f"{rows[-1]['windows']} windows")
    keys = ["folder", "song", "method", "masks", "class", "windows", "counted"]
    keys += [*NAMED, *SINGLE]
    with open(output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, keys, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    key: value if value == value else ""
                    for key, value in row.items()
                }
            )
    blocks = [
        block
        for folder in dict.fromkeys(row["folder"] for row in rows)
        for block in summary(rows, folder)
    ]
    lines = [[shown(row.get(key, "")) for key in keys] for row in rows]
    record.write(*blocks, "## By song and class", table(keys, lines))
    say(*blocks, sep="\n\n")
    say(f"wrote {output}")


if __name__ == "__main__":
    main()
