"""The command line: exit codes, what it prints and where."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from separators import performer

import trackformer_sb
from trackformer_sb.cli import main
from trackformer_sb.inference import separator as separators
from trackformer_sb.inference.separator import Separator


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return str(performer().export(tmp_path_factory.mktemp("model")))


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
    asked = []

    def recorded(self, path, **options):
        del options["progress"]
        asked.append((path, str(self.device), options))
        return []

    monkeypatch.setattr(Separator, "separate_file", recorded)
    separate(model, ["x.wav"], "o", "--chunk_seconds=3", "--overlap=0.1")
    options = {
        "out_folder": "o",
        "stem": "x",
        "chunk_seconds": 3.0,
        "overlap": 0.1,
        "batch_size": 1,
        "file_format": "wav",
        "outputs": None,
        "ranked": False,
        "remix": None,
        "figure": False,
        "skip_existing": False,
        "progressbar": False,
    }
    assert asked.pop() == ("x.wav", "cpu", options)
    more = ["--batch=4", "--format=flac", "--outputs=0,rest=1+2", "--figure"]
    more += ["--ranked", "--remix=0:-inf,rest:+3", "--skip-existing"]
    separate(model, ["x.wav"], "o", *more)
    options |= {
        "chunk_seconds": 10.0,
        "overlap": 0.25,
        "batch_size": 4,
        "file_format": "flac",
        "outputs": {"source0": (0,), "rest": (1, 2)},
        "ranked": True,
        "remix": {0: -np.inf, "rest": 3.0},
        "figure": True,
        "skip_existing": True,
    }
    assert asked.pop() == ("x.wav", "cpu", options)


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
    folder = shutil.copytree(model, tmp_path / "separator")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    song = write_noise(tmp_path / "song.wav")
    assert separate(str(folder), [song], tmp_path / "out") == 2
    assert "model.safetensors: no readable file" in capsys.readouterr().err


def test_out_that_is_a_file(model, tmp_path, capsys):
    song = write_noise(tmp_path / "song.wav")
    assert separate("nosuch", [song], song) == 2
    message = f"trackformer separate: --out {song}: expected a folder, got a"
    assert capsys.readouterr().err.startswith(message)


def test_ctrl_c_while_the_model_loads(model, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(separators, "load_separator", interrupted)
    song = write_noise(tmp_path / "song.wav")
    assert separate(model, [song], tmp_path / "out") == 130
    assert capsys.readouterr().err == "trackformer separate: interrupted\n"


def below(folder):
    """All files, relative to the folder."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    )


def test_folders_and_names_that_occur_twice(model, tmp_path, capsys):
    music = tmp_path / "music"
    for folder in (music / "a", music / "b", music / ".hidden"):
        folder.mkdir(parents=True)
    write_noise(music / "a" / "song.wav")
    write_noise(music / "b" / "song.WAV")
    write_noise(music / "b" / "song.flac")
    write_noise(music / "b" / "other.ogg")
    write_noise(music / ".hidden" / "song.wav")
    (music / "b" / "cover.jpg").write_text("no music")
    # below the folder: not separated again when the command is run again
    out = music / "sources"
    for _ in range(2):
        assert separate(model, [str(music)], out, "--outputs", "1") == 0
        assert below(out) == [
            "a/song_source1.wav",
            "b/song.WAV_source1.wav",
            "b/song.flac_source1.wav",
            "other_source1.wav",
        ]
        assert len(capsys.readouterr().out.splitlines()) == 4


def test_globs_and_files_named_twice(model, tmp_path, capsys):
    files = [write_noise(tmp_path / f"{name}.wav") for name in "abc"]
    out = tmp_path / "out"
    patterns = [files[2], str(tmp_path / "[ab].*"), str(tmp_path / "*.wav")]
    assert separate(model, patterns, out, "--outputs", "0") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(out / f"{x}_source0.wav") for x in "cab"]
    nothing = str(tmp_path / "*.mp3")
    assert separate(model, [nothing], out) == 1
    assert f"{nothing}: no such audio file" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["**/*", "**/*.wav", "*"])
def test_a_pattern_does_not_take_its_own_results(model, tmp_path, pattern):
    music = tmp_path / "music"
    music.mkdir()
    write_noise(music / "a.wav")
    out = music / "sources"
    pattern = str(music / pattern)
    for outputs in ("0", "x=0+1"):
        more = ("--skip-existing", "--outputs", outputs)
        assert separate(model, [pattern], out, *more) == 0
    assert below(out) == ["a_source0.wav", "a_x.wav"]


def test_a_pattern_of_the_folder_of_results(model, tmp_path, capsys):
    write_noise(tmp_path / "a.wav")
    assert separate(model, [str(tmp_path / "*.wav")], tmp_path) == 2
    assert "expected another folder than that of" in capsys.readouterr().err
    # one by one they are what was meant
    assert separate(model, [str(tmp_path / "a.wav")], tmp_path) == 0


def test_a_pattern_below_the_folder_of_results(model, tmp_path, monkeypatch):
    (tmp_path / "songs").mkdir()
    write_noise(tmp_path / "songs" / "a.wav")
    write_noise(tmp_path / "b.wav")
    monkeypatch.chdir(tmp_path)
    files = ["songs/*.wav", "b.wav"]
    assert separate(model, files, ".", "--outputs", "0") == 0
    assert (tmp_path / "a_source0.wav").is_file()
    assert separate(model, ["*.wav", "songs/a.wav"], ".") == 2


def test_results_that_cannot_be_written(model, tmp_path, capsys):
    """Said before anything is separated; other files are not stopped."""
    blocked, other = (write_noise(tmp_path / x) for x in ("a.wav", "b.wav"))
    long = write_noise(tmp_path / f"{'c' * 249}.wav")
    out = tmp_path / "out"
    (out / "a_source1.wav").mkdir(parents=True)
    assert separate(model, [blocked, long, other], out) == 1
    errors = capsys.readouterr().err
    assert f"{out / 'a_source1.wav'}: expected no folder there" in errors
    assert "File name too long" in errors
    assert [x for x in below(out) if x.startswith(("a", "c"))] == []
    assert len([x for x in below(out) if x.startswith("b")]) == 3


def test_links_to_folders_are_followed(model, tmp_path, capsys):
    music = tmp_path / "music"
    (music / "in").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    write_noise(music / "in" / "one.wav")
    write_noise(tmp_path / "elsewhere" / "two.wav")
    write_noise(tmp_path / "beside.wav")
    (music / "link").symlink_to(tmp_path / "elsewhere")
    (music / "again").symlink_to(music / "in")
    (music / "above").symlink_to(tmp_path)
    (music / "self").symlink_to(music)
    out = music / "out"
    for _ in range(2):
        assert separate(model, [str(music)], out, "--outputs", "0") == 0
        assert below(out) == ["one_source0.wav", "two_source0.wav"]
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_names_need_not_be_utf8(model, tmp_path, monkeypatch, capfdbinary):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    names = [b"x\xe9", "x\u00e9".encode()]
    paths = [folder / (os.fsdecode(name) + ".wav") for name in names]
    song = write_noise(tmp_path / "song.wav")
    for path in paths:
        shutil.copy(song, path)

    def run(*more):
        """Exit code and what is printed by a process of its own."""
        words = map(str, ("--remix", "0:-3", "--figure", *more))
        with (
            open(1, "w", encoding="utf-8", closefd=False) as stdout,
            open(2, "w", errors="backslashreplace", closefd=False) as stderr,
            monkeypatch.context() as context,
        ):
            context.setattr(sys, "stdout", stdout)
            context.setattr(sys, "stderr", stderr)
            code = separate(model, map(str, paths), folder / "out", *words)
        return code, *capfdbinary.readouterr()

    for more in ((), ("--skip-existing",), ("--format", "ogg")):
        code, printed, errors = run(*more)
        assert code == 0, errors
        lines = printed.splitlines()
        assert (len(lines) == 0) == (more == ("--skip-existing",))
        for name in names:
            assert bool(lines) == any(name in line for line in lines)
        assert all(any(name in line for name in names) for line in lines)
    assert len(list((folder / "out").iterdir())) == 2 * (4 + 4 + 1)
    # what is wrong with a file is said as well
    for path in paths:
        path.write_bytes(b"")
    code, _, errors = run()
    assert code == 1 and errors.count(b"not recognised") == 2


def test_names_that_look_like_placed_ones(model, tmp_path):
    for name in ("x.wav", "x.ogg", "x.wav.wav"):
        write_noise(tmp_path / name)
    out = tmp_path / "out"
    assert separate(model, [str(tmp_path)], out, "--outputs", "0") == 0
    names = ("x.ogg", "x.wav.wav", "x.wav")
    assert below(out) == [f"{name}_source0.wav" for name in names]


def test_what_a_killed_run_left_is_named(model, tmp_path, capsys):
    song = write_noise(tmp_path / "song.wav")
    left = tmp_path / "[out]" / ".x.partial"
    left.mkdir(parents=True)
    assert separate(model, [song], tmp_path / "[out]") == 0
    errors = capsys.readouterr().err
    assert f"{left}: left by a run that was killed" in errors
    assert left.is_dir() and errors.count("may be deleted") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_raw_samples_are_no_audio_file(
    model, tmp_path, capsys, monkeypatch, terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    (tmp_path / "a.raw").write_bytes(bytes(100))
    song = write_noise(tmp_path / "song.wav")
    files = [str(tmp_path / "a.raw"), song]
    assert separate(model, files, tmp_path / "out") == 1
    assert f"{files[0]}: no audio file" in capsys.readouterr().err
    assert len(below(tmp_path / "out")) == 3


def test_folder_without_audio(model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert separate(model, [empty], tmp_path / "out") == 1
    assert (
        f"separate: {empty}: a folder without audio" in capsys.readouterr().err
    )


def test_results_never_replace_an_input(model, tmp_path, capsys):
    files = [write_noise(tmp_path / f"{x}.wav") for x in ("a", "a_source0")]
    assert separate(model, files, tmp_path) == 2
    message = f"{files[0]}: its result {files[1]} would overwrite {files[1]}"
    assert message in capsys.readouterr().err
    assert below(tmp_path) == ["a.wav", "a_source0.wav"]


@pytest.mark.parametrize("spelling", ["--skip-existing", "--skip_existing"])
def test_skip_existing(model, tmp_path, capsys, spelling):
    song = write_noise(tmp_path / "song.wav")
    out = tmp_path / "out"
    paths = [out / f"song_source{i}.wav" for i in range(3)]
    args = [model, [song], out]

    def again(*options):
        for path in paths:
            os.utime(path, (path.stat().st_atime, 2e9)) if path.exists() else 0
        assert separate(*args, spelling, *options) == 0
        printed = capsys.readouterr()
        skipped = f"{song}: skipped, its results are there" in printed.err
        assert skipped == (not printed.out)
        return skipped

    assert not again()
    assert again()
    # a wish for more, a missing file, and a newer input
    assert not again("--figure")
    assert again("--figure")
    assert not again("--format", "flac")
    paths[1].unlink()
    assert not again()
    # other options, and another model
    assert not again("--overlap", "0.5")
    assert again("--overlap", "0.50", "--batch", "2")
    assert not again("--remix", "0:-3")
    assert again("--remix", "0:-3.0")
    assert not again("--remix", "0:-4")
    args[0] = str(tmp_path / "other")
    performer().save_pretrained(args[0])
    assert not again()
    assert again()
    # the picture is of the first model
    assert not again("--figure")
    # another song of the same name, not newer
    (tmp_path / "b").mkdir()
    song = args[1][0] = write_noise(tmp_path / "b" / "song.wav", frames=4001)
    os.utime(song, (1e9, 1e9))
    assert not again()
    assert again()
    os.utime(song, (2.1e9, 2.1e9))
    assert not again()


def test_outputs_and_remix(model, tmp_path, capsys):
    song = write_noise(tmp_path / "song.wav")
    whole = soundfile.read(song)[0]
    options = ["--chunk_seconds", 0.2, "--format", "flac"]
    options += ["--outputs", "drums=0+2,1", "--remix", "drums:-6.0206,1:-inf"]
    assert separate(model, [song], tmp_path / "out", *options) == 0
    paths = capsys.readouterr().out.splitlines()
    names = [os.path.basename(path) for path in paths]
    assert names == [f"song_{x}.flac" for x in ("drums", "source1", "remix")]
    drums, source, remix = (soundfile.read(path)[0] for path in paths)
    assert np.allclose(drums + source, whole, atol=1e-6)
    assert np.allclose(remix, drums / 2, atol=1e-6)
    out = tmp_path / "remix"
    assert (
        separate(model, [song], out, "--outputs=none", "--remix=0:-0,2:0") == 0
    )
    assert below(out) == ["song_remix.wav"]
    remix = soundfile.read(out / "song_remix.wav")[0]
    assert np.allclose(remix, whole, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--outputs=3"], "source3: expected outputs from 0 to 2, got 3"),
        (["--remix=3:-inf"], "remix: expected outputs from 0 to 2, got 3"),
        (["--remix=voice:3"], "number of an output or one of source0"),
        (["--outputs=none"], "expected an output, a remix or a figure"),
    ],
)
def test_options_that_do_not_fit_the_model(
    model, tmp_path, capsys, options, message
):
    song = write_noise(tmp_path / "song.wav")
    assert separate(model, [song], tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


STOPPED = """
import os, signal, sys
from trackformer_sb.cli import main
from trackformer_sb.inference.separator import Separator

whole = Separator._separated
calls = []

def interrupted(self, mix, groups):
    calls.append(mix)
    if len(calls) == 5:
        out = sys.argv[sys.argv.index("--out") + 1]
        hidden = [x for x in os.listdir(out) if x.endswith(".partial")]
        print(len(hidden), "growing", flush=True)
        os.kill(os.getpid(), signal.{signal})
    return whole(self, mix, groups)

Separator._separated = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_run_leaves_whole_files_only(model, tmp_path, name, code):
    files = [write_noise(tmp_path / f"{x}.wav") for x in "ab"]
    out = tmp_path / "out"
    command = [sys.executable, "-c", STOPPED.replace("{signal}", name)]
    command += ["separate", *files, "--model", model, "--out", str(out)]
    command += ["--device", "cpu", "--chunk_seconds", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "1 growing" in done.stdout
    # it came in the second of the three chunks of the second file
    names = [f"a_source{i}.wav" for i in range(3)]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "Traceback" not in done.stderr


def test_progress_on_a_terminal(model, tmp_path, capsys, monkeypatch):
    files = [write_noise(tmp_path / f"{x}.wav", 16000) for x in "ab"]
    (tmp_path / "c.wav").write_text("no audio")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    files.insert(1, str(tmp_path / "c.wav"))
    code = separate(model, files, tmp_path / "out", "--chunk_seconds", 0.5)
    assert code == 1
    printed = capsys.readouterr()
    assert "1/3 a.wav: 100%" in printed.err
    assert "3/3 b.wav: 100%" in printed.err
    assert "all 3 files: 100%" in printed.err
    assert "4/4 s" in printed.err
    assert len(printed.out.splitlines()) == 6


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
        (["separate", "--model", "m", "--out", "o"], "FILE"),
        (["separate", "--overlap", "0.6"], "must be in [0, 0.5], got 0.6"),
        (["separate", "--overlap", "nan"], "must be in [0, 0.5], got nan"),
        (["separate", "--chunk_seconds", "0"], "must be above 0, got 0"),
        (["separate", "--chunk_seconds", "ten"], "must be a number, got 'ten'"),
        (["separate", "--batch", "0"], "must be 1 or more, got 0"),
        (["separate", "--format", "mp3"], "invalid choice: 'mp3'"),
        (["separate", "a", "--stems", "x", "--slots"], "not allowed with"),
        (["separate", "--outputs", "1+2"], "expected a name for the sum 1+2"),
        (["separate", "--remix", "0:loud"], "as in 0:-inf,3:+3, got '0:loud'"),
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


def test_results_do_not_go_where_the_music_is(model, tmp_path, capsys):
    write_noise(tmp_path / "a.wav")
    assert separate(model, [str(tmp_path)], tmp_path) == 2
    assert "expected another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_all_files_are_separated_though_nobody_reads_the_names(model, tmp_path):
    files = [write_noise(tmp_path / f"{name}.wav") for name in "ab"]
    command = [sys.executable, "-m", "trackformer_sb.cli", "separate", *files]
    command += ["--model", model, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == 0 and "Traceback" not in errors
    assert len(list((tmp_path / "out").iterdir())) == 6
