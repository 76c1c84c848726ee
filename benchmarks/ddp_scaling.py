"""What a second rank takes off the first, and that both learn the same.

    python benchmarks/ddp_scaling.py [--ranks 2] [--device cuda]

The Performer of performer_mixit.yaml at its sizes (no dropout, which ranks draw
each for themselves) is trained on the same --steps global batches of noise by
one process and by --ranks processes under torchrun, each on its share of every
batch, with the masknet in DistributedDataParallel as in the recipes: gloo on
the loopback device and one thread a rank on a CPU, NCCL and one GPU a rank
with --device cuda. In each of --rounds rounds both are started, turn by turn.

Work of a rank: the items that it saw, and the processor seconds of its process
(time.process_time: all its threads, no waiting) from the second step on. The
first is left out, in which DistributedDataParallel orders its buckets; batches
are drawn before the clocks start. These, not wall clocks, are compared on a
CPU, since ranks there share what one process has alone. On GPUs the efficiency
is the time of one rank over ranks times their time. Largest of the ranks,
medians of the rounds.

Then the weights: equal to the last bit between ranks, and near to those of one
process, as a share of the way that training moved them.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from common import (
    Record,
    new_parser,
    parse_args,
    say,
    synchronise,
    table,
    verdict,
)
from torch.nn.parallel import DistributedDataParallel
from training_step import FAVOR, SAMPLE_RATE, build

from trackformer_sb.inference.separation import separate
from trackformer_sb.objectives.mixit import mixit_loss

# Of the work of one process over that of each of two ranks.
TARGET = 1.8
# Share of the way of the weights that ranks may come to lie apart.
TOLERANCE = 0.01


def global_batch(step, args):
    """Noise [batch, 2, time], the same on all ranks."""
    generator = torch.Generator().manual_seed(step)
    time = round(args.seconds * SAMPLE_RATE)
    return 0.1 * torch.randn(args.batch_size, 2, time, generator=generator)


def train(args):
    """One rank: trains on its share of each batch, leaves what it took."""
    on_gpu = args.device != "cpu"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank = torch.distributed.get_rank()
    world = torch.distributed.get_world_size()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    encoder, masknet, decoder = build(
        FAVOR, args.num_spks, device, dropout=0.0, num_layers=args.num_layers
    )
    before = flat(masknet)
    wrapped = DistributedDataParallel(masknet)
    optimizer = torch.optim.AdamW(masknet.parameters(), lr=1e-4, fused=True)
    share = args.batch_size // world
    own = slice(rank * share, (rank + 1) * share)
    # before the clock starts: every rank draws the batches of all
    batches = [
        global_batch(step, args)[own].to(device) for step in range(args.steps)
    ]
    items = 0
    for step, mixtures in enumerate(batches):
        if step == 1:
            synchronise(device)
            start = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        est_source, _ = separate(mixtures.sum(1), encoder, wrapped, decoder)
        mixit_loss(est_source, mixtures)[0].mean().backward()
        optimizer.step()
        items += len(mixtures)
    synchronise(device)
    torch.save(
        {
            "items": items,
            "wall": time.perf_counter() - start[0],
            "processor": time.process_time() - start[1],
            "before": before,
            "weights": flat(masknet),
        },
        pathlib.Path(args.folder) / f"rank{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def flat(module):
    """All weights of a module as one vector."""
    return torch.cat([p.detach().cpu().flatten() for p in module.parameters()])


def launch(ranks, args):
    """What each of some ranks left."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += [f"--nproc_per_node={ranks}", "--standalone", __file__]
        for key in (
            *("device", "output", "seconds", "steps"),
            *("batch_size", "num_spks", "num_layers"),
        ):
            command.append(f"--{key}={getattr(args, key)}")
        subprocess.run(
            [*command, f"--folder={folder}"],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return [
            torch.load(pathlib.Path(folder) / f"rank{rank}.pt")
            for rank in range(ranks)
        ]


def report(rounds, args):
    """Table of what a rank does, and the targets."""
    most = {
        (ranks, key): statistics.median(
            max(rank[key] for rank in one) for one in rounds[ranks]
        )
        for ranks in rounds
        for key in ("items", "processor", "wall")
    }
    rows = []
    for ranks in rounds:
        ratios = [
            most[1, key] / most[ranks, key]
            for key in ("items", "processor", "wall")
        ]
        rows.append(
            [
                ranks,
                most[ranks, "items"],
                f"{most[ranks, 'processor']:.2f}",
                f"{most[ranks, 'wall']:.2f}",
                *(f"{ratio:.2f}" for ratio in ratios),
                f"{100 * ratios[2] / ranks:.0f} %",
            ]
        )
    header = [
        "ranks",
        "items a rank",
        "processor seconds a rank",
        "seconds",
        "times fewer items",
        "times less work",
        "times faster",
        "efficiency a rank",
    ]
    lines = []
    if args.device == "cpu":
        # two ranks halve the work; of more the same share is asked
        target = TARGET * args.ranks / 2
        lines += [
            verdict(f"{what} a rank, times less", measured, target)
            for what, measured in zip(
                ("items", "processor seconds"), ratios[:2], strict=True
            )
        ]
    alone, together = rounds[1][0][0], rounds[args.ranks][0]
    apart = max(
        (rank["weights"] - together[0]["weights"]).abs().max().item()
        for rank in together
    )
    way = (alone["weights"] - alone["before"]).norm()
    off = (together[0]["weights"] - alone["weights"]).norm() / way
    lines += [
        verdict("largest difference between ranks", apart, 0, False),
        verdict(
            "difference from one process, share of the way of the weights",
            off.item(),
            TOLERANCE,
            False,
        ),
    ]
    return table(header, rows), "\n".join(lines)


def main():
    """Trains with one rank and with several, turn by turn."""
    parser = new_parser(__doc__, "ddp_scaling")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument(
        "--batch_size", type=int, default=4, help="of all ranks"
    )
    parser.add_argument("--num_spks", type=int, default=8)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parse_args(parser)
    if args.folder:
        return train(args)
    if args.steps < 2 or args.ranks < 2 or args.batch_size % args.ranks:
        parser.error(
            "expected at least 2 steps, 2 ranks, and a batch_size that ranks "
            "divide"
        )
    record = Record("Scaling over ranks", __doc__, args.output, args.device)
    rounds = {1: [], args.ranks: []}
    for number in range(args.rounds):
        for ranks in rounds:
            rounds[ranks].append(launch(ranks, args))
            most = max(rank["processor"] for rank in rounds[ranks][-1])
            say(f"round {number + 1}, {ranks} rank(s): {most:.2f} CPU s a rank")
    setting = (
        f"{args.steps} global batches of {args.batch_size} items of "
        f"{args.seconds:g} s, {args.num_layers} layers, {args.num_spks} "
        f"outputs; {args.rounds} rounds."
    )
    blocks = [setting, *report(rounds, args)]
    record.write(*blocks)
    say(*blocks, sep="\n\n")
    say(f"wrote {args.output}")


if __name__ == "__main__":
    main()
