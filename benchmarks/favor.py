"""FAVOR+ attention, forward and backward: ours against performer-pytorch's.

    pip install -e '.[bench]'
    python benchmarks/favor.py [--device cuda] [--output FILE.md]

`trackformer_sb.nnet.favor.favor_attention` against `FastAttention` of
performer-pytorch and exact `scaled_dot_product_attention`, on queries and keys
of norm 1, batch 1, 8 heads of 64, 256 features, float32. Times: one process,
turn by turn, medians. Memory: a fresh process each, the largest extra memory
of one call at full size, with output and gradients; a call at a small size
before it starts the libraries.

Both estimate the same kernel, but `FastAttention` scales queries and keys by
64^-0.25 and adds 1e-4 to each feature. The comparison of gradients therefore
calls its functions `softmax_kernel` and `linear_attention` with
`normalize_data=False, eps=0` and our directions, in float64; ours is computed
in float32. Timed is `FastAttention` as it is.

`attention: auto` is timed as a whole `SelfAttention`, with the projections of
inputs and output, against the same layer with either kind.
"""

import argparse
import functools
import statistics
import sys
import warnings

import torch
from common import (
    Record,
    add_arguments,
    in_fresh_process,
    interleave,
    peak_extra_mb,
    say,
    spread,
    table,
    verdict,
)
from torch.nn import functional as F

from trackformer_sb.nnet.favor import (
    draw_projection,
    favor_attention,
    softmax_attention,
)
from trackformer_sb.nnet.performer import ATTENTION_KINDS, SelfAttention

OURS, PEER, EXACT = "trackformer_sb", "performer-pytorch", "exact"
NHEAD, HEAD_DIM, N_FEATURES = 8, 64, 256

# Frames -> times faster than the peer.
SPEED_TARGETS = {517: 1.8, 1723: 1.8, 5168: 4, 20000: 4}
# Frames -> share of the peer's extra memory.
MEMORY_TARGETS = {20000: 0.1}
# Slowest that auto may be beside the better kind.
AUTO_TARGET = 1.05

# Largest difference of gradients, relative to their norm.
TOLERANCE = 1e-5


def import_peer():
    """The module of performer-pytorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from performer_pytorch import performer_pytorch
    return performer_pytorch


def make_inputs(frames, device):
    """Queries, keys and values [1, heads, frames, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    shape = 3, 1, NHEAD, frames, HEAD_DIM
    query, key, value = torch.randn(shape, generator=generator)
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    return [x.to(device).requires_grad_() for x in (query, key, value)]


def make_attention(who, device):
    """A function of queries, keys and values."""
    if who == EXACT:
        return softmax_attention
    if who == PEER:
        return import_peer().FastAttention(HEAD_DIM, N_FEATURES).to(device)
    generator = torch.Generator().manual_seed(0)
    projection = draw_projection(N_FEATURES, HEAD_DIM, generator).to(device)
    return functools.partial(favor_attention, projection=projection)


def forward_backward(attention, inputs, grad_output):
    """One call; leaves the gradients in the inputs."""
    for x in inputs:
        x.grad = None
    attention(*inputs).backward(grad_output)


def memory_of(who, frames, device):
    """Peak extra memory of one call in MB; runs in a process of its own."""
    attention = make_attention(who, device)
    for number in (10, frames):
        inputs = make_inputs(number, device)
        grad_output = torch.ones_like(inputs[2])
        call = functools.partial(
            forward_backward, attention, inputs, grad_output
        )
        memory = peak_extra_mb(call, device)
    return memory


def gradients_apart(frames, device):
    """Relative differences of the gradients of queries, keys, values."""
    peer = import_peer()
    generator = torch.Generator().manual_seed(0)
    projection = draw_projection(N_FEATURES, HEAD_DIM, generator).to(device)

    def theirs(query, key, value):
        features = functools.partial(
            peer.softmax_kernel,
            projection_matrix=projection.double(),
            normalize_data=False,
            eps=0.0,
        )
        phi_q = features(query, is_query=True)
        return peer.linear_attention(
            phi_q, features(key, is_query=False), value
        )

    ours = make_attention(OURS, device)
    inputs = make_inputs(frames, device)
    weights = torch.randn(inputs[2].shape, generator=generator).to(device)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    forward_backward(ours, inputs, weights)
    forward_backward(theirs, doubles, weights.double())
    return [
        float((x.grad - y.grad).norm() / y.grad.norm())
        for x, y in zip(inputs, doubles, strict=True)
    ]


def repetitions_at(frames, args):
    """Fewer of the long ones, but never less than 3."""
    return max(3, min(args.repetitions, args.repetitions * 2000 // frames))


def measure(frames, args):
    """Rows of the table and lines below it."""
    names = [OURS, PEER] + [EXACT] * (frames <= args.exact_up_to)
    inputs = make_inputs(frames, args.device)
    grad_output = torch.ones_like(inputs[2])
    calls = {
        who: functools.partial(
            forward_backward,
            make_attention(who, args.device),
            inputs,
            grad_output,
        )
        for who in names
    }
    for call in calls.values():
        call()
    number = repetitions_at(frames, args)
    seconds = interleave(calls, dict.fromkeys(names, number), args.device)
    memory = {}
    for who in names:
        memory[who], reason = in_fresh_process(
            memory_of, who, frames, args.device
        )
        if reason:
            sys.exit(f"{who}: {reason}")
        say(
            f"{frames} frames, {who}: {spread(seconds[who])} ms, "
            f"{memory[who]:.0f} MB"
        )
    medians = {who: statistics.median(seconds[who]) for who in names}
    rows = [
        [
            frames,
            who,
            number,
            spread(seconds[who]),
            f"{memory[who]:.0f}",
            f"{medians[who] / medians[OURS]:.2f}",
            f"{memory[who] / memory[OURS]:.2f}",
        ]
        for who in names
    ]
    lines = []
    if frames in SPEED_TARGETS:
        faster = medians[PEER] / medians[OURS]
        what = f"{frames} frames, times faster than {PEER}"
        lines.append(verdict(what, faster, SPEED_TARGETS[frames]))
    if frames in MEMORY_TARGETS:
        share = memory[OURS] / memory[PEER]
        what = f"{frames} frames, share of the memory of {PEER}"
        lines.append(verdict(what, share, MEMORY_TARGETS[frames], False))
        # output and three gradients in float32
        given = 4 * inputs[0].numel() * 4 / 2**20
        share = (memory[OURS] - given) / (memory[PEER] - given)
        lines.append(
            f"- {frames} frames, the same share without output and gradients, "
            f"{given:.0f} MB for each: {share:.3g}"
        )
    return rows, lines


def measure_auto(frames, args):
    """A row with the times of each kind of attention, and a line."""
    kinds = [
        kind
        for kind in ATTENTION_KINDS
        if kind != "softmax" or frames <= args.exact_up_to
    ]
    x = torch.randn(1, frames, NHEAD * HEAD_DIM, device=args.device)
    calls = {}
    for kind in kinds:
        layer = SelfAttention(x.shape[-1], NHEAD, N_FEATURES, kind)
        calls[kind] = functools.partial(
            forward_backward,
            layer.to(args.device),
            [x.clone().requires_grad_()],
            torch.ones_like(x),
        )
        calls[kind]()
    number = repetitions_at(frames, args)
    seconds = interleave(calls, dict.fromkeys(kinds, number), args.device)
    medians = {kind: statistics.median(seconds[kind]) for kind in kinds}
    better = min(medians[kind] for kind in kinds if kind != "auto")
    ratio = medians["auto"] / better
    say(f"{frames} frames, auto: {ratio:.2f} of the better kind")
    row = [frames, number] + [
        spread(seconds[kind]) if kind in kinds else "-"
        for kind in ATTENTION_KINDS
    ]
    line = verdict(
        f"{frames} frames, time of auto beside the better kind",
        ratio,
        AUTO_TARGET,
        False,
    )
    return [*row, f"{ratio:.2f}"], line


def main():
    """Measures each length and writes the record after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, "favor")
    parser.add_argument(
        "--frames", type=int, nargs="+", default=list(SPEED_TARGETS)
    )
    parser.add_argument(
        "--auto_frames", type=int, nargs="+", default=[259, 517, 600, 1723]
    )
    parser.add_argument(
        "--exact_up_to",
        type=int,
        default=6000,
        help="frames up to which exact attention is timed "
        "(default: %(default)s)",
    )
    parser.add_argument("--repetitions", type=int, default=40)
    args = parser.parse_args()
    record = Record("FAVOR+ attention", __doc__, args.output, args.device)
    apart = gradients_apart(517, args.device)
    agree = max(apart) <= TOLERANCE
    words = ", ".join(f"{x:.1e}" for x in apart)
    lines = [
        f"- gradients of queries, keys, values at 517 frames differ by {words} "
        f"of their norm from {PEER}'s functions in float64 (tolerance "
        f"{TOLERANCE:g}: {'equal' if agree else 'NOT EQUAL'})"
    ]
    say(*lines)
    header = [
        "frames",
        "implementation",
        "calls",
        "ms, median (range)",
        "extra memory, MB",
        "times slower",
        "times the memory",
    ]
    rows, auto_rows = [], []
    auto_header = ["frames", "calls", *ATTENTION_KINDS, "auto / better"]
    for frames in args.frames:
        new_rows, new_lines = measure(frames, args)
        rows += new_rows
        lines += new_lines
        record.write(table(header, rows), "\n".join(lines))
    for frames in args.auto_frames:
        row, line = measure_auto(frames, args)
        auto_rows.append(row)
        lines.append(line)
        record.write(
            table(header, rows),
            "`SelfAttention` by its `attention`, ms, median (range):",
            table(auto_header, auto_rows),
            "\n".join(lines),
        )
    say(f"wrote {args.output}")
    if not agree:
        sys.exit("the two implementations do not agree")


if __name__ == "__main__":
    main()
