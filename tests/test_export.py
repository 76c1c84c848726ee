"""The folder of a trained separator: what is in it and who can load it."""

import io

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.utils.run_opts import RunOptions

from trackformer_sb.inference.export import export_separator
from trackformer_sb.inference.interfaces import PerformerSeparation

# What create_experiment_directory saves after a training, with all that does
# not belong into the folder.
TRAINING = """\
# Generated from:
# {data}/hparams/tiny.yaml
seed: 1234
__set_seed: !apply:torch.manual_seed [!ref <seed>]
data_folder: {data}
output_folder: !ref <data_folder>/results
sample_rate: 8000
num_spks: 3
n_fft: 256
hop_length: 64
device: cpu
debug: False

# STFT
Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder
  n_fft: !ref <n_fft>  # samples
  hop_length: !ref <hop_length>

# SECRET COMMENT: sizes of the model
MaskNet: !new:trackformer_sb.nnet.masknet.PerformerMaskNet
  in_channels: 129
  num_spks: !ref <num_spks>
  d_model: 16
  nhead: 2
  num_layers: 1
  n_features: 16
  dropout: 0.5
  mask_activation: softmax

# SECRET COMMENT: the way back
Decoder: !new:trackformer_sb.nnet.stft.STFTDecoder
  n_fft: !ref <n_fft>
  hop_length: !ref <hop_length>

# SECRET COMMENT: the rest
modules:
  encoder: !ref <Encoder>
  masknet: !ref <MaskNet>
  decoder: !ref <Decoder>
"""

CONV_TASNET = """\
sample_rate: 8000
num_spks: 3
N: 32
kernel_size: 88

Encoder: !new:speechbrain.lobes.models.dual_path.Encoder
  kernel_size: !ref <kernel_size>
  out_channels: !ref <N>

MaskNet: !new:speechbrain.lobes.models.conv_tasnet.MaskNet
  N: !ref <N>
  B: 8
  H: 16
  P: 3
  X: 2
  R: 1
  C: !ref <num_spks>
  norm_type: gLN
  causal: False
  mask_nonlinear: relu

Decoder: !new:speechbrain.lobes.models.dual_path.Decoder
  in_channels: !ref <N>
  out_channels: 1
  kernel_size: !ref <kernel_size>
  stride: 44
  bias: False

modules:
  encoder: !ref <Encoder>
  masknet: !ref <MaskNet>
  decoder: !ref <Decoder>
"""


def trained(folder, text=TRAINING):
    """A resolved yaml in a folder of its own, and its modules with weights."""
    folder.mkdir(exist_ok=True)
    text = text.format(data=folder)
    path = folder / "hyperparams.yaml"
    path.write_text(resolve_references(io.StringIO(text)).getvalue())
    torch.manual_seed(0)
    modules = load_hyperpyyaml(text)["modules"]
    for module in modules.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return path, modules


@pytest.fixture
def exported(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    return export_separator(path, modules, tmp_path / "separator"), modules


@pytest.mark.parametrize(
    "names", [["mine.ckpt", "README.md"], ["README.md"], ["masknet.ckpt"]]
)
def test_files_of_somebody_else_are_not_replaced(tmp_path, names):
    path, modules = trained(tmp_path / "experiment")
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("precious")
    with pytest.raises(FileExistsError, match="is no separator folder"):
        export_separator(path, modules, folder)
    assert [(folder / name).read_text() for name in names] == [
        "precious" for _ in names
    ]


def test_a_folder_of_another_model_is_not_replaced(exported, tmp_path):
    folder, modules = exported
    path = folder / "hyperparams.yaml"
    text = path.read_text("utf-8").replace("  masknet:", "  classifier:", 1)
    path.write_text(text, "utf-8")
    experiment = tmp_path / "experiment" / "hyperparams.yaml"
    with pytest.raises(FileExistsError, match="another hyperparams"):
        export_separator(experiment, modules, folder)
    assert path.read_text("utf-8") == text


def test_everybody_may_read_an_exported_folder(exported):
    folder, _ = exported
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1


def loaded(folder, cls=PerformerSeparation, **options):
    return cls.from_hparams(
        source=str(folder), run_opts={"device": "cpu"}, **options
    )


def mixtures(frames=5000):
    return torch.randn(2, frames, generator=torch.Generator().manual_seed(1))


def test_files_of_the_folder(exported, tmp_path):
    folder, _ = exported
    # the STFT has no weights, and nothing is left beside the folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "hyperparams.yaml",
        "masknet.ckpt",
        "model.safetensors",
        "pytorch_model.bin",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "experiment",
        "separator",
    ]
    state = torch.load(folder / "masknet.ckpt", weights_only=True)
    assert type(state) is dict
    assert all(type(value) is torch.Tensor for value in state.values())


def test_nothing_of_the_experiment_comes_along(exported, tmp_path):
    folder, _ = exported
    text = (folder / "hyperparams.yaml").read_text()
    everything = text + (folder / "README.md").read_text()
    for trace in (str(tmp_path), "SECRET", "data_folder", "seed", "debug"):
        assert trace not in everything
    assert text.startswith("# PerformerMaskNet separator: 3 outputs at 8000 Hz")
    yaml = YAML().load(text)
    assert list(yaml) == [
        "sample_rate",
        "num_spks",
        "mixture_consistency",
        "Encoder",
        "MaskNet",
        "Decoder",
        "modules",
        "audio_normalizer",
        "pretrainer",
    ]
    # the Pretrained class takes such keys for run options
    assert not set(yaml) & set(RunOptions().as_dict())
    assert yaml["mixture_consistency"] is False
    assert yaml["MaskNet"]["dropout"] == 0.5


def test_loads_where_the_experiment_is_gone(exported, tmp_path, monkeypatch):
    folder, modules = exported
    for path in (tmp_path / "experiment").iterdir():
        path.unlink()
    (tmp_path / "experiment").rmdir()
    elsewhere = folder.rename(tmp_path / "moved")
    monkeypatch.chdir(elsewhere)
    separator = loaded(".")
    expected = modules["masknet"].state_dict()
    state = separator.mods.masknet.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    mix = mixtures()
    est_source = separator.separate_batch(mix)
    assert est_source.shape == (2, 5000, 3)
    assert torch.allclose(est_source.sum(-1), mix, atol=1e-5)
    # no dropout at inference, though it was trained with 0.5
    assert torch.equal(est_source, separator.separate_batch(mix))


def test_stock_interface_gives_the_same_samples(exported, tmp_path):
    folder, _ = exported
    ours = loaded(folder)
    stock = loaded(folder, SepformerSeparation, savedir=tmp_path / "save")
    mix = mixtures()
    expected = stock.separate_batch(mix)
    assert expected.abs().max() > 0.1
    assert torch.allclose(ours.separate_batch(mix), expected, atol=1e-6)
    assert stock.audio_normalizer.sample_rate == 8000
    assert stock.audio_normalizer.mix == "keep"


def test_conv_tasnet_of_speechbrain(tmp_path):
    path, modules = trained(tmp_path / "experiment", CONV_TASNET)
    folder = export_separator(path, modules, tmp_path / "separator")
    assert sorted(path.name for path in folder.glob("*.ckpt")) == [
        "decoder.ckpt",
        "encoder.ckpt",
        "masknet.ckpt",
    ]
    separator = loaded(folder)
    assert separator.hparams.mixture_consistency is True
    mix = mixtures()
    est_source = separator.separate_batch(mix)
    assert torch.allclose(est_source.sum(-1), mix, atol=1e-4)
    # the stock class knows no consistency: the same up to what is missing
    stock = loaded(folder, SepformerSeparation, savedir=tmp_path / "save")
    plain = stock.separate_batch(mix)
    missing = (mix - plain.sum(-1)) / 3
    assert torch.allclose(plain + missing.unsqueeze(-1), est_source, atol=1e-4)


@pytest.mark.parametrize(
    "change, expected",
    [
        (("softmax", "sigmoid"), True),
        (("num_spks: 3", "num_spks: 3\nmixture_consistency: True"), True),
        (("softmax", "softmax"), False),
    ],
)
def test_mixture_consistency(tmp_path, change, expected):
    """On unless the masks are a softmax, or as the training had it."""
    path, modules = trained(tmp_path / "experiment", TRAINING.replace(*change))
    folder = export_separator(path, modules, tmp_path / "separator")
    separator = loaded(folder)
    assert separator.hparams.mixture_consistency is expected
    mix = mixtures()
    total = separator.separate_batch(mix).sum(-1)
    assert torch.allclose(total, mix, atol=1e-4)


class Wrapped(torch.nn.Module):
    """A compiled module, as far as its attributes go."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


def test_wrapped_modules_are_unwrapped(exported, tmp_path):
    folder, modules = exported
    wrapped = {
        "encoder": modules["encoder"],
        "masknet": Wrapped(torch.nn.DataParallel(modules["masknet"])),
        "decoder": torch.nn.DataParallel(Wrapped(modules["decoder"])),
    }
    path = tmp_path / "experiment" / "hyperparams.yaml"
    again = export_separator(path, wrapped, tmp_path / "again")
    for name in ("hyperparams.yaml", "README.md"):
        assert (again / name).read_text() == (folder / name).read_text()
    states = [
        torch.load(place / "masknet.ckpt", weights_only=True)
        for place in (folder, again)
    ]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_compiled_modules_are_unwrapped(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    modules["masknet"] = torch.compile(modules["masknet"], backend="eager")
    folder = export_separator(path, modules, tmp_path / "separator")
    assert "embedding.weight" in torch.load(folder / "masknet.ckpt")


def test_export_leaves_training_alone(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    modules["masknet"].train()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    export_separator(path, modules, tmp_path / "separator")
    assert torch.equal(torch.rand(1), expected)
    assert modules["masknet"].training
    assert all(p.requires_grad for p in modules["masknet"].parameters())


def test_model_card(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    metadata = {
        "Training data": "30 minutes of a demo band.",
        "Results": {"si_snri_grouped": "5.9 dB", "mask_overlap": 0.31},
    }
    folder = export_separator(path, modules, tmp_path / "separator", metadata)
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", maxsplit=2)
    front = YAML(typ="safe").load(front)
    assert front["library_name"] == "speechbrain"
    assert front["license"] == "apache-2.0"
    assert "music-source-separation" in front["tags"]
    assert "## Training data\n\n30 minutes of a demo band." in body
    assert "| si_snri_grouped | 5.9 dB |" in body
    assert "| mask_overlap | 0.31 |" in body
    assert "trackformer separate song.wav --model" in body
    assert "{" not in body


def test_python_of_the_model_card_runs(exported, tmp_path, monkeypatch):
    import soundfile

    folder, _ = exported
    code = (folder / "README.md").read_text().split("```python\n")[1]
    code = code.split("```")[0].replace("path/to/this/folder", str(folder))
    monkeypatch.chdir(tmp_path)
    soundfile.write("song.wav", mixtures(800).T.numpy(), 8000)
    names = {}
    exec(code, names)
    assert [str(path) for path in names["paths"]] == [
        "sources/song_source0.wav",
        "sources/song_source1.wav",
        "sources/song_source2.wav",
    ]


def test_replaces_a_separator_only_by_a_whole_one(exported, monkeypatch):
    folder, modules = exported
    before = (folder / "masknet.ckpt").read_bytes()
    hparams_file = folder.parent / "experiment" / "hyperparams.yaml"
    with torch.no_grad():
        modules["masknet"].head.bias.add_(1.0)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            export_separator(hparams_file, modules, folder)
    assert (folder / "masknet.ckpt").read_bytes() == before
    assert len(list(folder.parent.iterdir())) == 2
    export_separator(hparams_file, modules, folder)
    assert len(list(folder.parent.iterdir())) == 2
    bias = loaded(folder).mods.masknet.head.bias
    assert torch.equal(bias, modules["masknet"].head.bias)


def test_does_not_replace_another_folder(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "song.wav").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"music .*it holds song\.wav"):
        export_separator(path, modules, tmp_path / "music")
    assert (tmp_path / "music" / "song.wav").read_bytes() == b"precious"


def test_what_file_managers_leave_is_no_other_folder(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    folder = tmp_path / "new"
    for _ in "new", "again":
        folder.mkdir(exist_ok=True)
        (folder / ".DS_Store").write_bytes(b"icons")
        export_separator(path, modules, folder)
        assert (folder / "hyperparams.yaml").is_file()


def test_yaml_that_does_not_fit_the_modules(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    path.write_text(path.read_text().replace("d_model: 16", "d_model: 32"))
    with pytest.raises(ValueError, match=r"masknet\.ckpt does not fit"):
        export_separator(path, modules, tmp_path / "separator")
    assert not (tmp_path / "separator").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (("num_spks: 3", "spks: 3"), r"missing num_spks"),
        (("Decoder: &", "Decoders: &"), r"missing Decoder"),
        (
            ("!new:trackformer_sb.nnet.stft.STFTE", "!name:torch.nn.E"),
            r"expected Encoder to be a !new: node, got '!name:torch\.nn\.E",
        ),
        (
            ("mask_activation: softmax", "mask_activation: /data/model"),
            r"MaskNet\.mask_activation: an absolute path",
        ),
    ],
)
def test_yaml_that_cannot_be_exported(tmp_path, change, message):
    path, modules = trained(tmp_path / "experiment")
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=message):
        export_separator(path, modules, tmp_path / "separator")
    assert not (tmp_path / "separator").exists()


def test_missing_module(tmp_path):
    path, modules = trained(tmp_path / "experiment")
    del modules["masknet"]
    with pytest.raises(ValueError, match="missing masknet"):
        export_separator(path, modules, tmp_path / "separator")
