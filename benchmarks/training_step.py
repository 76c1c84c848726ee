"""A whole training step: the Performer against ConvTasNet.

    python benchmarks/training_step.py [--seconds 3 10 30 60] [--device cuda]

A step is: separate the sum of two mixtures of noise into 8 outputs, our MixIT
loss (for all candidates, so that only the model differs), backward, AdamW.
Candidates, built from hparams/*.yaml: the Performer of performer_mixit.yaml
with FAVOR+, with exact attention and with `attention: auto`, SpeechBrain's
ConvTasNet and Asteroid's TDConvNet at kernel 88 and stride 44, and the latter
at Asteroid's defaults, kernel 16 and stride 8. Float32, without mixture
consistency (TF32 on GPUs), but for five: the Performer with FAVOR+ and
`--matmul_precision=medium`, and with `--precision=bf16` too, as with exact
attention, and both ConvTasNets at kernel 88 with the latter alone, as the
former makes Asteroid's slower. "medium" allows products of rounded inputs; how
far they are from float64 is recorded.

Beside them the FusionMaskNet of separator.yaml: masks for the sum of four
stereo stems of noise, its loss of named stems, backward, MuonAdamW. In float32
as it is and compiled, as that yaml has it, and compiled with
`--precision=bf16`; the memory of compiled ones includes that of compiling. With
OMP_NUM_THREADS=1 times are those of a rank on a core of its own, without the
exchange of gradients.

Memory first: each candidate in a fresh process makes 2 steps (the second with
the optimizer's state); recorded is the largest extra memory beyond the built
model. A candidate that needs more than --skip_above_gb (on a GPU with the built
model) or --time_limit is stopped and recorded as such. Times then: those that
passed, in one process, turn by turn after a short warm-up, medians. Slow ones
(above 10 s a step in the memory run) make --slow_repetitions steps. Between
them the MixIT loss by itself, forward and backward, for its share of a step
with FAVOR+. An epoch of an hour of music has 3600 / (seconds * batch) steps.
The record is written after every length, and with the last one two pictures
beside it: time and memory against length, with the exponent p of length^p that
fits best, and the ratios to the Performer with FAVOR+.
"""

import functools
import io
import pathlib
import statistics
import warnings
from typing import NamedTuple

import torch
from common import (
    Record,
    free_cache,
    in_fresh_process,
    interleave,
    limit_memory,
    limit_of,
    new_parser,
    parse_args,
    peak_extra_mb,
    say,
    spread,
    table,
    timed,
    verdict,
)
from hyperpyyaml import load_hyperpyyaml, resolve_references
from plots import draw, growth
from ruamel.yaml import YAML

from trackformer_sb.inference.separation import separate
from trackformer_sb.objectives.mixit import mixit_loss
from trackformer_sb.objectives.named import named_loss
from trackformer_sb.training.optimization import MuonAdamW

HPARAMS = pathlib.Path(__file__).resolve().parents[1] / "hparams"
SAMPLE_RATE = 44100
SLOW_SECONDS = 10.0
NODES = ("Encoder", "MaskNet", "Decoder")

PERFORMER, SEPARATOR = "performer_mixit.yaml", "separator.yaml"
TDCONVNET = "asteroid_convtasnet_mixit.yaml"
FAVOR, EXACT = "Performer, favor", "Performer, softmax"
ASTEROID, DEFAULTS = "Asteroid, kernel 88", "Asteroid, kernel 16"
FAVOR_MEDIUM = f"{FAVOR}, medium"
FAVOR_BF16, ASTEROID_BF16 = f"{FAVOR}, bf16", f"{ASTEROID}, bf16"
EXACT_BF16, SPEECHBRAIN = f"{EXACT}, bf16", "SpeechBrain, kernel 88"
SPEECHBRAIN_BF16 = f"{SPEECHBRAIN}, bf16"
FUSION, COMPILED = "Fusion", "Fusion, compiled"
COMPILED_BF16 = f"{COMPILED}, bf16"
CANDIDATES = {
    FAVOR: (PERFORMER, {"MaskNet": {"attention": "favor"}}),
    EXACT: (PERFORMER, {"MaskNet": {"attention": "softmax"}}),
    "Performer, auto": (PERFORMER, {"MaskNet": {"attention": "auto"}}),
    FAVOR_MEDIUM: (PERFORMER, {"MaskNet": {"attention": "favor"}}),
    FAVOR_BF16: (PERFORMER, {"MaskNet": {"attention": "favor"}}),
    EXACT_BF16: (PERFORMER, {"MaskNet": {"attention": "softmax"}}),
    SPEECHBRAIN: ("convtasnet_mixit.yaml", {}),
    SPEECHBRAIN_BF16: ("convtasnet_mixit.yaml", {}),
    ASTEROID: (TDCONVNET, {}),
    ASTEROID_BF16: (TDCONVNET, {}),
    DEFAULTS: (TDCONVNET, {"kernel_size": 16}),
    FUSION: (SEPARATOR, {}),
    COMPILED: (SEPARATOR, {}),
    COMPILED_BF16: (SEPARATOR, {}),
}
NAMED = (FUSION, COMPILED, COMPILED_BF16)
AUTOCAST = (
    *(FAVOR_BF16, EXACT_BF16, SPEECHBRAIN_BF16, ASTEROID_BF16),
    COMPILED_BF16,
)
MEDIUM = (FAVOR_MEDIUM, FAVOR_BF16, EXACT_BF16)
NUM_CLASSES = 4

# Seconds -> candidate -> how many times slower than the Performer with FAVOR+
# it is to be at least, and how many times its memory it is to need. At 3 s
# FAVOR+ is to be within 10 % of exact attention.
TARGETS = {
    3: {EXACT: (0.9, None), ASTEROID: (6, 3), DEFAULTS: (40, 10)},
    10: {EXACT: (1.4, None), ASTEROID: (8, None)},
    30: {EXACT: (2.5, None)},
    60: {EXACT: (4, None)},
}
# Seconds -> the paper's epoch of ConvTasNet over that of the Performer.
PAPER_EPOCHS = {3: 1.36, 5: 1.27, 10: 1.22}
PEERS = (
    *((FAVOR, SPEECHBRAIN), (FAVOR, ASTEROID)),
    *((FAVOR_BF16, SPEECHBRAIN_BF16), (FAVOR_BF16, ASTEROID_BF16)),
)
# GB of a GPU that segments of 30 s and more are to fit in.
FITS_GB = 32
# Seconds, batch and threads of a rank -> s a step of FusionMaskNet, with AMX.
RANK_TARGETS = {(3, 4, 1): 1.2}
# Percent of a step that the loss may take.
LOSS_TARGET = 3.0
LOSS = "MixIT loss"


class Cost(NamedTuple):
    """What the memory run found out."""

    memory: float  # MB
    seconds: float  # of the second step
    parameters: int


def build(name, num_spks, device, **more):
    """Encoder, masknet and decoder of a candidate, with more keys if any."""
    file, overrides = CANDIDATES[name]
    overrides = {**overrides, "num_spks": num_spks, **more}
    with open(HPARAMS / file, encoding="utf-8") as yaml:
        resolved = YAML().load(resolve_references(yaml, overrides))
    text = io.StringIO()
    YAML().dump({key: resolved[key] for key in NODES}, text)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hparams = load_hyperpyyaml(text.getvalue())
    modules = torch.nn.ModuleList(hparams[key] for key in NODES)
    return modules.to(device)


def make_batch(named, batch_size, seconds, device):
    """Noise: the cost does not depend on the music.

    Mixtures [batch, 2, time] or named stems [batch, classes, 2, time].
    """
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_CLASSES, 2) if named else (2,)
    time = round(seconds * SAMPLE_RATE)
    noise = torch.randn(batch_size, *shape, time, generator=generator)
    return 0.1 * noise.to(device)


def mixit_objective(modules, mixtures):
    """Loss of mixtures [batch, 2, time]."""
    est_source, _ = separate(mixtures.sum(1), *modules)
    return mixit_loss(est_source, mixtures)[0].mean()


def named_objective(modules, stems):
    """Loss of stems [batch, classes, 2, time], as training has it."""
    encoder, masknet, _ = modules
    mix = stems.sum(1)
    mix_w = encoder(mix.flatten(0, 1)).unflatten(0, mix.shape[:2])
    stems_w = encoder(stems.flatten(0, 2)).unflatten(0, stems.shape[:3])
    return named_loss(masknet(mix_w), mix_w, stems_w, SAMPLE_RATE).mean()


def train_step(name, modules, optimizer, batch):
    """One step of training."""
    precision = "medium" if name in MEDIUM else "high"
    torch.set_float32_matmul_precision(precision)
    optimizer.zero_grad(set_to_none=True)
    objective = named_objective if name in NAMED else mixit_objective
    with torch.autocast(
        batch.device.type, torch.bfloat16, enabled=name in AUTOCAST
    ):
        loss = objective(modules, batch)
    loss.backward()
    optimizer.step()


def loss_alone(num_spks, mixtures):
    """Forward and backward of the loss, as of sources from a network."""
    batch_size, _, time = mixtures.shape
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch_size, num_spks, time, generator=generator)
    est_source = noise.to(mixtures.device).requires_grad_()

    def call():
        torch.set_float32_matmul_precision("high")
        est_source.grad = None
        mixit_loss(est_source, mixtures)[0].mean().backward()

    return call


def make_step(name, num_spks, device):
    """A function of a batch that makes a step, and its modules."""
    modules = build(name, num_spks, device)
    if name in NAMED:
        optimizer = MuonAdamW(modules.parameters())
    else:
        optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-4, fused=True)
    if name in (COMPILED, COMPILED_BF16):
        modules[1].compile(dynamic=False)
    return functools.partial(train_step, name, modules, optimizer), modules


def cost_of(name, args, seconds):
    """Cost of a candidate; runs in a process of its own."""
    step, modules = make_step(name, args.num_spks, args.device)
    batch = make_batch(name in NAMED, args.batch_size, seconds, args.device)
    limit_memory(args.skip_above_gb, args.device)
    times = []

    def two_steps():
        for _ in range(2):
            times.append(timed(lambda: step(batch), args.device))

    memory = peak_extra_mb(two_steps, args.device)
    parameters = sum(p.numel() for p in modules.parameters())
    return Cost(memory, times[-1], parameters)


def costs_at(args, seconds):
    """Cost, or the reason why there is none, of each candidate."""
    costs, reasons = {}, {}
    for name in args.candidates:
        cost, reason = in_fresh_process(
            cost_of, name, args, seconds, timeout=args.time_limit
        )
        if reason and "memory" in reason:
            limit = limit_of(args.skip_above_gb, args.device)
            reason = f"needs more than {limit:.3g} GB"
        if reason:
            reasons[name] = reason
            say(f"{seconds:g} s, {name}: skipped, {reason}")
        else:
            costs[name] = cost
            say(
                f"{seconds:g} s, {name}: {cost.memory:.0f} MB, about "
                f"{cost.seconds:.2f} s a step"
            )
    return costs, reasons


def times_at(args, seconds, costs):
    """Seconds of each step, interleaved."""
    batches, short = (
        {
            named: make_batch(named, args.batch_size, length, args.device)
            for named in (False, True)
        }
        # SpeechBrain's ConvTasNet takes no less than 0.13 s
        for length in (seconds, 0.2)
    )
    calls, repetitions = {}, {}
    for name, cost in costs.items():
        step, _ = make_step(name, args.num_spks, args.device)
        named = name in NAMED
        # what is compiled is so for one length
        warm_up = batches if name in (COMPILED, COMPILED_BF16) else short
        step(warm_up[named])
        calls[name] = functools.partial(step, batches[named])
        slow = cost.seconds > SLOW_SECONDS
        repetitions[name] = args.slow_repetitions if slow else args.repetitions
    calls[LOSS] = loss_alone(args.num_spks, batches[False])
    calls[LOSS]()
    repetitions[LOSS] = max(repetitions.values(), default=0)
    return interleave(calls, repetitions, args.device)


def product_errors(device):
    """A line: how exact matrix products are in either precision."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2048, 256, generator=generator, dtype=torch.float64)
    b = torch.randn(256, 256, generator=generator, dtype=torch.float64)
    exact, errors = a @ b, []
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        product = a.float().to(device) @ b.float().to(device)
        error = (product.cpu().double() - exact).norm() / exact.norm()
        errors.append(f"{precision} {error:.1e}")
    return f"Errors of a product of 2048 x 256 x 256: {', '.join(errors)}."


def gpu_and_paper(seconds, costs, medians, args):
    """Lines: epochs beside the paper's, and what is to fit in a GPU."""
    lines = [
        verdict(
            f"epoch of {peer} over that of {name}, the paper's as target",
            medians[peer] / medians[name],
            PAPER_EPOCHS[seconds],
        )
        for name, peer in PEERS
        if seconds in PAPER_EPOCHS and name in costs and peer in costs
    ]
    if torch.device(args.device).type == "cuda" and seconds >= 30:
        lines += [
            verdict(
                f"{name}: extra memory, GB",
                costs[name].memory / 2**10,
                FITS_GB,
                False,
            )
            for name in (FAVOR, FAVOR_BF16)
            if name in costs
        ]
    return lines


def report(seconds, costs, reasons, times, args):
    """Table of one length, and the targets if it has any."""
    medians = {name: statistics.median(times[name]) for name in times}
    steps = 3600 / (seconds * args.batch_size)
    targets = TARGETS.get(seconds, {})
    rows, lines = [], []
    for name in CANDIDATES:
        if name in reasons:
            rows.append([name, *["-"] * 7, reasons[name]])
        if name not in costs:
            continue
        ratios = ["-", "-"]
        if FAVOR in costs:
            faster = medians[name] / medians[FAVOR]
            smaller = costs[name].memory / costs[FAVOR].memory
            ratios = [f"{faster:.2f}", f"{smaller:.2f}"]
            lines += [
                verdict(f"{name}: {what}", measured, target)
                for what, measured, target in zip(
                    ("times slower", "times the memory"),
                    (faster, smaller),
                    targets.get(name, (None, None)),
                    strict=True,
                )
                if target is not None
            ]
        rows.append(
            [
                name,
                f"{costs[name].parameters / 1e6:.1f}",
                len(times[name]),
                spread(times[name]),
                f"{steps * medians[name]:.1f}",
                f"{costs[name].memory:.0f}",
                *ratios,
                "",
            ]
        )
    header = [
        "candidate",
        "million parameters",
        "steps",
        "ms a step, median (range)",
        "s an epoch of 1 h",
        "extra memory, MB",
        "times slower than favor",
        "times its memory",
        "",
    ]
    peers = [medians[x] for x in (ASTEROID, ASTEROID_BF16) if x in costs]
    if ASTEROID in targets and peers and FAVOR_BF16 in costs:
        what = f"{ASTEROID}, the faster of its two: times slower than bf16"
        measured = min(peers) / medians[FAVOR_BF16]
        lines.append(verdict(what, measured, targets[ASTEROID][0]))
    if FAVOR in costs:
        share = 100 * medians[LOSS] / medians[FAVOR]
        what = "share of the MixIT loss in a step of favor, %"
        lines.append(verdict(what, share, LOSS_TARGET, False))
    compiled = [medians[x] for x in (COMPILED, COMPILED_BF16) if x in costs]
    rank = seconds, args.batch_size, torch.get_num_threads()
    if compiled and rank in RANK_TARGETS:
        what = f"{COMPILED}, the faster of its two: s a step on one core"
        target = RANK_TARGETS[rank]
        lines.append(verdict(what, min(compiled), target, False))
    lines += gpu_and_paper(seconds, costs, medians, args)
    blocks = [f"## {seconds:g} s", table(header, rows)]
    return [*blocks, "\n".join(lines)] if lines else blocks


def main():
    """Measures each length and writes the record after each."""
    parser = new_parser(__doc__, "training_step")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[3, 10, 30, 60]
    )
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--num_spks", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--slow_repetitions", type=int, default=2)
    parser.add_argument("--skip_above_gb", type=float, default=18.0)
    parser.add_argument(
        "--time_limit",
        type=float,
        default=300.0,
        help="seconds for a memory run (default: %(default)s)",
    )
    parser.add_argument(
        "--candidates", nargs="+", default=list(CANDIDATES), metavar="NAME"
    )
    args = parse_args(parser)
    unknown = set(args.candidates) - set(CANDIDATES)
    if unknown:
        parser.error(f"expected candidates of {list(CANDIDATES)}")
    record = Record("Training step", __doc__, args.output, args.device)
    setting = f"Batch {args.batch_size}, {args.num_spks} outputs, 44.1 kHz. "
    setting += product_errors(args.device)
    blocks, results = [setting], {}
    for seconds in args.seconds:
        costs, reasons = costs_at(args, seconds)
        times = times_at(args, seconds, costs)
        # or the processes that measure memory next find none
        free_cache(args.device)
        blocks += report(seconds, costs, reasons, times, args)
        record.write(*blocks)
        say(*blocks[1:], sep="\n\n")
        for name in costs:
            milliseconds = 1e3 * statistics.median(times[name])
            point = seconds, milliseconds, costs[name].memory
            results.setdefault(name, []).append(point)
    ending = growth(results)
    record.write(*blocks, *ending, *draw(results, FAVOR, args.output))
    say(*ending, f"wrote {args.output}", sep="\n\n")


if __name__ == "__main__":
    main()
