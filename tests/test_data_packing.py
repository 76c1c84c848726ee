"""`trackformer shards make`: what it prints and leaves."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from trackformer_sb.cli import main
from trackformer_sb.data.audio import read_segment
from trackformer_sb.data.manifest import MappedManifest, read_songs
from trackformer_sb.data.music import Music
from trackformer_sb.data.packing import pack

RATE = 8000


def write_stems(folder, songs=8, stems=("bass", "drums"), seed=0):
    rng = np.random.default_rng(seed)
    for i in range(songs):
        song = folder / f"söng {i}"
        song.mkdir(parents=True)
        for name in stems:
            sig = rng.uniform(-0.4, 0.4, size=4 * RATE)
            soundfile.write(song / f"{name}.wav", sig, RATE)
    return folder


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


def test_copies_are_of_todays_options(tmp_path):
    """Packed again, test songs are those of the options and files of today."""
    music = write_stems(tmp_path / "music")
    tests = write_stems(tmp_path / "tests", 2, ("kick", "snare"), seed=1)
    out = tmp_path / "out"
    options = {"sample_rate": RATE, "test_folder": tests}

    def copies(**more):
        pack(Music(music, "stems", **options, **more), out, 1.0)
        for row in MappedManifest(out, "test").values():
            for path in row["tracks"].values():
                assert read_segment(path, row["start"], 1.0, RATE).any()
        return {p: p.stat().st_mtime_ns for p in out.glob("test/*/*.wav")}

    first = copies()
    assert len(first) == 4
    assert copies() == first
    soundfile.write(tests / "söng 0" / "kick.wav", [0.1] * 4 * RATE, RATE)
    second = copies()
    assert len(second) == 4 and len(second.keys() & first.keys()) == 3
    # nothing is left of the others
    assert len(copies(stem_groups={"kit": ["kick", "snare"]})) == 2


def test_other_settings_in_the_same_folder(tmp_path, capsys):
    music = write_stems(tmp_path / "music")
    assert make(music, tmp_path / "out") == 0
    capsys.readouterr()
    assert make(music, tmp_path / "out", "--seed", "5") == 2
    said = capsys.readouterr().err
    assert said.startswith("trackformer shards: ") and "seed" in said


def test_songs_that_break_while_they_are_packed(tmp_path, caplog):
    music = write_stems(tmp_path / "music", songs=10)
    options = {"split_ratio": (40, 20, 40), "sample_rate": RATE}
    look = Music(music, "stems", **options).prepare(tmp_path / "look", 1.0)
    splits = look["splits"]
    trained = splits["train"]["songs"]
    # names are made safe; the last character is the number of the song
    broken = {s: splits[s]["song_names"][0] for s in ("train", "test")}
    for name in broken.values():
        path = music / f"söng {name[-1]}" / "bass.wav"
        sig, _ = soundfile.read(path)
        sig[RATE + 5] = np.nan
        soundfile.write(path, sig, RATE, "FLOAT")
    index = pack(Music(music, "stems", **options), tmp_path / "out", 1.0)
    assert [x["id"] for x in index["skipped"]] == [f"{broken['train']}_0001"]
    assert index["segments"] == trained * 4 - 1
    tested = {line["song"] for line in read_songs(tmp_path / "out", "test")}
    assert tested == set(splits["test"]["song_names"]) - {broken["test"]}
    said = [m for m in caplog.messages if "NaN" in m]
    assert len(said) == 2
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["splits"]["train"]["segments"] == trained * 4 - 1
    assert set(report["splits"]["test"]["song_names"]) == tested
    assert len(report["skipped"]) == 2
    assert all("NaN" in entry["reason"] for entry in report["skipped"])
    with pytest.raises(ValueError, match=r"strict: .*NaN"):
        strict = Music(music, "stems", strict=True, **options)
        pack(strict, tmp_path / "b", 1.0)
    assert not (tmp_path / "b" / "data_report.json").exists()


def test_shards_do_not_become_test_songs(tmp_path):
    music, test = write_stems(tmp_path / "a"), write_stems(tmp_path / "b", 2)
    message = f"expected a folder outside of {test}"
    with pytest.raises(ValueError, match=message):
        pack(Music(music, "stems", test_folder=test), test / "packed")


@pytest.mark.parametrize("out", [".", "packed", "a/../packed/b"])
def test_shards_do_not_become_songs(tmp_path, out):
    (tmp_path / "a").mkdir()
    message = "expected a folder outside of"
    with pytest.raises(ValueError, match=message):
        pack(Music(tmp_path), tmp_path / out)
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
