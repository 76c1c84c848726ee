"""FAVOR+ attention, forward and backward: ours against performer-pytorch's.

    pip install -c requirements.lock -e '.[bench]'
    python benchmarks/favor.py [--device cuda] [--dtype bfloat16] \
        [--batch_size 4] [--nhead 4] [--output FILE.md]

`trackformer_sb.nnet.favor.favor_attention` against `FastAttention` of
performer-pytorch and exact `scaled_dot_product_attention`, on queries and keys
of norm 1, heads of 64, 256 features. Times: one process, turn by turn, medians.
Memory: a fresh process each, the largest extra memory of one call at full size,
with output and gradients; a call at a small size before it starts the
libraries.

All inputs are of --dtype, to which performer-pytorch's directions and the
layers below are cast as well. In bfloat16 on a GPU exact attention is
PyTorch's flash attention and no other kernel ("exact, flash"); in float32
there, matrix products of all are TF32. On a CPU ours computes in float32
whatever the type.

Both estimate the same kernel, but `FastAttention` scales queries and keys by
64^-0.25 and adds 1e-4 to each feature. The comparison of gradients therefore
calls its functions `softmax_kernel` and `linear_attention` with
`normalize_data=False, eps=0` and our directions, in float64, on the same
inputs as ours. Timed is `FastAttention` as it is.

`attention: auto` is timed as a whole `SelfAttention`, with the projections of
inputs and output, against the same layer with either kind.
"""

import functools
import statistics
import sys

import torch
from common import (
    Record,
    in_fresh_process,
    interleave,
    new_parser,
    parse_args,
    peak_extra_mb,
    say,
    spread,
    table,
    verdict,
)
from favor_calls import (
    EXACT,
    FLASH,
    HEAD_DIM,
    N_FEATURES,
    OURS,
    PEER,
    allow_tf32,
    forward_backward,
    gradients_apart,
    make_attention,
    make_inputs,
    setting,
)

from trackformer_sb.nnet.performer import ATTENTION_KINDS, SelfAttention

FRAMES = (517, 1723, 5168, 20000)

# Device and type -> frames -> times faster than others.
SPEED_TARGETS = {
    ("cpu", "float32"): {
        517: {PEER: 1.8},
        1723: {PEER: 1.8},
        5168: {PEER: 4},
        20000: {PEER: 4},
    },
    ("cuda", "bfloat16"): {5168: {FLASH: 2, PEER: 5}},
}
# Frames -> share of the peer's extra memory.
MEMORY_TARGETS = {20000: 0.1}
# Slowest that auto may be beside the better kind.
AUTO_TARGET = 1.05

# Largest difference of gradients, relative to their norm; float32 on GPUs is
# multiplied as TF32.
TOLERANCES = {
    ("cpu", "float32"): 1e-5,
    ("cuda", "float32"): 1e-3,
    ("cpu", "bfloat16"): 2e-2,
    ("cuda", "bfloat16"): 2e-2,
}


def memory_of(who, frames, args):
    """Peak extra memory of one call in MB; runs in a process of its own."""
    allow_tf32(args)
    attention = make_attention(who, args)
    for number in (10, frames):
        inputs = make_inputs(number, args)
        grad_output = torch.ones_like(inputs[2])
        call = functools.partial(
            forward_backward, attention, inputs, grad_output
        )
        memory = peak_extra_mb(call, args.device)
    return memory


def repetitions_at(frames, args):
    """Fewer of the long ones, but never less than 3."""
    return max(3, min(args.repetitions, args.repetitions * 2000 // frames))


def measure(frames, args):
    """Rows of the table and lines below it."""
    flash = setting(args) == ("cuda", "bfloat16")
    exact = FLASH if flash else EXACT
    names = [OURS, PEER] + [exact] * (frames <= args.exact_up_to)
    inputs = make_inputs(frames, args)
    grad_output = torch.ones_like(inputs[2])
    calls = {
        who: functools.partial(
            forward_backward,
            make_attention(who, args),
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
        memory[who], reason = in_fresh_process(memory_of, who, frames, args)
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
    targets = SPEED_TARGETS.get(setting(args), {}).get(frames, {})
    for who in [who for who in targets if who in names]:
        what = f"{frames} frames, times faster than {who}"
        faster = medians[who] / medians[OURS]
        lines.append(verdict(what, faster, targets[who]))
    if frames in MEMORY_TARGETS:
        share = memory[OURS] / memory[PEER]
        what = f"{frames} frames, share of the memory of {PEER}"
        lines.append(verdict(what, share, MEMORY_TARGETS[frames], False))
        # output and three gradients
        given = 4 * inputs[0].nbytes / 2**20
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
    dtype = getattr(torch, args.dtype)
    x = torch.randn(args.batch_size, frames, args.nhead * HEAD_DIM)
    x = x.to(args.device, dtype)
    calls = {}
    for kind in kinds:
        layer = SelfAttention(x.shape[-1], args.nhead, N_FEATURES, kind)
        layer = layer.to(args.device, dtype)
        calls[kind] = functools.partial(
            forward_backward,
            layer,
            [x.clone().requires_grad_()],
            torch.ones_like(x),
            list(layer.parameters()),
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
    parser = new_parser(__doc__, "favor")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32"
    )
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--nhead", type=int, default=8)
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES))
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
    args = parse_args(parser)
    record = Record("FAVOR+ attention", __doc__, args.output, args.device)
    allow_tf32(args)
    head = (
        f"Batch {args.batch_size}, {args.nhead} heads of {HEAD_DIM}, "
        f"{N_FEATURES} features, {args.dtype}."
    )
    tolerance = TOLERANCES[setting(args)]
    apart = gradients_apart(517, args)
    agree = max(apart) <= tolerance
    words = ", ".join(f"{x:.1e}" for x in apart)
    lines = [
        f"- gradients of queries, keys, values at 517 frames differ by {words} "
        f"of their norm from {PEER}'s functions in float64 (tolerance "
        f"{tolerance:g}: {'equal' if agree else 'NOT EQUAL'})"
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
        record.write(head, table(header, rows), "\n".join(lines))
    for frames in args.auto_frames:
        row, line = measure_auto(frames, args)
        auto_rows.append(row)
        lines.append(line)
        record.write(
            head,
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
