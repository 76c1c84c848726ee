"""Separation of a file: speed and memory, against the ecosystem's ways.

    python benchmarks/separation.py [--device cuda] [--quick]

Speed. A stereo file of --seconds at 44.1 kHz, 16 bit (a song of the demo band,
panned and repeated), from disk to wav files on disk, 8 outputs, random
weights, which change nothing about the speed. Candidates:

- ours: the Performer of performer_mixit.yaml through
  `PerformerSeparation.separate_file` as it is by default: chunks of 10 s that
  share a quarter, one at a time. Both channels by one mask, nothing rescaled.
- SpeechBrain: the ConvTasNet of convtasnet_mixit.yaml through
  `SepformerSeparation.separate_file`, which takes the file whole, the channels
  as two items of a batch (their mean where it has to resample), and scales
  each output and channel to a peak of 1; it leaves writing to its caller.
- Asteroid, whole: its ConvTasNet at kernel 88 and stride 44 through
  `asteroid.separate.file_separate` with `resample=True`: the left channel
  alone (without it a stereo file is refused), outputs scaled together so that
  their absolute values add up to those of the mixture.
- Asteroid, overlap-add: the same model and path inside `LambdaOverlapAdd` with
  windows of 10 s and its default hop, half of that.

The peers' models are ConvTasNets: the table compares what each ecosystem
offers for the task, not one model in three ways. Asteroid's figures are for
one channel, which is half the work.

Each run has a process of its own, in turns; seconds are those of the call (on
a GPU after a short file). Memory is the largest beyond the built model: of the
GPU, or the resident set. A candidate that takes over --limit_gb (of address
space, on a CPU) or over --timeout with its start is recorded as such, and runs
on the first --excerpt_seconds instead. Runs of over 60 s are not repeated.

Named stems. The same for --named_seconds of stereo, drums, bass, vocals and
other, always on one CPU core: one thread, whose processor time is counted,
which other processes change little.

- ours: the separator of the package, or where there is none its size with
  random weights, as `trackformer separate` runs it;
- HTDemucs: `demucs.apply.apply_model` as it is by default, with the sizes of
  the released htdemucs (5 layers, 512 bottom channels, segments of 7.8 s);
- open-unmix: `openunmix.umxhq` as it is by default, which takes the file whole.

Both peers with random weights, of a file in memory, written as ours are.

Memory against length. `separate_file` with a model of 2 layers, d_model 64 and
2 outputs, so that an hour takes minutes: the largest resident set (VmHWM)
during the call, in a fresh process for each length, in all and beyond what the
process held before it, the model included. The target is for all of it; the
latter, smaller by what Python and torch take, tells more of what grows.

Sum. Our outputs, read back from disk, against the file.
"""

import functools
import pathlib
import statistics
import tempfile
import time
import warnings
from fractions import Fraction

import numpy as np
import psutil
import soundfile
import torch
from common import (
    Record,
    in_fresh_process,
    limit_memory,
    new_parser,
    parse_args,
    peak_extra_mb,
    say,
    synchronise,
    table,
    verdict,
)
from training_step import FAVOR, build

from trackformer_sb.data.band import make_song
from trackformer_sb.data.remix import STEM_CLASSES
from trackformer_sb.inference.separator import load_separator
from trackformer_sb.inference.speechbrain import PerformerSeparation
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder

SAMPLE_RATE = 44100
NUM_SPKS = 8
SMALL = {"num_layers": 2, "d_model": 64, "d_ffn": 128, "n_features": 32}
SMALL_SPKS = 2
SLOW_SECONDS = 60.0  # what takes longer is run once
SONG_SECONDS = 30.0
WINDOW_SECONDS = 10.0
MAX_RATIO = 1.1  # of the memory for the longest to that for the one before
PARTS = ["speed", "named", "memory"]
MAX_RESIDUAL = -80.0  # dB

OURS, HTDEMUCS, OPEN_UNMIX = "ours", "HTDemucs", "open-unmix"
CLASSES = list(STEM_CLASSES)
TARGETS = {HTDEMUCS: 20, OPEN_UNMIX: 5}  # times slower than ours, at least

# Where each stem of the band is, from 0 (left) to 1 (right).
PANS = {"drums": 0.5, "bass": 0.4, "chords": 0.9, "lead": 0.1}


def write_mixture(path, seconds):
    """A stereo file of any length, block by block."""
    mix = 0.0
    for name, stem in make_song(0, SONG_SECONDS, SAMPLE_RATE).items():
        angle = 0.5 * np.pi * PANS[name]
        mix = mix + stem[:, None] * [np.cos(angle), np.sin(angle)]
    mix *= 0.9 / np.abs(mix).max()
    left = round(seconds * SAMPLE_RATE)
    with soundfile.SoundFile(
        path, "w", SAMPLE_RATE, channels=2, subtype="PCM_16"
    ) as writer:
        while left:
            block = mix[:left]
            writer.write(block)
            left -= len(block)
    return path


def performer(modules, num_spks, device):
    """Ours, ready to use."""
    return PerformerSeparation(
        modules=dict(zip(("encoder", "masknet", "decoder"), modules)),
        hparams={"sample_rate": SAMPLE_RATE, "num_spks": num_spks},
        run_opts={"device": device},
    )


def make_ours(device):
    """(path, folder) -> nothing, leaving the outputs in the folder."""
    separator = performer(build(FAVOR, NUM_SPKS, device), NUM_SPKS, device)

    def call(path, folder):
        separator.separate_file(path, folder, progressbar=False)

    return call


def make_speechbrain(device):
    """SpeechBrain's path and what its user adds to it."""
    from speechbrain.inference.separation import SepformerSeparation

    modules = build("SpeechBrain, kernel 88", NUM_SPKS, device)
    separator = SepformerSeparation(
        modules=dict(zip(("encoder", "masknet", "decoder"), modules)),
        hparams={"sample_rate": SAMPLE_RATE, "num_spks": NUM_SPKS},
        run_opts={"device": device},
    )

    def call(path, folder):
        # [channels, time, sources]
        est_sources = separator.separate_file(str(path)).cpu().numpy()
        for i in range(NUM_SPKS):
            source = est_sources[:, :, i].T
            soundfile.write(folder / f"{i}.wav", source, SAMPLE_RATE, "FLOAT")

    return call


def make_asteroid(device, overlap_add=False):
    """Asteroid's path, with its model taking the file whole or in windows."""
    from asteroid.dsp.overlap_add import LambdaOverlapAdd
    from asteroid.models import ConvTasNet
    from asteroid.separate import file_separate

    model = ConvTasNet(
        n_src=NUM_SPKS,
        kernel_size=88,
        stride=44,
        mask_act="relu",
        sample_rate=SAMPLE_RATE,
    )
    if overlap_add:
        window = round(WINDOW_SECONDS * SAMPLE_RATE)
        model = LambdaOverlapAdd(model, n_src=NUM_SPKS, window_size=window)
    model = model.to(device).eval()

    def call(path, folder):
        file_separate(model, str(path), output_dir=str(folder), resample=True)

    return call


def make_named(device):
    """The separator of the package."""
    separator = load_separator(device=device)

    def call(path, folder):
        separator.separate_file(path, folder, progressbar=False)

    return call


def from_disk_to_disk(separate):
    """A call of [1, 2, time] -> [1, stems, 2, time] as one of files."""

    def call(path, folder):
        sig, _ = soundfile.read(path, dtype="float32")
        with torch.no_grad():
            stems = separate(torch.from_numpy(sig.T.copy())[None])[0].cpu()
        for name, stem in zip(CLASSES, stems.numpy(), strict=True):
            path = folder / f"{name}.wav"
            soundfile.write(path, stem.T, SAMPLE_RATE, "FLOAT")

    return call


def make_htdemucs(device):
    """HTDemucs, of the sizes of the released one."""
    from demucs.apply import apply_model
    from demucs.htdemucs import HTDemucs

    # grids/mmi.py; the segment is that of the released file
    model = HTDemucs(CLASSES, bottom_channels=512, segment=Fraction(39, 5))
    return from_disk_to_disk(
        functools.partial(apply_model, model, device=device)
    )


def make_open_unmix(device):
    """The smaller of open-unmix's models of music."""
    from openunmix import umxhq

    model = umxhq(pretrained=False, device=device).eval()
    return from_disk_to_disk(lambda mix: model(mix.to(device)))


CANDIDATES = {
    "speed": {
        OURS: make_ours,
        "SpeechBrain": make_speechbrain,
        "Asteroid, whole": make_asteroid,
        "Asteroid, overlap-add": functools.partial(
            make_asteroid, overlap_add=True
        ),
    },
    "named": {
        OURS: make_named,
        HTDEMUCS: make_htdemucs,
        OPEN_UNMIX: make_open_unmix,
    },
}


def measured(call, device, memory_device, clock=time.perf_counter):
    """Seconds of a call and its extra memory in MB."""
    seconds = []

    def timed_call():
        start = clock()
        call()
        synchronise(device)
        seconds.append(clock() - start)

    memory = peak_extra_mb(timed_call, memory_device)
    return seconds[0], memory


def residual_db(path, folder):
    """Level of what the sum of the outputs lacks, against the mixture's."""
    outputs = [soundfile.SoundFile(p) for p in sorted(folder.glob("*.wav"))]
    missing = whole = 0.0
    for block in soundfile.blocks(path, 2**16, dtype="float64", always_2d=True):
        total = sum(
            reader.read(len(block), dtype="float64", always_2d=True)
            for reader in outputs
        )
        missing += np.square(block - total).sum()
        whole += np.square(block).sum()
    for reader in outputs:
        reader.close()
    return 10 * np.log10(max(missing, 1e-30) / whole)


def run_candidate(path, folder, part, name, args):
    """Seconds, memory and, of ours, residual; in a process of its own."""
    warnings.simplefilter("ignore")
    device, clock = args.device, time.perf_counter
    if part == "named":
        device, clock = "cpu", time.process_time
        torch.set_num_threads(1)
    call = CANDIDATES[part][name](device)
    limit_memory(args.limit_gb, device)
    if torch.device(device).type == "cuda":
        with tempfile.TemporaryDirectory() as other:
            other = pathlib.Path(other)
            call(write_mixture(other / "short.wav", 1.0), other)
    cost = measured(lambda: call(path, folder), device, device, clock)
    return *cost, residual_db(path, folder) if name == OURS else None


def run_small(path, folder, device):
    """Seconds and memory of a small model; in a process of its own."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    masknet = PerformerMaskNet(513, SMALL_SPKS, **SMALL)
    modules = (STFTEncoder(), masknet, STFTDecoder())
    separator = performer(modules, SMALL_SPKS, device)
    before = psutil.Process().memory_info().rss / 2**20
    seconds, memory = measured(
        lambda: separator.separate_file(path, folder, progressbar=False),
        device,
        "cpu",  # the memory of the host, wherever the model is
    )
    return seconds, memory, before + memory


def in_folder(function, path, *args, timeout=None):
    """``in_fresh_process`` of a function of a file and a folder to fill."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        return in_fresh_process(function, path, folder, *args, timeout=timeout)


def speed_runs(part, files, args):
    """What each candidate of a part took for the longest file it can, in turns.

    Returns
    -------
    runs : dict
        Name and seconds of audio -> list of seconds, memory and residual.
    reasons : dict
        Name and seconds of audio -> why there is no result.
    """
    runs, reasons = {}, {}
    names = CANDIDATES[part]
    turns = [(i, name) for i in range(args.repetitions) for name in names]
    for turn, name in turns:
        for seconds, path in files.items():
            key = name, seconds
            if turn and key in runs and runs[key][0][0] > SLOW_SECONDS:
                break
            if key in reasons:
                continue
            result, reason = in_folder(
                run_candidate, path, part, name, args, timeout=args.timeout
            )
            say(f"{name}, {seconds:g} s:", reason or result)
            if result:
                runs.setdefault(key, []).append(result)
                break
            if "memory" in reason:
                reason = f"needs more than {args.limit_gb:g} GB"
            reasons[key] = reason
    return runs, reasons


def real_time_factors(runs):
    """Name and seconds of audio -> median seconds for one of audio."""
    return {
        key: statistics.median(cost[0] for cost in run) / key[1]
        for key, run in runs.items()
    }


def speed_table(part, runs, reasons, files):
    """Real-time factors."""
    rows, factors = [], real_time_factors(runs)
    ours = factors.get((OURS, next(iter(files))))
    for name in CANDIDATES[part]:
        for seconds in files:
            key = name, seconds
            row = [f"{seconds:g}", name]
            if key in reasons:
                rows.append([*row, reasons[key], *"----"])
            if key not in runs:
                continue
            times, memory, _ = zip(*runs[key], strict=True)
            times = statistics.median(times), min(times), max(times)
            row += [
                "{:.1f} ({:.1f} to {:.1f})".format(*times),
                len(runs[key]),
                f"{factors[key]:.3f}",
                f"{factors[key] / ours:.1f}" if ours else "-",
                f"{max(memory):.0f}",
            ]
            rows.append(row)
    header = (
        "audio, s|candidate|seconds, median (range)|runs|"
        "real-time factor|times ours|extra memory, MB"
    ).split("|")
    return table(header, rows)


def speed_blocks(folder, args):
    """Table of real-time factors, and what the outputs sum to."""
    files = {
        seconds: write_mixture(folder / f"{seconds:g}.wav", seconds)
        for seconds in (args.seconds, args.excerpt_seconds)
    }
    runs, reasons = speed_runs("speed", files, args)
    blocks = ["## Speed", speed_table("speed", runs, reasons, files)]
    if (OURS, args.seconds) in runs:
        blocks += ["## Sum", sum_line(runs[OURS, args.seconds])]
    return blocks


def sum_line(costs):
    """Whether the outputs sum to the file."""
    what = "sum of the outputs minus the file, dB"
    return verdict(what, costs[0][2], MAX_RESIDUAL, False)


def named_blocks(folder, args):
    """Table of real-time factors of one core, and the targets."""
    seconds = args.named_seconds
    files = {seconds: write_mixture(folder / "named.wav", seconds)}
    runs, reasons = speed_runs("named", files, args)
    factors = real_time_factors(runs)
    ours = factors[OURS, seconds]
    lines = [
        verdict(
            f"{name}: times slower than ours",
            factors[name, seconds] / ours,
            target,
        )
        if (name, seconds) in factors
        else f"- {name}: not compared, {reasons[name, seconds]}"
        for name, target in TARGETS.items()
    ]
    lines.append(sum_line(runs[OURS, seconds]))
    return [
        "## Named stems, one core",
        speed_table("named", runs, reasons, files),
        "\n".join(lines),
    ]


def memory_blocks(folder, args):
    """Table of memory against length, and the targets."""
    rows, extras, totals = [], [], []
    for seconds in args.memory_seconds:
        path = write_mixture(folder / "long.wav", seconds)
        result, reason = in_folder(run_small, path, args.device)
        say(f"small model, {seconds:g} s:", result or reason)
        if result is None:
            raise RuntimeError(reason)
        taken, extra, total = result
        extras.append(extra)
        totals.append(total)
        figures = f"{seconds / 60:.2f} {extra:.0f} {total:.0f} {taken:.1f}"
        rows.append([*figures.split(), f"{taken / seconds:.3f}"])
    header = (
        "minutes|extra memory, MB|VmHWM, MB|seconds|real-time factor"
    ).split("|")
    blocks = ["## Memory against length", table(header, rows)]
    if len(extras) > 1:
        before, last = (x / 60 for x in args.memory_seconds[-2:])
        what = f"memory for {last:g} min over that for {before:g} min"
        lines = [
            verdict(f"whole {what}", totals[-1] / totals[-2], MAX_RATIO, False),
            f"- extra {what}: {extras[-1] / extras[-2]:.3g}",
        ]
        blocks.append("\n".join(lines))
    return blocks


def main():
    """Measures each part; writes the record after each."""
    parser = new_parser(__doc__, "separation")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--excerpt_seconds", type=float, default=12.0)
    parser.add_argument("--named_seconds", type=float, default=30.0)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument(
        "--memory_seconds", type=float, nargs="+", default=[10, 180, 3600]
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART"
    )
    parser.add_argument("--limit_gb", type=float, default=10.0)
    parser.add_argument("--timeout", type=float, default=240.0)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="seconds of audio, to see that it runs; leaves no record",
    )
    args = parse_args(parser)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if args.quick:
            args.seconds, args.excerpt_seconds = 12.0, 3.0
            args.named_seconds = 12.0
            args.memory_seconds, args.repetitions = [5, 20, 60], 1
            args.output = folder / "quick.md"
        record = Record(
            "Separation of a file", __doc__, args.output, args.device
        )
        blocks = []
        for part, measure in (
            ("speed", speed_blocks),
            ("named", named_blocks),
            ("memory", memory_blocks),
        ):
            if part in args.parts:
                blocks += measure(folder, args)
                record.write(*blocks)
        say(args.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
