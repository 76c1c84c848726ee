"""Manifests: every song found once, split by song, oddities reported."""

import logging
import os
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from trackformer_sb.data.audio import read_segment
from trackformer_sb.data.catalogue import prepare
from trackformer_sb.data.manifest import MappedManifest
from trackformer_sb.data.songs import Song, name_songs
from trackformer_sb.data.splits import SPLITS, split_songs

REAL_MUSIC = Path(__file__).parents[2] / "shared" / "data"
RATE = 100  # the shortest files that are still seconds long
MANIFEST_FILES = {"data_report.json"} | {
    f"{split}.{ending}" for split in SPLITS for ending in ("jsonl", "npy")
}


def write(path, seconds=7.0, level=0.5, sample_rate=RATE, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (round(seconds * sample_rate), channels)
    soundfile.write(path, np.full(shape, level), sample_rate)
    return path


def write_mixtures(folder, num_songs=10, **options):
    for i in range(num_songs):
        write(folder / f"song_{i}.wav", level=i / 64, **options)
    return folder


def write_stems(folder, num_songs=6, stems=("bass", "drums"), **options):
    for i in range(num_songs):
        for stem in stems:
            # equal files would be one song
            path = folder / f"song_{i}" / f"{stem}.wav"
            write(path, level=(i + 0.5) / 64, **options)
    return folder


def read_manifests(folder):
    return {split: dict(MappedManifest(folder, split)) for split in SPLITS}


def songs_of(manifest):
    return {row["song"] for row in manifest.values()}


def all_rows(folder):
    manifests = read_manifests(folder).values()
    return {key: row for part in manifests for key, row in part.items()}


# ----------------------------------------------------------- what is found


def test_mixtures_are_files_at_any_depth(tmp_path):
    music = write_mixtures(tmp_path / "music", 8)
    deep = write(music / "a" / "b" / "deep song.flac")
    upper = write(music / "UPPER.WAV", level=0.9)
    (music / "LICENSE.txt").write_text("CC0")
    (music / "._song_0.wav").write_text("macOS leaves these")
    report = prepare(music, "mixtures", tmp_path / "json")
    rows = all_rows(tmp_path / "json")
    tracks = {row["song"]: row["tracks"] for row in rows.values()}
    assert len(tracks) == 10
    assert tracks["a_b_deep_song"] == {"mixture": str(deep)}
    assert tracks["UPPER"] == {"mixture": str(upper)}
    assert not any(row["has_stems"] for row in rows.values())
    assert report["skipped"] == []


def test_stems_are_folders_at_any_depth(tmp_path):
    music = write_stems(tmp_path / "music")
    write(music / "album" / "song" / "vocals.wav")
    write(music / "album" / "song" / "mixture.wav", seconds=60)
    write(music / "song_3" / "Mix.flac", level=7 / 64)
    (music / "song_0" / "LICENSE.txt").write_text("CC0")
    report = prepare(music, "stems", tmp_path / "json")
    rows = all_rows(tmp_path / "json")
    tracks = {row["song"]: sorted(row["tracks"]) for row in rows.values()}
    assert tracks.pop("album_song") == ["vocals"]
    assert tracks == {f"song_{i}": ["bass", "drums"] for i in range(6)}
    assert all(row["has_stems"] for row in rows.values())
    assert report["skipped"] == report["warnings"] == []


def test_rows_are_whole_segments(tmp_path):
    music = write_mixtures(tmp_path / "music", 6, seconds=7)
    report = prepare(
        music,
        "mixtures",
        tmp_path / "json",
        segment_seconds=3,
        segment_hop_seconds=0.1,
    )
    rows = all_rows(tmp_path / "json")
    starts = [r["start"] for r in rows.values() if r["song"] == "song_3"]
    assert starts == [round(i / 10, 1) for i in range(41)]  # 0.0 .. 4.0
    assert rows["song_3_0040"] == {
        "song": "song_3",
        "tracks": {"mixture": str(music / "song_3.wav")},
        "start": 4.0,
        "duration": 3,
        "song_seconds": 7.0,
        "has_stems": False,
    }
    assert sum(report["splits"][s]["segments"] for s in SPLITS) == 6 * 41
    hours = sum(report["splits"][s]["hours"] for s in SPLITS)
    assert hours == pytest.approx(6 * 7 / 3600)


def test_segment_ids_of_all_splits_differ(tmp_path):
    music = tmp_path / "music"
    names = ("a", "a_0000", "a 0000", "a/0000", "A", "b")
    for i, name in enumerate(names):
        write(music / f"{name}.wav", level=i / 8)
    prepare(music, "mixtures", tmp_path / "json")
    manifests = read_manifests(tmp_path / "json").values()
    assert len(all_rows(tmp_path / "json")) == sum(map(len, manifests)) == 12


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(min_size=1), unique=True), st.booleans())
def test_song_names_are_safe_and_unique(paths, has_stems):
    songs = [Song(path, {}, has_stems) for path in paths]
    named = name_songs({"data_folder": songs, "test_folder": songs})
    names = [song.name.lower() for part in named.values() for song in part]
    assert len(set(names)) == 2 * len(paths)
    assert not set("".join(names)) - set(
        "abcdefghijklmnopqrstuvwxyz0123456789_.-"
    )


def test_non_ascii_names_and_spaces(tmp_path):
    music = tmp_path / "meine Müsik"
    names = ["Пісня", "Канон", "日本", "a b", "a+b", "ü ö"]
    for i, name in enumerate(names):
        write(music / name / "geige ♪.wav", level=i / 8)
    prepare(music, "stems", tmp_path / "jsön")
    rows = all_rows(tmp_path / "jsön")
    paths = {row["tracks"]["geige ♪"] for row in rows.values()}
    assert paths == {str(music / name / "geige ♪.wav") for name in names}
    assert len({row["song"] for row in rows.values()}) == len(names)
    for path in paths:
        assert read_segment(path, 1, 0.1, RATE).shape == (10,)


def test_symlink_loop_ends(tmp_path):
    music = write_mixtures(tmp_path / "music", 6)
    (music / "loop").symlink_to(music, target_is_directory=True)
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "song_0.wav", level=0.9)
    (elsewhere / "back").symlink_to(music, target_is_directory=True)
    (music / "linked").symlink_to(elsewhere, target_is_directory=True)
    prepare(music, "mixtures", tmp_path / "json")
    songs = songs_of(all_rows(tmp_path / "json"))
    assert songs == {f"song_{i}" for i in range(6)} | {"linked_song_0"}


def test_linked_copy_of_a_song_is_left_out(tmp_path):
    music = write_mixtures(tmp_path / "music", 6)
    (music / "other name.wav").symlink_to(music / "song_0.wav")
    report = prepare(music, "mixtures", tmp_path / "json")
    assert len(songs_of(all_rows(tmp_path / "json"))) == 6
    assert len(report["skipped"]) == 1
    assert "the same as" in report["skipped"][0]["reason"]


def test_one_format_of_a_track_is_used(tmp_path):
    music = write_stems(tmp_path / "music")
    copy = write(music / "song_0" / "bass.flac")
    report = prepare(music, "stems", tmp_path / "json")
    row = all_rows(tmp_path / "json")["song_0_0000"]
    assert row["tracks"]["bass"].endswith("bass.wav")
    assert [skipped["file"] for skipped in report["skipped"]] == [str(copy)]


def test_demo_band_is_made_and_treated_as_stems(tmp_path, monkeypatch):
    calls = []

    def make_band(
        folder,
        num_songs=60,
        seconds=24.0,
        seed=0,
        sample_rate=44100,
        progress=False,
    ):
        calls.append((Path(folder), num_songs, seconds, sample_rate))
        return write_stems(Path(folder), num_songs, seconds=seconds)

    band = types.SimpleNamespace(make_band=make_band)
    monkeypatch.setitem(sys.modules, "trackformer_sb.data.band", band)
    options = {"demo_songs": 7, "demo_seconds": 4.0, "sample_rate": 8000}
    report = prepare(None, "demo", tmp_path / "json", **options)
    assert sum(report["splits"][split]["songs"] for split in SPLITS) == 7
    assert all(row["has_stems"] for row in all_rows(tmp_path / "json").values())
    prepare(tmp_path / "band", "demo", tmp_path / "json", **options)
    folders = (tmp_path / "json" / "demo_band", tmp_path / "band")
    assert calls == [(folder, 7, 4.0, 8000) for folder in folders]


def test_real_demo_band(tmp_path):
    options = {"demo_songs": 6, "demo_seconds": 4.0, "sample_rate": 8000}
    report = prepare(None, "demo", tmp_path, **options)
    rows = all_rows(tmp_path)
    assert len(rows) == 6
    stems = ["bass", "chords", "drums", "lead"]
    assert all(sorted(row["tracks"]) == stems for row in rows.values())
    assert report["skipped"] == report["warnings"] == []
    before = write_times(tmp_path)
    prepare(None, "demo", tmp_path, **options)
    assert write_times(tmp_path) == before


# ------------------------------------------------------------ how it is split


@settings(max_examples=100, deadline=None)
@given(
    st.integers(6, 80),
    st.integers(0, 2**32),
    st.tuples(*[st.integers(1, 100)] * 3),
    st.randoms(use_true_random=False),
)
def test_split_is_by_song(num_songs, seed, split_ratio, random):
    songs = [Song(f"{i:02d}", {}, False) for i in range(num_songs)]
    splits = split_songs("", songs, split_ratio, seed)
    names = [song.name for split in SPLITS for song in splits[split]]
    assert sorted(names) == [song.name for song in songs]
    assert min(map(len, splits.values())) >= 2
    random.shuffle(songs)
    assert split_songs("", songs, split_ratio, seed) == splits


@pytest.mark.parametrize(
    ("num_songs", "split_ratio", "sizes"),
    [
        (60, (80, 10, 10), [48, 6, 6]),
        (100, (0.8, 0.1, 0.1), [80, 10, 10]),
        (6, (80, 10, 10), [2, 2, 2]),
        (7, (1, 50, 49), [2, 2, 3]),
        (10, (80, 20), [8, 2]),
    ],
)
def test_split_sizes(num_songs, split_ratio, sizes):
    songs = [Song(f"{i:02d}", {}, False) for i in range(num_songs)]
    splits = split_songs("", songs, split_ratio, seed=0)
    assert [len(part) for part in splits.values()] == sizes


def test_seed_changes_the_split(tmp_path):
    music = write_mixtures(tmp_path / "music", 12)
    trains = set()
    for seed in range(5):
        prepare(music, "mixtures", tmp_path / "json", seed=seed)
        manifests = read_manifests(tmp_path / "json")
        songs = [songs_of(manifests[split]) for split in SPLITS]
        assert len(set.union(*songs)) == sum(map(len, songs)) == 12
        trains.add(frozenset(songs[0]))
    assert len(trains) > 1


def test_split_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    music = write_stems(tmp_path / "music", 9)
    prepare(music, "stems", tmp_path / "json")
    walk = os.walk

    def reversed_walk(*args, **options):
        for parent, folders, files in walk(*args, **options):
            folders.sort(reverse=True)
            yield parent, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    prepare(music, "stems", tmp_path / "again")
    assert set(write_times(tmp_path / "json")) == MANIFEST_FILES
    for name in MANIFEST_FILES:
        again = (tmp_path / "again" / name).read_bytes()
        assert (tmp_path / "json" / name).read_bytes() == again


@pytest.mark.parametrize("num_songs", [1, 5])
def test_too_few_songs(tmp_path, num_songs):
    music = write_mixtures(tmp_path / "music", num_songs)
    match = f"found {num_songs} usable songs under data_folder=.*music, .* 6"
    with pytest.raises(ValueError, match=match):
        prepare(music, "mixtures", tmp_path / "json")


# ---------------------------------------------------------- a folder to test on


def test_test_folder_is_the_whole_test_split(tmp_path):
    music = write_mixtures(tmp_path / "music", 9)
    stems = write_stems(tmp_path / "stems", 3)
    report = prepare(music, "mixtures", tmp_path / "json", test_folder=stems)
    manifests = read_manifests(tmp_path / "json")
    sizes = [report["splits"][split]["songs"] for split in SPLITS]
    assert sizes == [7, 2, 3]
    assert all(row["has_stems"] for row in manifests["test"].values())
    # song_0 is in both folders: other music, so another name.
    songs = [songs_of(manifests[split]) for split in SPLITS]
    assert len(set.union(*songs)) == 12
    for split in SPLITS:
        names = report["splits"][split]["song_names"]
        assert set(names) == songs_of(manifests[split])


def test_test_dataset_mixtures(tmp_path):
    music = write_stems(tmp_path / "music", 4)
    tests = write_mixtures(tmp_path / "tests", 2, seconds=6)
    prepare(
        music,
        "stems",
        tmp_path / "json",
        test_folder=tests,
        test_dataset="mixtures",
    )
    test = read_manifests(tmp_path / "json")["test"]
    assert [row["has_stems"] for row in test.values()] == [False] * 4


def test_test_song_in_both_folders(tmp_path):
    music = write_stems(tmp_path / "music", 6)
    (tmp_path / "tests").mkdir()
    for i in range(2):
        (tmp_path / "tests" / f"test_{i}").symlink_to(music / f"song_{i}")
    match = "bass.wav of test_folder is in data_folder as well"
    with pytest.raises(ValueError, match=match):
        prepare(
            music, "stems", tmp_path / "json", test_folder=tmp_path / "tests"
        )


def test_copy_of_a_test_song_is_not_trained_on(tmp_path):
    music = write_mixtures(tmp_path / "music", 8)
    for i in (2, 5):
        (tmp_path / "tests" / "deep").mkdir(parents=True, exist_ok=True)
        shutil.copy(music / f"song_{i}.wav", tmp_path / "tests" / "deep")
    # Name and size of song_6, but other music.
    write(tmp_path / "tests" / "song_6.wav", level=0.9)
    report = prepare(
        music,
        "mixtures",
        tmp_path / "json",
        test_folder=tmp_path / "tests",
        test_dataset="mixtures",
    )
    left_out = [skipped["file"] for skipped in report["skipped"]]
    assert left_out == [str(music / f"song_{i}.wav") for i in (2, 5)]
    assert "a copy of the test song" in report["skipped"][0]["reason"]
    assert [report["splits"][s]["songs"] for s in SPLITS] == [4, 2, 3]


def test_too_few_test_songs(tmp_path):
    music = write_mixtures(tmp_path / "music", 6)
    stems = write_stems(tmp_path / "stems", 1)
    match = "found 1 usable songs under test_folder=.*stems, .* at least 2"
    with pytest.raises(ValueError, match=match):
        prepare(music, "mixtures", tmp_path / "json", test_folder=stems)


# ------------------------------------------------------------- what goes wrong


def break_files(folder, extension="wav"):
    """Files with an audio ending that are no audio, sorted."""
    folder.mkdir(parents=True, exist_ok=True)
    broken = [folder / f"x{i}.{extension}" for i in range(3)]
    broken[0].write_bytes(b"")
    broken[1].write_text("these are no samples")
    broken[2].symlink_to(folder / "nowhere")
    return broken


def test_unreadable_files_are_skipped_with_one_warning(tmp_path, caplog):
    music = write_mixtures(tmp_path / "music", 6)
    broken = break_files(music)
    with caplog.at_level(logging.WARNING):
        report = prepare(music, "mixtures", tmp_path / "json")
    assert [entry["file"] for entry in report["skipped"]] == list(
        map(str, broken)
    )
    reasons = ["the file is empty", "ormat not recogni", "No such file"]
    for path, reason, entry in zip(
        broken, reasons, report["skipped"], strict=True
    ):
        assert reason in entry["reason"]
        said = [m for m in caplog.messages if str(path) in m]
        assert len(said) == 1
        assert reason in said[0]
    assert len(report["warnings"]) == 3
    assert len(songs_of(all_rows(tmp_path / "json"))) == 6


def test_song_with_an_unreadable_stem_is_left_out(tmp_path):
    music = write_stems(tmp_path / "music", 7)
    (music / "song_3" / "drums.wav").write_bytes(b"")
    report = prepare(music, "stems", tmp_path / "json")
    songs = songs_of(all_rows(tmp_path / "json"))
    assert songs == {f"song_{i}" for i in (0, 1, 2, 4, 5, 6)}
    assert len(report["skipped"]) == len(report["warnings"]) == 1
    assert report["skipped"][0]["file"].endswith("drums.wav")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may read every file",
)
def test_files_and_folders_without_permission(tmp_path):
    music = write_mixtures(tmp_path / "music", 7)
    (music / "song_0.wav").chmod(0)
    secret = write(music / "secret" / "song.wav").parent
    secret.chmod(0)
    try:
        report = prepare(music, "mixtures", tmp_path / "json")
    finally:
        secret.chmod(0o755)
    reasons = {s["file"]: s["reason"] for s in report["skipped"]}
    assert reasons == {
        str(secret): "Permission denied",
        str(music / "song_0.wav"): "Permission denied",
    }


def test_stems_of_different_kinds(tmp_path, caplog):
    music = write_stems(tmp_path / "music", 6)
    odd = music / "song_2"
    write(odd / "vocals.wav", seconds=9.5, sample_rate=200, channels=2)
    write(odd / "noise.wav", seconds=0.01)
    with caplog.at_level(logging.WARNING):
        report = prepare(music, "stems", tmp_path / "json")
    assert report["warnings"] == [
        "stems of song_2 differ: length 0.01 to 9.5 s, rate 100 to 200 Hz, "
        "channels 1 to 2"
    ]
    assert caplog.messages == report["warnings"]
    # The longest stem counts: 9.5 s hold three segments of 3 s.
    rows = all_rows(tmp_path / "json")
    assert [r["start"] for r in rows.values() if r["song"] == "song_2"] == [
        0.0,
        3.0,
        6.0,
    ]


def test_short_songs_are_reported(tmp_path, caplog):
    music = write_mixtures(tmp_path / "music", 6)
    short = [
        write(music / "one sample.wav", seconds=1 / RATE),
        write(music / "short.wav", seconds=2.99),
    ]
    with caplog.at_level(logging.WARNING):
        report = prepare(music, "mixtures", tmp_path / "json")
    assert {s["file"] for s in report["skipped"]} == set(map(str, short))
    assert len(caplog.messages) == 1
    assert "2 of 8 songs" in caplog.messages[0]


def test_segment_longer_than_every_song(tmp_path):
    music = write_mixtures(tmp_path / "music", 5, seconds=2)
    write(music / "longest.wav", seconds=2.5)
    match = (
        r"all 6 songs under data_folder=.* segment_seconds=3\.0; the longest, "
        r"longest, has 2\.500 s"
    )
    with pytest.raises(ValueError, match=match):
        prepare(music, "mixtures", tmp_path / "json")


@pytest.mark.parametrize("folder", [None, "", "nowhere", "file.wav"])
def test_missing_folder(tmp_path, folder):
    write(tmp_path / "file.wav")
    folder = folder and tmp_path / folder
    match = f"data_folder={folder} is not a folder"
    with pytest.raises(FileNotFoundError, match=match):
        prepare(folder, "mixtures", tmp_path / "json")
    music = write_mixtures(tmp_path / "music", 6)
    if folder:
        with pytest.raises(FileNotFoundError, match=r"test_folder=.* is not"):
            prepare(music, "mixtures", tmp_path / "j", test_folder=folder)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [("stems", "one folder a song"), ("mixtures", "each of them a song")],
)
def test_folder_without_music(tmp_path, dataset, expected):
    music = tmp_path / "music"
    music.mkdir()
    match = f"no audio files under data_folder=.*music.*{expected}"
    with pytest.raises(ValueError, match=match):
        prepare(music, dataset, tmp_path / "json")
    (music / "LICENSE.txt").write_text("CC0")
    with pytest.raises(ValueError, match=match):
        prepare(music, dataset, tmp_path / "json")
    broken = break_files(music / "song")
    match = f"no readable songs .*: 3 of 3 audio files .*{broken[0].name}"
    with pytest.raises(ValueError, match=match):
        prepare(music, dataset, tmp_path / "json")


def test_finished_songs_given_as_stems(tmp_path):
    music = write_mixtures(tmp_path / "music", 6)
    match = "6 of 6 audio files lie directly .*`dataset: mixtures`"
    with pytest.raises(ValueError, match=match):
        prepare(music, "stems", tmp_path / "json")


def test_files_beside_the_songs_are_reported(tmp_path):
    music = write_stems(tmp_path / "music", 6)
    loose = write(music / "preview.wav")
    report = prepare(music, "stems", tmp_path / "json")
    assert [s["file"] for s in report["skipped"]] == [str(loose)]
    assert "1 audio files directly in" in report["warnings"][0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dataset": "musdb"}, "'musdb', .* demo, stems, mixtures"),
        ({"test_dataset": "demo"}, "test_dataset 'demo', .* stems, mixtures"),
        ({"segment_seconds": 0}, "segment_seconds > 0, got 0"),
        ({"segment_hop_seconds": -1}, "segment_hop_seconds > 0, got -1"),
        ({"segment_hop_seconds": 0}, "segment_hop_seconds > 0, got 0"),
        ({"split_ratio": (90, 10)}, "three positive numbers, got .90, 10."),
        ({"split_ratio": (90, 10, 0)}, "three positive numbers"),
    ],
)
def test_impossible_settings(tmp_path, options, match):
    music = write_mixtures(tmp_path / "music", 6)
    options = {"dataset": "mixtures", **options}
    with pytest.raises(ValueError, match=match):
        prepare(music, manifest_folder=tmp_path / "json", **options)
    assert not (tmp_path / "json").exists()


# ------------------------------------------------------------ run after run


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (("Vocals", "mixture"), True),
        (("drums", "bass"), True),
        (("drums", "solo"), False),
        (("mix", "mixture"), False),
    ],
)
def test_stems_that_would_be_songs_are_warned_of(tmp_path, names, warned):
    write_mixtures(tmp_path / "music")
    for song in "ab":
        write_stems(tmp_path / "music" / song, 1, names)
    report = prepare(tmp_path / "music", "mixtures", tmp_path / "manifests")
    words = "2 folders in data_folder=.* look like songs with stems"
    found = [x for x in report["warnings"] if re.match(words, x)]
    assert len(found) == warned


def write_times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_same_settings_and_music_write_nothing(tmp_path):
    music = write_mixtures(tmp_path / "music", 6)
    break_files(music)
    report = prepare(music, "mixtures", tmp_path / "json")
    before = write_times(tmp_path / "json")
    assert set(before) == MANIFEST_FILES
    assert prepare(music, "mixtures", tmp_path / "json") == report
    assert write_times(tmp_path / "json") == before


@pytest.mark.parametrize(
    "change",
    ["settings", "new file", "new content", "lost manifest", "lost report"],
)
def test_any_change_is_seen(tmp_path, change):
    music = write_mixtures(tmp_path / "music", 6)
    folder = tmp_path / "json"
    options = {}
    prepare(music, "mixtures", folder)
    before = write_times(folder)
    if change == "settings":
        options["seed"] = 1
    elif change == "new file":
        write(music / "new.wav")
    elif change == "new content":
        write(music / "song_0.wav", seconds=13)
    elif change == "lost manifest":
        (folder / "valid.npy").unlink()
    else:
        (folder / "data_report.json").write_text("{")
    prepare(music, "mixtures", folder, **options)
    after = write_times(folder)
    assert set(after) == set(before)
    assert all(after[name] != before[name] for name in before)
    songs = len(songs_of(all_rows(folder)))
    assert songs == 6 + (change == "new file")
    assert len(all_rows(folder)) == 2 * songs + 2 * (change == "new content")


def test_killed_while_writing_leaves_no_valid_report(tmp_path, monkeypatch):
    """Old settings must not accept a mixture of old and new manifests."""
    music = write_mixtures(tmp_path / "music", 12)
    folder = tmp_path / "json"
    prepare(music, "mixtures", folder, seed=0)
    expected = read_manifests(folder)
    replace = os.replace

    def killed_at_valid(source, target):
        if Path(target).name == "valid.npy":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_valid)
        with pytest.raises(KeyboardInterrupt):
            prepare(music, "mixtures", folder, seed=3)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert read_manifests(folder) != expected
    prepare(music, "mixtures", folder, seed=0)
    assert read_manifests(folder) == expected


@pytest.mark.skipif(
    not REAL_MUSIC.is_dir(), reason=f"no real music at {REAL_MUSIC}"
)
def test_real_music(tmp_path):
    report = prepare(
        REAL_MUSIC / "mixes",
        "mixtures",
        tmp_path,
        test_folder=REAL_MUSIC / "stems",
        segment_seconds=10.0,
    )
    test = read_manifests(tmp_path)["test"]
    assert {"Hydrogen", "Rubidium"} <= songs_of(test)
    assert "LICENSE" not in {t for row in test.values() for t in row["tracks"]}
    assert sorted(test["Hydrogen_0000"]["tracks"]) == [
        "drums",
        "other",
        "vocals",
    ]
    # kyzfrintin_orange lasts 8 s.
    assert "kyzfrintin_orange" not in songs_of(test)
    assert any("kyzfrintin" in s["file"] for s in report["skipped"])
    hours = sum(report["splits"][split]["hours"] for split in SPLITS[:2])
    assert 2 < hours < 3
