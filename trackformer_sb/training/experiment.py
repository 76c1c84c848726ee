"""From a command line to a Brain with its data, for all recipes."""

import gc
import os
import pathlib
import signal
import sys
import time
from typing import NamedTuple

import speechbrain as sb
import torch
import yaml
from hyperpyyaml import resolve_references
from speechbrain.dataio.sampler import ReproducibleRandomSampler
from speechbrain.utils.distributed import ddp_broadcast
from speechbrain.utils.logger import get_logger
from speechbrain.utils.run_opts import RunOptions

from trackformer_sb.data.audio import UnreadableAudio
from trackformer_sb.nnet.transfer import plain_values
from trackformer_sb.training.arguments import load_hparams, parse_arguments
from trackformer_sb.training.dataio import dataio_prep
from trackformer_sb.training.keys import BEFORE, MAY_CHANGE, NAMED_MAY_CHANGE

logger = get_logger(__name__)

# What torch says in a RuntimeError when memory on the CPU is used up.
CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")

MATMUL_PRECISIONS = ("highest", "high", "medium")

# Mixed precision whose matrix products take this many times those of float32
# is worth a warning.
SLOW_BF16 = 1.5


class Experiment(NamedTuple):
    """What a command line asks for."""

    hparams: dict
    run_opts: RunOptions
    # arguments of create_experiment_directory, which also keeps a copy of the
    # file that calls it
    directory: dict


def load_experiment(argv, selection_metrics):
    """Reads the command line and the yaml; writes no file.

    Sets the precision of float32 matrix products of this process, the yaml's
    ``matmul_precision`` (``torch.set_float32_matmul_precision``).

    Arguments
    ---------
    argv : list of str
        The command line, see ``parse_arguments``.
    selection_metrics : sequence of str
        Valid values of the key ``selection_metric``.

    Returns
    -------
    Experiment
        The loaded yaml, and what it was loaded from.

    Raises
    ------
    FileNotFoundError, ValueError
        For settings that cannot work, or an output folder with checkpoints of
        another model.
    """
    hparams_file, run_opts, overrides = parse_arguments(argv)
    device = run_opts.device or ""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch finds no CUDA device")
    if run_opts.data_parallel_backend:
        raise ValueError(
            "--data_parallel_backend: expected torchrun for several GPUs, for "
            "masks have the batch in their second dimension"
        )
    hparams = BEFORE | load_hparams(hparams_file, overrides)
    metric = hparams.get("selection_metric", selection_metrics[0])
    if metric not in selection_metrics:
        raise ValueError(
            f"selection_metric must be one of {', '.join(selection_metrics)}, "
            f"got {metric!r}"
        )
    if "matmul_precision" in hparams:
        set_matmul_precision(hparams["matmul_precision"])
    hparams["checkpointer"].check_fits()
    if hparams["checkpointer"].find_checkpoint() is not None:
        check_same(hparams_file, overrides, hparams["output_folder"])
    sb.utils.distributed.ddp_init_group(run_opts)
    directory = {
        "experiment_directory": hparams["output_folder"],
        "hyperparams_to_save": hparams_file,
        "overrides": overrides,
    }
    return Experiment(hparams, run_opts, directory)


def set_matmul_precision(precision):
    """``torch.set_float32_matmul_precision``, refusing what it does not know.

    torch itself goes on with a warning.

    Raises
    ------
    ValueError
        Naming the key, with its valid values.
    """
    if precision not in MATMUL_PRECISIONS:
        raise ValueError(
            f"matmul_precision must be one of {', '.join(MATMUL_PRECISIONS)}, "
            f"got {precision!r}"
        )
    torch.set_float32_matmul_precision(precision)


def bf16_slowdown(size=256):
    """What a bfloat16 matrix product costs on this CPU, in float32 products.

    Where its instructions are missing torch carries on silently, many times
    slower.

    Returns
    -------
    float
        Ratio of times, measured in a fraction of a second.
    """
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(4):  # the first warms up
            begin = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - begin)
        fastest[dtype] = min(times)
    return fastest[torch.bfloat16] / fastest[torch.float32]


def check_same(hparams_file, overrides, output_folder):
    """Compares an experiment with the one that its folder was begun with.

    What was trained with other settings must not get the name of these.

    Raises
    ------
    ValueError
        Naming the keys that differ, with both values.
    """
    path = pathlib.Path(output_folder) / "hyperparams.yaml"
    if not path.is_file():
        return
    with open(hparams_file, encoding="utf-8") as file:
        asked = resolve_references(file, overrides).getvalue()
    try:
        begun = plain_values(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        begun = None
    if not isinstance(begun, dict):
        return  # it was cut
    # run options were not recorded before this one was there
    recorded = "skip_nonfinite_grads" in begun
    unknown = () if recorded else ("grad_accumulation_factor", "max_grad_norm")
    begun = BEFORE | begun
    changing = MAY_CHANGE + (NAMED_MAY_CHANGE if "classes" in begun else ())
    different = [
        f"{key} was {begun[key]!r}, now {value!r}"
        for key, value in plain_values(asked).items()
        if key not in (*changing, *unknown)
        and key in begun
        and _one_spelling(begun[key]) != _one_spelling(value)
    ]
    if different:
        raise ValueError(
            f"{output_folder} has checkpoints of an experiment with other "
            f"settings: {'; '.join(different)}. Choose another output_folder, "
            "or those settings"
        )


def _one_spelling(value):
    """Numbers have many, as 1e-4 and 0.0001, and paths, as a/b and ./a/b."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return os.path.abspath(value)
    number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if number else value


def make_brain(brain_class, experiment):
    """A Brain with its data, knowing how many steps it will take.

    Arguments
    ---------
    brain_class : type
        A ``MusicBrain``.
    experiment : Experiment
        See ``load_experiment``; its folder is prepared.

    Returns
    -------
    brain : MusicBrain
        Ready for ``fit``.
    datasets : dict
        "train", "valid" and "test".

    Raises
    ------
    ValueError
        If an epoch has no batch or no optimizer step.
    """
    hparams, run_opts = experiment.hparams, experiment.run_opts
    brain = brain_class(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    if brain.max_grad_norm < 0:
        # SpeechBrain documents a negative norm as "off" but turns the
        # gradient around with it
        brain.max_grad_norm = float("inf")
    precisions = brain.precision, brain.eval_precision
    if brain.device_type == "cpu" and "bf16" in precisions:
        slowdown = bf16_slowdown()
        if slowdown > SLOW_BF16:
            logger.warning(
                "precision and eval_precision: in bf16 this CPU takes "
                f"{slowdown:.1f} times as long for a matrix product as in fp32"
            )
    for options in ("train_loader_options", "eval_loader_options"):
        # workers load ahead, two batches each; pinned ones are copied to a
        # GPU faster and without a wait
        hparams[options]["pin_memory"] = brain.device_type == "cuda"
    rank = getattr(brain, "rank", 0)
    datasets, brain.pairs = dataio_prep(hparams, rank)
    brain.skipped, brain.silent_songs, brain.sounding = {}, set(), {}
    brain.results_folder = pathlib.Path(hparams["output_folder"])
    brain.num_processes, curves = _world_size(brain), {}
    if brain.debug and not brain.debug_persistently:
        # a few batches must not replace the results of a training, and all
        # ranks need the same of SpeechBrain's temporary folders
        brain.results_folder = brain.results_folder / "debug"
        brain.checkpointer.checkpoints_dir = pathlib.Path(
            ddp_broadcast(str(brain.checkpointer.checkpoints_dir))
        )
        brain.results_folder.mkdir(exist_ok=True)
        log = brain.results_folder / "train_log.txt"
        hparams["train_logger"].save_file = str(log)
        curves = {"save_dir": str(brain.results_folder / "tensorboard")}
    brain.tensorboard = hparams["tensorboard_logger"](**curves)
    segments, options = len(datasets["train"]), hparams["train_loader_options"]
    if hparams["dataset"] == "shards":
        # what this rank reads; all ranks read as much
        segments *= _world_size(brain)
    elif hparams["epoch_segments"] or options.get("shuffle"):
        segments = min(segments, hparams["epoch_segments"] or segments)
        # an order, and with fewer a set, of its own in each epoch; that of
        # SpeechBrain is the same for all seeds on several processes
        brain.train_sampler = ReproducibleRandomSampler(
            datasets["train"], seed=hparams["seed"], num_samples=segments
        )
        options.pop("shuffle", None)
        options["sampler"] = brain.train_sampler
    brain.num_batches, brain.num_steps = _count_steps(brain, hparams, segments)
    # ranks start from equal weights but draw their own dropout
    torch.manual_seed(hparams["seed"] + rank)
    return brain, datasets


def _world_size(brain):
    return torch.distributed.get_world_size() if brain.distributed_launch else 1


def _count_steps(brain, hparams, segments):
    """Batches of an epoch, and optimizer steps of the training."""
    world = _world_size(brain)
    batches = segments // (hparams["batch_size"] * world)
    if not batches:
        raise ValueError(
            f"batch_size: {hparams['batch_size']} on {world} process(es) is "
            f"more than the {segments} training segments"
        )
    # SpeechBrain counts batches anew in each epoch
    steps = batches // brain.grad_accumulation_factor
    if not steps:
        raise ValueError(
            f"grad_accumulation_factor: {brain.grad_accumulation_factor} is "
            f"more than the {batches} batches of an epoch"
        )
    steps *= hparams["number_of_epochs"]
    return batches, min(steps, brain.optimizer_step_limit or steps)


def train_and_test(brain, datasets, hparams):
    """Fits, then evaluates the best checkpoint."""
    brain.fit(
        hparams["epoch_counter"],
        datasets["train"],
        datasets["valid"],
        train_loader_kwargs=hparams["train_loader_options"],
        valid_loader_kwargs=hparams["eval_loader_options"],
    )
    brain.evaluate(
        datasets["test"],
        max_key="score",
        test_loader_kwargs=dict(hparams["eval_loader_options"]),
    )


def run(main):
    """Runs a recipe with one line in place of a traceback for the user.

    Raises
    ------
    SystemExit
        If the recipe fails in a way that is known, or is interrupted.
    """
    try:
        main(sys.argv[1:])
        if torch.distributed.is_initialized():
            # ranks that just exit abort now and then; what DDP holds goes first
            gc.collect()
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except (OSError, ValueError, ImportError, UnreadableAudio) as error:
        logger.debug("stopped", exc_info=True)
        message = f"{type(error).__name__}: {error}"
        if "Traceback" in message:
            # from a loader worker: the last line says what happened
            message = message.strip().splitlines()[-1]
        sys.exit(message)
    except KeyboardInterrupt:
        print(
            "interrupted; the same command goes on from its last checkpoint",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(x in str(error) for x in CPU_OUT_OF_MEMORY):
            raise
        logger.debug("stopped", exc_info=True)
        sys.exit(
            "out of memory: expected a smaller batch_size or segment_seconds, "
            f"or more memory ({str(error).splitlines()[0]})"
        )
