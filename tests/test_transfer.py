"""Pre-trained weights are loaded whole or not at all."""

import pytest
import torch

from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.transfer import (
    ENCODER_FILE,
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
