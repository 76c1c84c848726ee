"""Plain values of a yaml, checked before anything is built from them."""

import math
from numbers import Real

from trackformer_sb.objectives.mixit import OBJECTIVES

# Whole numbers from 1.
COUNTS = (
    "batch_size",
    "d_decoder",
    "d_ffn",
    "d_model",
    "decoder_nhead",
    "epoch_segments",
    "grad_accumulation_factor",
    "hop_length",
    "kernel_size",
    "mask_bands",
    "mask_span",
    "n_features",
    "n_fft",
    "nhead",
    "num_channels",
    "num_layers",
    "num_spks",
    "number_of_epochs",
    "sample_rate",
)
# Whole numbers from 0.
COUNTS_FROM_ZERO = (
    "decoder_layers",
    "early_stop_epochs",
    "num_workers",
    "redraw_interval",
    "seed",
)
NUMBERS = (
    "dropout",
    "lambda_diversity",
    "lambda_mask_count",
    "lambda_sparsity",
    "lr",
    "lr_final",
    "mask_ratio",
    "segment_seconds",
    "snr_max",
    "weight_decay",
)
FLAGS = (
    "checkpointing",
    "equal_levels",
    "mixture_consistency",
    "normalise_target",
    "skip_nonfinite_grads",
    "strict",
)
CHOICES = {"assign_by": OBJECTIVES, "mixit_objective": OBJECTIVES}


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and not math.isnan(value)


def _reads_as_number(value):
    try:
        return _is_number(float(value) if isinstance(value, str) else value)
    except ValueError:
        return False


# Keys, what they hold, and how to tell; those of NUMBERS come to it.
RULES = (
    (COUNTS, "a whole number from 1", lambda x: _is_count(x) and x >= 1),
    (
        COUNTS_FROM_ZERO,
        "a whole number from 0",
        lambda x: _is_count(x) and x >= 0,
    ),
    (FLAGS, "True or False", lambda x: isinstance(x, bool)),
)


def check_values(values, built=True):
    """Refuses values of a wrong kind.

    Values that are None are left to who reads them, and so are keys that are
    not known here.

    Arguments
    ---------
    values : dict
        Of a yaml.
    built : bool
        Whether HyperPyYAML read them. Before that they are what PyYAML makes of
        them, for which 1e-4 is a text.

    Raises
    ------
    ValueError
        Naming the key, its value, and what was expected.

    Example
    -------
    >>> check_values({"lr": 1e-4, "batch_size": 4})
    >>> check_values({"batch_size": 0})
    Traceback (most recent call last):
    ValueError: batch_size: expected a whole number from 1, got 0
    """
    is_number = _is_number if built else _reads_as_number
    for keys, expected, fits in (*RULES, (NUMBERS, "a number", is_number)):
        for key in keys:
            value = values.get(key)
            if value is not None and not fits(value):
                raise ValueError(f"{key}: expected {expected}, got {value!r}")
    for key, known in CHOICES.items():
        value = values.get(key)
        if value is not None and value not in known:
            raise ValueError(
                f"{key} must be one of {', '.join(known)}, got {value!r}"
            )
