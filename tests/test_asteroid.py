"""The bridge: Asteroid's masker in our path, our masknet in its models."""

import pathlib
import pickle
import re
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("asteroid")

import asteroid
from asteroid.masknn.convolutional import TDConvNet
from asteroid.models import BaseModel
from asteroid.models.base_models import BaseEncoderMaskerDecoder
from asteroid_filterbanks import make_enc_dec
from speechbrain.lobes.models.conv_tasnet import MaskNet
from speechbrain.lobes.models.dual_path import Decoder, Encoder
from test_export import TRAINING, mixtures, trained

from trackformer_sb.asteroid import (
    AsteroidMasker,
    AsteroidMaskNet,
    PerformerSeparatorModel,
)
from trackformer_sb.inference.export import export_separator
from trackformer_sb.inference.pretrained import PerformerSeparator
from trackformer_sb.inference.separation import separate
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder

ROOT = pathlib.Path(__file__).parents[1]
CHANNELS = 32


def td_conv_net(channels, num_spks=3):
    return TDConvNet(
        channels,
        num_spks,
        n_blocks=2,
        n_repeats=1,
        bn_chan=8,
        hid_chan=16,
        skip_chan=8,
        mask_act="relu",
    )


def performer(num_spks=3):
    return PerformerMaskNet(
        CHANNELS,
        num_spks,
        d_model=16,
        nhead=2,
        num_layers=1,
        n_features=8,
        dropout=0.0,
    )


def model_with(masker):
    """Asteroid's own model around a masker."""
    encoder, decoder = make_enc_dec(
        "free", n_filters=CHANNELS, kernel_size=16, stride=8
    )
    return BaseEncoderMaskerDecoder(
        encoder, masker, decoder, encoder_activation="relu"
    )


def check_gradients(loss, module, unused=()):
    """The loss reaches every other parameter, with finite numbers."""
    loss.backward()
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[0] in unused:
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert any(p.grad.abs().sum() > 0 for p in module.parameters())


# --- Asteroid's masker here --------------------------------------------------


@pytest.mark.parametrize("num_spks", (1, 3))
def test_their_masker_in_our_path(num_spks):
    masknet = AsteroidMaskNet(td_conv_net(CHANNELS, num_spks))
    encoder = Encoder(kernel_size=16, out_channels=CHANNELS)
    decoder = Decoder(CHANNELS, 1, kernel_size=16, stride=8, bias=False)
    modules = encoder, masknet, decoder
    mix = torch.randn(2, 1003)
    est_source, est_mask = separate(mix, *modules)
    assert est_source.shape == (2, num_spks, 1003)
    assert est_mask.shape[:3] == (num_spks, 2, CHANNELS)
    # Asteroid makes but does not use the residual of the last block
    unused = ("masker.TCN.1.res_conv",)
    check_gradients(est_source[:, 0].square().mean(), masknet, unused)
    est_source, _ = separate(mix, *modules, mixture_consistency=True)
    torch.testing.assert_close(est_source.sum(1), mix, atol=1e-5, rtol=1e-5)


def test_sources_and_batch_change_places_and_nothing_else():
    masker = td_conv_net(CHANNELS).eval()
    mix_w = torch.rand(2, CHANNELS, 40)
    theirs, ours = masker(mix_w), AsteroidMaskNet(masker)(mix_w)
    assert ours.shape == (3, 2, CHANNELS, 40)
    for source in range(3):
        for item in range(2):
            assert torch.equal(ours[source, item], theirs[item, source])


def test_their_masker_on_the_magnitude_of_an_stft():
    masknet = AsteroidMaskNet(td_conv_net(33)).eval()
    mix = torch.randn(2, 500)
    est_source, _ = separate(
        mix,
        STFTEncoder(64, 16),
        lambda mix_w: masknet(mix_w.abs()),
        STFTDecoder(64, 16),
    )
    assert est_source.shape == (2, 3, 500)
    assert torch.isfinite(est_source).all()


# --- our masknet there -------------------------------------------------------


@pytest.mark.parametrize("num_spks", (1, 4))
def test_our_masknet_in_their_model(num_spks):
    model = model_with(AsteroidMasker(performer(num_spks)))
    mix = torch.randn(2, 1003)
    est_source = model(mix)
    assert est_source.shape == (2, num_spks, 1003)
    check_gradients(est_source[:, 0].square().mean(), model)


def test_shapes_that_their_model_takes():
    model = model_with(AsteroidMasker(performer())).eval()
    mix = torch.randn(2, 1, 800)
    est_source = model(mix)
    assert est_source.shape == (2, 3, 800)
    torch.testing.assert_close(model(mix[:, 0]), est_source)
    alone = model(mix[1, 0])
    assert alone.shape == (3, 800)
    torch.testing.assert_close(alone, est_source[1], atol=1e-5, rtol=1e-4)


def test_softmax_masks_sum_to_what_was_encoded():
    model = model_with(AsteroidMasker(performer())).eval()
    mix = torch.randn(2, 800)
    encoded = model.forward_encoder(mix.unsqueeze(1))
    whole = model.forward_decoder(encoded)
    est_source = model(mix)
    length = min(whole.shape[-1], 800)
    torch.testing.assert_close(
        est_source.sum(1)[..., :length],
        whole.reshape(2, -1)[..., :length],
        atol=1e-5,
        rtol=1e-4,
    )


def test_speechbrain_masknet_in_their_model():
    masknet = MaskNet(
        *(CHANNELS, 8, 16),
        P=3,
        X=2,
        R=1,
        C=3,
        norm_type="gLN",
        causal=False,
        mask_nonlinear="relu",
    )
    model = model_with(AsteroidMasker(masknet))
    est_source = model(torch.randn(2, 1000))
    assert est_source.shape == (2, 3, 1000)
    check_gradients(est_source[:, 1].square().mean(), masknet)


def test_both_bridges_cancel():
    masknet = performer().eval()
    mix_w = torch.rand(2, CHANNELS, 30)
    there_and_back = AsteroidMaskNet(AsteroidMasker(masknet))
    assert torch.equal(there_and_back(mix_w), masknet(mix_w))


# --- a trained separator there -----------------------------------------------


def separator_model(**changes):
    """Our model in training mode, with dropout."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "nhead": 2, "num_layers": 1, "n_features": 8}
    model = PerformerSeparatorModel(
        **{"sample_rate": 8000, "num_spks": 3, "n_fft": 128, "hop_length": 32},
        **{"dropout": 0.5, **sizes, **changes},
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_nothing_of_asteroid_is_imported_before_it_is_needed():
    code = (
        "import sys, trackformer_sb.asteroid as bridge; "
        "print('asteroid' in sys.modules); bridge.PerformerSeparatorModel; "
        "print('asteroid' in sys.modules); bridge.surprise"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.stdout.split() == ["False", "True"]
    assert "has no attribute 'surprise'" in result.stderr


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_serialized_file_loads_in_their_class(tmp_path, activation):
    model = separator_model(mask_activation=activation).eval()
    mix = torch.randn(2, 1003)
    expected = model(mix)
    assert expected.shape == (2, 3, 1003)
    torch.testing.assert_close(expected.sum(1), mix, atol=1e-5, rtol=1e-4)
    path = str(tmp_path / "model.pth")
    torch.save(model.serialize(), path)
    # torch.load with weights_only, the default of today's torch
    for cls in (BaseModel, PerformerSeparatorModel):
        again = cls.from_pretrained(path).eval()
        assert type(again) is PerformerSeparatorModel
        assert torch.equal(again(mix), expected)
        assert again.sample_rate == 8000
        assert again.get_model_args()["dropout"] == 0.5
    conf = model.serialize()
    again = PerformerSeparatorModel.from_pretrained(conf)
    assert torch.equal(again(mix), expected)
    assert not again.training


def test_state_is_that_of_the_separator():
    model = separator_model().eval()
    separator = PerformerSeparator(**model.get_model_args()).eval()
    separator.load_state_dict(model.state_dict())
    mix = torch.randn(2, 500)
    assert torch.equal(separator(mix).transpose(1, 2), model(mix))


def test_shapes_of_waveforms():
    model = separator_model().eval()
    mix = torch.randn(2, 700)
    expected = model(mix)
    assert torch.equal(model(mix.unsqueeze(1)), expected)
    alone = model(mix[1])
    assert alone.shape == (3, 700)
    torch.testing.assert_close(alone, expected[1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"got \[2, 2, 350\]"):
        model(mix.view(2, 2, 350))


def test_their_separate():
    model = separator_model()
    mix = torch.randn(1, 1, 900)
    est_source = asteroid.separate.separate(model, mix)
    # without dropout, though the model is being trained
    assert model.training
    expected = model.eval()(mix)
    # it scales the outputs
    scale = mix.abs().sum() / expected.abs().sum()
    torch.testing.assert_close(est_source, expected * scale)
    est_source = model.separate(mix.numpy())
    torch.testing.assert_close(torch.tensor(est_source), expected * scale)


def test_their_separate_with_files(tmp_path):
    import soundfile

    model = separator_model()
    path = tmp_path / "song.wav"
    soundfile.write(path, torch.randn(800).mul(0.1).numpy(), 8000)
    model.separate(str(path), output_dir=str(tmp_path / "."))
    names = sorted(path.name for path in tmp_path.glob("song_est*"))
    assert names == ["song_est1.wav", "song_est2.wav", "song_est3.wav"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda conf: conf.pop("state_dict"), "expected a serialized"),
        (lambda conf: conf.update(model_name="XUMX"), "got XUMX"),
        (lambda conf: conf["state_dict"].popitem(), "missing masknet"),
        (
            lambda conf: conf["state_dict"].update(surprise=torch.ones(1)),
            "unexpected surprise",
        ),
        (lambda conf: conf["model_args"].update(x=1), "model_args: .*x"),
        (lambda conf: conf.update(model_args=[1]), "model_args"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, message):
    conf = separator_model().serialize()
    change(conf)
    path = tmp_path / "model.pth"
    torch.save(conf, path)
    with pytest.raises(ValueError, match=rf"model\.pth.*{message}"):
        PerformerSeparatorModel.from_pretrained(path)


def test_file_that_is_code(tmp_path):
    path, trace = tmp_path / "model.pth", tmp_path / "trace"

    class Payload:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    torch.save({"model_name": Payload()}, path)
    with pytest.raises(ValueError, match="no readable file of weights"):
        PerformerSeparatorModel.from_pretrained(path)
    # Asteroid's own loader: weights_only is the default of today's torch
    with pytest.raises(pickle.UnpicklingError):
        BaseModel.from_pretrained(str(path))
    assert not trace.exists()


# --- the folder of a separator there -----------------------------------------


def exported(tmp_path, text=TRAINING):
    path, modules = trained(tmp_path / "experiment", text)
    return export_separator(path, modules, tmp_path / "separator")


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("saved_by", ["export", "save_pretrained"])
def test_folder_loads_in_their_class(tmp_path, activation, saved_by):
    folder = exported(tmp_path, TRAINING.replace("softmax", activation))
    separator = PerformerSeparator.from_pretrained(folder)
    if saved_by == "save_pretrained":
        folder = tmp_path / "again"
        separator.save_pretrained(folder)
    mix = mixtures()
    expected = separator(mix).transpose(1, 2)
    assert expected.abs().max() > 0.1
    path = str(folder / "pytorch_model.bin")
    model = BaseModel.from_pretrained(path).eval()
    assert type(model) is PerformerSeparatorModel
    assert torch.equal(model(mix), expected)
    assert model.sample_rate == 8000
    for source in (folder, path):
        again = PerformerSeparatorModel.from_pretrained(source)
        assert torch.equal(again(mix), expected)
        assert again.get_model_args() == model.get_model_args()
        placed = PerformerSeparatorModel.from_pretrained(source, device="meta")
        assert {x.device.type for x in placed.parameters()} == {"meta"}


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    run = tmp_path / "results" / "demo" / "1234"
    run.mkdir(parents=True)
    exported(tmp_path).rename(run / "separator")
    text = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"(?:    .*\n)+    model = BaseModel.*\n", text)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(textwrap.dedent(block), names)
    assert names["model"](mixtures()).shape == (2, 3, 5000)
    assert not names["model"].training


def test_file_of_the_folder_is_what_the_model_saves(tmp_path):
    path = exported(tmp_path) / "pytorch_model.bin"
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    conf = torch.load(path, weights_only=True)
    again = BaseModel.from_pretrained(str(path)).serialize()
    assert conf.keys() == again.keys()
    assert conf["model_name"] == again["model_name"]
    assert conf["model_args"] == again["model_args"]
    state, expected = conf["state_dict"], again["state_dict"]
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda conf: conf["state_dict"].popitem(), "Missing key.*masknet"),
        (
            lambda conf: conf["state_dict"].update(surprise=torch.ones(1)),
            "Unexpected key.*surprise",
        ),
        (lambda conf: conf["model_args"].update(d_model=8), "size mismatch"),
        (lambda conf: conf["model_args"].update(surprise=1), "surprise"),
        (lambda conf: conf["model_args"].pop("num_spks"), "num_spks"),
        (lambda conf: conf.pop("state_dict"), "state_dict"),
    ],
)
def test_their_class_refuses_a_file_that_does_not_fit(
    tmp_path, change, message
):
    path = exported(tmp_path) / "pytorch_model.bin"
    conf = torch.load(path)
    change(conf)
    torch.save(conf, path)
    errors = (RuntimeError, TypeError, ValueError)
    with pytest.raises(errors, match=rf"(?s){message}"):
        BaseModel.from_pretrained(str(path))
