"""`trackformer data`, `trackformer shards make`: what they print and leave."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from trackformer_sb.cli import main
from trackformer_sb.data.audio import read_segment
from trackformer_sb.data.catalogue import prepare
from trackformer_sb.data.manifest import MappedManifest, read_songs
from trackformer_sb.data.packing import pack

RATE = 8000


def write_stems(folder, songs=8, seconds=4.0):
    rng = np.random.default_rng(0)
    for i in range(songs):
        song = folder / f"söng {i}"
        song.mkdir(parents=True)
        for name in ("bass", "drums"):
            sig = rng.uniform(-0.4, 0.4, size=round(seconds * RATE))
            soundfile.write(song / f"{name}.wav", sig, RATE)
    return folder


def data(folder, out, *options):
    words = [str(folder), "--segment_seconds", "1", *map(str, options)]
    return main(["data", *words, "--dataset", "stems", "--out", str(out)])


def test_data_prints_and_draws(tmp_path, capsys):
    music = write_stems(tmp_path / "music")
    (music / "söng 3" / "bass.wav").write_bytes(b"")
    assert data(music, tmp_path / "out") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["split", "songs", "hours", "segments"]
    sizes = [line.split() for line in printed[1:4]]
    assert [(name, int(n)) for name, n, *_ in sizes] == [
        ("train", 3),
        ("valid", 2),
        ("test", 2),
    ]
    assert sum(int(line[3]) for line in sizes) == 7 * 4
    assert printed[4] == "files    14 of 8000 Hz; 14 of 1 channel(s)"
    assert printed[5] == "stems    bass 7, drums 7"
    assert printed[6] == ("segments left out 0; files and songs: 1 left out")
    assert "the file is empty" in printed[7]
    figures = [line.split()[-1] for line in printed if line[:6] == "figure"]
    assert [name.rpartition("/")[2] for name in figures] == [
        "durations.png",
        "levels.png",
        "activity.png",
    ]
    for path in figures:
        with open(path, "rb") as file:
            assert file.read(4) == b"\x89PNG"
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["splits"]["train"]["songs"] == 3


def test_data_from_headers_only(tmp_path, capsys):
    music = write_stems(tmp_path / "music")
    assert data(music, tmp_path / "out", "--headers_only") == 0
    printed = capsys.readouterr().out
    assert "durations.png" in printed
    assert "levels.png" not in printed and "activity.png" not in printed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--split", "from_file"], "split_file=None is not a file"),
        (["--max_stems", "1"], "more than max_stems=1"),
        (["--split_ratio", "1", "1", "0"], "three positive numbers"),
    ],
)
def test_data_says_what_is_wrong(tmp_path, capsys, options, reason):
    music = write_stems(tmp_path / "music")
    assert data(music, tmp_path / "out", *options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("trackformer data: ") and reason in said.err


def test_data_of_a_folder_that_is_not_there(tmp_path, capsys):
    assert data(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_strict(tmp_path, capsys):
    music = write_stems(tmp_path / "music")
    (music / "söng 3" / "bass.wav").write_bytes(b"")
    assert data(music, tmp_path / "out", "--strict") == 2
    assert "bass.wav: the file is empty" in capsys.readouterr().err


def make(folder, out, *options):
    words = [str(folder), str(out), "--dataset", "stems"]
    words += ["--segment_seconds", "1", "--sample_rate", "4000"]
    return main(["shards", "make", *words, *map(str, options)])


def test_shards_make(tmp_path, capsys):
    music = write_stems(tmp_path / "music")
    out = tmp_path / "out"
    assert make(music, out, "--shard_megabytes", "0.05") == 0
    said = capsys.readouterr()
    shards = sorted(out.glob("train-*.tar"))
    assert len(shards) > 2
    assert said.out == (
        f"16 segments of 4 songs in {len(shards)} shards in {out}, 0 skipped\n"
    )
    made = {path: path.stat().st_mtime_ns for path in shards}
    # again: nothing is left to do
    assert make(music, out, "--shard_megabytes", "0.05") == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("train-*.tar")} == made
    # what is evaluated is the same music at the rate of the shards
    (tmp_path / "music").rename(tmp_path / "elsewhere")
    original = MappedManifest(out / "manifests", "test")
    packed = MappedManifest(out, "test")
    assert list(packed) == list(original) and len(packed) == 8
    for key, row in packed.items():
        assert row["start"] == original[key]["start"]
        for name, path in row["tracks"].items():
            source = original[key]["tracks"][name]
            source = source.replace("/music/", "/elsewhere/")
            expected = read_segment(source, row["start"], 1.0, 4000)
            found = read_segment(path, row["start"], 1.0, 4000)
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_copies_are_of_what_they_are_called(tmp_path):
    """Packed again, test songs are those of the options and files of today."""
    music = write_stems(tmp_path / "music")
    test = tmp_path / "test"
    rng = np.random.default_rng(1)

    def write(song, name, level):
        # equal songs would be one
        sig = level + 0.01 * rng.uniform(-1, 1, 4 * RATE)
        song.mkdir(parents=True, exist_ok=True)
        soundfile.write(song / f"{name}.wav", sig, RATE)

    for song in (test / "a", test / "b"):
        for level, name in ((0.1, "vocals"), (0.2, "bass"), (0.4, "lead")):
            write(song, name, level)
    out = tmp_path / "out"
    options = {"segment_seconds": 1.0, "test_folder": test}

    def levels(**more):
        pack(music, "stems", out, RATE, **options, **more)
        found = [
            {
                name: read_segment(path, 1.0, 1.0, RATE).mean().item()
                for name, path in row["tracks"].items()
            }
            for row in MappedManifest(out, "test").values()
        ]
        assert len(found) == 2 * 4
        for x in found:
            assert x == pytest.approx(found[0], abs=1e-3)
        return found[0]

    plain = {"bass": 0.2, "lead": 0.4, "vocals": 0.1}
    assert levels() == pytest.approx(plain, abs=1e-3)
    copies = {p: p.stat().st_mtime_ns for p in out.glob("test/*/*.wav")}
    assert levels() == pytest.approx(plain, abs=1e-3)
    assert len(copies) == 6
    assert copies == {p: p.stat().st_mtime_ns for p in copies}
    for song in test.iterdir():
        write(song, "bass", 0.5)
    assert levels() == pytest.approx(plain | {"bass": 0.5}, abs=1e-3)
    # what is trained on has none of these
    groups = {"melody": ["lead", "vocals"]}
    grouped = {"bass": 0.5, "melody": 0.5}
    assert levels(stem_groups=groups) == pytest.approx(grouped, abs=1e-3)
    # nothing is left of the others
    assert len(list(out.glob("test/*/*.wav"))) == 4


def test_names_that_are_no_utf8(tmp_path):
    music = write_stems(tmp_path / "music")
    (music / os.fsdecode(b"br\xe9k")).mkdir()
    (music / os.fsdecode(b"br\xe9k/b\xe9d.wav")).write_bytes(b"RIFF")
    words = ["data", music, "--dataset", "stems", "--segment_seconds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "trackformer_sb.cli", *words, "--headers_only"],
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert b"br\xe9k" in done.stdout and b"Traceback" not in done.stderr


def test_other_settings_in_the_same_folder(tmp_path, capsys):
    music = write_stems(tmp_path / "music")
    assert make(music, tmp_path / "out") == 0
    capsys.readouterr()
    assert make(music, tmp_path / "out", "--seed", "5") == 2
    said = capsys.readouterr().err
    assert said.startswith("trackformer shards: ") and "seed" in said


def test_songs_that_break_while_they_are_packed(tmp_path, caplog):
    music = write_stems(tmp_path / "music", songs=10)
    options = {"segment_seconds": 1.0, "split_ratio": (50, 20, 30)}
    splits = prepare(music, "stems", tmp_path / "look", **options)["splits"]
    # names are made safe; the last character is the number of the song
    broken = {s: splits[s]["song_names"][0] for s in ("train", "test")}
    for name in broken.values():
        path = music / f"söng {name[-1]}" / "bass.wav"
        sig, _ = soundfile.read(path)
        sig[RATE + 5] = np.nan
        soundfile.write(path, sig, RATE, "FLOAT")
    index = pack(music, "stems", tmp_path / "out", RATE, **options)
    assert [x["id"] for x in index["skipped"]] == [f"{broken['train']}_0001"]
    assert index["segments"] == 5 * 4 - 1
    tested = {line["song"] for line in read_songs(tmp_path / "out", "test")}
    assert tested == set(splits["test"]["song_names"]) - {broken["test"]}
    said = [m for m in caplog.messages if "NaN" in m]
    assert len(said) == 2
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["splits"]["train"]["segments"] == 5 * 4 - 1
    assert report["splits"]["test"]["songs"] == 2
    assert set(report["splits"]["test"]["song_names"]) == tested
    assert len(report["skipped"]) == 2
    assert all("NaN" in entry["reason"] for entry in report["skipped"])
    with pytest.raises(ValueError, match=r"strict: .*NaN"):
        pack(music, "stems", tmp_path / "b", RATE, strict=True, **options)
    assert not (tmp_path / "b" / "data_report.json").exists()


def test_shards_do_not_become_test_songs(tmp_path):
    music, test = write_stems(tmp_path / "a"), write_stems(tmp_path / "b", 2)
    message = f"expected a folder outside of {test}"
    with pytest.raises(ValueError, match=message):
        pack(music, "stems", test / "packed", RATE, test_folder=test)


@pytest.mark.parametrize("out", [".", "packed", "a/../packed/b"])
def test_shards_do_not_become_songs(tmp_path, out):
    (tmp_path / "a").mkdir()
    message = "expected a folder outside of"
    with pytest.raises(ValueError, match=message):
        pack(tmp_path, "mixtures", tmp_path / out, RATE)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_help_reads_well():
    for words in (["data"], ["shards", "make"]):
        run = subprocess.run(
            [sys.executable, "-m", "trackformer_sb.cli", *words, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "--segment_seconds SECONDS" in run.stdout
        assert "FOLDER" in run.stdout and run.stderr == ""
