"""Pre-trained encoders: their folder, features, and a masknet's start."""

import io
import shutil

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from safetensors.torch import load_file, save_file

from trackformer_sb.inference.features import PerformerFeatures
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.transfer import (
    check_settings,
    encoder_state,
    load_pretrained_encoder,
)

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
SETTINGS = {
    **{"sample_rate": 8000, "n_fft": 128, "hop_length": 32},
    **{"spec_norm": "zscore", "n_features": 8, **SIZES},
}


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
    with pytest.raises(ValueError, match=r"\[batch, time\], got \[1, 2, 1000"):
        features.encode_batch(wavs[None])


@pytest.mark.parametrize("filling", [0.0, 50.0])
@pytest.mark.parametrize("time", [1, 33, 320, 700, 1000])
def test_padding_equals_a_shorter_input(features, time, filling):
    wavs = torch.randn(2, 1000)
    wavs[0, time:] = filling
    x = features.encode_batch(wavs, torch.tensor([time / 1000, 1.0]))
    frames = -(-time // 32)
    alone = features.encode_batch(wavs[:1, :time])
    assert alone.shape == (1, frames, 16)
    torch.testing.assert_close(x[:1, :frames], alone, atol=1e-4, rtol=1e-4)
    whole = features.encode_batch(wavs[1:])
    torch.testing.assert_close(x[1:], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [0.0, 1.5, float("nan")])
def test_lengths_out_of_range_are_refused(features, length):
    with pytest.raises(ValueError, match=r"wav_lens as shares in \(0, 1\]"):
        features.encode_batch(torch.randn(2, 900), torch.tensor([1.0, length]))


def test_frozen_unless_asked_for(exported, features):
    assert not any(p.requires_grad for p in features.parameters())
    # a recipe that trains what is around it calls this
    features.train()
    assert not any(module.training for module in features.modules())
    free = PerformerFeatures.from_pretrained(exported[0], freeze_params=False)
    free.train()
    assert free.encoder.training
    free.encode_batch(torch.randn(2, 1000)).square().sum().backward()
    for name, parameter in free.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


# --- into a masknet ----------------------------------------------------------


def test_transfer_is_exact(exported):
    folder, hparams = exported
    net = masknet()
    heads = net.head.weight.clone()
    assert check_settings(SETTINGS, folder)["songs"] == ["a", "No"]
    keys = load_pretrained_encoder(net, folder)
    # the random features belong to the weights: others give other outputs
    assert "encoder.layers.1.attention.projection" in keys
    state = hparams["Features"].state_dict()
    assert keys == sorted(state) == sorted(encoder_state(net))
    for key in keys:
        assert torch.equal(net.state_dict()[key], state[key])
    assert torch.equal(net.head.weight, heads)
    mix_w = hparams["Encoder"](torch.randn(2, 1000))
    expected = hparams["Features"].eval().encode(mix_w)
    assert torch.equal(net.eval().encode(mix_w), expected)


def test_every_setting_that_differs_is_named_with_both_values(exported):
    asked = {**SETTINGS, "sample_rate": 16000, "nhead": 4, "num_spks": 3}
    message = (
        "does not fit: sample_rate is 8000, the separator has 16000; "
        "nhead is 2, the separator has 4$"
    )
    with pytest.raises(ValueError, match=f"^pretrained_encoder: .*{message}"):
        check_settings(asked, exported[0])


def refused(net, folder, message):
    """Expects an error that leaves the masknet as it was."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained_encoder(net, folder)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_every_key_that_does_not_fit_is_named(exported):
    folder, _ = exported
    state = load_file(folder / "model.safetensors")
    del state["encoder.embedding.bias"]
    state["encoder.embedding.weight"] = torch.ones(16, 5)
    state["encoder.a"] = torch.ones(1)
    save_file(state, folder / "model.safetensors")
    message = (
        r"embedding.weight is \[16, 5\], expected \[16, 65\]; "
        "extra a; missing embedding.bias$"
    )
    refused(masknet(), folder, rf"safetensors does not fit .*: {message}")
    with pytest.raises(ValueError, match=r"Missing key.*embedding\.bias"):
        PerformerFeatures.from_pretrained(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    refused(masknet(), folder, r"safetensors: no readable file of weights")


def test_encoder_of_other_sizes_is_refused(exported):
    folder, _ = exported
    refused(masknet(num_layers=1), folder, r"extra encoder\.layers\.1\.")
    refused(masknet(num_layers=3), folder, r"missing encoder\.layers\.2\.")
