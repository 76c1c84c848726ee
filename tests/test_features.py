"""Pre-trained encoders: their folder, features, and a masknet's start."""

import io
import shutil

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references

from trackformer_sb.inference.features import (
    PerformerFeatures,
    load_pretrained_encoder,
)
from trackformer_sb.nnet.masknet import PerformerMaskNet

PRETRAINING = """\
seed: 1234
data_folder: {data}
mask_ratio: 0.3
sample_rate: 8000
n_fft: 128
hop_length: 32
d_model: 16
Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder
  n_fft: !ref <n_fft>
  hop_length: !ref <hop_length>
Features: !new:trackformer_sb.nnet.features.SpectrogramEncoder
  in_channels: !ref <n_fft> // 2 + 1
  d_model: !ref <d_model>
  nhead: 2
  num_layers: 2
  d_ffn: 24
  n_features: 8
  dropout: 0.5
  spec_norm: zscore
AudioMAE: !new:trackformer_sb.nnet.mae.AudioMAE
  features: !ref <Features>
"""
SIZES = {"d_model": 16, "nhead": 2, "num_layers": 2, "d_ffn": 24}
SETTINGS = {"sample_rate": 8000, "n_fft": 128, "hop_length": 32, **SIZES}


@pytest.fixture
def exported(tmp_path):
    """A folder, and the modules in it."""
    run = tmp_path / "run"
    run.mkdir()
    text = PRETRAINING.format(data=run)
    resolved = resolve_references(io.StringIO(text)).getvalue()
    (run / "hyperparams.yaml").write_text(resolved)
    torch.manual_seed(0)
    hparams = load_hyperpyyaml(text)
    for parameter in hparams["Features"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = PerformerFeatures.of_recipe(
        run / "hyperparams.yaml", hparams["Features"], ["a", "No"]
    )
    metadata = {"Training": {"hidden": "30 %"}}
    folder = features.export(tmp_path / "encoder", metadata)
    shutil.rmtree(run)
    return folder, hparams


@pytest.fixture
def features(exported):
    return PerformerFeatures.from_pretrained(exported[0])


def masknet(**sizes):
    sizes = {**SIZES, "n_features": 8, "dropout": 0.0, **sizes}
    return PerformerMaskNet(65, 3, **sizes)


def test_files_of_the_folder(exported, tmp_path):
    folder, _ = exported
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "8000 Hz into 16 features per frame of 32\nsamples" in card
    assert "| hidden | 30 % |" in card
    text = card + (folder / "config.json").read_text()
    for trace in (str(tmp_path), "seed", "mask_ratio"):
        assert trace not in text
    code = card.split("```python\n")[1].split("```")[0]
    names = {"wavs": torch.randn(2, 3200)}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    assert names["x"].shape == (2, 100, 16)


def test_features_are_those_of_the_trained_modules(exported, features):
    _, hparams = exported
    wavs = torch.randn(2, 1000)
    x = features.encode_batch(wavs)
    encoder = hparams["Features"].eval()
    assert torch.equal(x, encoder.encode(hparams["Encoder"](wavs)).detach())
    # no dropout, though it was trained with 0.5; and it tells waveforms apart
    assert torch.equal(features(wavs), x)
    assert (x[0] - x[1]).abs().mean() > 0.01
    torch.testing.assert_close(features(100 * wavs), x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("time", [1, 33, 320, 1000])
def test_padding_equals_a_shorter_input(features, time):
    wavs = torch.randn(2, 1000)
    wavs[0, time:] = 50.0
    x = features.encode_batch(wavs, torch.tensor([time / 1000, 1.0]))
    frames = -(-time // 32)
    alone = features.encode_batch(wavs[:1, :time])
    assert alone.shape == (1, frames, 16)
    torch.testing.assert_close(x[:1, :frames], alone, atol=1e-4, rtol=1e-4)
    whole = features.encode_batch(wavs[1:])
    torch.testing.assert_close(x[1:], whole, atol=1e-4, rtol=1e-4)


# --- into a masknet ----------------------------------------------------------


def test_transfer_is_exact(exported):
    folder, hparams = exported
    net = masknet()
    heads = net.head.weight.clone()
    features = load_pretrained_encoder(net, folder, SETTINGS)
    assert features.config["songs"] == ["a", "No"]
    assert torch.equal(net.head.weight, heads)
    # the random features belong to the weights: others give other outputs
    mix_w = hparams["Encoder"](torch.randn(2, 1000))
    expected = hparams["Features"].eval().encode(mix_w)
    assert torch.equal(net.eval().encode(mix_w), expected)


def test_weights_that_do_not_fit_are_named(exported):
    folder, _ = exported
    with pytest.raises(RuntimeError, match=r"Unexpected.*encoder\.layers\.1\."):
        load_pretrained_encoder(masknet(num_layers=1), folder)
