"""``trackformer karaoke`` and ``remix``: songs with other levels of stems."""

import pathlib

import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample
from separators import CLASSES, RATE, close, named, performer

from trackformer_sb.audio import open_audio
from trackformer_sb.cli import main
from trackformer_sb.ffmpeg import FFmpegWriter, Tags, read_tags

# without an edge, and without what filters near half the rate treat differently
SONG = resample(
    np.random.default_rng(0).normal(0, 0.1, (RATE // 2, 2)), 2 * RATE
)
SONG = SONG * np.hanning(2 * RATE)[:, None]


def write_song(path, sig=SONG):
    """A song with a title, of 16 bits where the format has them."""
    tags = Tags({1: "mono", 2: "stereo"}[sig.shape[1]], {"title": "Lied"}, None)
    file_format = path.suffix[1:]
    with FFmpegWriter(path, file_format, RATE, tags, "PCM_16") as file:
        file.write(sig.astype("float32"))
    return path


def samples(path):
    """[channels, time] of any file."""
    with open_audio(path) as audio:
        sig = audio.read(audio.frames, dtype="float32", always_2d=True)
    return torch.from_numpy(sig).T


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return named().export(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model, tmp_path, capsys, caplog):
    """A command and its words -> the paths it printed, and messages."""

    def run(*words, code=0):
        caplog.clear()
        options = ["--model", model, "--out", tmp_path / "out"]
        assert main([str(word) for word in (*words, *options)]) == code
        printed = capsys.readouterr()
        messages = printed.err + "".join(caplog.messages)
        return [pathlib.Path(x) for x in printed.out.splitlines()], messages

    return run


@pytest.fixture
def stems_of(run):
    """A song -> its stems, as ``trackformer separate`` gives them."""
    return lambda path: dict(
        zip(CLASSES, map(samples, run("separate", path)[0]))
    )


# --- karaoke -----------------------------------------------------------------


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3"])
def test_karaoke_is_the_song_without_its_vocals(
    run, stems_of, tmp_path, ending
):
    song = write_song(tmp_path / f"song.{ending}")
    vocals = stems_of(song)["vocals"]
    (path,), messages = run("karaoke", song)
    assert path == tmp_path / "out" / f"song_karaoke.{ending}"
    assert messages == ""
    assert read_tags(path).metadata["title"] == "Lied (karaoke)"
    result, expected = samples(path), samples(song) - vocals
    assert result.shape == expected.shape
    if ending == "mp3":
        ratio = result.norm() / expected.norm()
        assert 20 * ratio.log10() == pytest.approx(0, abs=0.2)
    else:
        assert soundfile.info(path).subtype == "PCM_16"
        close(result, expected, 1.01 * 2**-16)


def test_files_and_folders(run, tmp_path):
    music = tmp_path / "music"
    music.mkdir()
    write_song(music / "a.wav")
    write_song(music / "b.flac")
    text = tmp_path / "text.mp3"
    text.write_text("this is no audio")
    paths, messages = run("karaoke", music, text, code=1)
    assert [x.name for x in paths] == ["a_karaoke.wav", "b_karaoke.flac"]
    assert messages.startswith(f"trackformer karaoke: {text}: format not")
    # one file a song
    assert sorted((tmp_path / "out").iterdir()) == paths


def test_backing_voices_are_those_at_the_sides(run, stems_of, tmp_path):
    mono, silence = SONG[:, :1], 0 * SONG[:, :1]
    songs = {"centre": [mono, mono], "left": [mono, silence]}
    for name, channels in songs.items():
        song = write_song(tmp_path / f"{name}.wav", np.hstack(channels))
        vocals = stems_of(song)["vocals"]
        (path,), _ = run("karaoke", song, "--keep-backing")
        kept = samples(path) - (samples(song) - vocals)
        assert vocals[0].abs().max() > 0.02
        close(kept, vocals * (name == "left"), 1e-4)
    song = write_song(tmp_path / "mono.wav", mono)
    _, messages = run("karaoke", song, "--keep-backing", code=1)
    assert f"{song}: backing voices are told from the lead by" in messages


def test_karaoke_needs_vocals(run, model, tmp_path, capsys):
    folder = performer().export(tmp_path / "unnamed")
    song = write_song(tmp_path / "song.wav")
    assert main(["karaoke", str(song), "--model", str(folder)]) == 2
    assert "stems: this model has no names" in capsys.readouterr().err
    folder = named(["vocals"]).export(tmp_path / "vocals")
    assert main(["karaoke", str(song), "--model", str(folder)]) == 2
    message = "karaoke: expected a model of more stems than vocals"
    assert message in capsys.readouterr().err


def test_karaoke_of_surround_sound_is_written_where_it_was_planned(
    run, tmp_path
):
    song = tmp_path / "song.ogg"
    soundfile.write(song, np.repeat(SONG, 3, 1), RATE)
    (path,), _ = run("karaoke", song)
    assert path == tmp_path / "out" / "song_karaoke.flac"
    _, messages = run("karaoke", song, path, code=2)
    assert f"{song}: its result {path} would overwrite {path}" in messages
    # and found again there
    words = "separate", song, "--format", "same", "--skip-existing"
    assert [x.suffix for x in run(*words)[0]] == 3 * [".flac"]
    _, messages = run(*words)
    assert f"{song}: skipped, its results are there" in messages


# --- remix -------------------------------------------------------------------


def test_gains_are_decibels(run, stems_of, tmp_path):
    song = write_song(tmp_path / "song.flac")
    stems = stems_of(song)
    words = "--vocals=-6.0206", "--drums=+3", "--gain", "other=-inf"
    (path,), messages = run("remix", song, *words)
    assert (path.name, messages) == ("song_remix.flac", "")
    assert read_tags(path).metadata["title"] == "Lied (remix)"
    expected = 0.5 * stems["vocals"] + 1.41254 * stems["drums"]
    close(samples(path), expected, 1.01 * 2**-16)


def panned(stem, pan):
    """By the W3C's Web Audio API, 1.31.2, for stereo input."""
    left, right = stem
    x = pan + 1 if pan <= 0 else pan
    gain_left, gain_right = np.cos(x * np.pi / 2), np.sin(x * np.pi / 2)
    if pan <= 0:
        return torch.stack([left + right * gain_left, right * gain_right])
    return torch.stack([left * gain_left, right + left * gain_right])


@pytest.mark.parametrize("pan", [-1, -0.4, 0.3, 1])
def test_pan_of_stereo(run, stems_of, tmp_path, pan):
    song = write_song(tmp_path / "song.wav")
    stems = stems_of(song)
    (path,), _ = run("remix", song, f"--pan=other={pan}", "--drums=-inf")
    expected = stems["vocals"] + panned(stems["other"], pan)
    close(samples(path), expected, 1.01 * 2**-16)


def test_mono_becomes_stereo_where_something_is_panned(run, stems_of, tmp_path):
    song = write_song(tmp_path / "song.wav", SONG[:, :1])
    stems = {name: stem[0] for name, stem in stems_of(song).items()}
    (path,), messages = run("remix", song, "--pan", "other=-0.5")
    assert messages == f"{song}: mono becomes stereo"
    left, right = samples(path)
    # constant power, and in the middle what it was
    angle = torch.tensor(0.25 * np.pi / 2)
    rest = stems["drums"] + stems["vocals"]
    close(left, rest + 2**0.5 * angle.cos() * stems["other"], 1.01 * 2**-16)
    close(right, rest + 2**0.5 * angle.sin() * stems["other"], 1.01 * 2**-16)
    (path,), messages = run("remix", song, "--other=0")
    assert (len(samples(path)), messages) == (1, "")


def test_a_loud_remix_is_turned_down_by_its_true_peak(run, stems_of, tmp_path):
    song = write_song(tmp_path / "song.wav")
    stems = stems_of(song)
    (path,), messages = run("remix", song, "--vocals=24")
    result = samples(path)
    louder = samples(song) + (10**1.2 - 1) * stems["vocals"]
    gain = (result * louder).sum() / louder.square().sum()
    close(result, gain * louder, 1.1 * 2**-16)
    decibels = -20 * gain.log10()
    assert f"turned down by {decibels:.1f} dB to stay below full" in messages
    # measured by a spectrum with zeros on top
    between = resample(result.numpy(), 8 * result.shape[1], axis=1)
    peak = 20 * np.log10(np.abs(between).max())
    assert -1.05 < peak < -0.9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gain", "tuba=3"], "one of drums, vocals, other, got 'tuba'"),
        (["--vocals=loud"], "as in 0:-inf,3:+3, got 'vocals:loud'"),
        (["--pan", "other=2"], "pan: expected -1 (left) to 1 (right), got"),
        ([], "remix: expected a gain or a place, as --vocals=-6"),
    ],
)
def test_remixes_that_there_are_not(run, tmp_path, words, message):
    song = write_song(tmp_path / "song.wav")
    _, messages = run("remix", song, *words, code=2)
    assert message in messages
    assert not (tmp_path / "out").exists()


def test_surround_sound_has_no_left_and_right(run, tmp_path):
    song = tmp_path / "song.wav"
    soundfile.write(song, np.zeros((RATE, 6)), RATE)
    _, messages = run("remix", song, "--pan", "other=0.5", code=1)
    assert f"{song}: pan: expected 1 or 2 channels, got 6" in messages
    assert list((tmp_path / "out").iterdir()) == []
