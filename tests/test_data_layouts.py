"""The layouts of MoisesDB, MUSDB18-HQ and Slakh2100, in miniature."""

import itertools
import json
import os

import numpy as np
import pytest
import soundfile
import yaml

from trackformer_sb.data.audio import AUDIO_EXTENSIONS
from trackformer_sb.data.layouts import (
    MUSDB18_VALIDATION,
    group_stems,
    keep_few_stems,
    moisesdb_songs,
    musdb18hq_songs,
    slakh2100_songs,
)
from trackformer_sb.data.songs import Findings, Song

UUID = "0358ee6f-2abb-4fa1-a33c-4ac3a2fe1d52"
LOADERS = {
    "moisesdb": moisesdb_songs,
    "musdb18hq": musdb18hq_songs,
    "slakh2100": slakh2100_songs,
}


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(8), 8000)
    return str(path)


def list_files(folder):
    """Absolute path -> [size, time, mode] of audio files, sorted."""
    listing = {}
    for parent, _, files in os.walk(folder):
        for file in files:
            path = os.path.join(parent, file)
            if os.path.splitext(file)[1].lower() in AUDIO_EXTENSIONS:
                stat = os.stat(path)
                listing[path] = [stat.st_size, stat.st_mtime_ns, stat.st_mode]
    return dict(sorted(listing.items()))


def load(dataset, folder):
    findings = Findings()
    songs = LOADERS[dataset](folder, list_files(folder), findings)
    return {song.name: song for song in songs}, findings


def relative(paths, folder):
    return tuple(os.path.relpath(path, folder) for path in paths)


def skipped(findings, folder):
    return {
        os.path.relpath(entry["file"], folder): entry["reason"]
        for entry in findings.skipped
    }


# --------------------------------------------------------------- MoisesDB


def write_moises(root, uuid, stems, extension="wav", bleeds=()):
    """A song of MoisesDB: stem name -> ids of its tracks."""
    data = {
        "song": "Ünter Brücken",
        "artist": "Ana & the Ñandús",
        "genre": "rock",
        "stems": [
            {
                "id": f"id of {name}",
                "stemName": name,
                "tracks": [
                    {
                        "id": track,
                        "trackType": f"{name} of some type",
                        "extension": extension,
                        "has_bleed": track in bleeds,
                    }
                    for track in tracks
                ],
            }
            for name, tracks in stems.items()
        ],
    }
    for name, tracks in stems.items():
        for track in tracks:
            write(root / uuid / name / f"{track}.wav")
    (root / uuid / "data.json").write_text(json.dumps(data), "utf-8")
    return root / uuid


@pytest.fixture
def moises(tmp_path):
    root = tmp_path / "Musik für MixIT" / "moisesdb_v0.1"
    stems = {"vocals": ["lead"], "guitar": ["g2", "g1"], "other_keys": ["k"]}
    write_moises(root, UUID, stems)
    write_moises(root, "zwei ö", {"bass": ["b"], "drums": ["kick", "snare"]})
    (root / "README.txt").write_text("not audio")
    return root


def test_moises_stem_is_the_files_of_its_tracks(moises):
    songs, findings = load("moisesdb", moises)
    assert list(songs) == [UUID, "zwei ö"]
    tracks = {
        name: relative(paths, moises / UUID)
        for name, paths in songs[UUID].tracks.items()
    }
    # stems by name, the tracks of a stem in the order of data.json
    assert list(tracks.items()) == [
        ("guitar", ("guitar/g2.wav", "guitar/g1.wav")),
        ("other_keys", ("other_keys/k.wav",)),
        ("vocals", ("vocals/lead.wav",)),
    ]
    assert all(os.path.isabs(path) for path in songs[UUID].files)
    assert songs[UUID].has_stems
    assert songs[UUID].split == songs[UUID].mixture == ""
    assert findings.skipped == findings.warnings == []


def test_moises_folder_may_be_the_one_above(moises):
    below, _ = load("moisesdb", moises)
    above, findings = load("moisesdb", moises.parent)
    assert above == below
    assert findings.skipped == []


def test_moises_folder_may_be_relative(moises, monkeypatch):
    monkeypatch.chdir(moises.parent)
    findings = Findings()
    songs = moisesdb_songs("moisesdb_v0.1", list_files(moises), findings)
    assert [song.name for song in songs] == [UUID, "zwei ö"]


def test_moises_song_without_a_file_is_skipped_once(moises):
    for track in ("g1", "g2"):
        (moises / UUID / "guitar" / f"{track}.wav").unlink()
    songs, findings = load("moisesdb", moises)
    assert list(songs) == ["zwei ö"]
    assert skipped(findings, moises) == {
        f"{UUID}/guitar/g2.wav": "missing (2 of 4 in data.json)"
    }
    assert len(findings.warnings) == 1


def test_moises_song_without_any_audio_is_named(moises):
    song = write_moises(moises, "empty", {"bass": ["b"]})
    (song / "bass" / "b.wav").unlink()
    songs, findings = load("moisesdb", moises)
    assert "empty" not in songs
    assert list(skipped(findings, moises)) == ["empty/bass/b.wav"]


def test_moises_extra_files_are_findings(moises):
    extra = ["bass/b (copy).wav", "bass/loud.flac", "preview.ogg"]
    for file in extra:
        write(moises / "zwei ö" / file)
    write(moises / "loose.wav")
    songs, findings = load("moisesdb", moises)
    assert relative(songs["zwei ö"].files, moises / "zwei ö") == (
        "bass/b.wav",
        "drums/kick.wav",
        "drums/snare.wav",
    )
    expected = {f"zwei ö/{file}": "not in data.json" for file in extra}
    expected["loose.wav"] = "not in the folder of a song"
    assert skipped(findings, moises) == expected
    assert len(findings.warnings) == 2  # the song's and the loose one's
    assert findings.warnings[1].startswith(f"skipped 3 files, {moises}/zwei ö")


@pytest.mark.parametrize("extension", (".wav", "WAV", ".Wav", "flac"))
def test_moises_extension_is_free(moises, extension):
    write_moises(moises, "other", {"bass": ["b.1"]}, extension)
    songs, findings = load("moisesdb", moises)
    assert relative(songs["other"].files, moises) == ("other/bass/b.1.wav",)
    assert findings.skipped == []


def test_moises_file_of_the_named_format_comes_first(moises):
    song = write_moises(moises, "two", {"bass": ["b"]}, "flac")
    write(song / "bass" / "b.flac")
    songs, findings = load("moisesdb", moises)
    assert relative(songs["two"].files, song) == ("bass/b.flac",)
    assert list(skipped(findings, song)) == ["bass/b.wav"]


def test_moises_file_is_summed_once(moises):
    song = write_moises(moises, "twice", {"bass": ["b"]})
    data = json.loads((song / "data.json").read_text())
    data["stems"] *= 2
    (song / "data.json").write_text(json.dumps(data))
    assert len(load("moisesdb", moises)[0]["twice"].files) == 1
    # and never for a second name that is not there
    (track,) = data["stems"][0]["tracks"]
    data["stems"] = [{"stemName": "bass", "tracks": [track, dict(track)]}]
    data["stems"][0]["tracks"][1]["extension"] = "flac"
    (song / "data.json").write_text(json.dumps(data))
    songs, findings = load("moisesdb", moises)
    assert "twice" not in songs
    assert list(skipped(findings, song)) == ["bass/b.flac"]


def test_moises_stem_may_come_in_parts(moises):
    song = write_moises(moises, "parts", {"bass": ["a", "b"]})
    data = json.loads((song / "data.json").read_text())
    first, second = data["stems"][0]["tracks"]
    data["stems"] = [
        {"stemName": "bass", "tracks": [second]},
        {"stemName": "piano", "tracks": []},
        {"stemName": "bass", "tracks": [first]},
    ]
    (song / "data.json").write_text(json.dumps(data))
    songs, _ = load("moisesdb", moises)
    assert list(songs["parts"].tracks) == ["bass"]
    assert relative(songs["parts"].files, song) == ("bass/b.wav", "bass/a.wav")


@pytest.mark.parametrize(
    "text, reason",
    (
        (None, "No such file"),
        ("", "Expecting value"),
        ("[]", "expected stems of list, got None"),
        ('{"stems": {}}', "expected stems of list, got {}"),
        ('{"stems": ["bass"]}', "expected stemName of str, got None"),
        ('{"stems": [{"stemName": "b"}]}', "expected tracks of list, got None"),
        ('{"stems": []}', "no stem"),
        ("\udcff", "can't decode"),
    ),
)
def test_moises_broken_data_json_is_named(moises, text, reason):
    path = moises / UUID / "data.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    songs, findings = load("moisesdb", moises)
    assert list(songs) == ["zwei ö"]
    (found,) = skipped(findings, moises).items()
    assert found[0] == f"{UUID}/data.json"
    assert reason in found[1]
    assert len(findings.warnings) == 1


def test_moises_tracks_with_bleed_are_kept_and_counted(moises):
    stems = {"drums": ["kick", "snare", "room"]}
    write_moises(moises, "live", stems, bleeds=("snare", "room"))
    gone = write_moises(moises, "gone", stems, bleeds=("snare",))
    (gone / "drums" / "kick.wav").unlink()
    songs, findings = load("moisesdb", moises)
    assert len(songs["live"].files) == 3
    assert findings.warnings[1:] == [
        f"kept 2 tracks with bleed in 1 songs of {moises} (has_bleed)"
    ]


# -------------------------------------------------------------- MUSDB18-HQ


def write_musdb(root, name, tracks=()):
    for track in tracks or ("bass", "drums", "other", "vocals", "mixture"):
        write(root / name / f"{track}.wav")


@pytest.fixture
def musdb(tmp_path):
    root = tmp_path / "MUSDB 18 é"
    write_musdb(root, "train/ANiMAL - Easy Tiger")
    write_musdb(root, "train/ANiMAL - Rockshow")
    write_musdb(root, "train/Johnny Lokke - Promises & Lies")
    write_musdb(root, "test/Zeno - Signs é")
    (root / "train" / "ANiMAL - Rockshow" / "LICENSE").write_text("text")
    return root


def test_musdb_songs_have_split_and_mixture(musdb):
    songs, findings = load("musdb18hq", musdb)
    assert {name: song.split for name, song in songs.items()} == {
        "test/Zeno - Signs é": "test",
        "train/ANiMAL - Easy Tiger": "train",
        "train/ANiMAL - Rockshow": "valid",
        "train/Johnny Lokke - Promises & Lies": "valid",
    }
    song = songs["test/Zeno - Signs é"]
    folder = musdb / "test" / "Zeno - Signs é"
    assert list(song.tracks) == ["bass", "drums", "other", "vocals"]
    assert song.tracks["drums"] == (str(folder / "drums.wav"),)
    assert song.mixture == str(folder / "mixture.wav")
    assert findings.skipped == findings.warnings == []


def test_musdb_has_14_validation_songs(tmp_path):
    assert len(set(MUSDB18_VALIDATION)) == 14
    for title in MUSDB18_VALIDATION:
        write_musdb(tmp_path, f"train/{title}")
    # a test song is one whatever its title
    write_musdb(tmp_path, f"test/{MUSDB18_VALIDATION[0]}")
    songs, _ = load("musdb18hq", tmp_path)
    splits = [song.split for song in songs.values()]
    assert splits == ["test"] + 14 * ["valid"]


def test_musdb_validation_titles_are_whole():
    # line breaks of the source would show as doubled or missing spaces
    assert all(title.count(" - ") == 1 for title in MUSDB18_VALIDATION)
    assert "Clara Berry And Wooldog - Waltz For My Victims" in (
        MUSDB18_VALIDATION
    )
    assert "Patrick Talbot - A Reason To Leave" in MUSDB18_VALIDATION
    assert "Leaf - Summerghost" in MUSDB18_VALIDATION
    assert "Triviul - Angelsaint" in MUSDB18_VALIDATION
    assert not any("  " in title for title in MUSDB18_VALIDATION)


def test_musdb_song_without_a_stem_is_skipped(musdb):
    write_musdb(musdb, "train/No {voice}", ("bass", "drums", "other"))
    songs, findings = load("musdb18hq", musdb)
    assert "train/No {voice}" not in songs
    assert skipped(findings, musdb) == {
        "train/No {voice}/vocals.wav": "missing (1 of 4 in MUSDB18-HQ)"
    }


def test_musdb_song_without_mixture_is_kept(musdb):
    (musdb / "test" / "Zeno - Signs é" / "mixture.wav").unlink()
    songs, findings = load("musdb18hq", musdb)
    assert songs["test/Zeno - Signs é"].mixture == ""
    assert findings.skipped == []


def test_musdb_other_files_are_findings(musdb):
    write(musdb / "train" / "ANiMAL - Rockshow" / "accompaniment.wav")
    write(musdb / "train" / "loose.wav")
    write(musdb / "extra" / "Some - Song" / "vocals.wav")
    songs, findings = load("musdb18hq", musdb)
    assert len(songs) == 4
    assert skipped(findings, musdb) == {
        "extra/Some - Song/vocals.wav": "not in the folder of a song",
        "train/loose.wav": "not in the folder of a song",
        "train/ANiMAL - Rockshow/accompaniment.wav": "not in MUSDB18-HQ",
    }


def test_musdb_case_and_format_are_free(musdb):
    folder = musdb / "test" / "Converted - Song"
    files = (
        "Bass.flac",
        "DRUMS.FLAC",
        "other.ogg",
        "vocals.wav",
        "Mixture.flac",
    )
    for file in files:
        write(folder / file)
    songs, _ = load("musdb18hq", musdb)
    song = songs["test/Converted - Song"]
    assert relative([*song.files, song.mixture], folder) == files


# --------------------------------------------------------------- Slakh2100


def stem(inst_class, rendered=True):
    return {
        "audio_rendered": rendered,
        "inst_class": inst_class,
        "integrated_loudness": -12.8,
        "is_drum": inst_class == "Drums",
        "midi_program_name": f"some {inst_class}",
        "midi_saved": True,
        "plugin_name": "some_plugin.nkm",
        "program_num": 30,
    }


def write_slakh(root, name, stems, ending="flac"):
    """A song of Slakh2100: stem -> (class of instruments, rendered)."""
    folder = root / name
    metadata = {
        "UUID": "1a81ae092884234f3264e2f45927f00a",
        # as one song of Slakh2100-redux has it
        "audio_dir": "Volumes/data/Track00001/stems",
        "normalized": True,
        "overall_gain": 0.18,
        "stems": {key: stem(*value) for key, value in stems.items()},
    }
    for key, (_, rendered) in stems.items():
        if rendered:
            write(folder / "stems" / f"{key}.{ending}")
    write(folder / f"mix.{ending}")
    (folder / "MIDI").mkdir()
    (folder / "MIDI" / "S00.mid").write_bytes(b"MThd")
    (folder / "all_src.mid").write_bytes(b"MThd")
    (folder / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    return folder


BAND = {
    "S00": ("Guitar", True),
    "S01": ("Drums", True),
    "S02": ("Strings (continued)", True),
    "S03": ("Guitar", True),
    "S04": ("Bass", False),
}


@pytest.fixture
def slakh(tmp_path):
    root = tmp_path / "Slakh für uns" / "slakh2100_flac_redux"
    write_slakh(root, "train/Track00001", BAND)
    write_slakh(root, "validation/Track01501", BAND, "wav")
    write_slakh(root, "test/Track01876", {"S00": ("Piano", True)})
    return root


def test_slakh_stems_are_summed_by_class(slakh):
    songs, findings = load("slakh2100", slakh)
    assert {name: song.split for name, song in songs.items()} == {
        "test/Track01876": "test",
        "train/Track00001": "train",
        "validation/Track01501": "valid",
    }
    for name, ending in (
        ("train/Track00001", "flac"),
        ("validation/Track01501", "wav"),
    ):
        song = songs[name]
        tracks = {
            track: relative(paths, slakh / name)
            for track, paths in song.tracks.items()
        }
        # Bass has no audio
        assert list(tracks.items()) == [
            ("Drums", (f"stems/S01.{ending}",)),
            ("Guitar", (f"stems/S00.{ending}", f"stems/S03.{ending}")),
            ("Strings (continued)", (f"stems/S02.{ending}",)),
        ]
        assert song.mixture == str(slakh / name / f"mix.{ending}")
    assert findings.skipped == findings.warnings == []


def test_slakh_folder_may_be_the_one_above(slakh):
    below, _ = load("slakh2100", slakh)
    above, findings = load("slakh2100", slakh.parent)
    assert above == below
    assert findings.skipped == []


def test_slakh_song_without_a_stem_is_skipped(slakh):
    (slakh / "train" / "Track00001" / "stems" / "S03.flac").unlink()
    songs, findings = load("slakh2100", slakh)
    assert "train/Track00001" not in songs
    assert skipped(findings, slakh) == {
        "train/Track00001/stems/S03.flac": "missing (1 of 4 in metadata.yaml)"
    }


def test_slakh_other_files_are_findings(slakh):
    folder = slakh / "train" / "Track00001"
    write(folder / "stems" / "S04.flac")  # said not to be rendered
    write(folder / "band" / "S00.wav")  # a submix
    songs, findings = load("slakh2100", slakh)
    assert len(songs["train/Track00001"].files) == 4
    assert skipped(findings, folder) == {
        "band/S00.wav": "not in metadata.yaml",
        "stems/S04.flac": "not in metadata.yaml",
    }
    assert len(findings.warnings) == 1


def test_slakh_omitted_songs_are_one_finding(slakh):
    for i in range(3):
        write_slakh(slakh, f"omitted/Track0000{i + 4}", BAND)
    songs, findings = load("slakh2100", slakh)
    assert sorted(song.split for song in songs.values()) == [
        "test",
        "train",
        "valid",
    ]
    assert findings.skipped == []
    assert findings.warnings == [f"left out 3 songs of {slakh}/omitted"]


@pytest.mark.parametrize(
    "text, reason",
    (
        ("stems: {S00: [", "node content"),
        ("UUID: 1a81", "expected stems of dict, got None"),
        ("stems: {S00: {}}", "expected audio_rendered of bool, got None"),
        ("stems: {S00: {audio_rendered: true}}", "expected inst_class of str"),
        ("stems: {S00: {audio_rendered: false}}", "no stem"),
        ("!!python/object:os.system {}", "could not determine a constructor"),
    ),
)
def test_slakh_broken_metadata_is_named(slakh, text, reason):
    path = slakh / "train" / "Track00001" / "metadata.yaml"
    path.write_text(text)
    songs, findings = load("slakh2100", slakh)
    assert sorted(songs) == ["test/Track01876", "validation/Track01501"]
    (found,) = skipped(findings, slakh).items()
    assert found[0] == "train/Track00001/metadata.yaml"
    assert reason in found[1]
    assert "\n" not in found[1]


# ---------------------------------------------------------------- no songs


@pytest.mark.parametrize(
    "dataset, other", list(itertools.permutations(LOADERS, 2))
)
def test_another_dataset_is_recognised(dataset, other, moises, musdb, slakh):
    folder = {"moisesdb": moises, "musdb18hq": musdb, "slakh2100": slakh}[other]
    with pytest.raises(ValueError) as error:
        load(dataset, folder)
    assert str(error.value).startswith(f"no songs under {folder}, expected ")
    assert str(error.value).endswith(f"; it looks like dataset: {other}")


@pytest.mark.parametrize(
    "dataset, expected",
    (
        ("moisesdb", "data.json"),
        ("musdb18hq", "{train,test}/<artist - title>/"),
        ("slakh2100", "metadata.yaml"),
    ),
)
def test_any_other_music_has_no_songs(dataset, expected, tmp_path):
    write(tmp_path / "album" / "song.wav")
    with pytest.raises(ValueError, match="dataset: stems or mixtures") as error:
        load(dataset, tmp_path)
    assert expected in str(error.value)


def test_songs_that_are_all_skipped_are_no_songs(moises):
    for path in moises.glob("*/data.json"):
        path.write_text("")
    with pytest.raises(ValueError, match="all 2 found were skipped"):
        load("moisesdb", moises)


def test_order_of_the_listing_does_not_matter(moises, musdb, slakh):
    for dataset, folder in zip(LOADERS, (moises, musdb, slakh), strict=True):
        listing = list_files(folder)
        back = dict(reversed(listing.items()))
        songs = [
            LOADERS[dataset](folder, x, Findings()) for x in (listing, back)
        ]
        assert songs[0] == songs[1]
        names = [song.name for song in songs[0]]
        assert names == sorted(set(names))


# ---------------------------------------------------- groups and few stems


def song(*tracks, has_stems=True):
    paths = {name: (f"/m/{name}/1.wav", f"/m/{name}/2.wav") for name in tracks}
    return Song("song", paths, has_stems, 3.5, "train", "/m/mixture.wav")


def test_groups_sum_tracks_in_order():
    before = song("bass", "other_keys", "piano", "Vocals")
    groups = {"Keys": ["PIANO", "*_KEYS"], "any": ("v*", "*keys", "drums")}
    (after,) = group_stems([before], groups)
    assert list(after.tracks.items()) == [
        ("Keys", before.tracks["other_keys"] + before.tracks["piano"]),
        ("any", before.tracks["Vocals"]),
        ("bass", before.tracks["bass"]),
    ]
    assert after._replace(tracks=before.tracks) == before
    assert list(before.tracks) == ["bass", "other_keys", "piano", "Vocals"]


def test_track_joins_the_group_of_its_name():
    (after,) = group_stems(
        [song("guitar", "other", "wind")], {"other": ["guitar", "wind"]}
    )
    assert list(after.tracks) == ["other"]
    assert len(after.tracks["other"]) == 6


def test_groups_leave_mixtures_and_nothing_alone():
    songs = [song("mixture", has_stems=False), song("bass")]
    assert group_stems(songs, None) == songs
    assert group_stems(songs, {}) == songs
    assert group_stems(songs[:1], {"all": ["*"]}) == songs[:1]


@pytest.mark.parametrize(
    "groups",
    (
        ["piano"],
        "piano",
        {"keys": "piano"},
        {"keys": None},
        {"keys": [1]},
        {False: ["piano"]},
        {"keys": {"piano": 1}},
    ),
)
def test_groups_of_other_types_are_refused(groups):
    with pytest.raises(ValueError, match="expected stem_groups") as error:
        group_stems([song("piano")], groups)
    assert str(error.value).endswith(f"got {groups}")


def test_songs_with_few_stems_are_kept():
    songs = [song("a"), song("a", "b"), song("a", "b", "c")]
    songs.append(song("mixture", has_stems=False))
    findings = Findings()
    assert keep_few_stems(songs, None, findings) == songs
    assert keep_few_stems(songs, 3, findings) == songs
    assert findings.warnings == []
    assert keep_few_stems(songs, 1, findings) == [songs[0], songs[3]]
    reason = "more than max_stems=1 stems"
    assert findings.skipped == 2 * [{"file": "/m", "reason": reason}]
    assert findings.warnings == [f"skipped 2 files, /m first: {reason}"]


def test_stems_are_counted_not_files(moises):
    songs, _ = load("moisesdb", moises)
    kept = keep_few_stems(songs.values(), 2, Findings())
    assert [song.name for song in kept] == ["zwei ö"]  # 2 stems of 3 files


def test_no_song_left_is_an_error():
    with pytest.raises(ValueError, match=r"all 1 songs .* max_stems=2"):
        keep_few_stems([song("a", "b", "c")], 2, Findings())
    assert keep_few_stems([], 2, Findings()) == []


@pytest.mark.parametrize("max_stems", (0, -1, 2.5, "4", True))
def test_max_stems_of_other_types_is_refused(max_stems):
    with pytest.raises(ValueError, match="expected max_stems"):
        keep_few_stems([song("a")], max_stems, Findings())
