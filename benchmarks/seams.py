"""Whether seams between chunks are heard in what a trained model separates.

    python benchmarks/seams.py SEPARATOR_FOLDER SONG [SONG ...]

Each song is separated twice, once without its first half hop, so that the seams
of either time lie in the middle between those of the other. At every seam, in
a window as long as the crossfade, the power of all outputs together is set
against that of the same samples in the other separation, in dB. Outputs that
do not agree at a seam cancel in the crossfade, up to -3 dB; agreement, and no
seam, is 0 dB. The same for the largest step from one sample to the next, summed
over outputs, as clicks and a wrong order of outputs would make it larger.

Windows of which the mixture is more than 40 dB below its level in the song are
left out. "Spread" is the standard deviation over windows: how much two
separations of the same samples differ at a seam at all.
"""

import pathlib
import statistics
import tempfile

import soundfile
import torch
from common import Record, new_parser, parse_args, say, table, verdict

from trackformer_sb.inference.overlap_add import FADE_SHARE
from trackformer_sb.inference.separator import load_separator

QUIET_DB = -40.0
LEVEL_TARGET_DB, STEP_TARGET_DB = 0.1, 0.3


def decibel(power):
    """Of powers; zero stays finite."""
    return 10 * torch.log10(power + 1e-20)


def power(x):
    """Of all outputs: [sources, channels, windows, width] -> [windows]."""
    return x.square().sum((0, 1, -1))


def step(x):
    """The largest step of each output, squared, summed over outputs."""
    return x.diff().square().amax((1, -1)).sum(0)


def seams_of(frames, chunk, hop):
    """Centres of the crossfades; the last chunk begins earlier, and is left."""
    first = (chunk + hop) // 2
    return [first + i * hop for i in range((frames - chunk) // hop)]


def windows(sig, centres, width):
    """[..., time] -> [..., windows, width]."""
    parts = [sig[..., c - width // 2 :][..., :width] for c in centres]
    return torch.stack(parts, -2)


def measure_song(separator, path, chunk_seconds, overlap):
    """Differences in dB at all seams: of the levels, and of the steps."""
    sig, rate = soundfile.read(path, dtype="float32", always_2d=True)
    chunk = round(chunk_seconds * rate)
    shared = int(overlap * chunk)
    hop, width = chunk - shared, round(FADE_SHARE * shared)
    later = hop // 2
    outputs = []
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/song.wav"
        for start in (0, later):
            soundfile.write(file, sig[start:], rate, subtype="FLOAT")
            est_source = separator.separate_file(
                file,
                chunk_seconds=chunk_seconds,
                overlap=overlap,
                progressbar=False,
            )
            outputs.append(est_source[..., later - start :])
    frames = outputs[0].shape[-1]
    seams = [
        # those of the whole song, on the clock of the later start
        [c - later for c in seams_of(frames + later, chunk, hop) if c > later],
        seams_of(frames, chunk, hop),
    ]
    whole = decibel(outputs[1].sum(0).square().mean())
    levels, steps = [], []
    for one, other, centres in zip(outputs, outputs[::-1], seams):
        if not centres:
            continue
        one, other = (windows(x, centres, width) for x in (one, other))
        loud = decibel(one.sum(0).square().mean((0, -1))) > whole + QUIET_DB
        for kept, measure in ((levels, power), (steps, step)):
            change = decibel(measure(one)) - decibel(measure(other))
            kept.extend(change[loud].tolist())
    return levels, steps


def figures(differences):
    """Mean, its standard error, and spread."""
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    return mean, spread / len(differences) ** 0.5, spread


def main():
    """Measures song by song."""
    parser = new_parser(__doc__, "seams")
    parser.add_argument("separator", help="folder")
    parser.add_argument("songs", nargs="+", type=pathlib.Path)
    parser.add_argument("--chunk_seconds", type=float, default=10.0)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--note", default="", help="about the separator")
    args = parse_args(parser)
    record = Record("Seams between chunks", __doc__, args.output, args.device)
    separator = load_separator(args.separator, args.device)
    rows, all_levels, all_steps = [], [], []

    def add_row(name, levels, steps):
        cells = [f"{x:+.2f}" for x in (*figures(levels), *figures(steps))]
        rows.append([name, len(levels), *cells])
        say(*rows[-1])

    for path in args.songs:
        levels, steps = measure_song(
            separator, path, args.chunk_seconds, args.overlap
        )
        if len(levels) < 2:
            say(f"{path}: too short for two seams, left out")
            continue
        add_row(path.stem, levels, steps)
        all_levels += levels
        all_steps += steps
    add_row("all", all_levels, all_steps)
    units = ["dB", "standard error", "spread"]
    record.write(
        args.note,
        table(
            [
                *("song", "seams"),
                *(f"{what}, {u}" for what in ("level", "steps") for u in units),
            ],
            rows,
        ),
        "\n".join(
            verdict(
                f"{what} at seams against the same samples without one, dB",
                abs(statistics.fmean(differences)),
                target,
                higher_is_better=False,
            )
            for what, differences, target in (
                ("level", all_levels, LEVEL_TARGET_DB),
                ("largest step", all_steps, STEP_TARGET_DB),
            )
        ),
    )


if __name__ == "__main__":
    main()
