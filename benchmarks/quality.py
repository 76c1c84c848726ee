"""How well named stems come out of songs: models beside what needs no training.

    python benchmarks/quality.py MODEL|METHOD [...] --data FOLDER [...]

Songs are folders of stems, separated in windows of 3 s. A MODEL is a folder or
an id on the hub. A METHOD is

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

All are masks on an STFT, that of a METHOD of 2048 samples with hop 1024.
Measures are those of `trackformer evaluate` (trackformer_sb.evaluation), and
song_si_snri: SI-SNRi of whole songs, the windows put together again.

Hydrogen and Resonate_house are for choices; the other songs of
../shared/data/stems are looked at once for each model that is released.
"""

import argparse
import csv
import fnmatch
import pathlib
from collections import defaultdict

import torch
from common import Record, say
from scipy.ndimage import median_filter

from trackformer_sb import evaluation
from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import STEM_CLASSES, stem_class, sum_by_class
from trackformer_sb.evaluation import MASKS, averages, measure_song
from trackformer_sb.inference.separation import separate_by_both
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
from trackformer_sb.objectives.named import named_si_snri, pair_by_class
from trackformer_sb.training.grid_tables import markdown

CLASSES = tuple(STEM_CLASSES)
MEASURES = (*evaluation.MEASURES, "song_si_snri")
COLUMNS = ("model", "masks", "class", "windows", *MEASURES)


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


def by_method(masks_of):
    """The ``separate_window`` of ``measure_song`` for a method of ``METHODS``.

    ``masks_of`` takes the spectrum of the mixture, complex [channels, freq,
    frames], and a dict of those of the true stems, for the two ideal ones; it
    gives masks [slots, freq, frames] and the class of each slot, None without
    names.
    """
    encoder, decoder = STFTEncoder(2048, 1024), STFTDecoder(2048, 1024)

    def separate_window(mix, stems):
        spectrum = encoder(mix)
        true = {name: encoder(sig) for name, sig in stems.items()}
        masks, classes = masks_of(spectrum, true)
        masks = masks.unsqueeze(1)
        how = encoder, lambda mix_w: masks, decoder
        return separate_by_both(mix, *how), classes

    return separate_window


def load_method(name):
    """``separate_window`` and rate of a method, or of a model."""
    if name in METHODS:
        return by_method(METHODS[name]), 44100
    return evaluation.load_evaluated(name)


# -- whole songs


class WholeSong:
    """Passes windows on to a ``separate_window``, and keeps what is named."""

    def __init__(self, separate_window):
        self.separate_window, self.signals = separate_window, defaultdict(list)

    def __call__(self, mix, stems):
        kinds, classes = self.separate_window(mix, stems)
        by_class = sum_by_class(stems)
        if classes and len(by_class) > 1:
            for masks, slots in zip(MASKS, kinds):
                self.names, *pair = pair_by_class(slots, classes, by_class)
                mono = [sig.mean(1) for sig in pair]
                self.signals[masks].append((*mono, mix.mean(0)))
        return kinds, classes

    def measures(self):
        """Yields masks, class, measure and value, as ``measure_song``."""
        for masks, signals in self.signals.items():
            whole = [torch.cat(sig, -1) for sig in zip(*signals)]
            for name, value in zip(self.names, named_si_snri(*whole).tolist()):
                if value == value:
                    yield masks, name, "song_si_snri", value


# -- the record


def main():
    """Measures, and writes a record (markdown) and all its rows (csv)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="+", metavar="MODEL|METHOD")
    parser.add_argument("--data", nargs="+", type=pathlib.Path, required=True)
    parser.add_argument("--songs", nargs="+", default=["*"], help="patterns")
    parser.add_argument("--seconds", type=float, default=3.0, help="a window")
    parser.add_argument("--out", default="quality", help="name of the record")
    args = parser.parse_args()
    torch.set_num_threads(1)
    output = pathlib.Path("benchmarks/results/quality") / f"{args.out}.md"
    how = f"{__doc__}\n{evaluation.__doc__}"
    record = Record("Quality of named stems", how, output, "cpu")
    methods = {name: load_method(name) for name in args.methods}
    found, rows, blocks = defaultdict(list), [], []
    for folder in args.data:
        songs = [
            song
            for song in Music(folder, "stems").songs(args.seconds)
            if any(fnmatch.fnmatch(song.name, name) for name in args.songs)
        ]
        found.clear()
        for song in songs:
            for path, (separate_window, sample_rate) in methods.items():
                name = pathlib.Path(path).name
                whole = WholeSong(separate_window)
                values = measure_song(whole, sample_rate, song, args.seconds)
                values += whole.measures()
                found[name] += values
                rows += [
                    [folder.name, song.name, name, *row]
                    for row in averages(values, MEASURES)
                ]
                say(song.name, name)
        lines = [
            [name, *row]
            for name, values in found.items()
            for row in averages(values, MEASURES)
        ]
        blocks.append(f"## {folder.name}: {len(songs)} songs")
        blocks.append(markdown(COLUMNS, lines))
    columns = ["folder", "song", *COLUMNS]
    with open(output.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    record.write(*blocks, "## By song and class", markdown(columns, rows))
    say(*blocks, sep="\n\n")
    say(f"wrote {output}")


if __name__ == "__main__":
    main()
