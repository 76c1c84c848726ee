"""MixIT loss, forward and backward: ours against Asteroid's.

    python benchmarks/mixit_loss.py [--device cuda] [--output FILE.md]

`trackformer_sb.objectives.mixit.mixit_loss` against
`asteroid.losses.MixITLossWrapper(..., generalized=True)` on the same sources
[4, 8, 132300] and mixtures [4, 2, 132300] (3 s at 44.1 kHz). Both search all
256 assignments. Losses: SI-SNR (Asteroid's `multisrc_neg_sisdr` as it is) and
SNR, for which Asteroid's means are left in and our threshold is off
(`snr_max=inf`), so that both are the same function; values and gradients are
compared. Times: one process, turn by turn, medians. Memory: a fresh process
each, the largest extra memory of the first call at full size, with the
gradient; a call at a small size before it starts the libraries.
"""

import functools
import math
import statistics
import sys
import warnings

import common
import torch

from trackformer_sb.objectives.mixit import mixit_loss

OURS, PEER = "trackformer_sb", "Asteroid"
SPEED_TARGET, MEMORY_TARGET = 150, 60

# Largest difference in value (dB) and gradient (relative) that rounding in
# float32 explains.
TOLERANCE = 1e-3


def make_signals(batch_size, num_spks, time, device):
    """Sources, and mixtures of two halves of them with some noise."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(batch_size, num_spks, time, generator=generator)
    noise = torch.randn(batch_size, 2, time, generator=generator)
    half = num_spks // 2
    parts = sources[:, :half].sum(1), sources[:, half:].sum(1)
    mixtures = torch.stack(parts, dim=1) + 0.5 * noise
    return sources.to(device).requires_grad_(), mixtures.to(device)


def make_loss(who, objective):
    """A function of sources and mixtures that returns one number."""
    if who == OURS:
        return lambda sources, mixtures: mixit_loss(
            sources, mixtures, objective, snr_max=math.inf
        )[0].mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from asteroid.losses import MixITLossWrapper, multisrc_neg_sisdr
        from asteroid.losses.sdr import MultiSrcNegSDR
    if objective == "si_snr":
        return MixITLossWrapper(multisrc_neg_sisdr, generalized=True)
    snr = MultiSrcNegSDR("snr", zero_mean=False)
    return MixITLossWrapper(snr, generalized=True)


def forward_backward(loss, sources, mixtures):
    """One call; leaves the gradient in the sources."""
    sources.grad = None
    value = loss(sources, mixtures)
    value.backward()
    return value.item()


def memory_of(who, objective, shape, device):
    """Peak extra memory of one call in MB; runs in a process of its own."""
    loss = make_loss(who, objective)
    batch_size, num_spks, _ = shape
    small = make_signals(batch_size, num_spks, 100, device)
    forward_backward(loss, *small)
    signals = make_signals(*shape, device)
    return common.peak_extra_mb(
        lambda: forward_backward(loss, *signals), device
    )


def compare(losses, signals):
    """Values of both, and the differences in value and gradient."""
    values, gradients = [], []
    for loss in losses.values():
        values.append(forward_backward(loss, *signals))
        gradients.append(signals[0].grad.clone())
    apart = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    return values, abs(values[0] - values[1]), float(apart)


def measure(objective, args, shape):
    """Rows of the table, lines below it, and whether both losses agree."""
    losses = {who: make_loss(who, objective) for who in (OURS, PEER)}
    signals = make_signals(*shape, args.device)
    values, value_apart, gradient_apart = compare(losses, signals)
    common.say(
        f"{objective}: {values} dB, gradients {gradient_apart:.1e} apart"
    )
    seconds = common.interleave(
        {
            who: functools.partial(forward_backward, loss, *signals)
            for who, loss in losses.items()
        },
        {OURS: args.repetitions, PEER: args.peer_repetitions},
        args.device,
    )
    memory = {}
    for who in losses:
        memory[who], reason = common.in_fresh_process(
            memory_of, who, objective, shape, args.device
        )
        if reason:
            sys.exit(f"{who}: {reason}")
        common.say(
            f"{objective}, {who}: {common.spread(seconds[who])} ms, "
            f"{memory[who]:.0f} MB"
        )
    faster = statistics.median(seconds[PEER]) / statistics.median(seconds[OURS])
    # at toy sizes the allocator has it in store
    smaller = memory[PEER] / max(memory[OURS], 1.0)
    rows = [
        [
            objective,
            who,
            f"{value:.5f}",
            len(seconds[who]),
            common.spread(seconds[who]),
            f"{memory[who]:.0f}",
            *([f"{faster:.0f}", f"{smaller:.0f}"] if who == PEER else [1, 1]),
        ]
        for who, value in zip(losses, values, strict=True)
    ]
    agree = max(value_apart, gradient_apart) <= TOLERANCE
    lines = [
        common.verdict(f"{objective}, times faster", faster, SPEED_TARGET),
        common.verdict(
            f"{objective}, times less memory", smaller, MEMORY_TARGET
        ),
        f"- {objective}: values differ by {value_apart:.1e} dB, gradients by "
        f"{gradient_apart:.1e} of their norm (tolerance {TOLERANCE:g}: "
        f"{'equal' if agree else 'NOT EQUAL'})",
    ]
    return rows, lines, agree


def main():
    """Measures both objectives and writes the record."""
    parser = common.new_parser(__doc__, "mixit_loss")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_spks", type=int, default=8)
    parser.add_argument("--time", type=int, default=132300, help="samples")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--peer_repetitions", type=int, default=3)
    args = common.parse_args(parser)
    shape = args.batch_size, args.num_spks, args.time
    record = common.Record("MixIT loss", __doc__, args.output, args.device)
    header = [
        "loss",
        "implementation",
        "value, dB",
        "calls",
        "ms, median (range)",
        "extra memory, MB",
        "times slower",
        "times the memory",
    ]
    rows, lines, agree = [], [], True
    for objective in ("si_snr", "snr"):
        new_rows, new_lines, equal = measure(objective, args, shape)
        rows += new_rows
        lines += new_lines
        agree &= equal
        record.write(
            f"Sources {list(shape)}, mixtures "
            f"{[args.batch_size, 2, args.time]}.",
            common.table(header, rows),
            "\n".join(lines),
        )
    common.say(f"wrote {args.output}")
    if not agree:
        sys.exit("the two implementations do not agree")


if __name__ == "__main__":
    main()
