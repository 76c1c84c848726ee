"""A folder of music: every song once, split by song, oddities reported."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.cli import main
from trackformer_sb.data import files as files_module
from trackformer_sb.data import music as music_module
from trackformer_sb.data.audio import read_segment
from trackformer_sb.data.files import FileCache, file_stat
from trackformer_sb.data.manifest import MappedManifest, read_songs
from trackformer_sb.data.music import SPLITS, Music, split_songs
from trackformer_sb.data.songs import Song

RATE = 1000


def noise(seed, seconds=7.0, level=0.1):
    """Noise: no two seeds are alike."""
    sig = np.random.default_rng(seed).normal(size=round(seconds * RATE))
    return level * sig.clip(-3, 3) / 3


def write(path, sig, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sig, RATE, **options)
    return path


def write_songs(folder, songs=8, **options):
    for i in range(songs):
        write(folder / f"song {i}.wav", noise(i, **options))
    return folder


def write_stems(folder, songs=6, stems=("bass", "drums"), **options):
    for i in range(songs):
        for j, stem in enumerate(stems):
            write(
                folder / f"s{i}" / f"{stem}.wav",
                noise(500 + 9 * i + j, **options),
            )
    return folder


def write_musdb(folder):
    """Four songs to train on, two of them for validation, and two to test."""
    names = ["a - A", "b - B", "Meaxic - Take A Step", "Leaf - Summerghost"]
    songs = [f"train/{name}" for name in names] + ["test/c - C", "test/d - Ü"]
    for i, song in enumerate(songs):
        for j, stem in enumerate(
            ("bass", "drums", "other", "vocals", "mixture")
        ):
            write(folder / song / f"{stem}.wav", noise(1000 + 50 * i + j))
    return folder


def prepare(music, out, dataset="mixtures", segment_seconds=3.0, **options):
    return Music(music, dataset, **options).prepare(out, segment_seconds)


def names_in(report, *splits):
    parts = [
        report["splits"][split]["song_names"] for split in splits or SPLITS
    ]
    return {name for part in parts for name in part}


def reasons(report):
    return {entry["file"]: entry["reason"] for entry in report["skipped"]}


def write_times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# --- what is found -----------------------------------------------------------


def test_mixtures_are_files_at_any_depth(tmp_path):
    music = write_songs(tmp_path / "music", 6)
    deep = write(music / "a" / "b" / "deep söng.flac", noise(20))
    write(music / "UPPER.WAV", noise(21))
    (music / "LICENSE.txt").write_text("CC0")
    (music / "._song_0.wav").write_text("macOS leaves these")
    songs = Music(music, "mixtures").songs()
    assert [song.name for song in songs] == [
        "UPPER.WAV",
        "a/b/deep söng.flac",
        *(f"song {i}.wav" for i in range(6)),
    ]
    assert songs[1] == Song(
        "a/b/deep söng.flac", {"mixture": (str(deep),)}, False, 7.0
    )


def test_stems_are_folders_at_any_depth(tmp_path):
    music = write_stems(tmp_path / "music", 2)
    write(music / "album" / "one" / "vocals.wav", noise(20))
    mixture = write(music / "album" / "one" / "Mix.wav", noise(21, seconds=60))
    loose = write(music / "preview.wav", noise(22))
    copy = write(music / "s0" / "bass.flac", noise(23))
    music = Music(music, "stems")
    songs = {song.name: song for song in music.songs()}
    assert {name: list(song.tracks) for name, song in songs.items()} == {
        "album/one": ["vocals"],
        "s0": ["bass", "drums"],
        "s1": ["bass", "drums"],
    }
    assert songs["album/one"].mixture == str(mixture)
    assert songs["album/one"].seconds == 7.0
    assert songs["s0"].tracks["bass"][0].endswith(".wav")
    skipped = [entry["file"] for entry in music.skipped]
    assert skipped == [str(loose), str(copy)]


def test_rows_are_whole_segments(tmp_path):
    music = write_songs(tmp_path / "music", 6)
    music_every = Music(music, segment_hop_seconds=0.1)
    report = music_every.prepare(tmp_path / "out", 3)
    rows = {
        key: row
        for split in SPLITS
        for key, row in MappedManifest(tmp_path / "out", split).items()
    }
    starts = [row["start"] for row in rows.values() if row["song"] == "song_3"]
    assert starts == [round(i / 10, 1) for i in range(41)]  # 0.0 .. 4.0
    assert rows["song_3_0040"] == {
        "song": "song_3",
        "tracks": {"mixture": str(music / "song 3.wav")},
        "start": 4.0,
        "duration": 3,
        "song_seconds": 7.0,
        "has_stems": False,
    }
    assert sum(report["splits"][s]["segments"] for s in SPLITS) == 6 * 41
    assert sum(report["splits"][s]["hours"] for s in SPLITS) == pytest.approx(
        6 * 7 / 3600
    )


@given(st.lists(st.text(min_size=1), unique=True), st.booleans())
def test_song_names_are_safe_and_unique(paths, has_stems):
    songs = [Song(path, {}, has_stems) for path in paths]
    named = music_module._safe_names({"train": songs, "test": songs})
    names = [name.lower() for _, name, _ in named]
    assert len(set(names)) == 2 * len(paths)
    assert not set("".join(names)) - set(
        "abcdefghijklmnopqrstuvwxyz0123456789_.-"
    )


def test_names_of_songs_become_those_of_files(tmp_path):
    music = tmp_path / "meine Müsik"
    long = "/".join(["Composer" * 16, "Orchestra" * 14, "movement" * 12])
    names = ["Пісня", "日本", "a b", "a+b", "A B", long]
    for i, name in enumerate(names):
        write(music / name / "geige ♪.wav", noise(i))
    report = prepare(music, tmp_path / "jsön", "stems")
    assert len(names_in(report)) == 6
    assert max(map(len, names_in(report))) == 159
    for split in SPLITS:
        for row in MappedManifest(tmp_path / "jsön", split).values():
            path = row["tracks"]["geige ♪"]
            assert read_segment(path, 1, 0.1, RATE).shape == (100,)


def test_links_are_followed_without_loops(tmp_path):
    music = write_songs(tmp_path / "music", 2)
    elsewhere = write_songs(tmp_path / "elsewhere", 1)
    (music / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(music, target_is_directory=True)
    (music / "above").symlink_to(tmp_path, target_is_directory=True)
    music = Music(music)
    assert [song.name for song in music.songs()] == [
        "linked/song 0.wav",
        "song 0.wav",
        "song 1.wav",
    ]
    assert [entry["reason"][:9] for entry in music.skipped] == ["a link to"] * 2


def test_a_song_in_two_formats_side_by_side_is_one(tmp_path):
    music = write_songs(tmp_path / "music", 2)
    for path in sorted(music.glob("*.wav")):
        write(path.with_suffix(".flac"), 0.9 * noise(50))
    music = Music(music)
    assert [song.name for song in music.songs()] == ["song 0.wav", "song 1.wav"]
    assert all("the same song as" in x["reason"] for x in music.skipped)


def test_other_formats_are_named_once(tmp_path):
    music = write_songs(tmp_path / "music", 2)
    for name in ("a.m4a", "b.M4A", "c.wma"):
        (music / name).write_bytes(b"x")
    music = Music(music)
    assert len(music.songs()) == 2
    assert len(music.skipped) == 3
    assert [text.partition(", convert")[0] for text in music.warnings] == [
        f"skipped 2 files, {music.folder}/a.m4a first: .m4a is not read",
        f"skipped {music.folder}/c.wma: .wma is not read",
    ]


def test_stems_given_as_mixtures_are_warned_of(tmp_path):
    music = Music(write_stems(tmp_path / "music", 2), "mixtures")
    assert len(music.songs()) == 4
    (warning,) = music.warnings
    assert warning.startswith(f"2 folders in {music.folder} look like songs")


def test_real_demo_band(tmp_path):
    music = Music(
        dataset="demo", demo_songs=6, demo_seconds=4.0, sample_rate=8000
    )
    report = music.prepare(tmp_path)
    assert report["stems"] == dict.fromkeys(
        ("bass", "chords", "drums", "lead"), 6
    )
    assert report["skipped"] == report["warnings"] == []
    assert [report["splits"][split]["songs"] for split in SPLITS] == [2, 2, 2]
    before = write_times(tmp_path)
    assert music.prepare(tmp_path) == report
    assert write_times(tmp_path) == before


def test_groups_and_numbers_of_stems(tmp_path):
    folder = write_musdb(tmp_path / "musdb18hq")
    options = {"stem_groups": {"rhythm": ["BASS", "dr*"], "keys": ["piano"]}}
    music = Music(folder, "musdb18hq", max_stems=3, **options)
    tracks = music.songs()[0].tracks
    assert {name: len(files) for name, files in tracks.items()} == {
        "rhythm": 2,
        "other": 1,
        "vocals": 1,
    }
    assert music.warnings == [
        "stem_groups: no stem is like those of keys; there are bass, drums, "
        "other, vocals"
    ]
    with pytest.raises(ValueError, match=r"all 6 songs .* max_stems=2"):
        Music(folder, "musdb18hq", max_stems=2, **options).songs()


# --- what is left out --------------------------------------------------------


def test_damaged_files_are_named_and_left_out(tmp_path):
    music = write_songs(tmp_path / "music")
    (music / "a.mp3").write_bytes(b"")
    (music / "b.mp3").write_text("these are no samples")
    (music / "c.wav").symlink_to(music / "nowhere")
    report = prepare(music, tmp_path / "out")
    found = reasons(report)
    assert len(names_in(report)) == 8
    for name, reason in (
        ("a.mp3", "the file is empty"),
        ("b.mp3", "ormat not recogni"),
        ("c.wav", "No such file"),
    ):
        path = str(music / name)
        assert reason in found[path]
        assert len([m for m in report["warnings"] if path in m]) == 1


def test_a_song_with_a_damaged_stem_is_left_out(tmp_path):
    music = Music(write_stems(tmp_path / "music", 3), "stems")
    (music.folder / "s1" / "drums.wav").write_bytes(b"")
    assert [song.name for song in music.songs()] == ["s0", "s2"]
    assert music.skipped == [
        {
            "file": str(music.folder / "s1"),
            "reason": "the file is empty (drums.wav)",
        }
    ]


def test_a_full_check_finds_what_headers_do_not_show(tmp_path):
    music = write_songs(tmp_path / "music")
    sig = noise(77)
    sig[2000] = np.nan
    write(music / "nan.wav", sig, subtype="FLOAT")
    path = write(music / "cut.flac", noise(80))
    path.write_bytes(path.read_bytes()[:-4000])
    assert prepare(music, tmp_path / "a")["skipped"] == []
    report = prepare(music, tmp_path / "b", audio_check="full")
    found = reasons(report)
    assert "NaN" in found.pop(str(music / "nan.wav"))
    assert "truncated" in found.pop(str(path))
    assert found == {}
    saved = (tmp_path / "b" / "data_report.json").read_text()
    assert json.loads(saved) == report
    with pytest.raises(ValueError, match=r"strict: .*: truncated"):
        prepare(music, tmp_path / "c", audio_check="full", strict=True)
    assert not (tmp_path / "c").exists()


def test_strict_lets_pass_what_the_settings_leave_out(tmp_path):
    music = write_stems(tmp_path / "music", 8)
    write(music / "short" / "bass.wav", noise(900, seconds=1.0))
    shutil.copytree(music / "s0", music / "copy")
    write(music / "loose.wav", noise(901))
    report = prepare(music, tmp_path / "out", "stems", strict=True)
    assert len(names_in(report)) == 8
    assert len(report["skipped"]) == 3


def test_stems_of_different_kinds(tmp_path):
    music = write_stems(tmp_path / "music", 3)
    write(music / "s2" / "vocals.wav", noise(900, seconds=9.5))
    music = Music(music, "stems")
    assert [song.seconds for song in music.songs()] == [7.0, 7.0, 9.5]
    assert music.warnings == [
        "stems of 1 songs differ in length, rate or channels, s2 first"
    ]


def test_nothing_usable(tmp_path):
    folder = write_songs(tmp_path / "music", 3, seconds=2.5)
    (folder / "a.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="no usable songs") as error:
        Music(folder).songs(segment_seconds=3.0)
    short, damaged = str(error.value).splitlines()[1:]
    assert short.endswith(f"segment_seconds=..., first {folder}/song 0.wav")
    assert damaged == f"    1  the file is empty, first {folder}/a.wav"


@pytest.mark.parametrize("folder", [None, "nowhere", "file.wav"])
def test_missing_folder(tmp_path, folder):
    music = write_songs(tmp_path / "music", 2)
    write(tmp_path / "file.wav", noise(0))
    folder = folder and tmp_path / folder
    with pytest.raises(
        FileNotFoundError, match=f"folder={folder} is not a fol"
    ):
        Music(folder).songs()
    if folder:
        with pytest.raises(FileNotFoundError, match=r"test_folder=.* is not"):
            Music(music, test_folder=folder).split()


def test_folder_of_other_music(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("CC0")
    with pytest.raises(ValueError, match=r"no audio files under .* \.wav"):
        Music(tmp_path).songs()
    music = write_songs(tmp_path / "music", 6)
    with pytest.raises(ValueError, match=r"6 of 6 .* `dataset: mixtures`"):
        Music(music, "stems").songs()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dataset": "musdb"}, "dataset: .* demo, stems, .* got 'musdb'"),
        ({"test_dataset": "demo"}, "test_dataset: expected one of stems"),
        ({"split": "random"}, "split: expected one of auto, by_song"),
        ({"split": "from_file"}, "split_file: None"),
        ({"split_file": "split.yaml"}, "expected split: from_file"),
        ({"split_ratio": (90, 10)}, "split_ratio: expected three positive"),
        ({"split_ratio": (90, 10, 0)}, "split_ratio: expected three positive"),
        ({"audio_check": "all"}, "audio_check: expected one of header, full"),
        ({"min_active_share": 1.5}, "min_active_share: .* 0 to 1, got 1.5"),
        ({"min_level_db": 3}, "min_level_db: expected dBFS, at most 0, or nul"),
        ({"min_level_db": "soft"}, "min_level_db: .* got 'soft'"),
        ({"max_stems": 0}, "max_stems"),
        ({"stem_groups": ["bass"]}, "stem_groups"),
    ],
)
def test_impossible_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        Music("/nowhere", **options)


def test_impossible_lengths(tmp_path):
    with pytest.raises(ValueError, match=r"segment_seconds: .* got 0"):
        Music("/nowhere").prepare(tmp_path, 0)
    with pytest.raises(ValueError, match=r"segment_hop_seconds: .* got -1"):
        Music("/nowhere", segment_hop_seconds=-1).prepare(tmp_path)


# --- silence and level -------------------------------------------------------


def test_silent_segments_are_left_out(tmp_path):
    for i in range(8):
        sig = noise(i, seconds=12.0)
        sig[3 * RATE : 9 * RATE] *= 1e-6
        write(tmp_path / "music" / f"song {i}.wav", sig)
    out = tmp_path / "out"
    report = prepare(tmp_path / "music", out, min_active_share=0.5)
    train = MappedManifest(out, "train")
    assert {row["start"] for row in train.values()} == {0.0, 9.0}
    # what is tested on stays what it was
    test = MappedManifest(out, "test")
    assert {row["start"] for row in test.values()} == {0.0, 3.0, 6.0, 9.0}
    left = sum(report["splits"][s]["songs"] for s in ("train", "valid"))
    assert report["segments_left_out"] == 2 * left == 12


def test_soft_songs_are_left_out(tmp_path):
    music = write_songs(tmp_path / "music", 20)
    for i in range(20):
        write(music / f"soft {i}.wav", noise(50 + i, level=0.001))
    ratio = (40, 30, 30)
    what = music, tmp_path / "out", "mixtures", 3.0
    report = prepare(*what, min_level_db=-45.0, split_ratio=ratio)
    trained = names_in(report, "train", "valid")
    assert trained and not [name for name in trained if "soft" in name]
    with pytest.raises(ValueError, match="'train': 0"):
        prepare(*what, min_level_db=-3.0, split_ratio=ratio)


# --- the same music twice ----------------------------------------------------


def test_copies_are_left_out_whatever_their_names_and_tags(tmp_path):
    music = write_songs(tmp_path / "music")
    (music / "a").mkdir()
    shutil.copy(music / "song 3.wav", music / "a" / "Überall.wav")
    (music / "link.wav").symlink_to(music / "song 4.wav")
    # lossless: the same samples in other bytes
    sig, _ = soundfile.read(music / "song 5.wav", dtype="int16")
    with soundfile.SoundFile(music / "0.flac", "w", RATE, 1) as file:
        file.title = "a title of its own"
        file.write(sig)
    report = prepare(music, tmp_path / "out")
    assert len(names_in(report)) == 8
    pairs = {
        frozenset({file, reason.removeprefix("a copy of ")})
        for file, reason in reasons(report).items()
    }
    assert pairs == {
        frozenset({str(music / a), str(music / b)})
        for a, b in (
            ("song 3.wav", "a/Überall.wav"),
            ("song 4.wav", "link.wav"),
            ("song 5.wav", "0.flac"),
        )
    }


def test_a_copy_does_not_take_the_place_of_a_test_song(tmp_path):
    music = write_songs(tmp_path / "music", 20)
    before = prepare(music, tmp_path / "out")["splits"]
    for path in sorted(music.iterdir()):
        shutil.copy(path, music / f"copy of {path.name}")
    report = prepare(music, tmp_path / "out")
    test = {name[-7:] for name in names_in(report, "test")}
    assert test >= {name[-7:] for name in before["test"]["song_names"]}
    assert len(names_in(report)) == 20


def test_silent_songs_of_one_length_are_no_copies(tmp_path):
    music = write_songs(tmp_path / "music")
    for i in range(2):
        sig = np.zeros(7 * RATE)
        sig[100 + i] = 0.5
        write(music / f"click {i}.wav", sig)
    assert prepare(music, tmp_path / "out")["skipped"] == []


def test_only_files_that_could_be_copies_are_fingerprinted(
    tmp_path, monkeypatch
):
    music = write_songs(tmp_path / "music", 4)
    for i in range(4):
        write(music / f"own length {i}.wav", noise(20 + i, seconds=8 + i))
    read = []
    fingerprint = files_module.audio_fingerprint

    def noting(path):
        read.append(path)
        return fingerprint(path)

    monkeypatch.setattr(files_module, "audio_fingerprint", noting)
    for out in "ab":
        prepare(music, tmp_path / out)
        assert sorted(read) == sorted(map(str, music.glob("song*.wav")))


@pytest.mark.parametrize("shared", ["mixture.wav", "bass.wav"])
def test_no_file_of_a_test_song_is_trained_on(tmp_path, shared):
    tests = write_musdb(tmp_path / "tests") / "test"
    music = write_songs(tmp_path / "music")
    shutil.copy(tests / "c - C" / shared, music / "x.wav")
    (music / "y.wav").symlink_to(tests / "d - Ü" / shared)
    report = prepare(music, tmp_path / "out", test_folder=tests)
    reason = f"it has music of the held-out song {tests}"
    assert reasons(report) == {
        str(music / "x.wav"): f"{reason}/c - C",
        str(music / "y.wav"): f"{reason}/d - Ü",
    }


def test_songs_that_share_a_file_are_kept_apart(tmp_path):
    """Remixes: two songs of one folder with the same drums."""
    for i in range(24):
        song = tmp_path / "music" / f"s{i:02d}"
        write(song / "drums.wav", noise(i // 2))
        write(song / "rest.wav", noise(100 + i))
        # which many songs have, and which is no music
        write(song / "vocals.wav", np.zeros(7 * RATE))
    ratio = (50, 20, 30)
    report = prepare(
        tmp_path / "music", tmp_path / "out", "stems", split_ratio=ratio
    )
    drums = {
        split: {int(name[1:]) // 2 for name in names_in(report, split)}
        for split in SPLITS
    }
    assert drums["train"].isdisjoint(drums["valid"] | drums["test"])
    assert drums["valid"].isdisjoint(drums["test"])
    assert len(names_in(report)) + len(report["skipped"]) == 24
    assert report["skipped"]
    for entry in report["skipped"]:
        assert "it has music of the held-out song" in entry["reason"]


# --- the split ---------------------------------------------------------------


@given(
    st.integers(6, 80),
    st.integers(0, 2**32),
    st.tuples(*[st.integers(1, 100)] * 3),
    st.randoms(use_true_random=False),
)
def test_split_is_by_song(num_songs, seed, split_ratio, random):
    songs = [Song(f"{i:02d}", {}, True) for i in range(num_songs)]
    splits = split_songs(songs, split_ratio, seed)
    names = [song.name for split in SPLITS for song in splits[split]]
    assert sorted(names) == [song.name for song in songs]
    assert min(map(len, splits.values())) >= 2
    random.shuffle(songs)
    assert split_songs(songs, split_ratio, seed) == splits


def test_split_is_by_shares_and_seed():
    songs = [Song(f"{i:04d}", {}, True) for i in range(4000)]
    tests = set()
    for seed in range(3):
        splits = split_songs(songs, (70, 10, 20), seed)
        sizes = [len(splits[split]) / 4000 for split in SPLITS]
        assert sizes == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
        tests.add(tuple(song.name for song in splits["test"]))
    assert len(tests) == 3


@given(st.integers(0, 1000), st.integers(1, 200))
def test_a_library_that_grows_keeps_its_split(seed, more):
    """But for songs that fill up a split of fewer than two."""
    songs = [Song(f"{i}", {}, True) for i in range(100)]
    before = split_songs(songs, (60, 20, 20), seed)
    songs += [Song(f"more {i}", {}, True) for i in range(more)]
    after = split_songs(songs, (60, 20, 20), seed)
    for split in SPLITS:
        names = {song.name for song in after[split]}
        assert names >= {song.name for song in before[split]}


def test_a_song_in_another_format_or_alphabet_keeps_its_split():
    names = [f"é {i}" for i in range(50)]
    songs, others = (
        [Song(form(name), {}, False) for name in names]
        for form in (
            lambda name: f"{name}.wav",
            lambda name: unicodedata.normalize("NFD", f"{name}.flac"),
        )
    )
    first, second = (split_songs(x, (60, 20, 20), 0) for x in (songs, others))
    for split in SPLITS:
        found = {unicodedata.normalize("NFC", x.name) for x in second[split]}
        wanted = {song.name.replace("wav", "flac") for song in first[split]}
        assert found == wanted


def test_nothing_depends_on_the_file_system(tmp_path, monkeypatch):
    music = write_stems(tmp_path / "music", 9)
    prepare(music, tmp_path / "out", "stems")
    walk = os.walk

    def reversed_walk(*args, **options):
        for parent, folders, files in walk(*args, **options):
            folders.sort(reverse=True)
            yield parent, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    prepare(music, tmp_path / "again", "stems")
    names = set(write_times(tmp_path / "out"))
    assert len(names) == 7
    for name in names:
        again = (tmp_path / "again" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == again


def test_too_few_songs(tmp_path):
    music = write_songs(tmp_path / "music", 5)
    with pytest.raises(ValueError, match="at least 2 songs in each split, got"):
        Music(music).split()
    tests = write_stems(tmp_path / "tests", 1)
    with pytest.raises(ValueError, match="'test': 1"):
        Music(music, test_folder=tests).split()


def test_test_folder_is_the_whole_test_split(tmp_path):
    music = write_songs(tmp_path / "music", 9)
    tests = write_stems(tmp_path / "tests", 3)
    report = prepare(
        music,
        tmp_path / "out",
        test_folder=tests,
        stem_groups={"band": ["bass", "drums"]},
    )
    assert len(names_in(report, "train", "valid")) == 9
    assert names_in(report, "test") == {"s0", "s1", "s2"}
    assert report["stems"] == {"band": 3}
    assert report["settings"]["test_folder"] == str(tests)


def test_a_dataset_with_splits_of_its_own(tmp_path):
    music = write_musdb(tmp_path / "musdb18hq")
    report = prepare(music, tmp_path / "a", "musdb18hq")
    assert report["warnings"] == []
    names = [report["splits"][split]["song_names"] for split in SPLITS]
    assert names == [
        ["train_a_-_A", "train_b_-_B"],
        ["train_Leaf_-_Summerghost", "train_Meaxic_-_Take_A_Step"],
        ["test_c_-_C", "test_d_-__"],
    ]
    by_song = prepare(music, tmp_path / "b", "musdb18hq", split="by_song")
    assert names_in(by_song) == names_in(report)
    assert by_song["splits"] != report["splits"]
    # its own test songs are not trained on where another folder is for tests
    tests = write_songs(tmp_path / "tests", 2)
    what = {"test_folder": tests, "test_dataset": "mixtures"}
    other = prepare(music, tmp_path / "c", "musdb18hq", **what)
    assert names_in(other, "train", "valid") == {*names[0], *names[1]}
    assert names_in(other, "test") == {"song_0", "song_1"}


def write_split(path, **lists):
    path.write_text(yaml.safe_dump(lists), encoding="utf-8")
    return {"split": "from_file", "split_file": path}


def test_split_from_a_file(tmp_path):
    music = write_songs(tmp_path / "music")
    file = tmp_path / "split.yaml"
    split = write_split(
        file,
        train=["song 0", "song 1.wav", "song [23]"],
        valid=["song 4", "song 5"],
        test=["song 6.wav", "song 7"],
    )
    report = prepare(music, tmp_path / "out", **split)
    assert [report["splits"][s]["song_names"] for s in SPLITS] == [
        ["song_0", "song_1", "song_2", "song_3"],
        ["song_4", "song_5"],
        ["song_6", "song_7"],
    ]
    # another content of the file is another split
    write_split(
        file,
        train=["song 0", "song 1"],
        valid=["song [23]"],
        test=["song [67]"],
    )
    report = prepare(music, tmp_path / "out", **split)
    assert names_in(report, "valid") == {"song_2", "song_3"}
    left_out = {str(music / f"song {i}.wav") for i in (4, 5)}
    assert reasons(report).keys() == left_out


def test_names_in_a_split_file_are_as_they_are_written(tmp_path):
    # 010 is 8 in yaml, and macOS takes letters apart
    music, apart = tmp_path / "music", unicodedata.normalize("NFD", "é")
    names = ["01", "2", "8", "010", "no", "2024-05-01", f"{apart} 1", "[live]"]
    for i, name in enumerate(names):
        write(music / f"{name}.wav", noise(i))
    file = tmp_path / "split.yaml"
    file.write_text(
        "train: [01, 2]\nvalid: [010, no, '[live]']\ntest: [2024-05-01, é 1]",
        encoding="utf-8",
    )
    splits = Music(music, split="from_file", split_file=file).split()
    assert [[song.name[:-4] for song in splits[s]] for s in SPLITS] == [
        ["01", "2"],
        ["010", "[live]", "no"],
        ["2024-05-01", f"{apart} 1"],
    ]


@pytest.mark.parametrize(
    ("lists", "match"),
    [
        ({"train": ["song 9"]}, "no song 'song 9' .train."),
        ({"train": ["song 1"], "test": ["song 1"]}, "is in test and in train"),
        ({"training": ["song 1"]}, "lists of songs under train, valid, test"),
        ({"train": "song 1"}, "lists of songs"),
        ({"train": ["song 1"]}, "'train': 1"),
    ],
)
def test_wrong_split_files(tmp_path, lists, match):
    music = write_songs(tmp_path / "music")
    split = write_split(tmp_path / "split.yaml", **lists)
    with pytest.raises(ValueError, match=match):
        Music(music, **split).split()


# --- run after run -----------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The files whose header or content is really read."""
    found = []
    for name in ("audio_info", "measure_levels"):
        read = getattr(files_module, name)

        def noting(path, read=read):
            found.append(path)
            return read(path)

        monkeypatch.setattr(files_module, name, noting)
    return found


def test_only_new_and_changed_files_are_read_again(tmp_path, reads):
    music = write_songs(tmp_path / "music")
    (music / "broken.wav").write_bytes(b"")
    prepare(music, tmp_path / "a")
    assert len(reads) == 9
    reads.clear()
    new = write(music / "new.wav", noise(20))
    changed = write(music / "song 3.wav", noise(21, seconds=9.0))
    # another experiment on the same music; errors are not kept
    report = prepare(music, tmp_path / "b", seed=5)
    assert sorted(reads) == sorted(
        map(str, (new, changed, music / "broken.wav"))
    )
    assert sum(x["hours"] for x in report["splits"].values()) == pytest.approx(
        (8 * 7 + 9) / 3600
    )
    (music / "broken.wav").unlink()
    for out in "cd":
        # levels are another reading, kept as well
        reads.clear()
        prepare(music, tmp_path / out, min_active_share=0.5)
        assert len(reads) == (9 if out == "c" else 0)


def test_a_stopped_reading_goes_on(tmp_path, monkeypatch, reads):
    music = write_songs(tmp_path / "music")
    listing = {str(path): file_stat(path) for path in sorted(music.iterdir())}
    read = files_module.audio_info

    def stops(path):
        if "song 5" in path:
            raise KeyboardInterrupt
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "audio_info", stops)
        patch.setattr(files_module, "THREADS", 1)
        with pytest.raises(KeyboardInterrupt):
            FileCache(music, listing, tmp_path).headers(listing)
    # a kill may cut the last line
    path = FileCache(music, listing, tmp_path).path
    text = path.read_text()
    assert len(text.splitlines()) == 5
    path.write_text(text[:-20])
    reads.clear()
    found = FileCache(music, listing, tmp_path).headers(listing)
    assert [path[-5] for path in reads] == ["4", "5", "6", "7"]
    assert {info.duration for info in found.values()} == {7.0}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    music = write_songs(tmp_path / "music", 2)
    (tmp_path / "file").write_text("no folder")
    assert len(Music(music, cache_folder=tmp_path / "file" / "x").songs()) == 2
    assert any("cache_folder" in m for m in caplog.messages)


def test_same_settings_and_music_write_nothing(tmp_path):
    music = write_songs(tmp_path / "music")
    report = prepare(music, tmp_path / "out")
    before = write_times(tmp_path / "out")
    assert prepare(music, tmp_path / "out") == report
    assert write_times(tmp_path / "out") == before


@pytest.mark.parametrize("change", ["settings", "new file", "new content"])
def test_any_change_is_seen(tmp_path, change):
    music = write_songs(tmp_path / "music")
    prepare(music, tmp_path / "out")
    before = write_times(tmp_path / "out")
    if change == "new file":
        write(music / "new.wav", noise(20))
    elif change == "new content":
        write(music / "song 0.wav", noise(21, seconds=13))
    prepare(music, tmp_path / "out", seed=int(change == "settings"))
    after = write_times(tmp_path / "out")
    assert set(after) == set(before)
    assert all(after[name] != before[name] for name in before)


def test_mended_metadata_is_read_again(tmp_path):
    music = tmp_path / "MoisesDB" / "moisesdb_v0.1"
    for i in range(8):
        tracks = [{"id": "t", "extension": "wav"}]
        stems = [{"stemName": x, "tracks": tracks} for x in ("bass", "vocals")]
        for j, stem in enumerate(("bass", "vocals")):
            write(music / f"uuid {i}" / stem / "t.wav", noise(10 * i + j))
        path = music / f"uuid {i}" / "data.json"
        path.write_text(json.dumps({"stems": stems}))
    text = path.read_text()
    path.write_text(text[:20])
    out = tmp_path / "out"
    assert len(names_in(prepare(music.parent, out, "moisesdb"))) == 7
    path.write_text(text)
    assert len(names_in(prepare(music.parent, out, "moisesdb"))) == 8


def test_killed_while_writing_leaves_no_valid_report(tmp_path, monkeypatch):
    """Old settings must not accept a mixture of old and new manifests."""
    music = write_songs(tmp_path / "music", 12)
    out = tmp_path / "out"
    prepare(music, out, seed=0)
    expected = [read_songs(out, split) for split in SPLITS]
    replace = os.replace

    def killed_at_valid(source, target):
        if Path(target).name == "valid.npy":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_valid)
        with pytest.raises(KeyboardInterrupt):
            prepare(music, out, seed=3)
    prepare(music, out, seed=0)
    assert [read_songs(out, split) for split in SPLITS] == expected


# --- trackformer data --------------------------------------------------------


def data(folder, out, *options):
    words = [folder, "--dataset", "stems", "--out", out, *options]
    return main(["data", *map(str, words)])


def test_data_prints_and_draws(tmp_path, capsys):
    music = write_stems(tmp_path / "music", 8)
    (music / "s3" / "bass.wav").write_bytes(b"")
    # the second time nothing has changed
    for _ in range(2):
        assert data(music, tmp_path / "out") == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in printed[:4]] == [
            ["split", "songs"],
            ["train", "3"],
            ["valid", "2"],
            ["test", "2"],
        ]
        assert printed[4] == "files    14 of 1000 Hz; 14 of 1 channel(s)"
        assert printed[5] == "stems    bass 7, drums 7"
        assert printed[6:8] == [
            "segments left out 0; files and songs: 1 left out",
            f"    1  the file is empty, first {music / 's3'}",
        ]
        figures = [Path(line.split()[-1]) for line in printed[8:]]
        assert [path.stem for path in figures] == [
            "durations",
            "levels",
            "activity",
        ]
        assert all(path.read_bytes()[:4] == b"\x89PNG" for path in figures)
    assert data(music, tmp_path / "b", "--headers_only") == 0
    assert "levels.png" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max_stems", "1"], "more than max_stems=1"),
        (["--split_ratio", "1", "1", "0"], "three positive numbers"),
        (["--strict"], "the file is empty"),
        (["--split", "from_file", "--split_file", "/no"], "No such file"),
    ],
)
def test_data_says_what_is_wrong(tmp_path, capsys, options, reason):
    music = write_stems(tmp_path / "music", 6)
    (music / "s3" / "bass.wav").write_bytes(b"")
    assert data(music, tmp_path / "out", *options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("trackformer data: ") and reason in said.err


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
