"""Separators of named stems: folders, files and the command line."""

import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.inference.separation import SepformerSeparation

from trackformer_sb.cli import main
from trackformer_sb.inference import separator as separator_module
from trackformer_sb.inference.interfaces import PerformerSeparation
from trackformer_sb.inference.loading import load_separator
from trackformer_sb.inference.separator import Separator

CLASSES = ["drums", "vocals", "other"]
RATE = 8000
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def separator():
    torch.manual_seed(0)
    return Separator(
        CLASSES,
        RATE,
        n_fft=512,
        hop_length=256,
        masknet={
            "num_spks": 6,
            "channels": [8, 8, 8],
            "d_model": 16,
            "num_layers": 1,
        },
    ).eval()


@pytest.fixture(scope="module")
def folder(separator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("separator")
    separator.save_pretrained(folder)
    return folder


def write_song(path, channels=2, seconds=2.0, rate=RATE):
    shape = round(seconds * rate), channels
    sig = np.random.default_rng(0).normal(0.0, 0.1, shape)
    soundfile.write(path, sig, rate, subtype="FLOAT")
    return str(path)


def read(path):
    return soundfile.read(path, always_2d=True)[0]


def test_a_folder_gives_the_same_stems(separator, folder):
    again = Separator.from_pretrained(folder)
    song = torch.randn(2, 5000)
    # the folder has bfloat16
    for name, stem in separator.separate(song).items():
        torch.testing.assert_close(
            again.separate(song)[name], stem, atol=0.02, rtol=0
        )
    assert json.loads((folder / "config.json").read_text())["classes"] == (
        CLASSES
    )


def test_saved_again_nothing_changes(folder, tmp_path):
    Separator.from_pretrained(folder).save_pretrained(tmp_path)
    names = "README.md config.json hyperparams.yaml model.safetensors".split()
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("cls", [PerformerSeparation, SepformerSeparation])
def test_by_yaml_a_batch_has_the_stems_in_their_order(folder, cls, tmp_path):
    mix = torch.randn(1, 5000)
    stems = Separator.from_pretrained(folder).separate(mix)
    expected = torch.stack(list(stems.values()), -1)
    for savedir in (None, tmp_path / "saved"):
        by_yaml = cls.from_hparams(str(folder), savedir=savedir)
        torch.testing.assert_close(by_yaml.separate_batch(mix), expected)
    loaded, _ = load_separator(folder, "cpu")
    torch.testing.assert_close(loaded.separate_batch(mix), expected)


@pytest.mark.parametrize("cls", [PerformerSeparation, SepformerSeparation])
def test_by_yaml_weights_that_do_not_fit_are_refused(folder, cls, tmp_path):
    text = (folder / "hyperparams.yaml").read_text()
    other = text.replace('"d_model": 16', '"d_model": 32')
    assert other != text
    (tmp_path / "hyperparams.yaml").write_text(other)
    with pytest.raises((FileNotFoundError, ValueError), match="safetensors"):
        cls.from_hparams(str(tmp_path))
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="does not fit StemMaskNet"):
        cls.from_hparams(str(tmp_path))


def test_of_masknet_takes_the_weights(separator):
    config = {k: separator.config[k] for k in ("sample_rate", "n_fft")}
    again = Separator.of_masknet(
        separator.masknet, classes=CLASSES, hop_length=256, **config
    )
    song = torch.randn(1, 3000)
    for name, stem in separator.separate(song).items():
        torch.testing.assert_close(again.separate(song)[name], stem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["a", "b", "c", "d"]}, "num_spks: expected a multiple"),
        ({"n_fft": 1024}, "does not fit"),
        ({"sound": 1}, "sound"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit_are_refused(folder, tmp_path, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=message):
        Separator.from_pretrained(tmp_path)


def test_damaged_weights_are_named(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2 + 99])
    (tmp_path / "config.json").write_bytes(
        (folder / "config.json").read_bytes()
    )
    with pytest.raises(ValueError, match=r"model\.safetensors: no readable"):
        Separator.from_pretrained(tmp_path)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [RATE, 11025])
def test_files_get_their_names(folder, tmp_path, channels, rate):
    song = write_song(tmp_path / "song.wav", channels, rate=rate)
    model = f"--model={folder}"
    assert main(["separate", song, model, f"--out={tmp_path}/out"]) == 0
    stems = [read(tmp_path / "out" / f"song_{name}.wav") for name in CLASSES]
    np.testing.assert_allclose(sum(stems), read(song), atol=1e-5)


@pytest.mark.parametrize(
    "load", [Separator.from_pretrained, PerformerSeparation.from_hparams]
)
def test_separate_file_writes_what_the_command_does(folder, tmp_path, load):
    song = write_song(tmp_path / "song.wav", rate=11025)
    main(["separate", song, f"--model={folder}", f"--out={tmp_path}/out"])
    paths = load(str(folder)).separate_file(song, tmp_path, progressbar=False)
    assert [path.name for path in paths] == [f"song_{x}.wav" for x in CLASSES]
    for path in paths:
        expected = read(tmp_path / "out" / path.name)
        np.testing.assert_allclose(read(path), expected, atol=1e-6)


def test_one_stem_and_the_rest(folder, tmp_path, capsys):
    song = write_song(tmp_path / "song.wav")
    options = [f"--model={folder}", f"--out={tmp_path}"]
    assert main(["separate", song, *options, "--stems=vocals"]) == 0
    names = capsys.readouterr().out.split()
    assert [name.rpartition("_")[2] for name in names] == [
        "vocals.wav",
        "rest.wav",
    ]
    assert main(["separate", song, *options, "--slots"]) == 0
    written = capsys.readouterr().out.split()
    assert [name.rpartition("_")[2] for name in written] == [
        f"source{k}.wav" for k in range(6)
    ]
    slots = sum(read(name) for name in written)
    both = sum(read(name) for name in names)
    np.testing.assert_allclose(slots, both, atol=1e-5)


def test_remixes_take_names(folder, tmp_path):
    song = write_song(tmp_path / "song.wav")
    options = [f"--model={folder}", f"--out={tmp_path}"]
    assert main(["separate", song, *options, "--remix=vocals:-inf"]) == 0
    karaoke = read(tmp_path / "song_remix.wav")
    vocals = read(tmp_path / "song_vocals.wav")
    np.testing.assert_allclose(karaoke + vocals, read(song), atol=1e-5)


def test_a_name_that_is_not_there_is_refused(folder, tmp_path, capsys):
    song = write_song(tmp_path / "song.wav")
    assert main(["separate", song, f"--model={folder}", "--stems=tuba"]) == 2
    error = capsys.readouterr().err
    assert "this model has drums, vocals, other; got tuba" in error


def test_without_a_model_the_one_in_the_package_is_asked_for(
    folder, tmp_path, capsys, monkeypatch
):
    song = write_song(tmp_path / "song.wav")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(separator_module.resources, "files", lambda _: tmp_path)
    assert main(["separate", song]) == 2
    assert "brings no separator of its own" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "pretrained")
    assert main(["separate", song]) == 0
    assert (tmp_path / "song_drums.wav").is_file()
    capsys.readouterr()
    assert main(["info", "--seconds=0.1"]) == 0
    assert "drums, vocals, other" in capsys.readouterr().out


def test_a_wheel_brings_the_separator(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "trackformer_sb",
        tmp_path / "trackformer_sb",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps"]
    subprocess.run(
        [*pip, "--no-build-isolation", "."], cwd=tmp_path, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    folder = tmp_path / "unpacked" / "trackformer_sb" / "pretrained"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "hyperparams.yaml"),
        "model.safetensors",
    }
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    separator = Separator.from_pretrained(folder)
    assert list(separator.groups) == ["drums", "bass", "vocals", "other"]


def test_chunks_keep_their_names(separator, folder, tmp_path):
    """Outputs of neighbouring chunks are not put in another order."""
    song = write_song(tmp_path / "song.wav", seconds=4.0)
    loaded, _ = load_separator(folder, "cpu")
    chunks = loaded.separate_file(
        song, chunk_seconds=1.5, overlap=0.5, progressbar=False
    )
    whole = separator.separate(torch.from_numpy(read(song).T).float())
    for stem, expected in zip(chunks, whole.values()):
        # context differs, names do not
        assert torch.corrcoef(torch.stack([stem[0], expected[0]]))[0, 1] > 0.9


@pytest.mark.parametrize(
    ("rate", "channels", "samples"),
    [
        (RATE, 1, 1),
        (44100, 2, 1),
        (RATE, 2, 300),  # shorter than a window
        (RATE // 2, 1, 3000),
    ],
)
def test_short_songs_and_low_rates(folder, tmp_path, rate, channels, samples):
    song = write_song(tmp_path / "song.wav", channels, samples / rate, rate)
    options = [f"--model={folder}", f"--out={tmp_path}"]
    assert main(["separate", song, *options]) == 0
    stems = [read(tmp_path / f"song_{name}.wav") for name in CLASSES]
    np.testing.assert_allclose(sum(stems), read(song), atol=1e-5)


def test_silence_stays_silent(folder, tmp_path):
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros((RATE, 2)), RATE)
    options = [f"--model={folder}", f"--out={tmp_path}"]
    assert main(["separate", str(path), *options]) == 0
    assert not read(tmp_path / "silence_vocals.wav").any()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "holds no samples"),
        ([0.1] * 9 + [np.nan], "NaN or infinite samples"),
        ([0.1] * 9 + [np.inf], "NaN or infinite samples"),
    ],
    ids=["empty", "nan", "infinite"],
)
def test_no_stems_of_what_is_no_sound(
    folder, tmp_path, capsys, samples, message
):
    path = tmp_path / "song.wav"
    soundfile.write(path, np.array(samples), RATE, subtype="FLOAT")
    options = [f"--model={folder}", f"--out={tmp_path}/out"]
    assert main(["separate", str(path), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and message in line
    assert not list((tmp_path / "out").glob("*"))


def test_the_model_in_the_box_keeps_its_sound():
    time = torch.arange(3 * 44100) / 44100
    bass = 0.3 * torch.sin(2 * torch.pi * 55 * time)
    hits = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    hits = 0.3 * hits * (-30 * (time % 0.5)).exp()
    stems = Separator.from_pretrained().separate(torch.stack([bass + hits] * 2))
    total = sum(stem.square().mean() for stem in stems.values())
    shares = {k: float(v.square().mean() / total) for k, v in stems.items()}
    # what this model gave when it was put there
    expected = {"drums": 0.185, "bass": 0.802, "vocals": 0.004, "other": 0.008}
    assert shares == pytest.approx(expected, abs=0.01)
