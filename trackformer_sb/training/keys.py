"""Which keys go where; without torch, for the grid loads none."""

# Keys that a training may go on with other values of.
MAY_CHANGE = (
    "output_folder",  # it may have been moved, these are its own
    "save_folder",
    "train_log",
    "number_of_epochs",
    "early_stop_epochs",
    "num_workers",
    "cache_folder",
    "strict",
    "train_loader_options",
    "eval_loader_options",
    "ckpt_interval_minutes",
    "precision",
    "matmul_precision",
    "compile_module_keys",
    "checkpointing",
)
# More of them where stems have names: those runs go on for days.
NAMED_MAY_CHANGE = (
    "mixtures_folder",
    "mixture_share",
    "absent",
    "valid_folders",
    "valid_windows",
    "epoch_items",
    "finish_minutes",
    "stem_classes",
    "lr",
    "ema_decay",
    "log_steps",
)

# What a training did before its yaml had the key.
BEFORE = {"visible_weight": 0.0, "pretrained_layer_decay": 1.0}

# SpeechBrain's run options that make sense for every cell: to ask SpeechBrain
# for them would import torch
RUN_OPTIONS = (
    "precision",
    "eval_precision",
    "grad_accumulation_factor",
    "max_grad_norm",
    "compile",
    "ckpt_interval_minutes",
    "noprogressbar",
)
# What decides which songs there are, and which are held back.
SONG_KEYS = (
    "split_ratio",
    "split",
    "split_file",
    "stem_groups",
    "max_stems",
    "audio_check",
    "min_active_share",
    "min_level_db",
    "strict",
    "cache_folder",
)
# What a pre-training has in common with the separators that take its encoder:
# the songs, and all that its weights depend on.
SHARED_KEYS = (
    *SONG_KEYS,
    "channel",
    "num_workers",
    "matmul_precision",
    "sample_rate",
    "n_fft",
    "hop_length",
    "num_layers",
    "d_model",
    "nhead",
    "d_ffn",
    "n_features",
    "dropout",
    "attention",
    "spec_norm",
)
