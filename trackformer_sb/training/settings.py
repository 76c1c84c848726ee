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
    "ckpt_interval_minutes",
    "dropout",
    "gain_db",
    "lambda_diversity",
    "lambda_mask_count",
    "lambda_sparsity",
    "lr_final",
    "mask_ratio",
    "min_active_share",
    "pitch_shift_semitones",
    "polarity_share",
    "segment_hop_seconds",
    "silent_share",
    "single_stem_share",
    "speed_percent",
    "time_shift_seconds",
    "time_stretch_percent",
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
# What may be null, which elsewhere is no value.
OPTIONAL = ("assign_by", "epoch_segments")
CHOICES = {"assign_by": OBJECTIVES, "mixit_objective": OBJECTIVES}


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _as_number(value, built):
    """A value as a number, NaN if it is none."""
    if isinstance(value, str) and not built:
        try:
            return float(value)
        except ValueError:
            return math.nan
    number = isinstance(value, Real) and not isinstance(value, bool)
    return value if number else math.nan


# Keys, what they hold, and how to tell.
RULES = (
    (("num_spks",), "a whole number from 2", lambda x: _is_count(x) and x >= 2),
    (COUNTS, "a whole number from 1", lambda x: _is_count(x) and x >= 1),
    (
        COUNTS_FROM_ZERO,
        "a whole number from 0",
        lambda x: _is_count(x) and x >= 0,
    ),
    (FLAGS, "True or False", lambda x: isinstance(x, bool)),
)
# The same for numbers, NaN being none.
NUMBER_RULES = (
    (("snr_max",), "a number", lambda x: not math.isnan(x)),
    (
        ("max_grad_norm",),
        "a number above 0, or below it for no limit",
        lambda x: x != 0 and not math.isnan(x),
    ),
    (("lr", "segment_seconds"), "a number above 0", lambda x: 0 < x < math.inf),
    (NUMBERS, "a number", math.isfinite),
)


def check_values(values, built=True):
    """Refuses values of a wrong kind.

    Keys that are not known here are left to those that read them.

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
    numbers = {key: _as_number(x, built) for key, x in values.items()}
    for rules, read in ((RULES, values), (NUMBER_RULES, numbers)):
        for keys, expected, fits in rules:
            for key in (key for key in keys if key in values):
                missing = values[key] is None and key in OPTIONAL
                if not missing and not fits(read[key]):
                    raise ValueError(
                        f"{key}: expected {expected}, got {values[key]!r}"
                    )
    lr, lr_final = numbers.get("lr"), numbers.get("lr_final")
    if None not in (lr, lr_final) and not 0 <= lr_final <= lr:
        raise ValueError(
            f"lr_final: expected a number from 0 to lr, which is "
            f"{lr:g}, got {lr_final:g}"
        )
    for key, known in CHOICES.items():
        value = values.get(key)
        if value is not None and value not in known:
            raise ValueError(
                f"{key} must be one of {', '.join(known)}, got {value!r}"
            )
