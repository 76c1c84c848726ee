"""Headers kept from run to run, filters, copies, splits, what is left out."""

import json
import logging
import os
import re
import shutil
import unicodedata

import numpy as np
import pytest
import soundfile
import yaml

from trackformer_sb.data import catalogue as catalogue_module
from trackformer_sb.data import headers, library
from trackformer_sb.data.audio import UnreadableAudio
from trackformer_sb.data.catalogue import prepare
from trackformer_sb.data.findings import Findings
from trackformer_sb.data.headers import FileCache, file_stat
from trackformer_sb.data.manifest import MappedManifest, read_songs
from trackformer_sb.data.segments import SegmentFilter
from trackformer_sb.data.splits import SPLITS

RATE = 8000


def noise(seed, seconds=6.0, level=0.1, channels=1):
    """Noise whose level changes each half second: no two seeds are alike."""
    rng = np.random.default_rng(seed)
    sig = rng.normal(size=(round(seconds * RATE), channels))
    steps = rng.uniform(0.2, 1.0, size=round(2 * seconds))
    return level * sig.clip(-3, 3) / 3 * np.repeat(steps, RATE // 2)[:, None]


def write(path, sig, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sig, RATE, **options)
    return path


def library_of(folder, songs=8, **options):
    for i in range(songs):
        write(folder / f"song {i}.wav", noise(i, **options))
    return folder


def listing_of(folder):
    return {str(p): file_stat(p) for p in sorted(folder.rglob("*.*"))}


def songs_in(folder, *splits):
    splits = splits or SPLITS
    return {
        line["song"] for split in splits for line in read_songs(folder, split)
    }


def catalogue(music, out, **options):
    return prepare(music, "mixtures", out, sample_rate=RATE, **options)


# ------------------------------------------------------------------- the cache


@pytest.fixture
def reads(monkeypatch):
    """The files whose header or content is really read."""
    found = []
    for name in ("audio_info", "measure_levels"):
        read = getattr(headers, name)

        def noting(path, read=read):
            found.append(path)
            return read(path)

        monkeypatch.setattr(headers, name, noting)
    return found


def test_only_new_and_changed_files_are_read_again(tmp_path, reads):
    music = library_of(tmp_path / "music")
    catalogue(music, tmp_path / "a")
    assert len(reads) == 8
    reads.clear()
    # another experiment on the same music
    catalogue(music, tmp_path / "b", seed=5)
    assert reads == []
    new = write(music / "new.wav", noise(20))
    changed = write(music / "song 3.wav", noise(21, seconds=9.0))
    catalogue(music, tmp_path / "b", seed=5)
    assert sorted(reads) == sorted(map(str, (new, changed)))
    songs = {x["song"]: x for x in read_songs(tmp_path / "b", "train")}
    for split in SPLITS:
        songs.update((x["song"], x) for x in read_songs(tmp_path / "b", split))
    assert songs["song_3"]["song_seconds"] == 9.0
    reads.clear()
    # levels are another reading, kept as well
    catalogue(music, tmp_path / "c", min_active_share=0.5)
    assert len(reads) == 9
    catalogue(music, tmp_path / "d", min_active_share=0.4)
    assert len(reads) == 9


def test_a_stopped_reading_goes_on(tmp_path, monkeypatch, reads):
    music = library_of(tmp_path / "music")
    listing = listing_of(music)
    read = headers.audio_info

    def stops(path):
        if "song 5" in path:
            raise KeyboardInterrupt
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(headers, "audio_info", stops)
        patch.setattr(headers, "THREADS", 1)
        with pytest.raises(KeyboardInterrupt):
            FileCache(music, tmp_path / "cache").headers(listing)
    cache = FileCache(music, tmp_path / "cache")
    # a kill may cut the last line
    text = cache.path.read_text()
    assert len(text.splitlines()) == 5
    cache.path.write_text(text[:-20])
    reads.clear()
    found = FileCache(music, tmp_path / "cache").headers(listing)
    assert [path[-5] for path in reads] == ["4", "5", "6", "7"]
    assert {info.duration for info in found.values()} == {6.0}
    again = FileCache(music, tmp_path / "cache").headers(listing)
    assert again == found and len(reads) == 4


def test_errors_are_not_kept(tmp_path, reads):
    path = tmp_path / "music" / "song.wav"
    path.parent.mkdir()
    path.write_bytes(b"")
    for _ in range(2):
        cache = FileCache(tmp_path / "music", tmp_path / "cache")
        found = cache.headers({str(path): file_stat(path)})
        assert isinstance(found[str(path)], UnreadableAudio)
    assert len(reads) == 2


def test_an_old_cache_is_made_shorter(tmp_path):
    music = library_of(tmp_path / "music", songs=1)
    listing = listing_of(music)
    cache = FileCache(music, tmp_path / "cache")
    expected = cache.headers(listing)
    line = cache.path.read_text()
    cache.path.write_text(line * 2000 + "no json\n[1]\n")
    assert FileCache(music, tmp_path / "cache").headers(listing) == expected
    assert cache.path.read_text() == line


# ------------------------------------------------------------------ the filter


def half_silent(folder):
    """Songs of 12 s: three seconds of noise, six of silence, three of noise."""
    for i in range(8):
        sig = noise(i, seconds=12.0)
        sig[3 * RATE : 9 * RATE] *= 1e-6
        write(folder / f"song {i}.wav", sig)
    return folder


def test_silent_segments_are_left_out(tmp_path):
    music = half_silent(tmp_path / "music")
    report = catalogue(music, tmp_path / "out", min_active_share=0.5)
    train = MappedManifest(tmp_path / "out", "train")
    assert {row["start"] for row in train.values()} == {0.0, 9.0}
    # what is tested on stays what it was
    test = MappedManifest(tmp_path / "out", "test")
    assert {row["start"] for row in test.values()} == {0.0, 3.0, 6.0, 9.0}
    left = sum(report["splits"][s]["songs"] for s in ("train", "valid"))
    assert report["segments_left_out"] == 2 * left == 12


def test_soft_segments_are_left_out(tmp_path):
    music = library_of(tmp_path / "music", level=0.1)
    write(music / "soft.wav", noise(50, level=0.001))
    report = catalogue(music, tmp_path / "out", min_level_db=-45.0, seed=3)
    assert "soft" in songs_in(tmp_path / "out", "test") or any(
        "soft.wav" in entry["file"] and "min_level_db" in entry["reason"]
        for entry in report["skipped"]
    )
    assert "soft" not in songs_in(tmp_path / "out", "train", "valid")


def test_filters_that_leave_nothing(tmp_path):
    music = library_of(tmp_path / "music", level=0.001)
    with pytest.raises(ValueError, match=r"of 0 songs of train .*=-10"):
        catalogue(music, tmp_path / "out", min_level_db=-10)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"min_active_share": 1.5}, "min_active_share in .0, 1., got 1.5"),
        ({"min_active_share": float("nan")}, "min_active_share"),
        ({"min_level_db": 3}, "min_level_db in dBFS, at most 0, got 3"),
        ({"split": "random"}, "split 'random', expected one of auto, by_song"),
        ({"audio_check": "all"}, "audio_check 'all', .* header, full"),
        ({"max_stems": 0}, "max_stems"),
        ({"stem_groups": ["bass"]}, "stem_groups"),
    ],
)
def test_impossible_options(tmp_path, options, match):
    music = library_of(tmp_path / "music")
    with pytest.raises(ValueError, match=match):
        catalogue(music, tmp_path / "out", **options)


def test_filter_is_off_by_default():
    assert not SegmentFilter().is_on
    assert SegmentFilter(min_level_db=0).is_on


# ------------------------------------------------------------------ the copies


def test_copies_under_other_names_are_left_out(tmp_path):
    music = library_of(tmp_path / "music")
    copy = music / "a" / "Überall.wav"
    copy.parent.mkdir()
    shutil.copy(music / "song 3.wav", copy)
    # the same size, other samples
    write(music / "other.wav", noise(30))
    report = catalogue(music, tmp_path / "out")
    (entry,) = report["skipped"]
    assert entry == {
        "file": str(music / "song 3.wav"),
        "reason": f"a copy of {copy}",
    }
    assert len(songs_in(tmp_path / "out")) == 9


def test_copies_of_stems_whatever_their_names(tmp_path):
    music = tmp_path / "music"
    for i in range(6):
        for j, stem in enumerate(("bass", "drums")):
            write(music / f"song {i}" / f"{stem}.wav", noise(10 * i + j))
    (music / "copy").mkdir()
    shutil.copy(music / "song 2" / "bass.wav", music / "copy" / "x.wav")
    shutil.copy(music / "song 2" / "drums.wav", music / "copy" / "a.wav")
    # shares one stem only
    (music / "remix").mkdir()
    shutil.copy(music / "song 2" / "bass.wav", music / "remix" / "bass.wav")
    write(music / "remix" / "drums.wav", noise(99))
    report = prepare(music, "stems", tmp_path / "out", sample_rate=RATE)
    (entry,) = report["skipped"]
    assert entry["file"] == str(music / "song 2")
    assert entry["reason"] == f"a copy of {music / 'copy'}"


@pytest.mark.parametrize("ending", ["flac", "mp3", "ogg"])
def test_copies_in_other_formats_are_found_by_a_full_check(tmp_path, ending):
    music = library_of(tmp_path / "music", seconds=20.0)
    sig, _ = soundfile.read(music / "song 3.wav")
    write(music / f"renamed.{ending}", 0.7 * sig)
    report = catalogue(music, tmp_path / "a")
    assert report["skipped"] == []
    report = catalogue(music, tmp_path / "b", audio_check="full")
    (entry,) = report["skipped"]
    assert entry == {
        "file": str(music / "song 3.wav"),
        "reason": f"a copy of {music / 'renamed'}.{ending}",
    }


def test_short_music_is_no_copy_by_its_levels(tmp_path):
    # excerpts of a song that repeats itself have one level curve as well
    music = library_of(tmp_path / "music", seconds=8.0)
    sig, _ = soundfile.read(music / "song 3.wav")
    write(music / "renamed.ogg", 0.7 * sig)
    report = catalogue(music, tmp_path / "out", audio_check="full")
    assert report["skipped"] == []


def test_no_copy_of_a_test_song_is_trained_on(tmp_path):
    music = library_of(tmp_path / "music", seconds=20.0)
    tests = tmp_path / "tests"
    for i in (2, 5):
        sig, _ = soundfile.read(music / f"song {i}.wav")
        write(tests / f"test {i}.flac", sig)
    report = catalogue(
        music,
        tmp_path / "out",
        test_folder=tests,
        test_dataset="mixtures",
        audio_check="full",
    )
    left_out = {entry["file"]: entry["reason"] for entry in report["skipped"]}
    assert left_out == {
        str(music / f"song {i}.wav"): "a copy of the test song "
        f"{tests / f'test {i}.flac'}"
        for i in (2, 5)
    }


def test_other_tags_do_not_hide_a_copy(tmp_path):
    music = library_of(tmp_path / "music")
    sig, _ = soundfile.read(music / "song 3.wav", dtype="int16")
    # lossless: the same samples in other bytes
    path = music / "0.flac"
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        file.title = "a title of its own"
        file.write(sig)
    report = catalogue(music, tmp_path / "out")
    (entry,) = report["skipped"]
    assert entry["file"] == str(music / "song 3.wav")
    assert entry["reason"] == f"a copy of {path}"


def test_no_file_of_a_test_song_is_trained_on(tmp_path):
    tests = musdb(tmp_path / "tests")
    music = library_of(tmp_path / "music")
    shutil.copy(tests / "test" / "c - C" / "mixture.wav", music / "x.wav")
    shutil.copy(tests / "test" / "c - C" / "bass.wav", music / "y.wav")
    linked = music / "z.wav"
    options = {"test_folder": tests / "test", "test_dataset": "stems"}
    report = catalogue(music, tmp_path / "out", **options)
    reason = f"it has music of the test song {tests / 'test' / 'c - C'}"
    assert {x["file"]: x["reason"] for x in report["skipped"]} == {
        str(music / "x.wav"): reason,
        str(music / "y.wav"): reason,
    }
    linked.symlink_to(tests / "test" / "d - Ü" / "mixture.wav")
    with pytest.raises(ValueError, match="must not be trained on"):
        catalogue(music, tmp_path / "again", **options)


@pytest.mark.parametrize("dataset", ["mixtures", "stems"])
def test_no_mixture_beside_stems_is_tested_on(tmp_path, dataset):
    """Its stems are trained on, whatever stems the test has of it."""
    music, tests = tmp_path / "music", tmp_path / "tests"
    for i in range(8):
        for j, name in enumerate(("drums", "rest")):
            write(music / f"s{i}" / f"{name}.wav", noise(10 * i + j))
        write(music / f"s{i}" / "mixture.wav", noise(200 + i))

    def in_test(name, copy):
        if dataset == "mixtures":
            tests.mkdir(exist_ok=True)
            copy(tests / f"{name}.wav")
            return
        for j, stem in enumerate(("kick", "all")):
            write(tests / name / f"{stem}.wav", noise(len(name) * 30 + 300 + j))
        copy(tests / name / "mixture.wav")

    def catalogued():
        what = {"test_folder": tests, "test_dataset": dataset}
        out = tmp_path / "out"
        return prepare(music, "stems", out, sample_rate=RATE, **what)

    for i, name in enumerate(("x", "yy")):
        path = music / f"s{i}" / "mixture.wav"
        in_test(name, lambda to, path=path: shutil.copy(path, to))
    report = catalogued()
    assert [x["file"] for x in report["skipped"]] == [
        str(music / name) for name in ("s0", "s1")
    ]
    assert all("of the test song" in x["reason"] for x in report["skipped"])
    assert report["splits"]["test"]["songs"] == 2
    # links to them are refused, as those to stems are
    path = music / "s2" / "mixture.wav"
    in_test("zzz", lambda to: to.symlink_to(path))
    with pytest.raises(ValueError, match="must not be trained on"):
        catalogued()


def test_songs_that_share_a_file_are_kept_apart(tmp_path):
    """Remixes: two songs of one folder with the same drums."""
    for i in range(24):
        song = tmp_path / "music" / f"s{i:02d}"
        write(song / "drums.wav", noise(i // 2))
        write(song / "rest.wav", noise(100 + i))
        # which many songs have, and which is no music
        write(song / "vocals.wav", np.zeros((6 * RATE, 1)))
    report = prepare(
        tmp_path / "music",
        "stems",
        tmp_path / "out",
        sample_rate=RATE,
        split_ratio=(50, 20, 30),
    )
    drums = {
        name: {int(song[1:]) // 2 for song in part["song_names"]}
        for name, part in report["splits"].items()
    }
    assert drums["train"].isdisjoint(drums["valid"] | drums["test"])
    assert drums["valid"].isdisjoint(drums["test"])
    kept = sum(part["songs"] for part in report["splits"].values())
    assert report["splits"]["test"]["songs"] == 7
    assert kept + len(report["skipped"]) == 24 and report["skipped"]
    for entry in report["skipped"]:
        pattern = r"it has music of the (test|valid) song .*/s\d\d"
        assert re.fullmatch(pattern, entry["reason"])


def test_too_few_songs_that_share_nothing(tmp_path):
    for i in range(12):
        song = tmp_path / "music" / f"s{i}"
        write(song / "drums.wav", noise(0))
        write(song / "rest.wav", noise(100 + i))
    with pytest.raises(ValueError, match="0 songs of valid are left"):
        prepare(tmp_path / "music", "stems", tmp_path / "o", sample_rate=RATE)


def test_a_copy_does_not_take_the_place_of_a_test_song(tmp_path):
    music = library_of(tmp_path / "music", songs=20)
    before = catalogue(music, tmp_path / "out")["splits"]
    for line in read_songs(tmp_path / "out", "test"):
        path = line["tracks"]["mixture"]
        shutil.copy(path, music / f"a copy of {line['song']}.wav")
    after = catalogue(music, tmp_path / "out")
    for split in SPLITS:
        names = before[split]["song_names"]
        assert after["splits"][split]["song_names"] == names
    assert len(after["skipped"]) == len(before["test"]["song_names"])


@pytest.mark.parametrize("subtype", ["FLOAT", "PCM_24"])
def test_copies_of_high_resolution(tmp_path, subtype):
    music = library_of(tmp_path / "music", songs=7)
    for name in "ab":
        path = music / f"{name}.wav"
        with soundfile.SoundFile(path, "w", RATE, 1, subtype) as file:
            file.title = name  # other bytes
            file.write(noise(77))
    (skipped,) = catalogue(music, tmp_path / "out")["skipped"]
    assert skipped["reason"] == f"a copy of {music / 'a.wav'}"


def test_long_names_become_names_of_files(tmp_path):
    music = library_of(tmp_path / "music")
    for i, name in enumerate(("first", "second")):
        parts = ["Composer" * 16, "Orchestra" * 14, name + " movement" * 12]
        write(music.joinpath(*parts[:2]) / f"{parts[2]}.wav", noise(90 + i))
    catalogue(music, tmp_path / "out")
    names = songs_in(tmp_path / "out")
    assert len(names) == 10
    assert sorted(map(len, names))[-2:] == [159, 159]


def test_silent_songs_of_one_length_are_no_copies(tmp_path):
    music = library_of(tmp_path / "music")
    for i in range(2):
        sig = np.zeros((6 * RATE, 1))
        sig[100 + i] = 0.5
        write(music / f"click {i}.wav", sig)
    assert catalogue(music, tmp_path / "out")["skipped"] == []


def test_only_files_that_could_be_copies_are_fingerprinted(
    tmp_path, monkeypatch
):
    music = library_of(tmp_path / "music", songs=6)
    for i in range(6):
        write(music / f"own length {i}.wav", noise(20 + i, seconds=7 + i / 2))
    read = []
    fingerprint = headers.audio_fingerprint

    def noting(path):
        read.append(path)
        return fingerprint(path)

    monkeypatch.setattr(headers, "audio_fingerprint", noting)
    catalogue(music, tmp_path / "a")
    assert sorted(read) == sorted(str(p) for p in music.glob("song*.wav"))
    catalogue(music, tmp_path / "b")
    assert len(read) == 6


# ------------------------------------------------------------------ the splits


def test_a_library_that_has_grown_keeps_its_split(tmp_path):
    music = library_of(tmp_path / "music", songs=20)
    before = catalogue(music, tmp_path / "out")["splits"]
    for i in range(5):
        write(music / f"another {i}.wav", noise(100 + i))
    after = catalogue(music, tmp_path / "out")["splits"]
    for split in ("valid", "test"):
        assert after[split]["song_names"] == before[split]["song_names"]
    assert after["train"]["songs"] == before["train"]["songs"] + 5
    # what is left out does not split anew
    fewer = catalogue(music, tmp_path / "out", min_level_db=-90)["splits"]
    assert fewer == after
    # other settings of the split do
    other = catalogue(music, tmp_path / "out", seed=3)["splits"]
    assert other["test"]["song_names"] != before["test"]["song_names"]


def test_songs_keep_their_split_when_their_names_change(tmp_path):
    music = library_of(tmp_path / "music", songs=20)

    def splits():
        catalogue(music, tmp_path / "out")
        return {
            line["tracks"]["mixture"]: split
            for split in SPLITS
            for line in read_songs(tmp_path / "out", split)
        }

    before = splits()
    names = songs_in(tmp_path / "out")
    # each makes the name of another song ambiguous
    for i in range(20):
        write(music / f"song+{i}.wav", noise(100 + i))
    after = splits()
    assert names.isdisjoint(songs_in(tmp_path / "out"))
    assert {path: after[path] for path in before} == before
    assert {after[p] for p in after.keys() - before.keys()} == {"train"}
    # a song in another format is known by its name
    (held, *_) = (p for p in before if before[p] == "test" and "song 1" in p)
    sig, rate = soundfile.read(held)
    (music / held).unlink()
    (music / held.replace("song ", "song+")).unlink()
    names = songs_in(tmp_path / "out", "test")
    assert splits().get(held) is None
    soundfile.write(held, sig, rate)
    assert splits()[held] == "test"


def test_songs_that_were_gone_for_a_while_keep_their_split(tmp_path):
    """What was trained on must not come back as a test song."""
    music = library_of(tmp_path / "music", songs=40)
    before = catalogue(music, tmp_path / "out")["splits"]
    gone = [before[x]["song_paths"][0] for x in SPLITS]
    for path in gone:
        os.rename(path, f"{path}.off")
    for _ in range(2):
        between = catalogue(music, tmp_path / "out")
        write(music / "another.wav", noise(100))
    assert between["splits"]["test"]["songs"] == before["test"]["songs"] - 1
    for path in gone:
        os.rename(f"{path}.off", path)
    after = catalogue(music, tmp_path / "out")
    for split in ("valid", "test"):
        assert after["splits"][split] == before[split]
    assert gone[0] in after["splits"]["train"]["song_paths"]
    assert after["absent"] == {}


def test_a_song_in_another_format_keeps_its_split(tmp_path):
    music = library_of(tmp_path / "music", songs=20)
    before = catalogue(music, tmp_path / "out")["splits"]
    for path in music.iterdir():
        sig, _ = soundfile.read(path)
        write(path.with_suffix(".flac"), sig)
        path.unlink()
    after = catalogue(music, tmp_path / "out")["splits"]
    for split in SPLITS:
        assert after[split]["song_names"] == before[split]["song_names"]


def test_a_split_that_cannot_be_kept_is_said(tmp_path):
    music = library_of(tmp_path / "music", songs=20)
    before = catalogue(music, tmp_path / "out")
    assert not before["warnings"]
    for line in read_songs(tmp_path / "out", "test")[1:]:
        (music / line["tracks"]["mixture"]).unlink()
    after = catalogue(music, tmp_path / "out")
    assert after["splits"]["test"]["songs"] == 2
    (warning,) = after["warnings"]
    assert "too few songs are left: songs are split anew" in warning


def test_a_killed_run_does_not_forget_the_split(tmp_path, monkeypatch):
    music = library_of(tmp_path / "music", songs=20)
    before = catalogue(music, tmp_path / "out")["splits"]
    for i in range(5):
        write(music / f"another {i}.wav", noise(100 + i))

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(catalogue_module, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            catalogue(music, tmp_path / "out")
    after = catalogue(music, tmp_path / "out")["splits"]
    for split in ("valid", "test"):
        assert after[split]["song_names"] == before[split]["song_names"]
    assert after["train"]["songs"] == before["train"]["songs"] + 5


@pytest.mark.parametrize("part", [float("nan"), float("inf"), 0])
def test_parts_that_are_no_numbers(tmp_path, part):
    music = library_of(tmp_path / "music")
    with pytest.raises(ValueError, match="split_ratio of three positive"):
        catalogue(music, tmp_path / "out", split_ratio=(80, 10, part))


def write_split(path, **lists):
    path.write_text(yaml.safe_dump(lists), encoding="utf-8")
    return path


def test_split_from_a_file(tmp_path):
    music = library_of(tmp_path / "music")
    file = write_split(
        tmp_path / "split.yaml",
        train=["song 0", "song 1.wav", "song [23]"],
        valid=["song 4", "song 5"],
        test=["song 6.wav", "song 7"],
    )
    what = {"split": "from_file", "split_file": file}
    report = catalogue(music, tmp_path / "out", **what)
    assert [report["splits"][s]["song_names"] for s in SPLITS] == [
        ["song_0", "song_1", "song_2", "song_3"],
        ["song_4", "song_5"],
        ["song_6", "song_7"],
    ]
    # a song that is left out is there, only not wanted
    (music / "again").mkdir()
    (music / "again" / "song 0.wav").symlink_to(music / "song 0.wav")
    text = file.read_text()
    file.write_text(text.replace("train:", "train:\n- again/song 0"))
    catalogue(music, tmp_path / "out", **what)
    file.write_text(text.replace("train:", "train:\n- again/song 1"))
    with pytest.raises(ValueError, match="no song 'again/song 1'"):
        catalogue(music, tmp_path / "out", **what)
    shutil.rmtree(music / "again")
    # another content of the file is another split
    write_split(
        file,
        train=["song 0", "song 1"],
        valid=["song [23]"],
        test=["song [67]"],
    )
    report = catalogue(music, tmp_path / "out", **what)
    assert report["splits"]["valid"]["song_names"] == ["song_2", "song_3"]
    left_out = {entry["file"] for entry in report["skipped"]}
    assert left_out == {str(music / f"song {i}.wav") for i in (4, 5)}


def test_a_test_song_that_links_to_a_training_song(tmp_path):
    music = library_of(tmp_path / "music")
    (music / "link.wav").symlink_to(music / "song 0.wav")
    file = write_split(
        tmp_path / "split.yaml",
        train=["song 0", "song 1", "song 2"],
        valid=["song 3", "song 4"],
        test=["song 5", "link"],
    )
    what = {"split": "from_file", "split_file": file}
    splits = catalogue(music, tmp_path / "out", **what)["splits"]
    assert splits["test"]["song_names"] == ["link", "song_5"]
    assert splits["train"]["song_names"] == ["song_1", "song_2"]


def test_a_song_in_two_formats_side_by_side_is_one(tmp_path):
    music = library_of(tmp_path / "music", songs=12)
    for path in sorted(music.glob("*.wav")):
        sig, _ = soundfile.read(path)
        # as a lossy format, no copy by its samples
        write(path.with_suffix(".mp3"), 0.9 * sig)
        write(path.parent / "more" / path.with_suffix(".flac").name, sig[::-1])
    report = catalogue(music, tmp_path / "out")
    assert sum(x["songs"] for x in report["splits"].values()) == 24
    reasons = [x["reason"] for x in report["skipped"]]
    assert len(reasons) == 12
    assert all(re.match("the same song as .*wav", x) for x in reasons)


def test_mended_metadata_is_read_again(tmp_path):
    music = tmp_path / "MoisesDB" / "moisesdb_v0.1"
    for i in range(8):
        tracks = [{"id": "t", "extension": "wav"}]
        stems = [{"stemName": x, "tracks": tracks} for x in ("bass", "vocals")]
        for j, stem in enumerate(("bass", "vocals")):
            write(music / f"uuid {i}" / stem / "t.wav", noise(10 * i + j))
        path = music / f"uuid {i}" / "data.json"
        path.write_text(json.dumps({"stems": stems}))

    def songs():
        what = music.parent, "moisesdb", tmp_path / "out"
        report = prepare(*what, sample_rate=RATE)
        return sum(part["songs"] for part in report["splits"].values())

    text = path.read_text()
    path.write_text(text[:20])
    assert songs() == songs() == 7
    path.write_text(text)
    assert songs() == 8


def test_groups_of_stems_beside_mixtures_are_known(tmp_path):
    music, stems = library_of(tmp_path / "music"), tmp_path / "stems"
    for i in range(3):
        for j, stem in enumerate(("bass", "drums", "keys")):
            write(stems / f"song {i}" / f"{stem}.wav", noise(10 * i + j + 50))
    report = catalogue(
        music,
        tmp_path / "out",
        test_folder=stems,
        stem_groups={"band": ["bass", "drums"]},
    )
    assert report["stems"] == {"band": 3, "keys": 3}
    assert report["warnings"] == []


def test_names_in_a_split_file_are_as_they_are_written(tmp_path):
    # 010 is 8 in yaml, and macOS takes letters apart
    music, apart = tmp_path / "music", unicodedata.normalize("NFD", "é")
    names = ["01", "2", "8", "010", "no", "2024-05-01", f"{apart} 1", "[live]"]
    for i, name in enumerate(names):
        write(music / f"{name}.wav", noise(i))
    file = tmp_path / "split.yaml"
    lists = (
        "train: [01, 2]\nvalid: [010, no, '[live]']\ntest: [2024-05-01, é 1]"
    )
    file.write_text(lists, encoding="utf-8")
    what = {"split": "from_file", "split_file": file}
    splits = catalogue(music, tmp_path / "out", **what)["splits"]
    assert [splits[s]["song_names"] for s in SPLITS] == [
        ["01", "2"],
        ["010", "_live_", "no"],
        ["2024-05-01", splits["test"]["song_names"][1]],
    ]
    assert f"{apart} 1.wav" in splits["test"]["song_paths"][1]
    # what is left out is known by such names too
    (music / "[live].wav").unlink()
    write(music / "[live].wav", noise(9)[:10])
    splits = catalogue(music, tmp_path / "out", **what)["splits"]
    assert splits["valid"]["song_names"] == ["010", "no"]


def test_a_split_file_may_name_a_song_that_lacks_a_file(tmp_path):
    music = tmp_path / "music"
    for i, part in enumerate(["train"] * 5 + ["test"] * 2):
        for j, stem in enumerate(("bass", "drums", "other", "vocals")):
            write(music / part / f"A - {i}" / f"{stem}.wav", noise(10 * i + j))
    (music / "train" / "A - 0" / "bass.wav").unlink()
    file = write_split(
        tmp_path / "split.yaml",
        train=["train/A - 0", "train/A - 1", "train/A - 2"],
        valid=["train/A - 3", "train/A - 4"],
        test=["test/*"],
    )
    what = {"split": "from_file", "split_file": file, "sample_rate": RATE}
    report = prepare(music, "musdb18hq", tmp_path / "out", **what)
    assert [report["splits"][split]["songs"] for split in SPLITS] == [2, 2, 2]
    # a folder of songs is none, whatever was left out in it
    file.write_text(file.read_text().replace("- train/A - 0", "- train"))
    with pytest.raises(ValueError, match="no song 'train'"):
        prepare(music, "musdb18hq", tmp_path / "out", **what)


@pytest.mark.parametrize(
    ("lists", "match"),
    [
        ({"train": ["song 9"]}, "no song 'song 9' .train."),
        ({"train": ["song 1"], "test": ["song 1"]}, "is in test and in train"),
        ({"training": ["song 1"]}, "lists of songs under train, valid, test"),
        ({"train": "song 1"}, "lists of songs"),
        ({"train": ["song 1"]}, "found 1 train songs"),
        # nothing is left to chance
        ({"train": [], "valid": [], "test": []}, "found 0 train songs"),
    ],
)
def test_wrong_split_files(tmp_path, lists, match):
    music = library_of(tmp_path / "music")
    file = write_split(tmp_path / "split.yaml", **lists)
    with pytest.raises(ValueError, match=match):
        catalogue(music, tmp_path / "out", split="from_file", split_file=file)


@pytest.mark.parametrize("file", [None, "nowhere.yaml"])
def test_missing_split_file(tmp_path, file):
    music = library_of(tmp_path / "music")
    with pytest.raises(FileNotFoundError, match=f"split_file={file}"):
        catalogue(music, tmp_path / "out", split="from_file", split_file=file)


def musdb(folder):
    """Four songs to train on, two of them for validation, and two to test."""
    names = ["a - A", "b - B", "Meaxic - Take A Step", "Leaf - Summerghost"]
    songs = [f"train/{name}" for name in names] + ["test/c - C", "test/d - Ü"]
    for i, song in enumerate(songs):
        stems = {
            stem: noise(10 * i + j, level=0.05)
            for j, stem in enumerate(("bass", "drums", "other", "vocals"))
        }
        for stem, sig in stems.items():
            write(folder / song / f"{stem}.wav", sig, subtype="FLOAT")
        mixture = sum(stems.values())
        write(folder / song / "mixture.wav", mixture, subtype="FLOAT")
    return folder


def test_a_dataset_with_splits_of_its_own(tmp_path, caplog):
    music = musdb(tmp_path / "musdb18hq")
    with caplog.at_level(logging.WARNING):
        report = prepare(music, "musdb18hq", tmp_path / "a", sample_rate=RATE)
    assert caplog.messages == []
    names = [report["splits"][split]["song_names"] for split in SPLITS]
    assert names[0] == ["train_a_-_A", "train_b_-_B"]
    assert names[1] == [
        "train_Leaf_-_Summerghost",
        "train_Meaxic_-_Take_A_Step",
    ]
    assert names[2] == ["test_c_-_C", "test_d_-__"]
    assert report["stems"] == dict.fromkeys(
        ("bass", "drums", "other", "vocals"), 6
    )
    report = prepare(
        music, "musdb18hq", tmp_path / "b", sample_rate=RATE, split="by_song"
    )
    at_random = [report["splits"][s]["song_names"] for s in SPLITS]
    assert {x for part in at_random for x in part} == {
        x for part in names for x in part
    }
    assert at_random != names


def test_own_test_songs_are_not_trained_on_where_another_folder_tests(tmp_path):
    music = musdb(tmp_path / "musdb18hq")
    tests = library_of(tmp_path / "tests", songs=2)
    report = prepare(
        music,
        "musdb18hq",
        tmp_path / "out",
        sample_rate=RATE,
        test_folder=tests,
        test_dataset="mixtures",
    )
    trained = {x for s in SPLITS[:2] for x in report["splits"][s]["song_names"]}
    assert len(trained) == 4
    assert not [name for name in trained if name.startswith("test")]
    assert len(report["skipped"]) == 2


def test_a_mixture_that_is_not_the_sum_is_named(tmp_path, caplog):
    music = musdb(tmp_path / "musdb18hq")
    mixture = music / "train" / "a - A" / "mixture.wav"
    sig, _ = soundfile.read(mixture)
    write(mixture, 1.1 * sig, subtype="FLOAT")
    (music / "train" / "b - B" / "mixture.wav").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        prepare(music, "musdb18hq", tmp_path / "out", sample_rate=RATE)
    said = [m for m in caplog.messages if "mixture.wav" in m]
    # 20 log10(0.1 / 1.1)
    assert any(f"{mixture}: differs" in m and "-21 dB" in m for m in said)
    assert any("b - B" in m and "cannot be read" in m for m in said)
    assert len(said) == 2


def test_groups_and_numbers_of_stems(tmp_path):
    music = musdb(tmp_path / "musdb18hq")
    options = {"stem_groups": {"rhythm": ["BASS", "dr*"]}, "sample_rate": RATE}
    prepare(music, "musdb18hq", tmp_path / "out", max_stems=3, **options)
    row = MappedManifest(tmp_path / "out", "train").row(0)
    assert {name: np.size(files) for name, files in row["tracks"].items()} == {
        "rhythm": 2,
        "other": 1,
        "vocals": 1,
    }
    with pytest.raises(ValueError, match="max_stems"):
        prepare(music, "musdb18hq", tmp_path / "b", max_stems=2, **options)


def test_patterns_that_no_stem_is_like(tmp_path, caplog):
    music = musdb(tmp_path / "musdb18hq")
    groups = {"band": ["bas", "Drums"]}
    with caplog.at_level(logging.WARNING):
        prepare(
            music,
            "musdb18hq",
            tmp_path / "out",
            sample_rate=RATE,
            stem_groups=groups,
        )
    assert caplog.messages == [
        "stem_groups: no stem is like bas; there are bass, drums, other, vocals"
    ]


def test_many_songs_with_odd_stems_are_summed_up(tmp_path, caplog):
    music = musdb(tmp_path / "musdb18hq")
    for i, song in enumerate(sorted(music.glob("*/*"))):
        write(song / "bass.wav", noise(200 + i, seconds=7.0, level=0.05))
        (song / "mixture.wav").unlink()
    with caplog.at_level(logging.WARNING):
        prepare(music, "musdb18hq", tmp_path / "out", sample_rate=RATE)
    assert len(caplog.messages) == 6
    assert caplog.messages[-1] == "stems of 1 more songs differ"


# -------------------------------------------------------- what cannot be used


def damaged(folder):
    """A library with one song of every kind of damage."""
    library_of(folder, songs=6)
    sig = noise(77)
    sig[2000] = np.nan
    write(folder / "nan.wav", sig, subtype="FLOAT")
    sig = noise(76)
    sig[2000] = np.inf
    write(folder / "inf.wav", sig, subtype="FLOAT")
    write(folder / "offset.wav", noise(78) + 0.3)
    write(folder / "clipped.wav", (300 * noise(79)).clip(-1, 1))
    path = write(folder / "cut.flac", noise(80))
    path.write_bytes(path.read_bytes()[:-4000])
    for seed, extension in ((81, "ogg"), (82, "mp3")):
        path = write(folder / f"cut_{extension}.{extension}", noise(seed))
        path.write_bytes(path.read_bytes()[:-4000])
    return folder


KINDS = {
    "nan.wav": "NaN or infinite",
    "inf.wav": "NaN or infinite",
    "offset.wav": "a DC offset of 0.30",
    "clipped.wav": "clipped, .* % of it is at full scale",
    "cut.flac": "truncated",
    "cut_ogg.ogg": r"truncated, \d+ of at least \d+ bytes",
    "cut_mp3.mp3": r"truncated, \d+ of \d+ bytes",
}


def test_a_full_check_finds_what_headers_do_not_show(tmp_path, caplog):
    music = damaged(tmp_path / "music")
    report = catalogue(music, tmp_path / "a")
    assert report["skipped"] == []
    with caplog.at_level(logging.INFO):
        report = catalogue(music, tmp_path / "b", audio_check="full")
    found = {entry["file"]: entry["reason"] for entry in report["skipped"]}
    assert set(found) == {str(music / name) for name in KINDS}
    for name, reason in KINDS.items():
        path = str(music / name)
        assert len([m for m in report["warnings"] if path in m]) == 1
        assert re.search(reason, found[path]), (name, found[path])
    (table,) = [m for m in caplog.messages if "left out" in m]
    assert table.startswith("7 left out")
    assert "    2  NaN or infinite samples after ... s, first" in table
    saved = json.loads((tmp_path / "b" / "data_report.json").read_text())
    assert saved == report
    assert len(songs_in(tmp_path / "b")) == 6


def test_ogg_that_nobody_ended_is_kept_and_named(tmp_path):
    music = library_of(tmp_path / "music")
    for name in ("a.ogg", "b.ogg"):
        path = write(music / name, noise(ord(name[0]), seconds=30.0))
        content = path.read_bytes()
        path.write_bytes(content[: content.rindex(b"OggS")])
    write(music / "whole.ogg", noise(90))
    assert catalogue(music, tmp_path / "a")["warnings"] == []
    # whether the files are decoded now or were before
    for out in ("b", "c"):
        report = catalogue(music, tmp_path / out, audio_check="full")
        assert report["skipped"] == []
        assert report["warnings"] == [
            f"2 Ogg files, {music / 'a.ogg'} first: no end-of-stream page, a "
            "live recording or cut between two pages"
        ]


def test_other_formats_and_links_are_named(tmp_path, caplog):
    music = library_of(tmp_path / "music")
    for name in ("a.m4a", "b.M4A", "c.wma"):
        (music / name).write_bytes(b"x")
    library_of(tmp_path / "beside", songs=1)
    (music / "above").symlink_to(tmp_path, target_is_directory=True)
    (music / "self").symlink_to(music, target_is_directory=True)
    with caplog.at_level(logging.WARNING):
        report = catalogue(music, tmp_path / "out")
    reasons = {x["file"]: x["reason"] for x in report["skipped"]}
    assert reasons == {
        str(music / "a.m4a"): ".m4a is not read",
        str(music / "b.M4A"): ".m4a is not read",
        str(music / "c.wma"): ".wma is not read",
        str(music / "above"): "a link to a folder above",
        str(music / "self"): f"a link to {music}",
    }
    said = [m for m in caplog.messages if "does not read" in m]
    assert len(said) == 2 and said[0].startswith("skipped 2 .m4a files")
    assert len(songs_in(tmp_path / "out")) == 8


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    music = library_of(tmp_path / "music")
    (tmp_path / "file").write_text("no folder")
    report = catalogue(
        music, tmp_path / "out", cache_folder=tmp_path / "file" / "cache"
    )
    assert sum(part["songs"] for part in report["splits"].values()) == 8
    assert any("cache_folder" in m for m in caplog.messages)


def test_a_split_file_without_its_switch(tmp_path):
    music = library_of(tmp_path / "music")
    with pytest.raises(ValueError, match="expected split: from_file"):
        catalogue(music, tmp_path / "out", split_file="split.yaml")


def test_strict_stops_at_the_first(tmp_path):
    music = damaged(tmp_path / "music")
    options = {"audio_check": "full", "strict": True}
    with pytest.raises(ValueError, match=r"strict: .*\.\w+: "):
        catalogue(music, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
    for name in KINDS:
        (music / name).unlink()
    assert catalogue(music, tmp_path / "b", **options)["skipped"] == []


def test_strict_lets_pass_what_the_settings_leave_out(tmp_path):
    music = musdb(tmp_path / "musdb18hq")
    (music / "train" / "d - D").mkdir()
    write(music / "train" / "d - D" / "bass.wav", noise(90, seconds=1.0))
    shutil.copytree(music / "train" / "a - A", music / "train" / "e - E")
    write(music / "extra.wav", noise(91))
    report = prepare(
        music,
        "stems",
        tmp_path / "out",
        sample_rate=RATE,
        strict=True,
        max_stems=4,
        segment_seconds=2.0,
    )
    reasons = sorted(entry["reason"] for entry in report["skipped"])
    assert len(reasons) == 3
    assert reasons[0].startswith("1.000 s is shorter")
    assert reasons[1].startswith("a copy of")
    assert reasons[2] == "not in the folder of a song"


def test_nothing_usable_after_a_full_check(tmp_path):
    for i in range(6):
        sig = (300 * noise(i)).clip(-1, 1)
        write(tmp_path / "music" / f"{i}.wav", sig)
    with pytest.raises(ValueError, match=r"6 files are damaged, .*0\.wav"):
        catalogue(tmp_path / "music", tmp_path / "a", audio_check="full")


def test_reasons_are_counted_by_kind():
    findings = Findings()
    for i in range(3):
        findings.skip(f"/m/{i}.wav", f"a copy of /music/x y {i}.wav", True)
    findings.skip("/m/b.wav", "the file is empty", True)
    assert findings.summary().splitlines() == [
        "4 left out",
        "    3  a copy of ..., first /m/0.wav",
        "    1  the file is empty, first /m/b.wav",
    ]


def test_mixtures_without_anything_to_compare_are_quiet(caplog):
    library.check_mixtures([], Findings())
    assert caplog.messages == []
