"""Separators: their folder, all ways to load it, files in and files out."""

import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from separators import (
    CLASSES,
    OF_ASTEROID,
    OF_SPEECHBRAIN,
    PERFORMER,
    RATE,
    mixtures,
    named,
    performer,
    read,
    trained,
)
from speechbrain.inference.separation import SepformerSeparation

from trackformer_sb.audio import UnreadableAudio
from trackformer_sb.cli import main
from trackformer_sb.inference.separation import separate
from trackformer_sb.inference.separator import Separator, find_device
from trackformer_sb.inference.speechbrain import PerformerSeparation

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ["README.md", "config.json", "hyperparams.yaml", "model.safetensors"]
SEPARATION_YAMLS = {
    "softmax": PERFORMER,
    "sigmoid": PERFORMER.replace("softmax", "sigmoid"),
    "speechbrain": OF_SPEECHBRAIN,
    "asteroid": OF_ASTEROID,
}


@pytest.fixture(scope="module")
def separator():
    torch.manual_seed(0)
    return performer()


@pytest.fixture(scope="module")
def named_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    torch.manual_seed(0)
    named().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(separator, tmp_path):
    separator.save_pretrained(tmp_path / "separator")
    return tmp_path / "separator"


def by_asteroid(folder, _):
    pytest.importorskip("asteroid")
    from trackformer_sb.asteroid import SeparatorModel

    model = SeparatorModel.from_pretrained(folder)
    return lambda mix: model(mix).transpose(1, 2)


def by_speechbrain(folder, tmp_path):
    saved = str(tmp_path / "saved")
    interface = SepformerSeparation.from_hparams(str(folder), savedir=saved)
    return interface.separate_batch


WAYS = {
    "ours": lambda folder, _: (
        lambda mix: Separator.from_pretrained(folder)(mix).transpose(1, 2)
    ),
    "speechbrain": lambda folder, _: (
        PerformerSeparation.from_hparams(str(folder)).separate_batch
    ),
    "stock": by_speechbrain,
    "asteroid": by_asteroid,
}


@pytest.mark.parametrize("text", SEPARATION_YAMLS)
@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_load_give_the_trained_modules(tmp_path, way, text):
    if text == "asteroid":
        pytest.importorskip("asteroid")
    path, modules = trained(tmp_path / "run", SEPARATION_YAMLS[text])
    folder = tmp_path / "separator"
    Separator.of_recipe(path, modules).save_pretrained(folder)
    shutil.rmtree(tmp_path / "run")
    mix = mixtures()
    with torch.no_grad():
        expected, _ = separate(
            mix,
            modules["encoder"],
            modules["masknet"].eval(),
            modules["decoder"],
            # which SpeechBrain does not know
            mixture_consistency=text != "softmax" and way != "stock",
        )
        est_source = WAYS[way](folder, tmp_path)(mix)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(
        est_source, expected.transpose(1, 2), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_give_named_stems_in_their_order(named_folder, way, tmp_path):
    mix = mixtures()[:1]
    stems = Separator.from_pretrained(named_folder).separate(mix)
    with torch.no_grad():
        est_source = WAYS[way](named_folder, tmp_path)(mix)
    torch.testing.assert_close(est_source, torch.stack([*stems.values()], -1))


# --- the folder --------------------------------------------------------------


def test_files_of_the_folder(folder, separator, tmp_path):
    assert sorted(os.listdir(folder)) == NAMES
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    config = json.loads((folder / "config.json").read_text())
    assert config == separator.config
    # defaults of today come along
    assert config["masknet"]["spec_norm"] == "zscore"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: trackformer_sb\n")
    assert "# Separator of 3 outputs at 8000 Hz" in card
    # saved again nothing changes
    Separator.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in NAMES:
        again = tmp_path / "again" / name
        assert again.read_bytes() == (folder / name).read_bytes()


def test_nothing_of_the_experiment_comes_along(tmp_path):
    path, modules = trained(tmp_path / "run")
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    wrapped = torch.compile(modules["masknet"].train(), backend="eager")
    modules["masknet"] = torch.nn.DataParallel(wrapped)
    separator = Separator.of_recipe(path, modules)
    # nor of the export into the experiment
    assert torch.equal(torch.rand(1), expected)
    assert wrapped.training and not separator.training
    folder = separator.export(
        tmp_path / "separator", {"Data": "A band.", "Test": {"sdr": 5.1}}
    )
    text = (folder / "hyperparams.yaml").read_text()
    card = (folder / "README.md").read_text()
    for trace in (str(tmp_path), "data_folder", "seed"):
        assert trace not in text + card
    assert "## Data\n\nA band." in card and "| sdr | 5.1 |" in card
    separator.export(folder)
    assert "A band" not in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    separator.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_earlier_weights_stay_until_new_ones_are_whole(
    folder, separator, monkeypatch
):
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(self, content):
        raise OSError("No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        separator.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


# --- nothing runs ------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


PICKLES = ("pytorch_model.bin", "masknet.ckpt", "model.pth", "data.pkl")
OBJECT = '!!python/object/apply:builtins.open ["{path}", "w"]'


def plant(folder, trace):
    """Fills a folder with what runs when it is read."""
    for name in PICKLES:
        payload = pickle.dumps(Payload(str(trace)))
        (folder / name).write_bytes(payload)
    text = f'a: !apply:builtins.open ["{trace}", "w"]\n'
    (folder / "hyperparams.yaml").write_text(text)
    card = f"---\na: {OBJECT.format(path=trace)}\n---\n# A card\n"
    (folder / "README.md").write_text(card)


def test_nothing_planted_runs(folder, separator, tmp_path):
    trace = tmp_path / "trace"
    plant(folder, trace)
    # it would run where it can
    pickle.loads((folder / "data.pkl").read_bytes())
    assert trace.exists()
    trace.unlink()
    with pytest.raises(KeyError):
        PerformerSeparation.from_hparams(str(folder))
    assert trace.exists()
    trace.unlink()
    again = Separator.from_pretrained(folder)
    assert torch.equal(again(mixtures()), separator(mixtures()))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        Separator.from_pretrained(folder)
    (folder / "data.pkl").replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors make no Sep"):
        Separator.from_pretrained(folder)
    assert not trace.exists()


def test_a_class_that_is_not_known_is_not_built(folder, tmp_path):
    trace = tmp_path / "trace"
    path = folder / "config.json"
    config = json.loads(path.read_text())
    harm = {"class": "builtins.open", "file": str(trace), "mode": "w"}
    for part in (harm, {**config["masknet"], "num_spks": harm}):
        path.write_text(json.dumps({**config, "masknet": part}))
        with pytest.raises(ValueError, match=r"builtins\.open is not among"):
            Separator.from_pretrained(folder)
    assert not trace.exists()


# --- strict ------------------------------------------------------------------


@pytest.mark.parametrize(
    "load, kind",
    [
        (Separator.from_pretrained, ValueError),
        (SepformerSeparation.from_hparams, RuntimeError),
    ],
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.popitem(), "Missing key"),
        (
            lambda state: state.update({"masknet.more": torch.zeros(1)}),
            "Unexpected key.*more",
        ),
        (
            lambda state: state.update({"masknet.head.bias": torch.zeros(5)}),
            "size mismatch for .*head.bias",
        ),
    ],
)
def test_weights_that_do_not_fit(folder, change, message, load, kind):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(kind, match=f"(?s){message}"):
        load(str(folder))


def test_config_that_is_wrong(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "classes": ["a", "b"]}))
    message = rf"{folder}: config\.json .*num_spks: expected a multiple of 2"
    with pytest.raises(ValueError, match=message):
        Separator.from_pretrained(folder)


def test_folder_that_is_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("separater", "./separater", str(tmp_path / "separater")):
        with pytest.raises(FileNotFoundError, match="separater not found: exp"):
            Separator.from_pretrained(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Separator.from_pretrained(tmp_path / "empty")


# --- in Python ---------------------------------------------------------------


def test_stems_of_channels(separator):
    song = torch.randn(6, 3000)
    stems = separator.separate(song)
    assert list(stems) == ["source0", "source1", "source2"]
    torch.testing.assert_close(sum(stems.values()), song, atol=1e-5, rtol=0)
    mono = separator.separate(song[:1])["source1"]
    expected = separator(song[:1])[0, 1]
    torch.testing.assert_close(mono[0], expected, atol=1e-6, rtol=0)
    # nothing is scaled
    quiet = separator.separate(song * 1e-3)["source1"]
    torch.testing.assert_close(
        quiet, stems["source1"] * 1e-3, atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match=r"channels, time\], got \[1, 1, 6, "):
        separator.separate(song[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [performer, named])
def test_modules_in_half_precision(make, dtype):
    separator, mix = make(), mixtures()
    with torch.no_grad():
        expected = separator(mix)
        separator.to(dtype)
        for given in (mix, mix.to(dtype)):
            est_source = separator(given)
            assert est_source.dtype == given.dtype
            error = (est_source.float() - expected).norm()
            assert error < 0.01 * expected.norm()


def test_arrays_of_numpy(separator):
    song = mixtures()
    expected = separator.separate(song)["source1"]
    stem = separator.separate(song.numpy())["source1"]
    assert torch.equal(stem, expected)
    stem = separator.separate(song.double().numpy())["source1"]
    assert stem.dtype == torch.float64
    torch.testing.assert_close(stem.float(), expected)
    backwards = separator.separate(song.numpy()[:, ::-1])["source1"]
    assert backwards.shape == expected.shape
    with pytest.raises(TypeError, match=r"floating-point .*, got torch\.int16"):
        separator.separate((song * 2**15).short().numpy())
    # time comes last
    with pytest.raises(ValueError, match=r"channels, time\], got \[1, \d+, 2"):
        separator.separate(song.numpy().T)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [performer, named])
def test_export_of_any_length(make):
    separator, mix = make(attention="favor"), mixtures(6144)[None]
    free = {"mix": {2: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(separator, (mix,), dynamic_shapes=free)
        # neither and both a multiple of the hop and of the net's steps
        for time in (5000, 16384):
            other = torch.randn(1, 2, time)
            est_source = program.module()(other)
            expected = separator(other)
            torch.testing.assert_close(est_source, expected, atol=1e-4, rtol=0)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device() == "cuda:0" and find_device("cuda") == "cuda"
    with pytest.raises(
        ValueError, match=r"cuda:2: .* has, cuda:0, cuda:1, cpu"
    ):
        find_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device() == "mps"
    with pytest.raises(ValueError, match=r"device gpu: .* has, mps, cpu"):
        find_device("gpu")


@pytest.mark.parametrize("source", ["card", "readme"])
def test_python_of_card_and_readme_runs(named_folder, source, tmp_path):
    if source == "card":
        text = (named_folder / "README.md").read_text()
    else:
        text = (ROOT / "README.md").read_text("utf-8")
        start = text.index("In Python:")
        text = text[start:].replace(
            "from_pretrained()", f"from_pretrained('{named_folder}')"
        )
    code = text.split("```python\n")[1].split("```")[0]
    write_song(tmp_path / "song.wav")
    for old, new in (
        ("path/to/this/folder", named_folder),
        ("song.wav", tmp_path / "song.wav"),
        ("song.mp3", tmp_path / "song.wav"),
        ('"stems")', f'"{tmp_path}")'),
    ):
        code = code.replace(old, str(new))
    names = {"song": torch.randn(2, 800)}
    exec(code, names)
    assert list(names["stems"]) == CLASSES
    assert all(path.is_file() for path in names["paths"])


# --- files -------------------------------------------------------------------


def write_song(path, channels=2, seconds=2.0, rate=RATE, subtype="FLOAT"):
    shape = round(seconds * rate), channels
    sig = np.random.default_rng(0).normal(0.0, 0.1, shape)
    soundfile.write(path, sig.astype(np.float32), rate, subtype)
    return str(path)


@pytest.mark.parametrize(
    "rate, channels, frames",
    [
        *((RATE, 1, 9000), (22050, 2, 22051), (44100, 6, 30000)),
        *((96000, 2, 50000), (44100, 2, 1), (RATE, 2, 300)),
    ],
)
def test_files_sum_to_the_input(separator, tmp_path, rate, channels, frames):
    path = tmp_path / "my song.v2.wav"
    write_song(path, channels, frames / rate, rate)
    out = tmp_path / "new" / "sources"
    options = {"chunk_seconds": 0.2, "progressbar": False}
    paths = separator.separate_file(path, out, **options)
    assert paths == [out / f"my song.v2_source{i}.wav" for i in range(3)]
    # nothing else, not even a hidden folder
    assert sorted(out.iterdir()) == paths
    info = soundfile.info(paths[0])
    assert (info.samplerate, info.channels) == (rate, channels)
    assert (info.frames, info.subtype) == (frames, "FLOAT")
    total, sig = sum(read(path) for path in paths), read(path)
    assert 20 * torch.log10((total - sig).norm() / sig.norm()) < -120
    # without a folder the same comes as a tensor
    est_source = separator.separate_file(path, **options)
    assert torch.equal(est_source, torch.stack([read(p) for p in paths]))


def test_stems_slots_and_remixes(named_folder, tmp_path, capsys):
    song = write_song(tmp_path / "song.wav")
    options = [f"--model={named_folder}", f"--out={tmp_path}"]

    def written(*more):
        assert main(["separate", song, *options, *more]) == 0
        paths = map(pathlib.Path, capsys.readouterr().out.splitlines())
        return {path.stem.removeprefix("song_"): read(path) for path in paths}

    stems = written()
    assert list(stems) == CLASSES
    torch.testing.assert_close(
        sum(stems.values()), read(song), atol=1e-5, rtol=0
    )
    both = written("--stems=vocals")
    assert list(both) == ["vocals", "rest"]
    slots = written("--slots")
    assert list(slots) == [f"source{k}" for k in range(6)]
    vocals = slots["source2"] + slots["source3"]
    both = written("--stems=vocals", "--no-spatial")
    torch.testing.assert_close(vocals, both["vocals"], atol=1e-5, rtol=0)
    remixed = written("--remix=vocals:-inf")
    karaoke = remixed["remix"] + remixed["vocals"]
    torch.testing.assert_close(karaoke, read(song), atol=1e-5, rtol=0)
    assert main(["separate", song, *options, "--stems=tuba"]) == 2
    error = capsys.readouterr().err
    assert "this model has drums, vocals, other; got tuba" in error


def test_chunks_keep_their_names(named_folder, tmp_path):
    """Outputs of neighbouring chunks are not put in another order."""
    song = write_song(tmp_path / "song.wav", seconds=4.0)
    separator = Separator.from_pretrained(named_folder)
    chunks = separator.separate_file(
        song, chunk_seconds=1.5, overlap=0.5, progressbar=False
    )
    for stem, expected in zip(chunks, separator.separate(read(song)).values()):
        # context differs, names do not
        assert torch.corrcoef(torch.stack([stem[0], expected[0]]))[0, 1] > 0.9


def test_a_file_equals_a_batch_at_the_rate_of_the_model(separator, tmp_path):
    path = write_song(tmp_path / "song.flac", 1, 1.0, subtype="PCM_16")
    options = {"chunk_seconds": 0.3, "progressbar": False}
    whole = separator.separate_file(path, progressbar=False)
    expected = separator(read(path))[0]
    torch.testing.assert_close(whole[:, 0], expected, atol=1e-6, rtol=0)
    one = separator.separate_file(path, **options)
    many = separator.separate_file(path, batch_size=4, **options)
    torch.testing.assert_close(one, many, atol=1e-6, rtol=0)


def test_silence_stays_silent(separator, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros((9000, 2)), 44100)
    est_source = separator.separate_file(
        tmp_path / "silence.wav", progressbar=False
    )
    assert est_source.shape == (3, 2, 9000) and not est_source.any()


def test_progress_that_cancels(separator, tmp_path, capsys):
    path = write_song(tmp_path / "song.wav", 1)
    calls = []

    def cancel(*seconds):
        calls.append(seconds)
        if seconds[0] > 1:
            raise InterruptedError("cancelled")

    # as a user of the page may
    with pytest.raises(InterruptedError, match="cancelled"):
        separator.separate_file(
            path,
            tmp_path / "out",
            chunk_seconds=0.5,
            overlap=0.2,
            progressbar=cancel,
        )
    assert calls == [pytest.approx((0.4 * i, 2.0)) for i in range(4)]
    assert not list((tmp_path / "out").iterdir())
    assert capsys.readouterr().err == ""


def test_outputs_ranks_and_remix(separator, tmp_path):
    path = write_song(tmp_path / "song.wav", seconds=1.0)
    options = {"chunk_seconds": 0.4, "progressbar": False}
    est_source = separator.separate_file(path, **options)
    order = est_source.square().sum((1, 2)).argsort(descending=True)
    ranked = separator.separate_file(path, ranked=True, **options)
    assert torch.equal(ranked, est_source[order])
    paths = separator.separate_file(
        path,
        tmp_path / "out",
        file_format="flac",
        outputs={"rest": (1, 2)},
        ranked=True,
        remix={"rest": -20.0},
        figure=True,
        **options,
    )
    names = ["song_rest.flac", "song_remix.flac", "song_figure.png"]
    assert [path.name for path in paths] == names
    rest = ranked[1] + ranked[2]
    torch.testing.assert_close(read(paths[0]), rest, atol=1e-6, rtol=0)
    (remix,) = separator.separate_file(
        path, outputs="none", ranked=True, remix="1:-20,2:-20", **options
    )
    torch.testing.assert_close(remix, ranked[0] + 0.1 * rest)
    torch.testing.assert_close(read(paths[1]), remix, atol=1e-6, rtol=0)
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_files_that_are_no_music(separator, tmp_path):
    def refused(name, kind, message):
        with pytest.raises(kind, match=message):
            separator.separate_file(
                tmp_path / name, tmp_path / "out", 0.5, progressbar=False
            )

    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), 44100)
    refused("empty.wav", UnreadableAudio, r"empty\.wav: no samples")
    sig = np.zeros(20000, dtype=np.float32)
    sig[-1] = np.nan
    soundfile.write(tmp_path / "broken.wav", sig, RATE, "FLOAT")
    refused("broken.wav", UnreadableAudio, r"broken\.wav: NaN or infinite")
    sig = np.random.default_rng(0).uniform(-0.3, 0.3, 5 * RATE)
    soundfile.write(tmp_path / "cut.mp3", sig, RATE)
    content = (tmp_path / "cut.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(content[: len(content) // 2])
    refused("cut.mp3", UnreadableAudio, r"cut\.mp3: truncated")
    assert not list((tmp_path / "out").iterdir())


# --- the model in the package ------------------------------------------------


def test_a_wheel_brings_the_separator(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("trackformer_sb", "hparams"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps"]
    subprocess.run(
        [*pip, "--no-build-isolation", "."], cwd=tmp_path, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    for name, largest in (("pretrained", 12e6), ("pretrained_live", 4e6)):
        folder = tmp_path / "unpacked" / "trackformer_sb" / name
        assert sorted(os.listdir(folder)) == NAMES
        assert (folder / "model.safetensors").stat().st_size <= largest
        separator = Separator.from_pretrained(folder)
        assert list(separator.groups) == ["drums", "bass", "vocals", "other"]
    # what adapt trains by
    yaml = "trackformer_sb/hparams/separator_self.yaml"
    assert (tmp_path / "unpacked" / yaml).is_file()


def test_the_model_in_the_box_keeps_its_sound():
    time = torch.arange(3 * 44100) / 44100
    bass = 0.3 * torch.sin(2 * torch.pi * 55 * time)
    hits = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    hits = 0.3 * hits * (-30 * (time % 0.5)).exp()
    stems = Separator.from_pretrained().separate(torch.stack([bass + hits] * 2))
    total = sum(stem.square().mean() for stem in stems.values())
    shares = {k: float(v.square().mean() / total) for k, v in stems.items()}
    # what this model gave when it was put there
    expected = {"drums": 0.068, "bass": 0.932, "vocals": 0.0, "other": 0.0}
    assert shares == pytest.approx(expected, abs=0.01)
