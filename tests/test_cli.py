"""The command line: exit codes, what it prints and where."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml

import trackformer_sb
from trackformer_sb.cli import main
from trackformer_sb.inference.export import export_separator

TINY = """\
sample_rate: 8000
num_spks: 3
Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder {n_fft: 256, hop_length: 64}
MaskNet: !new:trackformer_sb.nnet.masknet.PerformerMaskNet
  in_channels: 129
  num_spks: 3
  d_model: 16
  nhead: 2
  num_layers: 1
  n_features: 16
Decoder: !new:trackformer_sb.nnet.stft.STFTDecoder {n_fft: 256, hop_length: 64}
modules: {encoder: !ref <Encoder>, masknet: !ref <MaskNet>,
  decoder: !ref <Decoder>}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "hyperparams.yaml").write_text(TINY)
    torch.manual_seed(0)
    modules = load_hyperpyyaml(TINY)["modules"]
    return str(
        export_separator(
            folder / "hyperparams.yaml", modules, folder / "separator"
        )
    )


def write_noise(path, frames=4000):
    sig = np.random.default_rng(0).normal(0.0, 0.1, (frames, 2))
    soundfile.write(path, sig, 8000)
    return str(path)


def separate(model, files, out, *options):
    options = ["--device", "cpu", *map(str, options)]
    return main(
        ["separate", *files, "--model", model, "--out", str(out), *options]
    )


def test_separate(model, tmp_path, capsys):
    files = [write_noise(tmp_path / name) for name in ("a.wav", "b.flac")]
    out = tmp_path / "out"
    code = separate(model, files, out, "--chunk_seconds", 0.2, "--overlap", 0.5)
    assert code == 0
    written = [
        str(out / f"{stem}_source{i}.wav") for stem in "ab" for i in range(3)
    ]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == written
    # no bar in a pipe
    assert printed.err == ""
    assert sorted(map(str, out.iterdir())) == written
    total = sum(soundfile.read(path)[0] for path in written[:3])
    assert np.allclose(total, soundfile.read(files[0])[0], atol=1e-6)


def test_options_reach_the_separator(model, tmp_path, monkeypatch):
    from trackformer_sb.inference.interfaces import PerformerSeparation

    asked = []

    def recorded(self, path, **options):
        asked.append((path, self.device, options))
        return []

    monkeypatch.setattr(PerformerSeparation, "separate_file", recorded)
    separate(model, ["x.wav"], "o", "--chunk_seconds=3", "--overlap=0.1")
    options = {"chunk_seconds": 3.0, "overlap": 0.1, "progressbar": False}
    assert asked == [("x.wav", "cpu", {"out_folder": "o", **options})]


def test_a_failed_file_does_not_stop_the_others(model, tmp_path, capsys):
    text = tmp_path / "text.wav"
    text.write_text("this is no audio")
    broken = tmp_path / "broken.wav"
    soundfile.write(broken, np.full(900, np.nan, np.float32), 8000, "FLOAT")
    files = [
        str(text),
        str(broken),
        str(tmp_path / "missing.wav"),
        write_noise(tmp_path / "good.wav"),
    ]
    assert separate(model, files, tmp_path / "out") == 1
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("trackformer separate: ") for line in errors)
    assert str(text) in errors[0] and "Format not recognised" in errors[0]
    assert f"{broken}: NaN or infinite samples" in errors[1]
    assert f"{files[2]}: no such audio file" in errors[2]
    assert len(printed.out.splitlines()) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"good_source{i}.wav" for i in range(3)
    ]


def test_wrong_model(tmp_path, capsys):
    song = write_noise(tmp_path / "song.wav")
    missing = str(tmp_path / "separater")
    assert separate(missing, [song], tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"trackformer separate: {missing} not found: expected" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_damaged_model(model, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(model, tmp_path / "separator")
    weights = folder / "masknet.ckpt"
    weights.write_bytes(weights.read_bytes()[:500])
    song = write_noise(tmp_path / "song.wav")
    assert separate(str(folder), [song], tmp_path / "out") == 2
    assert "masknet.ckpt: no readable file" in capsys.readouterr().err


def test_files_of_the_same_name(model, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    files = [
        write_noise(tmp_path / "song.wav"),
        write_noise(tmp_path / "other" / "song.flac"),
    ]
    assert separate(model, files, tmp_path / "out") == 2
    assert "would write the same files" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_gpu(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    song = write_noise(tmp_path / "song.wav")
    code = separate(model, [song], tmp_path / "out", "--device", "cuda")
    assert code == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND"),
        (["seperate"], "invalid choice: 'seperate'"),
        (["separate", "song.wav"], "--model, --out"),
        (["separate", "--model", "m", "--out", "o"], "FILE"),
        (["separate", "--overlap", "0.6"], "must be in [0, 0.5], got 0.6"),
        (["separate", "--overlap", "nan"], "must be in [0, 0.5], got nan"),
        (["separate", "--chunk_seconds", "0"], "must be above 0, got 0"),
        (["separate", "--chunk_seconds", "ten"], "value: 'ten'"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "separate" in capsys.readouterr().out
    assert main(["separate", "--help"]) == 0
    assert "default: 0.25" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == trackformer_sb.__version__


def test_help_does_not_load_torch():
    code = (
        "import sys; from trackformer_sb.cli import main;"
        "main(['separate', '--help']);"
        "sys.exit(bool({'torch', 'speechbrain', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "trackformer_sb.cli", "separate"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: trackformer separate")
