"""Tiny separators and files, as several tests share them."""

import io

import numpy as np
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references

from trackformer_sb.inference.separator import Separator

RATE = 8000
CLASSES = ["drums", "vocals", "other"]
STFT = {"n_fft": 256, "hop_length": 64}
SIZES = {"d_model": 16, "nhead": 2, "num_layers": 1, "n_features": 16}

# What create_experiment_directory saves after a training, with all that does
# not belong into the folder of a separator.
PERFORMER = """\
seed: 1234
__set_seed: !apply:torch.manual_seed [!ref <seed>]
data_folder: {data}
dataset: stems
segment_seconds: 3.0
selection_metric: si_snri
sample_rate: 8000
num_spks: 3
n_fft: 256
Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder
  n_fft: !ref <n_fft>
  hop_length: 64
MaskNet: !new:trackformer_sb.nnet.masknet.PerformerMaskNet
  in_channels: !ref <n_fft> // 2 + 1
  num_spks: !ref <num_spks>
  d_model: 16
  nhead: 2
  num_layers: 1
  n_features: 16
  dropout: 0.5
  mask_activation: softmax
Decoder: !new:trackformer_sb.nnet.stft.STFTDecoder
  n_fft: !ref <n_fft>
  hop_length: 64
modules:
  encoder: !ref <Encoder>
  masknet: !ref <MaskNet>
  decoder: !ref <Decoder>
"""

CONV_TASNET = """\
sample_rate: 8000
num_spks: 3
Encoder: !new:speechbrain.lobes.models.dual_path.Encoder
  kernel_size: 88
  out_channels: 32
MaskNet: !new:{masknet}
Decoder: !new:speechbrain.lobes.models.dual_path.Decoder
  in_channels: 32
  out_channels: 1
  kernel_size: 88
  stride: 44
  bias: False
modules:
  encoder: !ref <Encoder>
  masknet: !ref <MaskNet>
  decoder: !ref <Decoder>
"""
OF_SPEECHBRAIN = CONV_TASNET.format(
    masknet="""speechbrain.lobes.models.conv_tasnet.MaskNet
  {N: 32, B: 8, H: 16, P: 3, X: 2, R: 1, C: 3, norm_type: gLN, causal: False,
  mask_nonlinear: relu}"""
)
OF_ASTEROID = CONV_TASNET.format(
    masknet="""trackformer_sb.asteroid.AsteroidMaskNet
  masker: !new:asteroid.masknn.convolutional.TDConvNet
    {in_chan: 32, n_src: 3, n_blocks: 2, n_repeats: 1, bn_chan: 8, hid_chan: 16,
    mask_act: relu}"""
)


def trained(folder, text=PERFORMER):
    """A resolved yaml in a folder of its own, and its modules with weights."""
    folder.mkdir(exist_ok=True)
    text = text.replace("{data}", str(folder))
    path = folder / "hyperparams.yaml"
    path.write_text(resolve_references(io.StringIO(text)).getvalue())
    torch.manual_seed(0)
    modules = load_hyperpyyaml(text)["modules"]
    for module in modules.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return path, modules


def _separator(name, stft, num_spks, sizes, **more):
    path = "trackformer_sb.nnet"
    channels = {"in_channels": stft["n_fft"] // 2 + 1, "num_spks": num_spks}
    return Separator(
        encoder={"class": f"{path}.stft.STFTEncoder", **stft},
        masknet={"class": f"{path}.{name}", **channels, **sizes},
        decoder={"class": f"{path}.stft.STFTDecoder", **stft},
        sample_rate=RATE,
        num_spks=num_spks,
        **more,
    ).eval()


def performer(num_spks=3, **more):
    """A separator whose outputs have no names."""
    sizes = {**SIZES, **more}
    separator = _separator("masknet.PerformerMaskNet", STFT, num_spks, sizes)
    for parameter in separator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return separator


def named(classes=CLASSES, hop_length=256, **more):
    """A separator of named stems, of two outputs each."""
    stft = {"n_fft": 512, "hop_length": hop_length}
    sizes = {"channels": [8, 8, 8], "d_model": 16, "num_layers": 1, **more}
    num_spks = 2 * len(classes)
    return _separator(
        "fusion.FusionMaskNet", stft, num_spks, sizes, classes=classes
    )


def write_noise(path, frames=4000):
    """A stereo file."""
    sig = np.random.default_rng(0).normal(0.0, 0.1, (frames, 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sig, RATE)
    return str(path)


def read(path):
    """The samples of a file, [channels, time]."""
    sig, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(sig).T


def mixtures(frames=5000):
    return torch.randn(2, frames, generator=torch.Generator().manual_seed(1))


def close(found, expected, atol=1e-4):
    """Requires that no sample is farther away."""
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
