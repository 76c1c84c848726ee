"""What the folder of a pre-trained encoder holds; needs no torch."""

ENCODER_FILE = "encoder.ckpt"
SETTINGS_FILE = "hyperparams.yaml"

# What a masknet must have in common with the encoder that initialises it.
SETTINGS = (
    "sample_rate",
    "n_fft",
    "hop_length",
    "spec_norm",
    "d_model",
    "nhead",
    "num_layers",
    "d_ffn",
    "n_features",
)
