"""What places between the channels add to masks: the filter, the net's inputs.

    python benchmarks/spatial.py MODEL --data FOLDER [...] --songs NAME [...]

Songs are folders of stems as of quality.py, separated in windows of 3 s, of
which every sixth is measured: as they are, and panned, each stem as mono, its
channels 3 to 12 dB and up to 20 samples apart (drawn for each song and stem;
what is delayed is the one or the other channel). Each by four separations:

- inputs: the side and pan features of the net, as they are or zeros. The net
  was trained with them: one that was trained without would do better than this
  one with zeros;
- filter: inference.spatial.wiener, or masks alone, as `trackformer separate`
  does it with --spatial and --no-spatial.

The measures, by class, as of quality.py: SI-SNRi in dB, mean of windows, and
SDR in dB, median of windows of 1 s. Images, of panned stems that are separated
above 6 dB, as improvement (SI-SNRi) or of the output (SI-SNR): the share of
those whose level difference is within 1 dB of the true stem's, and of those
whose time difference, the peak of the cross-correlation of the channels, is
within a sample of it; the largest distance of the sum of all stems from the
mixture, of a full scale of 1.
"""

import argparse
import fnmatch
import itertools
import pathlib
from collections import defaultdict
from statistics import fmean, median

import torch
from common import Record, say, table

from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import read_stems, sum_by_class
from trackformer_sb.evaluation import window_sdr
from trackformer_sb.inference.separator import Separator
from trackformer_sb.objectives.metrics import si_snr
from trackformer_sb.objectives.named import named_si_snri, pair_by_class

SECONDS, EVERY, SEPARATED_DB, MAX_DELAY = 3.0, 6, 6.0, 100


def pan(song, generator):
    """Each stem as mono at a place of its own, [2, time]."""
    panned = {}
    for name, sig in song.items():
        draw = torch.rand(2, generator=generator)
        level = (3 + 9 * draw[0]) * (1 if draw[1] < 0.5 else -1)
        delay = int(torch.randint(-20, 21, (), generator=generator))
        first = sig.mean(0)
        late = torch.cat([first.new_zeros(abs(delay)), first])[: len(first)]
        channels = (late, first) if delay > 0 else (first, late)
        gains = 10 ** (torch.stack([level, -level]) / 40)
        panned[name] = gains.unsqueeze(1) * torch.stack(channels)
    return panned


def image(sig):
    """Level difference in dB, and time difference in samples, of stereo."""
    spectrum = torch.fft.rfft(sig, 2 * sig.shape[-1])
    cross = torch.fft.irfft(spectrum[0] * spectrum[1].conj())
    near = cross.roll(MAX_DELAY)[: 2 * MAX_DELAY + 1]
    left, right = sig.square().sum(1)
    return 10 * (left / right).log10().item(), near.argmax().item() - MAX_DELAY


def without_inputs(masks):
    """A net's ``masks`` with zeros for its side and pan features."""
    return lambda features, memory=None: masks(
        torch.cat([features[:, :3], torch.zeros_like(features[:, 3:])], 1),
        memory,
    )


def measure(separator, spatial, window, panned, found):
    """Appends the measures of a window."""
    stems, mix = sum_by_class(window), sum(window.values())
    out = separator.separate(mix, spatial)
    slots = torch.stack([*out.values()])
    names, est_stems, true = pair_by_class(slots, [*out], stems)
    away = (est_stems.sum(0) - mix).abs().max().item()
    found["sum"].append(away)
    there = [i for i, name in enumerate(names) if name in stems]
    est_stems, true = est_stems[there], true[there]
    mono = est_stems.mean(1), true.mean(1)
    gained = named_si_snri(*mono, mix.mean(0)).tolist()
    found["si_snri"] += [value for value in gained if value == value]
    sdr = window_sdr(est_stems, true, separator.sample_rate).flatten().tolist()
    found["sdr"] += [value for value in sdr if value == value]
    if not panned:
        return
    for i, reached in enumerate(si_snr(*mono).tolist()):
        (level, delay), (true_level, true_delay) = map(
            image, (est_stems[i], true[i])
        )
        right = abs(level - true_level) <= 1, abs(delay - true_delay) <= 1
        for kind, value in (("gained", gained[i]), ("reached", reached)):
            if value > SEPARATED_DB:
                found[kind].append(right)


def shares(found):
    """How many stems, and the shares of right levels and delays."""
    right = [f"{fmean(kind):.2f}" for kind in zip(*found)]
    return f"{len(found)}: " + " / ".join(right or ["-"])


def blocks(found):
    """Tables of all that was found."""
    lines, images = [], defaultdict(list)
    for (name, panned, inputs, spatial), values in found.items():
        kind = "panned" if panned else "as it is"
        how = "on" if inputs else "zeros", "on" if spatial else "off"
        dbs = fmean(values["si_snri"]), median(values["sdr"])
        lines.append([name, kind, *how, *(f"{value:.2f}" for value in dbs)])
        for kind in ("gained", "reached", "sum"):
            images[(*how, kind)] += values[kind] if panned else []
    header = ["song", "material", "inputs", "filter", "SI-SNRi", "SDR"]
    yield "## Separation"
    yield table(header, lines)
    lines = [
        [
            *how,
            *(shares(images[(*how, kind)]) for kind in ("gained", "reached")),
            f"{max(images[(*how, 'sum')]):.1e}",
        ]
        for how in itertools.product(("on", "zeros"), ("on", "off"))
    ]
    yield "## Images of panned stems: number, right levels / right delays"
    header = ["inputs", "filter", "SI-SNRi > 6", "SI-SNR > 6", "sum"]
    yield table(header, lines)


@torch.no_grad()
def main():
    """Measures, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", nargs="+", type=pathlib.Path, required=True)
    parser.add_argument("--songs", nargs="+", default=["*"], help="patterns")
    args = parser.parse_args()
    torch.set_num_threads(1)
    output = pathlib.Path("benchmarks/results/spatial.md")
    record = Record("Places of stems", __doc__, output, "cpu")
    separator = Separator.from_pretrained(args.model)
    rate, masks = separator.sample_rate, separator.masknet.encode
    found = defaultdict(lambda: defaultdict(list))
    for one in (one for x in args.data for one in Music(x, "stems").songs()):
        if not any(fnmatch.fnmatch(one.name, name) for name in args.songs):
            continue
        song = read_stems(one, 0, one.seconds, rate)
        generator = torch.Generator().manual_seed(0)
        for panned, stems in ((False, song), (True, pan(song, generator))):
            for first in range(0, int(one.seconds // SECONDS), EVERY):
                start, length = (round(x * SECONDS * rate) for x in (first, 1))
                window = {
                    name: sig[:, start : start + length]
                    for name, sig in stems.items()
                }
                for inputs, spatial in itertools.product(
                    (True, False), repeat=2
                ):
                    separator.masknet.encode = (
                        masks if inputs else without_inputs(masks)
                    )
                    key = one.name, panned, inputs, spatial
                    measure(separator, spatial, window, panned, found[key])
        say(one.name)
        record.write(*blocks(found))
    say(output.read_text("utf-8"))


if __name__ == "__main__":
    main()
