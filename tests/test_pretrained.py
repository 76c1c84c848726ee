"""Separators without code: plain config, safetensors, and nothing else."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from speechbrain.inference.separation import SepformerSeparation
from test_export import CONV_TASNET, TRAINING, loaded, mixtures, trained

from trackformer_sb.inference.export import export_separator
from trackformer_sb.inference.interfaces import PerformerSeparation
from trackformer_sb.inference.pretrained import PerformerSeparator

TINY = {
    "sample_rate": 8000,
    "num_spks": 3,
    "n_fft": 256,
    "hop_length": 64,
    "d_model": 16,
    "nhead": 2,
    "num_layers": 1,
    "n_features": 16,
}


@pytest.fixture
def folder(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    return export_separator(path, modules, tmp_path / "separator")


def by_asteroid(folder, _):
    pytest.importorskip("asteroid")
    from asteroid.models import BaseModel

    from trackformer_sb.asteroid import PerformerSeparatorModel

    # Asteroid's own class and loader, which leave the training mode on
    model = BaseModel.from_pretrained(str(folder / "pytorch_model.bin")).eval()
    assert type(model) is PerformerSeparatorModel
    return lambda mix: model(mix).transpose(1, 2)


WAYS = {
    "speechbrain": lambda folder, _: loaded(folder).separate_batch,
    "stock": lambda folder, tmp_path: (
        loaded(
            folder, SepformerSeparation, savedir=tmp_path / "save"
        ).separate_batch
    ),
    "hub": lambda folder, _: PerformerSeparator.from_pretrained(folder),
    "asteroid": by_asteroid,
}


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("way", WAYS)
def test_loads_four_ways(tmp_path, way, activation):
    """Each gives the samples of the trained modules."""
    text = TRAINING.replace("softmax", activation)
    path, modules = trained(tmp_path / "experiment", text)
    folder = export_separator(path, modules, tmp_path / "separator")
    separate = WAYS[way](folder, tmp_path)
    mix = mixtures()
    modules["masknet"].eval()
    mix_w = modules["encoder"](mix)
    est_mask = modules["masknet"](mix_w)
    expected = torch.stack(
        [modules["decoder"](mix_w * mask, 5000) for mask in est_mask], dim=-1
    )
    assert expected.abs().max() > 0.1
    if activation == "sigmoid" and way != "stock":
        # which knows no mixture consistency
        missing = mix.unsqueeze(-1) - expected.sum(-1, keepdim=True)
        expected = expected + missing / 3
    with torch.no_grad():
        est_source = separate(mix)
    torch.testing.assert_close(est_source, expected, atol=2e-6, rtol=0)


def test_same_bits_as_the_hub_class(folder):
    mix = mixtures()
    expected = loaded(folder).separate_batch(mix)
    with torch.no_grad():
        est_source = PerformerSeparator.from_pretrained(folder)(mix)
    assert torch.equal(est_source, expected)


def test_config_and_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "library_name": "trackformer_sb",
        "library_version": "0.1.0",
        **TINY,
        "mixture_consistency": False,
        "d_ffn": None,
        "dropout": 0.5,
        "attention": "favor",
        "causal": False,
        "spec_norm": "zscore",
        "mask_activation": "softmax",
    }
    weights = load_file(folder / "model.safetensors")
    state = torch.load(folder / "masknet.ckpt")
    assert weights.keys() == {f"masknet.{key}" for key in state}
    assert all(torch.equal(weights[f"masknet.{k}"], state[k]) for k in state)


def test_loaded_separator_is_in_evaluation_mode(folder):
    separator = PerformerSeparator.from_pretrained(str(folder))
    assert not separator.training
    mix = mixtures()
    assert torch.equal(separator(mix), separator(mix))
    assert separator(mix).requires_grad
    # trained with dropout 0.5, which is there to be trained on
    separator.train()
    assert not torch.equal(separator(mix), separator(mix))


def test_shape_is_checked(folder):
    separator = PerformerSeparator.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"expected mix .* got \[2, 1, 5000\]"):
        separator(mixtures().unsqueeze(1))


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_save_and_load(tmp_path, activation):
    separator = PerformerSeparator(**TINY, mask_activation=activation).eval()
    separator.save_pretrained(tmp_path / "saved")
    again = PerformerSeparator.from_pretrained(tmp_path / "saved")
    mix = mixtures()
    with torch.no_grad():
        expected = separator(mix)
        assert torch.equal(again(mix), expected)
        assert torch.allclose(expected.sum(-1), mix, atol=1e-4)
    assert again.config == separator.config
    # what it saves is an exported separator as well
    interface = loaded(tmp_path / "saved", PerformerSeparation)
    assert torch.equal(interface.separate_batch(mix), expected)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: speechbrain\n")
    assert "# PerformerMaskNet separator: 3 outputs at 8000 Hz" in card


def test_saving_keeps_a_card_that_is_there(folder):
    (folder / "README.md").write_text("mine")
    PerformerSeparator.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_other_parts_have_no_config(tmp_path):
    path, modules = trained(tmp_path / "experiment", CONV_TASNET)
    folder = export_separator(path, modules, tmp_path / "separator")
    names = {path.name for path in folder.iterdir()}
    assert not names & {"config.json", "model.safetensors", "pytorch_model.bin"}
    card = (folder / "README.md").read_text()
    assert "has no `config.json`" in card
    assert "PerformerSeparator" not in card
    with pytest.raises(FileNotFoundError, match=r"config\.json not found"):
        PerformerSeparator.from_pretrained(folder)


def test_python_of_the_card_runs(folder):
    pytest.importorskip("asteroid")
    code = (folder / "README.md").read_text().split("```python\n")[2:]
    assert len(code) == 2
    for i, block in enumerate(code):
        block = block.split("```")[0]
        names = {"mix": mixtures()}
        exec(block.replace("path/to/this/folder", str(folder)), names)
        shape = [(2, 5000, 3), (2, 3, 5000)][i]
        assert names["est_source"].shape == shape


# --- nothing runs ------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


PICKLES = ("pytorch_model.bin", "masknet.ckpt", "model.pth", "data.pkl")
YAMLS = ("hyperparams.yaml", "config.yaml")
OBJECT = '!!python/object/apply:builtins.open ["{path}", "w"]'


def plant(folder, trace):
    """Fills a folder with what runs when it is read."""
    for name in PICKLES:
        payload = pickle.dumps(Payload(str(trace)))
        (folder / name).write_bytes(payload)
    text = f'a: !apply:builtins.open ["{trace}", "w"]\n'
    for name in YAMLS:
        (folder / name).write_text(text)
    card = f"---\na: {OBJECT.format(path=trace)}\n---\n# A card\n"
    (folder / "README.md").write_text(card)


def test_planted_code_runs_where_it_can(folder, tmp_path):
    """The test below could fail."""
    trace = tmp_path / "trace"
    plant(folder, trace)
    with open(folder / "data.pkl", "rb") as file:
        pickle.load(file)
    assert trace.exists()
    trace.unlink()
    with pytest.raises(ValueError, match="expected the key modules"):
        loaded(folder)
    assert trace.exists()


def test_nothing_planted_runs(folder, tmp_path):
    mix = mixtures()
    expected = PerformerSeparator.from_pretrained(folder)(mix)
    trace = tmp_path / "trace"
    plant(folder, trace)
    separator = PerformerSeparator.from_pretrained(folder)
    assert torch.equal(separator(mix), expected)
    assert not trace.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_no_substitute(folder, tmp_path, name):
    trace = tmp_path / "trace"
    plant(folder, trace)
    (folder / "model.safetensors").unlink()
    for other in set(PICKLES) - {name}:
        (folder / other).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} could run code"):
        PerformerSeparator.from_pretrained(folder)
    assert not trace.exists()


def test_pickle_named_like_safe_weights(folder, tmp_path):
    trace = tmp_path / "trace"
    plant(folder, trace)
    (folder / "data.pkl").replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"safetensors: no readable file"):
        PerformerSeparator.from_pretrained(folder)
    assert not trace.exists()


# --- strict ------------------------------------------------------------------


def drop_key(state):
    del state["masknet.head.bias"]


def add_key(state):
    state["surprise"] = torch.zeros(1)


def misshape_key(state):
    state["masknet.head.bias"] = state["masknet.head.bias"][1:].clone()


@pytest.mark.parametrize(
    "change, message",
    [
        (drop_key, r"missing masknet\.head\.bias"),
        (add_key, r"unexpected surprise"),
        (
            misshape_key,
            r"misshapen masknet\.head\.bias \(expected \[387\], got \[386\]\)",
        ),
    ],
)
def test_weights_that_do_not_fit(folder, change, message):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(
        ValueError, match=rf"model\.safetensors does not fit .*: {message}"
    ):
        PerformerSeparator.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.99])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = kept if isinstance(kept, int) else int(kept * len(whole))
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"safetensors: no readable file"):
        PerformerSeparator.from_pretrained(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"surprise": 1}, "unknown surprise"),
        ({"nhead": None, "remove": "nhead"}, "missing nhead"),
        ({"library_name": "diffusers"}, "library_name .*got 'diffusers'"),
        ({"d_model": "16"}, "d_model: expected a positive whole .* got '16'"),
        ({"d_model": 0}, "d_model: expected a positive whole number, got 0"),
        ({"d_model": True}, "d_model: expected a positive .* got True"),
        ({"d_ffn": -3}, "d_ffn: expected a positive .* or null, got -3"),
        ({"dropout": float("nan")}, "dropout: expected a number, got nan"),
        ({"dropout": 3.0}, "dropout.* got 3.0"),
        ({"causal": 1}, "causal: expected true or false, got 1"),
        ({"spec_norm": ["zscore"]}, "spec_norm: expected a text"),
        ({"spec_norm": "z"}, "spec_norm must be one of .* got 'z'"),
        ({"nhead": 3}, "nhead"),
        ({"hop_length": 100}, "hop_length"),
    ],
)
def test_config_that_is_wrong(folder, change, message):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **change}
    config.pop(config.pop("remove", None), None)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        PerformerSeparator.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100000])
def test_config_that_is_no_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (no readable|expect)"):
        PerformerSeparator.from_pretrained(folder)


def test_other_sizes_than_the_weights(folder):
    """Each number of the config matters."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    sizes = ("n_fft", "num_spks", "d_model", "num_layers", "n_features")
    for key in (*sizes, "d_ffn"):
        value = 2 * (config[key] or 50)
        path.write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match="does not fit"):
            PerformerSeparator.from_pretrained(folder)


def test_unknown_argument():
    with pytest.raises(ValueError, match="unknown d_modle"):
        PerformerSeparator(44100, 4, d_modle=32)


def test_mistyped_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^separater not found: exp"):
        PerformerSeparator.from_pretrained("separater")


def test_encoder_and_decoder_that_differ(tmp_path):
    text = TRAINING.replace(
        "  hop_length: !ref <hop_length>  # samples", "  hop_length: 64"
    )
    before, after = text.rsplit("  hop_length: !ref <hop_length>", 1)
    text = f"{before}  hop_length: 32{after}"
    path, modules = trained(tmp_path / "experiment", text)
    with pytest.raises(ValueError, match="Encoder and Decoder with the same"):
        export_separator(path, modules, tmp_path / "separator")


@pytest.mark.parametrize(
    "node",
    [
        "[129, 3, 16, 2, 1, null, 16]",
        "\n  in_channels: 129\n  num_spks: 3\n  d_model: 16\n  nhead: 2"
        "\n  num_layers: 1\n  n_features: 16",
    ],
)
def test_arguments_by_place_and_by_name(tmp_path, node):
    start = TRAINING.index("MaskNet: ")
    text = (
        TRAINING[:start]
        + f"MaskNet: !new:trackformer_sb.nnet.masknet.PerformerMaskNet {node}\n"
        + TRAINING[TRAINING.index("# SECRET COMMENT: the way back") :]
    )
    path, modules = trained(tmp_path / "experiment", text)
    folder = export_separator(path, modules, tmp_path / "separator")
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in TINY} == TINY
    assert config["dropout"] == 0.1
