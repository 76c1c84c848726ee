"""The folder of a pre-trained encoder: what is in it and who can load it."""

import io
import re
import socket

import pytest
import torch
from hub_server import serving, use_hub
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from speechbrain.utils.run_opts import RunOptions

from trackformer_sb.inference.features import (
    SETTINGS,
    PerformerFeatures,
    encoder_folder,
    export_encoder,
)
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.stft import STFTEncoder
from trackformer_sb.nnet.transfer import (
    check_settings,
    load_pretrained_encoder,
)

# What create_experiment_directory saves after a pre-training, with all that
# does not belong into the folder.
PRETRAINING = """\
seed: 1234
data_folder: {data}
output_folder: !ref <data_folder>/results
mask_ratio: 0.3
device: cpu
sample_rate: 8000
n_fft: 128
hop_length: 32
spec_norm: zscore
d_model: 16
nhead: 2
num_layers: 2
d_ffn: 24
n_features: 8

Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder
  n_fft: !ref <n_fft>
  hop_length: !ref <hop_length>

# SECRET COMMENT: what is pre-trained
Features: !new:trackformer_sb.nnet.features.SpectrogramEncoder
  in_channels: !ref <n_fft> // 2 + 1
  d_model: !ref <d_model>
  nhead: !ref <nhead>
  num_layers: !ref <num_layers>
  d_ffn: !ref <d_ffn>
  n_features: !ref <n_features>
  dropout: 0.5
  spec_norm: !ref <spec_norm>

# SECRET COMMENT: around it
AudioMAE: !new:trackformer_sb.nnet.mae.AudioMAE
  features: !ref <Features>
"""

CPU = {"device": "cpu"}


def trained(folder):
    """A resolved yaml in a folder of its own, and its modules with weights."""
    folder.mkdir()
    text = PRETRAINING.format(data=folder)
    path = folder / "hyperparams.yaml"
    path.write_text(resolve_references(io.StringIO(text)).getvalue())
    torch.manual_seed(0)
    hparams = load_hyperpyyaml(text)
    for parameter in hparams["Features"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return path, {"stft": hparams["Encoder"], "encoder": hparams["Features"]}


@pytest.fixture
def exported(tmp_path):
    """A folder, and the modules in it."""
    path, modules = trained(tmp_path / "experiment")
    return export_encoder(path, modules, tmp_path / "encoder"), modules


def loaded(folder, **options):
    return PerformerFeatures.from_hparams(folder, run_opts=CPU, **options)


def change(folder, **changes):
    """Sets keys of the saved weights, or takes them out where None."""
    state = torch.load(folder / "encoder.ckpt", weights_only=True)
    for key, value in changes.items():
        state.pop(key, None)
        if value is not None:
            state[key] = value
    torch.save(state, folder / "encoder.ckpt")


# --- what is in it -----------------------------------------------------------


def test_files_of_the_folder(exported, tmp_path):
    folder, modules = exported
    # the STFT has no weights, and nothing is left beside the folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "encoder.ckpt",
        "hyperparams.yaml",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "encoder",
        "experiment",
    ]
    state = torch.load(folder / "encoder.ckpt", weights_only=True)
    expected = modules["encoder"].state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_nothing_of_the_experiment_comes_along(exported, tmp_path):
    folder, _ = exported
    text = (folder / "hyperparams.yaml").read_text()
    everything = text + (folder / "README.md").read_text()
    traces = ("SECRET", "data_folder", "seed", "mask_ratio", "AudioMAE")
    for trace in (str(tmp_path), *traces):
        assert trace not in everything
    # paths of one machine
    assert not re.search(r"(?:[\s:\"'\[]|^)(?:/\w|[A-Z]:\\)", everything)
    yaml = YAML().load(text)
    parts = ["Encoder", "Features", "modules", "audio_normalizer", "pretrainer"]
    assert list(yaml) == [*SETTINGS, "songs", *parts]
    # the Pretrained class takes such keys for run options
    assert not set(yaml) & set(RunOptions().as_dict())
    values = (8000, 128, 32, "zscore", 16, 2, 2, 24, 8)
    assert tuple(yaml[key] for key in SETTINGS) == values
    assert text.startswith("# Performer encoder of music: 2 layers at 8000 Hz")


def test_export_leaves_training_alone(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    modules["encoder"].train()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    export_encoder(path, modules, tmp_path / "encoder")
    assert torch.equal(torch.rand(1), expected)
    assert modules["encoder"].training
    assert all(p.requires_grad for p in modules["encoder"].parameters())


def test_model_card(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    metadata = {
        "Training": {"hidden": "30 % in spans of 1 frames"},
        "Notes": "Two songs.",
    }
    folder = export_encoder(path, modules, tmp_path / "encoder", metadata)
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    front = YAML(typ="safe").load(front)
    assert front["library_name"] == "speechbrain"
    assert front["pipeline_tag"] == "feature-extraction"
    assert "8000 Hz into 16 features per frame of 32\nsamples" in body
    assert "| hidden | 30 % in spans of 1 frames |" in body
    assert "## Notes\n\nTwo songs." in body
    assert "{" not in body


def test_python_of_the_model_card_runs(exported):
    folder, _ = exported
    code = (folder / "README.md").read_text().split("```python\n")[1]
    code = code.split("```")[0].replace("path/to/this/folder", str(folder))
    names = {"wavs": torch.randn(2, 3200)}
    exec(code, names)
    assert names["x"].shape == (2, 100, 16)


# --- who can load it ---------------------------------------------------------


def test_features_are_those_of_the_trained_modules(exported):
    folder, modules = exported
    features = loaded(folder)
    wavs = torch.randn(2, 1000)
    x = features.encode_batch(wavs)
    modules["encoder"].eval()
    expected = modules["encoder"].encode(modules["stft"](wavs))
    assert torch.equal(x, expected.detach())
    assert torch.equal(features(wavs), x)
    # no dropout, though it was trained with 0.5; and it tells waveforms apart
    assert torch.equal(features.encode_batch(wavs), x)
    assert (x[0] - x[1]).abs().mean() > 0.01
    assert features.hparams.sample_rate == 8000


@pytest.mark.parametrize("time", [1, 31, 32, 33, 1000, 1024])
def test_a_frame_every_hop(exported, time):
    x = loaded(exported[0]).encode_batch(torch.randn(3, time))
    assert x.shape == (3, -(-time // 32), 16)
    assert x.isfinite().all()


def test_batch_neighbours_do_not_matter(exported):
    features = loaded(exported[0])
    wavs = torch.randn(3, 1000)
    wavs[1] *= 1e3
    wavs[2] = 0.0
    together = features.encode_batch(wavs)
    assert together.isfinite().all()
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], features.encode_batch(wavs[i : i + 1])
        )


@pytest.mark.parametrize("filling", [0.0, 50.0])
@pytest.mark.parametrize("time", [33, 320, 700, 992, 1000])
def test_padding_equals_a_shorter_input(exported, time, filling):
    features = loaded(exported[0])
    wavs = torch.randn(2, 1000)
    wavs[0, time:] = filling
    x = features.encode_batch(wavs, torch.tensor([time / 1000, 1.0]))
    frames = -(-time // 32)
    alone = features.encode_batch(wavs[:1, :time])
    torch.testing.assert_close(x[:1, :frames], alone, atol=1e-4, rtol=1e-4)
    whole = features.encode_batch(wavs[1:])
    torch.testing.assert_close(x[1:], whole, atol=1e-4, rtol=1e-4)


def test_gain_does_not_matter(exported):
    features = loaded(exported[0])
    wavs = torch.randn(2, 1000)
    torch.testing.assert_close(
        features.encode_batch(100 * wavs),
        features.encode_batch(wavs),
        atol=1e-3,
        rtol=0,
    )


def test_frozen_unless_asked_for(exported):
    folder, _ = exported
    frozen = loaded(folder)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(module.training for module in frozen.mods.modules())
    # a recipe that trains what is around it calls this
    frozen.train()
    assert not any(module.training for module in frozen.mods.modules())
    # a module of another recipe, trained with it
    trained_on = loaded(folder, freeze_params=False)
    assert trained_on.mods.encoder.training
    trained_on.encode_batch(torch.randn(2, 1000)).square().sum().backward()
    assert len(list(trained_on.parameters())) > 10
    for name, parameter in trained_on.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_it_computes_where_its_weights_are(exported):
    features = loaded(exported[0])
    wavs, wav_lens = torch.randn(2, 900), torch.tensor([1.0, 0.5])
    expected = features.encode_batch(wavs, wav_lens)
    # what was said at construction, before a recipe moved the weights
    features.device = "cuda:7"
    assert torch.equal(features.encode_batch(wavs, wav_lens), expected)


@pytest.mark.parametrize("length", [0.0, -0.5, 1.5, float("nan")])
def test_lengths_out_of_range_are_refused(exported, length):
    features = loaded(exported[0])
    with pytest.raises(ValueError, match=r"wav_lens as shares in \(0, 1\]"):
        features.encode_batch(torch.randn(2, 900), torch.tensor([1.0, length]))


def test_item_of_less_than_a_sample_has_one(exported):
    features = loaded(exported[0])
    wavs = torch.randn(2, 900)
    x = features.encode_batch(wavs, torch.tensor([1.0, 1e-4]))
    assert x.isfinite().all()
    one = features.encode_batch(wavs, torch.tensor([1.0, 1 / 900]))
    assert torch.equal(x, one)


def test_shapes_are_checked(exported):
    features = loaded(exported[0])
    for shape in ((1000,), (1, 2, 1000)):
        with pytest.raises(ValueError, match=r"\[batch, time\], got \["):
            features.encode_batch(torch.zeros(shape))


@pytest.mark.parametrize("as_text", (False, True))
def test_loads_elsewhere_and_without_a_network(
    exported, tmp_path, monkeypatch, as_text
):
    folder, modules = exported
    (tmp_path / "experiment" / "hyperparams.yaml").unlink()
    moved = folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)

    def no_network(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    features = loaded("moved" if as_text else moved)
    state = features.mods.encoder.state_dict()
    expected = modules["encoder"].state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    # nothing is copied to where it is loaded from
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "experiment",
        "moved",
    ]
    assert len(list(moved.iterdir())) == 3


def test_initialises_a_masknet(exported):
    folder, modules = exported
    sizes = {"d_model": 16, "nhead": 2, "num_layers": 2, "d_ffn": 24}
    masknet = PerformerMaskNet(65, 3, n_features=8, **sizes)
    place = encoder_folder(folder)
    check_settings({"sample_rate": 8000, "hop_length": 32, **sizes}, place)
    load_pretrained_encoder(masknet, place)
    mix_w = modules["stft"](torch.randn(2, 1000))
    for module in (masknet, modules["encoder"]):
        module.eval()
    assert torch.equal(masknet.encode(mix_w), modules["encoder"](mix_w))


def test_initialises_a_masknet_from_the_hub(exported, tmp_path, monkeypatch):
    folder, modules = exported
    sizes = {"d_model": 16, "nhead": 2, "num_layers": 2, "d_ffn": 24}
    masknet = PerformerMaskNet(65, 3, n_features=8, **sizes)
    with serving() as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        hub.put("band/encoder", folder)
        fetched = encoder_folder("band/encoder")
        check_settings({"sample_rate": 8000, **sizes}, fetched)
        load_pretrained_encoder(masknet, fetched)
        features = loaded("band/encoder").mods.encoder
        with pytest.raises(FileNotFoundError, match="band/nothing"):
            encoder_folder("band/nothing")
    for key, value in modules["encoder"].state_dict().items():
        assert torch.equal(masknet.state_dict()[key], value)
        assert torch.equal(features.state_dict()[key], value)


# --- damage ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"embedding.bias": None}, "missing embedding.bias"),
        ({"head.bias": torch.ones(3)}, "unexpected head.bias"),
        (
            {"embedding.bias": torch.ones(7)},
            r"embedding.bias \(expected \[16\], got \[7\]\)",
        ),
    ),
)
def test_weights_that_do_not_fit_are_named(changes, message, exported):
    folder, _ = exported
    change(folder, **changes)
    with pytest.raises(ValueError, match=rf"encoder\.ckpt does not.*{message}"):
        loaded(folder)


def test_weights_are_strict_without_hooks_in_the_yaml(exported):
    # as in folders that others make for SpeechBrain
    path = exported[0] / "hyperparams.yaml"
    path.write_text(path.read_text().partition("  custom_hooks:")[0])
    change(exported[0], **{"embedding.bias": None})
    with pytest.raises(ValueError, match=r"missing embedding\.bias"):
        loaded(exported[0])


def test_truncated_weights_are_named(exported):
    path = exported[0] / "encoder.ckpt"
    path.write_bytes(path.read_bytes()[:2000])
    message = r"encoder\.ckpt: no readable file of weights"
    with pytest.raises(ValueError, match=message):
        loaded(exported[0])


def test_yaml_that_loads_no_weights_is_refused(exported):
    path = exported[0] / "hyperparams.yaml"
    head, _, _ = path.read_text().partition("pretrainer:")
    pretrainer = "!new:speechbrain.utils.parameter_transfer.Pretrainer"
    path.write_text(f"{head}pretrainer: {pretrainer}\n  loadables: {{}}\n")
    with pytest.raises(ValueError, match="loads no weights for encoder"):
        loaded(exported[0])
    path.write_text(head)
    with pytest.raises(ValueError, match="expected the key pretrainer"):
        loaded(exported[0])


@pytest.mark.parametrize("name", ("encoder.ckpt", "hyperparams.yaml"))
def test_missing_file_is_named(name, exported):
    folder, _ = exported
    (folder / name).unlink()
    for load in (loaded, encoder_folder):
        with pytest.raises(Exception, match=name) as found:
            load(folder)
        assert isinstance(found.value, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="expected an encoder folder"):
        encoder_folder(folder)


def test_module_that_is_no_encoder_is_named():
    stft = STFTEncoder(n_fft=64, hop_length=32)
    message = "encoder: expected a SpectrogramEncoder, .* got STFTEncoder"
    with pytest.raises(ValueError, match=message):
        PerformerFeatures(
            modules={"stft": stft, "encoder": stft},
            hparams={"sample_rate": 8000},
            run_opts={"device": "cpu"},
        )


@pytest.mark.parametrize("place", ("no/such/folder", "encodr"))
def test_mistyped_folder_is_named(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = f"{place} not found: expected an encoder folder"
    for load in (loaded, encoder_folder):
        with pytest.raises(FileNotFoundError, match=message):
            load(place)


# --- where it is written -----------------------------------------------------


def test_replaces_an_encoder_only_by_a_whole_one(exported, monkeypatch):
    folder, modules = exported
    before = (folder / "encoder.ckpt").read_bytes()
    hparams_file = folder.parent / "experiment" / "hyperparams.yaml"
    with torch.no_grad():
        modules["encoder"].embedding.bias.add_(1.0)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            export_encoder(hparams_file, modules, folder)
    assert (folder / "encoder.ckpt").read_bytes() == before
    assert len(list(folder.parent.iterdir())) == 2
    export_encoder(hparams_file, modules, folder)
    assert len(list(folder.parent.iterdir())) == 2
    bias = loaded(folder).mods.encoder.embedding.bias
    assert torch.equal(bias, modules["encoder"].embedding.bias)


def test_does_not_replace_another_folder(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "song.wav").write_bytes(b"precious")
    message = r"music is no encoder folder, it holds song\.wav"
    with pytest.raises(FileExistsError, match=message):
        export_encoder(path, modules, tmp_path / "music")
    assert (tmp_path / "music" / "song.wav").read_bytes() == b"precious"


def test_what_file_managers_leave_is_no_other_folder(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    folder = tmp_path / "new"
    for _ in "new", "again":
        folder.mkdir(exist_ok=True)
        (folder / ".DS_Store").write_bytes(b"icons")
        export_encoder(path, modules, folder)
        assert (folder / "hyperparams.yaml").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (("hop_length: 32\n", "hop: 32\n"), "missing hop_length"),
        (("Features: &", "Feature: &"), "missing Features"),
        (
            ("!new:trackformer_sb.nnet.f", "!name:trackformer_sb.nnet.f"),
            "expected Features to be a !new: node, got '!name:track",
        ),
        (
            ("dropout: 0.5", "dropout: /data/model"),
            r"Features\.dropout: an abs",
        ),
        (("in_channels: 65", "in_channels: 66"), r"encoder\.ckpt does not"),
    ),
)
def test_yaml_that_cannot_be_exported(tmp_path, change, message):
    path, modules = trained(tmp_path / "experiment")
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(change[0], change[1], 1))
    with pytest.raises(ValueError, match=message):
        export_encoder(path, modules, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_missing_module(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    del modules["encoder"]
    message = "expected the modules stft, encoder, missing encoder"
    with pytest.raises(ValueError, match=message):
        export_encoder(path, modules, tmp_path / "encoder")
