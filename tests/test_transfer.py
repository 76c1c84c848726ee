"""Pre-trained weights are loaded whole or not at all."""

import re

import pytest
import torch

from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.transfer import (
    ENCODER_FILE,
    SETTINGS_FILE,
    check_settings,
    encoder_state,
    load_pretrained_encoder,
)


def masknet(seed, **sizes):
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "nhead": 2, "num_layers": 2, **sizes}
    return PerformerMaskNet(33, 3, n_features=8, dropout=0.0, **sizes)


def copy_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.fixture
def source(tmp_path):
    """A folder with the encoder of masknet(0)."""
    torch.save(encoder_state(masknet(0)), tmp_path / ENCODER_FILE)
    return tmp_path


def change(source, **changes):
    """Sets keys of the saved state, or takes them out where None."""
    state = torch.load(source / ENCODER_FILE, weights_only=True)
    for key, value in changes.items():
        state.pop(key, None)
        if value is not None:
            state[key] = value
    torch.save(state, source / ENCODER_FILE)


def test_encoder_state_is_all_but_the_head():
    net = masknet(0)
    state = encoder_state(net)
    assert net.state_dict().keys() - state.keys() == {
        "head.weight",
        "head.bias",
    }
    # the random features belong to the weights: others give other outputs
    assert "encoder.layers.1.attention.projection" in state
    for key, value in state.items():
        assert torch.equal(value, net.state_dict()[key])


@pytest.mark.parametrize("as_text", (False, True))
def test_transfer_is_exact(source, as_text):
    origin, net = masknet(0), masknet(1)
    before = copy_of(net)
    keys = load_pretrained_encoder(net, str(source) if as_text else source)
    assert keys == sorted(encoder_state(origin))
    for key, value in net.state_dict().items():
        expected = before if key.startswith("head.") else origin.state_dict()
        assert torch.equal(value, expected[key]), key
    x = torch.randn(1, 33, 12)
    hidden = [
        one.eval().encoder(one.embedding(x.transpose(1, 2)))
        for one in (origin, net)
    ]
    assert torch.equal(*hidden)


def test_number_of_sources_may_differ(source):
    net = PerformerMaskNet(33, 7, 16, 2, 2, n_features=8)
    load_pretrained_encoder(net, source)
    expected = masknet(0).embedding.weight
    assert torch.equal(net.embedding.weight, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"embedding.bias": None}, "missing embedding.bias$"),
        ({"head.bias": torch.ones(3)}, "extra head.bias$"),
        (
            {"embedding.bias": torch.ones(17)},
            r"embedding.bias is \[17\], expected \[16\]$",
        ),
        (
            {
                "embedding.bias": None,
                "embedding.weight": torch.ones(16, 5),
                "a": torch.ones(1),
            },
            r"embedding.weight is \[16, 5\], expected \[16, 33\]; "
            "extra a; missing embedding.bias$",
        ),
    ),
)
def test_every_key_that_does_not_fit_is_named(changes, message, source):
    change(source, **changes)
    net = masknet(1)
    before = copy_of(net)
    with pytest.raises(ValueError, match=f"{ENCODER_FILE} does not.*{message}"):
        load_pretrained_encoder(net, source)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("sizes", "message"),
    (
        ({"num_layers": 1}, r"extra encoder\.layers\.1\."),
        ({"num_layers": 3}, r"missing encoder\.layers\.2\."),
        ({"d_model": 32}, r"embedding\.bias is \[16\], expected \[32\]"),
    ),
)
def test_encoder_of_other_sizes_is_refused(sizes, message, source):
    net = masknet(1, **sizes)
    before = copy_of(net)
    with pytest.raises(ValueError, match=message):
        load_pretrained_encoder(net, source)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"pretrained_encoder: no {ENCODER_FILE} in "
    ):
        load_pretrained_encoder(masknet(0), tmp_path / "nowhere")


# --- damaged weights ---------------------------------------------------------


def refused(net, source, message):
    """Expects an error that leaves the masknet as it was."""
    before = copy_of(net)
    with pytest.raises(ValueError, match=message):
        load_pretrained_encoder(net, source)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("share", (0.0, 0.001, 0.01, 0.3, 0.9, 0.999))
def test_truncated_weights_are_named(share, source):
    path = source / ENCODER_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    message = f"{re.escape(str(path))}: no readable file of weights"
    refused(masknet(1), source, message)


@pytest.mark.parametrize("content", (b"<html>404</html>\n", b"\0" * 500))
def test_another_file_in_place_of_weights_is_named(content, source):
    (source / ENCODER_FILE).write_bytes(content)
    refused(masknet(1), source, "no readable file of weights")


@pytest.mark.parametrize("content", ([1, 2], torch.ones(3), None))
def test_something_else_than_a_dict_is_named(content, source):
    torch.save(content, source / ENCODER_FILE)
    name = type(content).__name__
    refused(masknet(1), source, f"expected a dict of tensors, got {name}$")


def test_something_else_than_a_tensor_is_named(source):
    change(source, **{"embedding.bias": 3.0})
    refused(masknet(1), source, r"embedding\.bias is \[\], expected \[16\]$")


def test_nothing_in_a_file_of_weights_is_executed(source):
    class Trap:
        def __reduce__(self):
            return (source.joinpath("opened").touch, ())

    change(source, **{"embedding.bias": Trap()})
    refused(masknet(1), source, "no readable file of weights")
    assert not (source / "opened").exists()


# --- settings ----------------------------------------------------------------

SETTINGS = """\
sample_rate: 44100
n_fft: 1024
hop_length: 256
spec_norm: zscore
d_model: 16
nhead: 2
num_layers: 1
d_ffn: null
n_features: 8

Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder
  n_fft: 1024
modules:
  stft: !ref <Encoder>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
  loadables:
    encoder: !ref <Features>
"""

NEEDED = (
    *("sample_rate", "n_fft", "hop_length", "spec_norm", "d_model", "nhead"),
    *("num_layers", "d_ffn", "n_features"),
)

SEPARATOR = {
    "sample_rate": 44100,
    "n_fft": 1024,
    "hop_length": 256,
    "spec_norm": "zscore",
    "d_model": 16,
    "d_ffn": 64,
    "num_spks": 4,
    "Encoder": torch.nn.Identity(),
}


@pytest.fixture
def settings(tmp_path):
    """The yaml of an encoder that fits."""
    path = tmp_path / SETTINGS_FILE
    path.write_text(SETTINGS)
    return path


@pytest.mark.parametrize("as_text", (False, True))
def test_settings_that_agree_are_taken(as_text, settings):
    folder = settings.parent
    check_settings(SEPARATOR, str(folder) if as_text else folder)


def test_keys_of_the_separator_alone_do_not_matter(settings):
    # nor do those of the encoder alone, as of a learned encoder's separator
    check_settings({"num_spks": 3, "sample_rate": 44100}, settings.parent)
    check_settings({}, settings.parent)


def test_every_setting_that_differs_is_named_with_both_values(settings):
    separator = {
        **SEPARATOR,
        "sample_rate": 22050,
        "hop_length": 512,
        "spec_norm": "minmax",
    }
    message = (
        f"pretrained_encoder: the encoder in {settings.parent} does not fit: "
        "sample_rate is 44100, the separator has 22050; "
        "hop_length is 256, the separator has 512; "
        "spec_norm is zscore, the separator has minmax"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_settings(separator, settings.parent)


@pytest.mark.parametrize(
    "key", ("sample_rate", "n_fft", "hop_length", "spec_norm", "d_model")
)
def test_one_setting_that_differs_is_named_alone(key, settings):
    separator = {**SEPARATOR, key: "other"}
    with pytest.raises(ValueError, match=f"fit: {key} is .* has other$"):
        check_settings(separator, settings.parent)


def test_nothing_in_the_settings_is_executed(settings):
    opened = settings.with_name("opened")
    settings.write_text(
        f"trap: !apply:pathlib.Path.touch [!new:pathlib.Path [{opened}]]\n"
        f"folder: !apply:os.mkdir [{opened}]\n"
        "number: !new:no.such.module.Thing {}\n"
        "sample_rate: !apply:os.abort []\n" + SETTINGS.split("\n", 1)[1]
    )
    check_settings(SEPARATOR, settings.parent)
    assert not opened.exists()


@pytest.mark.parametrize(
    "content",
    (
        b"sample_rate: [44100\n",
        b"sample_rate: 44100\nn_ff",
        b"\xff\xfe\x00",
        b"x: !!python/object/apply:os.abort []\n",
    ),
)
def test_broken_settings_are_named(content, settings):
    settings.write_bytes(content)
    message = f"{re.escape(str(settings))}: no readable yaml"
    with pytest.raises(ValueError, match=message):
        check_settings(SEPARATOR, settings.parent)


@pytest.mark.parametrize("content", ("", "- 1\n", "text", "num_spks: 8\n"))
def test_settings_of_something_else_are_named(content, settings):
    settings.write_text(content)
    message = "expected the settings of an encoder, got none of d_ffn, d_model"
    with pytest.raises(ValueError, match=message):
        check_settings(SEPARATOR, settings.parent)


@pytest.mark.parametrize("lines", range(SETTINGS.count("\n") - 2))
def test_settings_cut_between_lines_are_refused(lines, settings):
    settings.write_text("".join(SETTINGS.splitlines(True)[:lines]))
    with pytest.raises(ValueError, match=f"{SETTINGS_FILE}: expected the set"):
        check_settings(SEPARATOR, settings.parent)


@pytest.mark.parametrize("key", NEEDED)
def test_missing_setting_is_named(key, settings):
    lines = SETTINGS.splitlines(True)
    kept = [line for line in lines if not line.startswith(f"{key}:")]
    assert len(kept) == len(lines) - 1
    settings.write_text("".join(kept))
    with pytest.raises(ValueError, match=f"an encoder, got none of {key}$"):
        check_settings(SEPARATOR, settings.parent)


def test_missing_settings_are_named(tmp_path):
    message = f"pretrained_encoder: no {SETTINGS_FILE} in .*nowhere"
    with pytest.raises(FileNotFoundError, match=message):
        check_settings(SEPARATOR, tmp_path / "nowhere")
