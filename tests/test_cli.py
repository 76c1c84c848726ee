"""The command line: exit codes, what it prints and where."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from separators import performer, write_noise

import trackformer_sb
from trackformer_sb.cli import TESTED, main

ROOT = Path(__file__).parents[1]
RECORD = "trackformer.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return str(performer().export(tmp_path_factory.mktemp("model")))


def separate(model, files, out, *options):
    files, options = map(str, files), map(str, options)
    where = ["--model", model, "--out", str(out), "--device", "cpu"]
    return main(["separate", *files, *where, *options])


def below(folder):
    """All files but the record, relative to the folder."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != RECORD
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
    record = out / RECORD
    assert sorted(map(str, out.iterdir())) == [*written, str(record)]
    made = json.loads(record.read_text())["b"]
    assert (made["file"], made["overlap"]) == ("b.flac", 0.5)
    assert list(made["results"]) == [os.path.basename(x) for x in written[3:]]
    total = sum(soundfile.read(path)[0] for path in written[:3])
    assert np.allclose(total, soundfile.read(files[0])[0], atol=1e-6)


def test_a_failed_file_does_not_stop_the_others(model, tmp_path, capsys):
    text = tmp_path / "text.wav"
    text.write_text("this is no audio")
    (tmp_path / "empty").mkdir()
    good = write_noise(tmp_path / "good.wav")
    assert separate(model, [text, tmp_path / "empty", good], tmp_path) == 1
    printed = capsys.readouterr()
    messages = [
        f"{text}: format not recognised",
        f"{tmp_path / 'empty'}: a folder without audio files",
    ]
    for line, message in zip(printed.err.splitlines(), messages, strict=True):
        assert line.startswith("trackformer separate: ") and message in line
    written = [str(tmp_path / f"good_source{i}.wav") for i in range(3)]
    assert printed.out.splitlines() == written


# --- which files, and where results go ---------------------------------------


def test_folders_and_names_that_occur_twice(model, tmp_path, capsys):
    music = tmp_path / "music"
    for name in ("a/song.wav", "b/song.WAV", "b/song.flac", "b/other.ogg"):
        write_noise(music / name)
    write_noise(music / ".hidden" / "song.wav")
    write_noise(tmp_path / "elsewhere" / "linked.wav")
    for name in ("cover.jpg", "notes.MID"):
        (music / "b" / name).write_text("no music")
    (music / "link").symlink_to(tmp_path / "elsewhere")
    (music / "self").symlink_to(music)
    # below the folder: not separated again when the command is run again
    out = music / "sources"
    for _ in range(2):
        assert separate(model, [music, music], out, "--outputs", "1") == 0
        assert below(out) == [
            "a/song_source1.wav",
            "b/WAV/song_source1.wav",
            "b/flac/song_source1.wav",
            "linked_source1.wav",
            "other_source1.wav",
        ]
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 5
        (line,) = printed.err.splitlines()
        assert "notes.MID: left out: notes without sound, trackf" in line
    assert separate(model, [music], music) == 2
    assert "expected another folder" in capsys.readouterr().err


def test_patterns(model, tmp_path, capsys):
    """Which the shells of Windows leave to the program."""
    album, out = tmp_path / "Best [2020]", tmp_path / "out"
    files = [write_noise(album / f"{name}.wav") for name in "abc"]
    # what exists is no pattern, nor is what exists of a pattern's beginning
    files.append(write_noise(album / "[b].wav"))
    write_noise(tmp_path / "Best 2" / "d.wav")
    patterns = [*files[2:], album / "[ab].*", album / "*.wav"]
    assert separate(model, patterns, out, "--outputs", "0") == 0
    printed = capsys.readouterr().out.splitlines()
    names = ("c", "[b]", "a", "b")
    assert printed == [str(out / f"{x}_source0.wav") for x in names]
    nothing = tmp_path / "*.mp3"
    assert separate(model, [nothing], out) == 1
    assert f"{nothing}: no such audio file" in capsys.readouterr().err


def test_tilde_and_variables(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ALBUM", "music")
    shutil.copytree(model, tmp_path / "separator")
    write_noise(tmp_path / "music" / "a.wav")
    monkeypatch.chdir(tmp_path / "music")
    files = ["~/$ALBUM/a.wav", "~/mus*/a.wav"]
    assert separate("~/separator", files, "~/out", "--outputs", "0") == 0
    assert below(tmp_path / "out") == ["a_source0.wav"]
    assert os.listdir() == ["a.wav"]
    # a name that exists is no variable
    write_noise(tmp_path / "music" / "$ALBUM.wav")
    assert separate("~/separator", ["$ALBUM.wav"], "~/b", "--outputs", "0") == 0
    assert below(tmp_path / "b") == ["$ALBUM_source0.wav"]


def test_names_as_long_as_the_file_system_takes(model, tmp_path, capsys):
    names = [f"{'é' * 125}{x}.wav" for x in "ab"]
    files = [write_noise(tmp_path / name) for name in names]
    for _ in range(2):
        code = separate(model, files, tmp_path / "out", "--skip-existing")
        assert code == 0
    assert capsys.readouterr().err.count("skipped, its results are") == 2
    written = below(tmp_path / "out")
    assert len(written) == 6
    assert all(name.startswith("é" * 100 + "_") for name in written)


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_names_need_not_be_utf8(model, tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    song, empty = (folder / os.fsdecode(x) for x in (b"x\xe9.wav", b"\xe9.wav"))
    write_noise(tmp_path / "song.wav")
    folder.mkdir()
    shutil.copy(tmp_path / "song.wav", song)
    empty.write_bytes(b"")
    command = [sys.executable, "-m", "trackformer_sb", "separate", empty]
    command += [song, "--model", model, "--out", folder / "out"]
    command += ["--device", "cpu", "--format", "flac", "--remix", "0:-3"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 1 and b"the file is empty" in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(b"x\xe9_" in line for line in lines)
    assert os.fsdecode(b"x\xe9") in json.loads(
        (folder / "out" / RECORD).read_text()
    )


def test_results_that_cannot_be_written(model, tmp_path, capsys):
    """All said before anything is separated."""
    files = [write_noise(tmp_path / f"{x}.wav") for x in ("a", "a_source0")]
    assert separate(model, files, tmp_path) == 2
    message = f"{files[0]}: its result {files[1]} would overwrite {files[1]}"
    assert message in capsys.readouterr().err
    assert separate(model, files, files[0]) == 2
    assert f"File exists: '{files[0]}'" in capsys.readouterr().err
    if sys.platform == "linux":
        # whoever one is
        assert separate(model, files[:1], "/proc") == 2
        assert "/proc/" in capsys.readouterr().err
    assert below(tmp_path) == ["a.wav", "a_source0.wav"]


# --- what is done ------------------------------------------------------------


def test_skip_existing(model, tmp_path, capsys):
    song = write_noise(tmp_path / "song.wav")
    out = tmp_path / "out"
    args = [model, [song], out, "--skip-existing"]

    def again(*options):
        assert separate(*args, *options) == 0
        printed = capsys.readouterr()
        skipped = f"{song}: skipped, its results are there" in printed.err
        assert skipped == (not printed.out)
        return not skipped

    assert again()
    assert not again() and not again("--overlap", "0.250", "--batch", "2")
    # a result that is gone or cut
    (out / "song_source1.wav").unlink()
    assert again()
    path = out / "song_source2.wav"
    path.write_bytes(path.read_bytes()[:-40])
    assert again()
    # other options
    for option in ("--figure", "--overlap=0.5", "--remix=0:-3", "--ranked"):
        assert again(option) and not again(option)
    # another model, of the same sizes
    args[0] = str(tmp_path / "other")
    performer().save_pretrained(args[0])
    assert again() and not again()
    # another song of the same name, and the same song changed
    song = args[1][0] = write_noise(tmp_path / "b" / "song.wav", frames=4001)
    assert again() and not again()
    os.utime(song, (1e9, 1e9))
    assert again() and not again()


def test_folders_of_songs(model, tmp_path, capsys):
    songs = ["a/01.wav", "b/01.wav", "b/02.wav"]
    for song in songs:
        write_noise(tmp_path / "music" / song)
    out = tmp_path / "music" / "stems"
    args = model, [tmp_path / "music"], out, "--song_folders", "--format=flac"
    assert separate(*args, "--skip-existing") == 0
    assert below(out) == [
        f"{song}/source{i}.flac"
        for song in ("02", "a/01", "b/01")
        for i in range(3)
    ]
    assert len(capsys.readouterr().out.splitlines()) == 9
    (out / "b" / "01" / "source2.flac").unlink()
    assert separate(*args, "--skip-existing") == 0
    printed = capsys.readouterr()
    assert printed.err.count("skipped, its results are there") == 2
    assert printed.out.splitlines()[2] == f"{out}/b/01/source2.flac"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--outputs=3"], "source3: expected outputs from 0 to 2, each once"),
        (["--remix=0:loud"], "as in 0:-inf,3:+3, got '0:loud'"),
        (["--outputs=none"], "expected an output, a remix or a figure"),
        (["--model=nowhere"], "nowhere not found: expected a folder"),
        (["--device=cuda"], "device cuda: expected what this machine has"),
    ],
)
def test_options_that_do_not_fit(
    model, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert separate(model, ["song.wav"], tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


STOPPED = """
import os, signal, sys
from trackformer_sb.cli import TESTED, main
from trackformer_sb.inference.separator import Separator

whole = Separator._separated
calls = []

def interrupted(self, *mix_and_options):
    calls.append(mix_and_options)
    if len(calls) == 5:
        out = sys.argv[sys.argv.index("--out") + 1]
        hidden = [x for x in os.listdir(out) if x.endswith(".partial")]
        print(len(hidden), "growing", flush=True)
        os.kill(os.getpid(), signal.{signal})
    return whole(self, *mix_and_options)

Separator._separated = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name, code", [("SIGKILL", -9), ("SIGINT", 130)])
def test_a_stopped_run_leaves_whole_files_only(model, tmp_path, name, code):
    files = [write_noise(tmp_path / f"{x}.wav") for x in "ab"]
    out = tmp_path / "out"
    command = [sys.executable, "-c", STOPPED.replace("{signal}", name)]
    command += ["separate", *files, "--model", model, "--out", str(out)]
    command += ["--device", "cpu", "--chunk_seconds", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "1 growing" in done.stdout and "Traceback" not in done.stderr
    # it came in the second of the three chunks of the second file
    names = [f"a_source{i}.wav" for i in range(3)]
    assert [x for x in below(out) if not x.startswith(".b.partial")] == names
    assert (out / ".b.partial").exists() == (name == "SIGKILL")
    # the next run goes on, and removes what is left of the file
    more = "--chunk_seconds=0.2", "--skip-existing"
    assert separate(model, files, out, *more) == 0
    assert len(below(out)) == 6


def test_progress_on_a_terminal(model, tmp_path, capsys, monkeypatch):
    files = [write_noise(tmp_path / f"{x}.wav", 16000) for x in "ab"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code = separate(model, files, tmp_path / "out", "--chunk_seconds", 0.5)
    assert code == 0
    printed = capsys.readouterr()
    for text in ("a.wav: ", "b.wav: ", "/2 s", "2/2 ["):
        assert text in printed.err
    assert len(printed.out.splitlines()) == 6


# --- usage -------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND"),
        (["seperate"], "invalid choice: 'seperate'"),
        (["separate", "--overlap", "nan"], "must be in [0, 0.5], got nan"),
        (["separate", "--chunk_seconds", "0"], "must be above 0, got 0"),
        (["separate", "--chunk_seconds", "ten"], "positive value: 'ten'"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--help"], "make-music"),
        (["separate", "--help"], "default: 0.25"),
        (["--version"], trackformer_sb.__version__),
    ],
)
def test_help_and_version(arguments, text, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert text in capsys.readouterr().out


# --- torch and torchaudio ----------------------------------------------------


def test_the_pair_that_mends_is_the_one_that_is_locked():
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    for name in ("torch", "torchaudio"):
        assert f"{name}=={TESTED}" in lock


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "trackformer_sb", "info", "separator"),
        ("recipes/train.py", "hparams/demo.yaml"),
        ("recipes/pretrain.py", "hparams/audio_mae.yaml"),
        ("recipes/reproduce.py", "--dry-run"),
    ],
    ids=" ".join,
)
def test_a_pair_that_does_not_load_is_named_in_one_line(tmp_path, command):
    # as torchaudio fails beside another torch
    text = "raise OSError('libtorchaudio.so: undefined symbol: x')\n"
    (tmp_path / "torchaudio.py").write_text(text)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert "do not load side by side (libtorchaudio.so: undefined" in line
    assert f"--force-reinstall torch=={TESTED} torchaudio=={TESTED}" in line


# --- no console --------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "redirection", "code"),
    [
        ("song.wav", "| true", 0),
        ("none.wav song.wav", "2>&1 | true", 1),
        # without streams, as pythonw starts
        ("none.wav song.wav", ">&- 2>&- <&-", 1),
    ],
)
def test_work_is_done_without_a_listener(
    files, redirection, code, model, tmp_path
):
    write_noise(tmp_path / "song.wav")
    line = (
        f"set -o pipefail; {sys.executable} -m trackformer_sb separate "
        f"{files} --model {model} --out out {redirection}"
    )
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert below(tmp_path / "out") == [f"song_source{i}.wav" for i in range(3)]
