"""How long a training step waits for its data.

    python benchmarks/data_loading.py \
        [--data_folder FOLDER --dataset mixtures] [--workers 0 1 2] \
        [--music_folder FOLDER]

Batches come as in training: `dataio_prep` of `training.dataio` on prepared
manifests, SpeechBrain's `make_dataloader`. The consumer is a training step of
a Performer (--num_layers layers of 192 channels, as in hparams/demo.yaml).
Sets: the built-in demo band (16-bit wav, four stems a song), made in a
temporary folder, and, if given, --data_folder. Files read before are likely
to be in the system's cache.

In each of --rounds rounds every number of workers, and batches kept in
memory, take --steps steps. The first batch of a round, for which workers
start, is reported apart. Waiting is the time from the end of a step to its
next batch, as the recipe counts it, as a share of the time of both. Workers
also slow the step down where they share its cores, which waiting does not
show: so the whole step is compared with that on batches in memory. Last, the
loader alone, in segments a second, from its first batch on.

Named stems. With --music_folder, what `trackformer make-music` left: how long
`RemixedItems` takes to make a stereo item with its stems, against a training
step of a batch of them with FusionMaskNet as separator.yaml has it, compiled,
both on one core, which a rank of a training shares with its loader worker; turn
by turn. The share is of the means, as items differ.
"""

import functools
import pathlib
import statistics
import tempfile
import time
from itertools import count
from typing import NamedTuple

import torch
from common import (
    Record,
    interleave,
    new_parser,
    parse_args,
    say,
    spread,
    synchronise,
    table,
    verdict,
)
from speechbrain.dataio.dataloader import make_dataloader
from training_step import COMPILED
from training_step import make_step as make_candidate

from trackformer_sb.data.mixtures import MixtureOfMixtures
from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import STEM_CLASSES, RemixedItems
from trackformer_sb.inference.separation import separate
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
from trackformer_sb.objectives.mixit import mixit_loss
from trackformer_sb.training.dataio import dataio_prep

ROOT = pathlib.Path(__file__).resolve().parents[1]
SAMPLE_RATE = 44100
IN_MEMORY = None  # in place of a number of workers
TARGET = 5.0  # percent of waiting with 2 workers
MAKING_TARGET = 0.25  # of the training of an item


def label(workers):
    """How a way to load is called in the record."""
    if workers is IN_MEMORY:
        return "in memory"
    return f"{workers} worker{'' if workers == 1 else 's'}"


class Times(NamedTuple):
    """Seconds of the steps of one way to load, over all rounds."""

    first: list  # until the first batch of a round
    waiting: list
    whole: list  # waiting and computing


def training_set(args, dataset, data_folder, folder):
    """The training set of a folder of music, as the recipe makes it."""
    music = Music(
        data_folder,
        dataset,
        sample_rate=SAMPLE_RATE,
        demo_songs=args.demo_songs,
    )
    music.prepare(folder / "manifests", args.segment_seconds)
    hparams = {
        "output_folder": folder,
        "dataset": dataset,
        "sample_rate": SAMPLE_RATE,
        "segment_seconds": args.segment_seconds,
        "seed": 1234,
        "music": music,
        "pairs": functools.partial(
            MixtureOfMixtures, sample_rate=SAMPLE_RATE, seed=1234
        ),
    }
    datasets, _ = dataio_prep(hparams)
    return datasets["train"]


def make_loader(dataset, args, num_workers):
    """The loader of a training, by the options of the yaml files."""
    return make_dataloader(
        dataset,
        batch_size=args.batch_size,
        num_workers=num_workers,
        shuffle=True,
        drop_last=True,
        pin_memory=torch.device(args.device).type == "cuda",
    )


def make_step(args):
    """A function that trains on a batch of mixtures."""
    torch.manual_seed(0)
    encoder, decoder = STFTEncoder(), STFTDecoder()
    masknet = PerformerMaskNet(
        513,
        8,
        d_model=192,
        num_layers=args.num_layers,
        dropout=0.0,
        attention="auto",
    )
    for module in (encoder, masknet, decoder):
        module.to(args.device)
    optimizer = torch.optim.AdamW(masknet.parameters(), lr=1e-4)

    def step(mixtures):
        mixtures = mixtures.to(args.device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        est_source, _ = separate(mixtures.sum(1), encoder, masknet, decoder)
        mixit_loss(est_source, mixtures)[0].mean().backward()
        optimizer.step()
        synchronise(args.device)

    return step


def run_steps(step, batches, num_steps, times):
    """Steps through an iterator of batches; adds to the times."""
    end = time.perf_counter()
    for number in range(num_steps + 1):
        mixtures = next(batches)
        arrived = time.perf_counter()
        step(mixtures)
        last, end = end, time.perf_counter()
        if number == 0:
            times.first.append(arrived - last)
        else:
            times.waiting.append(arrived - last)
            times.whole.append(end - last)


def stream(loader):
    """The mixtures of a loader, epoch after epoch."""
    while True:
        for batch in loader:
            yield batch.mixtures.data


def repeat(batches):
    """The same batches over and over."""
    while True:
        yield from batches


def measure(dataset, args, step):
    """Times by number of workers, and of batches in memory."""
    few = stream(make_loader(dataset, args, 0))
    kept = [next(few) for _ in range(min(args.steps, 8))]
    step(kept[0])
    times = {way: Times([], [], []) for way in (IN_MEMORY, *args.workers)}
    for number in range(args.rounds):
        run_steps(step, repeat(kept), args.steps, times[IN_MEMORY])
        for workers in args.workers:
            batches = stream(make_loader(dataset, args, workers))
            run_steps(step, batches, args.steps, times[workers])
            batches.close()  # ends the workers
            share = sum(times[workers].waiting) / sum(times[workers].whole)
            say(
                f"round {number + 1}, {label(workers)}: {100 * share:.1f} % "
                "waiting"
            )
    return times


def segments_per_second(dataset, args, workers):
    """How fast the loader is when nothing else computes."""
    batches = stream(make_loader(dataset, args, workers))
    next(batches)
    num_batches = 3 * args.steps
    start = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return num_batches * args.batch_size / seconds


def report(name, dataset, args, times):
    """Blocks of markdown for a set."""
    rows, lines = [], []
    base = statistics.median(times[IN_MEMORY].whole)
    for workers, (first, waiting, whole) in times.items():
        share = 100 * sum(waiting) / sum(whole)
        alone = start = "-"
        if workers is not IN_MEMORY:
            rate = segments_per_second(dataset, args, workers)
            alone, start = f"{rate:.1f}", f"{statistics.median(first):.2f}"
        if workers == 2:
            what = "percent of the step waiting, 2 workers"
            lines.append(verdict(what, share, TARGET, higher_is_better=False))
        rows.append(
            [
                label(workers),
                len(whole),
                f"{share:.2f}",
                spread(whole),
                f"{statistics.median(whole) / base:.3f}",
                start,
                alone,
            ]
        )
    header = [
        "batches",
        "steps",
        "waiting, % of the step",
        "ms a step, median (range)",
        "times in memory",
        "s to the first batch",
        "segments/s, loader alone",
    ]
    blocks = [
        f"## {name}: {len(dataset)} training segments",
        table(header, rows),
    ]
    return [*blocks, "\n".join(lines)] if lines else blocks


def named_blocks(args):
    """Making items with named stems against training on them, on one core."""
    torch.set_num_threads(1)
    music = Music(args.music_folder, "midi", stem_groups=STEM_CLASSES)
    songs = music.songs()
    items = RemixedItems(songs, segment_seconds=args.segment_seconds)
    batch = torch.stack([items[i][0] for i in range(args.batch_size)])
    batch = batch.to(args.device)
    step, _ = make_candidate(COMPILED, 2 * len(STEM_CLASSES), args.device)
    step(batch)
    numbers = count(args.batch_size)
    what = "an item", f"a step of {args.batch_size}"
    times = interleave(
        {what[0]: lambda: items[next(numbers)], what[1]: lambda: step(batch)},
        {what[0]: args.batch_size * args.steps, what[1]: args.steps},
        args.device,
    )
    making, training = (statistics.mean(times[name]) for name in what)
    share = making / (training / args.batch_size)
    rows = [[name, len(times[name]), spread(times[name])] for name in what]
    header = ["named stems, one core", "times", "ms, median (range)"]
    return [
        f"## Named stems ({args.music_folder.name}): {len(songs)} songs",
        table(header, rows),
        verdict(
            "making an item, share of its training",
            *(share, MAKING_TARGET, False),
        ),
    ]


def main():
    """Measures each set and writes the record after each."""
    parser = new_parser(__doc__, "data_loading")
    parser.add_argument("--data_folder", type=pathlib.Path)
    parser.add_argument(
        "--dataset", default="mixtures", choices=("mixtures", "stems")
    )
    parser.add_argument("--music_folder", type=pathlib.Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--segment_seconds", type=float, default=3.0)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--demo_songs", type=int, default=60)
    args = parse_args(parser)
    record = Record("Data loading", __doc__, args.output, args.device)
    blocks = [
        f"Batches of {args.batch_size} pairs of {args.segment_seconds:g} s at "
        f"44.1 kHz; a Performer of {args.num_layers} layers."
    ]
    sets = {"Demo band (wav)": ("demo", None)}
    if args.data_folder:
        name = f"{args.data_folder.name} ({args.dataset})"
        sets[name] = (args.dataset, args.data_folder)
    step = make_step(args)
    for name, (kind, data_folder) in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            dataset = training_set(
                args, kind, data_folder, pathlib.Path(folder)
            )
            say(f"{name}: {len(dataset)} training segments")
            times = measure(dataset, args, step)
            blocks += report(name, dataset, args, times)
        record.write(*blocks)
    if args.music_folder:
        # last, as it has one thread
        blocks += named_blocks(args)
        record.write(*blocks)
    say(*blocks, sep="\n\n")
    say(f"wrote {args.output}")


if __name__ == "__main__":
    main()
