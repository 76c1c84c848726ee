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

from trackformer_sb.audio import read_segment
from trackformer_sb.cli import main
from trackformer_sb.data import files as files_module
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
            sig = noise(500 + 9 * i + j, **options)
            write(folder / f"s{i}" / f"{stem}.wav", sig)
    return folder


def write_musdb(folder):
    """Four songs to train on, two of them for validation, and two to test."""
    names = ["a - A", "b - B", "Meaxic - Take A Step", "Leaf - Summerghost"]
    songs = [f"train/{name}" for name in names] + ["test/c - C", "test/d - Ü"]
    stems = "bass", "drums", "other", "vocals", "mixture"
    for i, song in enumerate(songs):
        for j, stem in enumerate(stems):
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
    music = write_songs(tmp_path / "music", 3)
    deep = write(music / "a" / "b" / "deep söng.flac", noise(20))
    write(music / "UPPER.WAV", noise(21))
    (music / "LICENSE.txt").write_text("CC0")
    (music / "._song_0.wav").write_text("macOS leaves these")
    # the same song in another format, a file that is none, a link back
    other = write(music / "song 1.flac", noise(50))
    (music / "a.m4a").write_bytes(b"x")
    (music / "a" / "back").symlink_to(music, target_is_directory=True)
    found = Music(music, "mixtures")
    songs = found.songs()
    names = ["song 0.wav", "song 1.wav", "song 2.wav"]
    assert [song.name for song in songs] == [
        "UPPER.WAV",
        "a/b/deep söng.flac",
        *names,
    ]
    assert songs[1].tracks == {"mixture": (str(deep),)}
    assert songs[1].seconds == 7.0 and not songs[1].has_stems
    assert [x["file"] for x in found.findings.skipped] == [
        f"{music}/a/back",
        str(other),
        f"{music}/a.m4a",
    ]


def test_stems_are_folders_at_any_depth(tmp_path):
    music = write_stems(tmp_path / "music", 2)
    write(music / "album" / "one" / "vocals.wav", noise(20, seconds=9))
    write(music / "album" / "one" / "choir.wav", noise(23))
    mixture = write(music / "album" / "one" / "Mix.wav", noise(21, seconds=60))
    loose = write(music / "preview.wav", noise(22))
    copy = write(music / "s0" / "bass.flac", noise(23))
    found = Music(music, "stems")
    songs = {song.name: song for song in found.songs()}
    assert {name: list(song.tracks) for name, song in songs.items()} == {
        "album/one": ["choir", "vocals"],
        "s0": ["bass", "drums"],
        "s1": ["bass", "drums"],
    }
    assert songs["album/one"].mixture == str(mixture)
    assert songs["album/one"].seconds == 9.0
    assert songs["s0"].tracks["bass"][0].endswith(".wav")
    skipped = [entry["file"] for entry in found.findings.skipped]
    assert skipped == [str(loose), str(copy)]
    # taken for mixtures, the same folder looks odd
    found = Music(music, "mixtures")
    found.songs()
    warning = found.findings.warnings[1]
    assert warning.startswith(f"3 folders in {music} look like songs with")


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


def test_names_of_songs_become_those_of_files(tmp_path):
    music = tmp_path / "meine Müsik"
    long = "/".join(["Composer" * 16, "Orchestra" * 14, "movement" * 12])
    names = ["Пісня", "日本", "a b", "a+b", "A B", long]
    for i, name in enumerate(names):
        write(music / name / "geige ♪.wav", noise(i))
    found = names_in(prepare(music, tmp_path / "jsön", "stems"))
    assert len({name.lower() for name in found}) == 6
    assert max(map(len, found)) == 159
    assert not {x for x in "".join(found) if not x.isascii() or x in " /+"}
    row = MappedManifest(tmp_path / "jsön", "train").row(0)
    path = row["tracks"]["geige ♪"]
    assert read_segment(path, 1, 0.1, RATE).shape == (100,)


def test_songs_of_too_many_stems_are_left_out(tmp_path):
    music = write_stems(tmp_path / "music", 2)
    write(music / "s0" / "vocals.wav", noise(20))
    songs = Music(music, "stems", max_stems=2).songs()
    assert [song.name for song in songs] == ["s1"]


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
    music = write_stems(tmp_path / "stems", 3)
    (music / "s1" / "drums.wav").write_bytes(b"")
    found = Music(music, "stems")
    assert [song.name for song in found.songs()] == ["s0", "s2"]
    assert reasons(vars(found.findings)) == {
        str(music / "s1"): "the file is empty (drums.wav)"
    }


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


def test_nothing_usable(tmp_path):
    folder = write_songs(tmp_path / "music", 3, seconds=2.5)
    (folder / "a.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="no usable songs") as error:
        Music(folder).songs(segment_seconds=3.0)
    short, damaged = str(error.value).splitlines()[1:]
    assert short.endswith(f"segment_seconds=..., first {folder}/song 0.wav")
    assert damaged == f"    1  the file is empty, first {folder}/a.wav"


def test_folders_without_music(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="None is not a folder, expec"):
        Music().songs()
    with pytest.raises(ValueError, match=r"no audio .*empty, expected \.wav"):
        Music(tmp_path / "empty").songs()
    songs = write_songs(tmp_path / "music")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        prepare(songs, tmp_path, test_folder=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"8 of 8 .* `dataset: mixtures`"):
        Music(songs, "stems").songs()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dataset": "musdb"}, "dataset: .* demo, stems, .* got 'musdb'"),
        ({"split": "from_file"}, "split_file: .* got None"),
        ({"split_ratio": (90, 10, 0)}, "split_ratio: expected three positive"),
        ({"max_stems": "4"}, r"max_stems: expected int \| None, got '4'"),
        ({"audio_check": True}, "audio_check: expected str, got True"),
        ({"stem_groups": {"low": "bass"}}, "expected stem_groups of {group: "),
    ],
)
def test_impossible_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        Music("/nowhere", **options)


# --- silence and level -------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"min_active_share": 0.5}, {"min_level_db": -45.0}]
)
def test_silent_segments_are_left_out(tmp_path, options):
    for i in range(8):
        sig = noise(i, seconds=12.0)
        sig[3 * RATE : 9 * RATE] *= 1e-6
        write(tmp_path / "music" / f"song {i}.wav", sig)
    out = tmp_path / "out"
    report = prepare(tmp_path / "music", out, **options)
    train = MappedManifest(out, "train")
    assert {row["start"] for row in train.values()} == {0.0, 9.0}
    # what is tested on stays what it was
    test = MappedManifest(out, "test")
    assert {row["start"] for row in test.values()} == {0.0, 3.0, 6.0, 9.0}
    left = sum(report["splits"][s]["songs"] for s in ("train", "valid"))
    assert report["segments_left_out"] == 2 * left == 12


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
    # one length, silent nearly everywhere, and no copies
    for i in range(2):
        sig = np.zeros(7 * RATE)
        sig[100 + i] = 0.5
        write(music / f"click {i}.wav", sig)
    report = prepare(music, tmp_path / "out")
    assert len(names_in(report)) == 10
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


@given(st.integers(0, 1000), st.integers(1, 200))
def test_a_library_that_grows_keeps_its_split(seed, more):
    """Also in another format, and where macOS takes letters apart."""
    songs = [Song(f"é {i}.wav", {}, False) for i in range(100)]
    before = split_songs(songs, (60, 20, 20), seed)
    names = [unicodedata.normalize("NFD", f"é {i}.flac") for i in range(100)]
    songs = [Song(name, {}, False) for name in names]
    songs += [Song(f"more {i}", {}, True) for i in range(more)]
    after = split_songs(songs, (60, 20, 20), seed)
    for split in SPLITS:
        found = {unicodedata.normalize("NFC", x.title) for x in after[split]}
        assert found >= {song.title for song in before[split]}


def test_too_few_songs(tmp_path):
    music = write_songs(tmp_path / "music", 5)
    with pytest.raises(ValueError, match="at least 2 songs in each split, got"):
        prepare(music, tmp_path / "out")
    tests = write_stems(tmp_path / "tests", 1)
    with pytest.raises(ValueError, match="'test': 1"):
        prepare(music, tmp_path / "out", test_folder=tests)


def test_test_folder_is_the_whole_test_split(tmp_path):
    music = write_songs(tmp_path / "music", 9)
    tests = write_stems(tmp_path / "tests", 3)
    groups = {"band": ["bass", "drums"]}
    report = prepare(
        music, tmp_path / "out", test_folder=tests, stem_groups=groups
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


def test_split_from_a_file(tmp_path):
    # 010 is 8 in yaml, and macOS takes letters apart
    music, apart = tmp_path / "music", unicodedata.normalize("NFD", "é")
    names = ["01", "8", "010", "no", f"{apart} 1", "[live]"]
    names += [f"part {i}" for i in range(4)]
    for i, name in enumerate(names):
        write(music / f"{name}.wav", noise(i))
    file = tmp_path / "split.yaml"
    lists = "train: [01, part*]\nvalid: [010, no]\ntest: ['[live]', é 1.wav]\n"
    file.write_text(lists, encoding="utf-8")
    options = {"split": "from_file", "split_file": file}
    report = prepare(music, tmp_path / "out", **options)
    paths = [report["splits"][split]["song_paths"] for split in SPLITS]
    assert [[Path(x).stem for x in part] for part in paths] == [
        ["01", "part 0", "part 1", "part 2", "part 3"],
        ["010", "no"],
        ["[live]", f"{apart} 1"],
    ]
    assert reasons(report) == {
        str(music / "8.wav"): "in none of train, valid, test"
    }
    # another content of the file is another split
    file.write_text(lists.replace("010", "8"), encoding="utf-8")
    report = prepare(music, tmp_path / "out", **options)
    assert names_in(report, "valid") == {"8", "no"}


@pytest.mark.parametrize(
    ("lists", "match"),
    [
        ({"train": ["song 9"]}, "no song 'song 9' .train."),
        ({"train": ["song 1"], "test": ["song 1"]}, "is in train and in test"),
        ({"training": ["song 1"]}, "lists of songs under train, valid, test"),
    ],
)
def test_wrong_split_files(tmp_path, lists, match):
    music = write_songs(tmp_path / "music")
    file = tmp_path / "split.yaml"
    file.write_text(yaml.safe_dump(lists, sort_keys=False))
    with pytest.raises(ValueError, match=match):
        prepare(music, tmp_path / "out", split="from_file", split_file=file)


# --- run after run -----------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """What is really read: the name of the function -> files."""
    found = {}
    for name in ("audio_info", "measure_levels", "audio_fingerprint"):
        read, found[name] = getattr(files_module, name), []

        def noting(path, read=read, paths=found[name]):
            paths.append(path)
            return read(path)

        monkeypatch.setattr(files_module, name, noting)
    return found


def test_only_new_and_changed_files_are_read_again(tmp_path, reads):
    music = write_songs(tmp_path / "music")
    kept = {"cache_folder": tmp_path / "cache"}
    (music / "broken.wav").write_bytes(b"")
    longer = str(write(music / "longer.wav", noise(30, seconds=8.0)))
    prepare(music, tmp_path / "a", **kept)
    headers, levels, fingerprints = reads.values()
    assert len(headers) == 10
    # only files of one length can be copies
    assert len(fingerprints) == 8 and longer not in fingerprints
    headers.clear()
    fingerprints.clear()
    new = write(music / "new.wav", noise(20))
    changed = write(music / "song 3.wav", noise(21, seconds=9.0))
    # another experiment on the same music; errors are not kept
    report = prepare(music, tmp_path / "b", seed=5, **kept)
    again = new, changed, music / "broken.wav"
    assert sorted(headers) == sorted(map(str, again))
    assert fingerprints == [str(new)]
    assert sum(x["hours"] for x in report["splits"].values()) == pytest.approx(
        (8 * 7 + 8 + 9) / 3600
    )
    # levels are another reading, kept as well
    for out in "cd":
        prepare(music, tmp_path / out, min_active_share=0.5, **kept)
        assert len(levels) == 10
    # a kill while something was read may have cut the last line
    [cache] = (tmp_path / "cache").iterdir()
    cache.write_text(cache.read_text()[:-20])
    prepare(music, tmp_path / "e", min_active_share=0.5, **kept)
    assert len(levels) == 11


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    music = write_songs(tmp_path / "music", 2)
    (tmp_path / "file").write_text("no folder")
    assert len(Music(music, cache_folder=tmp_path / "file" / "x").songs()) == 2
    assert any("cache_folder" in m for m in caplog.messages)


@pytest.mark.parametrize("change", [None, "settings", "new", "other content"])
def test_only_a_change_is_written(tmp_path, change):
    music = write_songs(tmp_path / "music")
    report = prepare(music, tmp_path / "out")
    before = write_times(tmp_path / "out")
    if change == "new":
        write(music / "new.wav", noise(20))
    elif change == "other content":
        write(music / "song 0.wav", noise(21, seconds=13))
    again = prepare(music, tmp_path / "out", seed=int(change == "settings"))
    after = write_times(tmp_path / "out")
    assert set(after) == set(before)
    if change is None:
        assert again == report and after == before
    else:
        assert all(after[name] != before[name] for name in before)


def test_mended_metadata_is_read_again(tmp_path):
    for i in range(8):
        song = tmp_path / "moisesdb" / f"uuid {i}"
        write(song / "bass" / "t.wav", noise(i))
        track = {"id": "t", "extension": "wav"}
        text = json.dumps({"stems": [{"stemName": "bass", "tracks": [track]}]})
        (song / "data.json").write_text(text)
    (song / "data.json").write_text(text[:20])
    out = tmp_path / "out"
    assert len(names_in(prepare(tmp_path, out, "moisesdb"))) == 7
    (song / "data.json").write_text(text)
    assert len(names_in(prepare(tmp_path, out, "moisesdb"))) == 8


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

HEADERS = "{audio_check: header}"


def data(folder, out, *options):
    words = [folder, "--dataset", "stems", "--out", out, *options]
    return main(["data", *map(str, words)])


def test_data_prints_what_a_training_sees(tmp_path, capsys):
    music = write_stems(tmp_path / "music", 8)
    (music / "s3" / "bass.wav").write_bytes(b"")
    # the second time nothing has changed
    for _ in range(2):
        assert data(music, tmp_path / "out") == 0
        printed = capsys.readouterr().out.splitlines()
        words = [line.split()[:2] for line in printed[:4]]
        assert words[0] == ["split", "songs"]
        assert words[1:] == [["train", "3"], ["valid", "2"], ["test", "2"]]
        assert printed[4] == "files    14 of 1000 Hz; 14 of 1 channel(s)"
        assert printed[5] == "stems    bass 7, drums 7"
        assert printed[6:] == [
            "median   0.1 minutes, -26.5 dBFS RMS, 100.0 % with bass, "
            "100.0 % with drums",
            "segments left out 0; files and songs: 1 left out",
            f"    1  the file is empty, first {music / 's3'}",
        ]
    assert data(music, tmp_path / "b", "--music", HEADERS) == 0
    assert "dBFS" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("music", "reason"),
    [
        ("{max_stem: 1}", "unexpected keyword argument 'max_stem'"),
        ("{max_stems: ", "expected the node content"),
    ],
)
def test_data_says_what_is_wrong(tmp_path, capsys, music, reason):
    folder = write_stems(tmp_path / "music", 6)
    assert data(folder, tmp_path / "out", "--music", music) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("trackformer data: ") and reason in said.err


def test_names_that_are_no_utf8(tmp_path):
    music = write_stems(tmp_path / "music")
    (music / os.fsdecode(b"br\xe9k")).mkdir()
    (music / os.fsdecode(b"br\xe9k/b\xe9d.wav")).write_bytes(b"RIFF")
    words = ["data", music, "--dataset", "stems", "--music", HEADERS]
    done = subprocess.run(
        [sys.executable, "-m", "trackformer_sb", *words],
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert b"br\xe9k" in done.stdout and b"Traceback" not in done.stderr
