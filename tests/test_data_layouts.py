"""The layouts of MoisesDB, MUSDB18-HQ and Slakh2100, in miniature."""

import itertools
import json
import os

import numpy as np
import pytest
import soundfile
import yaml

from trackformer_sb.data.files import list_audio
from trackformer_sb.data.layouts import (
    LAYOUTS,
    MUSDB18_VALIDATION,
    dataset_songs,
    group_stems,
)
from trackformer_sb.data.songs import Findings, Song

UUID = "0358ee6f-2abb-4fa1-a33c-4ac3a2fe1d52"


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(8), 8000)
    return str(path)


def load(dataset, folder):
    findings = Findings()
    songs = dataset_songs(
        dataset, folder, list_audio(folder, Findings()), findings
    )
    names = [song.name for song in songs]
    assert names == sorted(set(names))
    return dict(zip(names, songs)), findings


def relative(paths, folder):
    return tuple(os.path.relpath(path, folder) for path in paths)


def skipped(findings, folder):
    return {
        os.path.relpath(entry["file"], folder): entry["reason"]
        for entry in findings.skipped
    }


# --------------------------------------------------------------- MoisesDB


def write_moises(root, uuid, stems, bleeds=()):
    """A song of MoisesDB: stem name -> ids of its tracks."""
    data = {
        "stems": [
            {
                "stemName": name,
                "tracks": [
                    {
                        "id": track,
                        "extension": "wav",
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
    song = songs[UUID]
    # stems by name, the tracks of a stem in the order of data.json
    tracks = [(x, relative(y, moises / UUID)) for x, y in song.tracks.items()]
    assert tracks == [
        ("guitar", ("guitar/g2.wav", "guitar/g1.wav")),
        ("other_keys", ("other_keys/k.wav",)),
        ("vocals", ("vocals/lead.wav",)),
    ]
    assert song.has_stems and song.split == song.mixture == ""
    assert findings.skipped == findings.warnings == []


def test_moises_song_without_a_file_is_skipped_once(moises):
    for track in ("g1", "g2"):
        (moises / UUID / "guitar" / f"{track}.wav").unlink()
    song = write_moises(moises, "empty", {"bass": ["b"]})
    (song / "bass" / "b.wav").unlink()
    songs, findings = load("moisesdb", moises)
    assert list(songs) == ["zwei ö"]
    assert skipped(findings, moises) == {
        f"{UUID}/guitar/g2.wav": "missing (2 of 4 in data.json)",
        "empty/bass/b.wav": "missing (1 of 1 in data.json)",
    }
    assert len(findings.warnings) == 2


def test_extra_files_are_findings(moises):
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


def test_moises_tracks_with_bleed_are_kept_and_counted(moises):
    stems = {"drums": ["kick", "snare", "room"]}
    write_moises(moises, "live", stems, bleeds=("snare", "room"))
    songs, findings = load("moisesdb", moises)
    assert len(songs["live"].files) == 3
    assert findings.warnings == [
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
    write_musdb(root, "test/Zeno - Signs é")
    (root / "train" / "ANiMAL - Easy Tiger" / "LICENSE").write_text("text")
    return root


def test_musdb_songs_have_split_and_mixture(musdb):
    for title in MUSDB18_VALIDATION:
        write_musdb(musdb, f"train/{title}")
    songs, findings = load("musdb18hq", musdb)
    splits = [song.split for song in songs.values()]
    assert {x: splits.count(x) for x in splits} == {
        "test": 1,
        "train": 1,
        "valid": 14,
    }
    # those that a line break of the source is in
    broken = {"Alexander Ross - Goodbye Bolero", "Fergessen - Nos Palpitants"}
    assert broken < {*MUSDB18_VALIDATION}
    song = songs["test/Zeno - Signs é"]
    folder = musdb / "test" / "Zeno - Signs é"
    assert list(song.tracks) == ["bass", "drums", "other", "vocals"]
    assert song.tracks["drums"] == (str(folder / "drums.wav"),)
    assert song.mixture == str(folder / "mixture.wav")
    assert findings.skipped == findings.warnings == []


def test_musdb_case_and_format_are_free(musdb):
    folder = musdb / "test" / "Converted - Song"
    files = "Bass.flac", "DRUMS.FLAC", "other.ogg", "vocals.wav", "Mixture.flac"
    for file in files:
        write(folder / file)
    songs, _ = load("musdb18hq", musdb)
    song = songs["test/Converted - Song"]
    assert relative([*song.files, song.mixture], folder) == files


# --------------------------------------------------------------- Slakh2100


def write_slakh(root, name, stems, ending="flac"):
    """A song of Slakh2100: stem -> (class of instruments, rendered)."""
    folder = root / name
    metadata = {
        # as one song of Slakh2100-redux has it
        "audio_dir": "Volumes/data/Track00001/stems",
        "stems": {
            key: {"audio_rendered": rendered, "inst_class": inst_class}
            for key, (inst_class, rendered) in stems.items()
        },
    }
    for key, (_, rendered) in stems.items():
        if rendered:
            write(folder / "stems" / f"{key}.{ending}")
    write(folder / f"mix.{ending}")
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
        folder, song = slakh / name, songs[name]
        tracks = [(x, relative(y, folder)) for x, y in song.tracks.items()]
        # Bass has no audio
        assert tracks == [
            ("Drums", (f"stems/S01.{ending}",)),
            ("Guitar", (f"stems/S00.{ending}", f"stems/S03.{ending}")),
            ("Strings (continued)", (f"stems/S02.{ending}",)),
        ]
        assert song.mixture == str(folder / f"mix.{ending}")
    assert findings.skipped == findings.warnings == []


def test_slakh_omitted_songs_are_one_finding(slakh):
    for i in range(3):
        write_slakh(slakh, f"omitted/Track0000{i + 4}", BAND)
    songs, findings = load("slakh2100", slakh)
    assert len(songs) == 3
    assert findings.skipped == []
    assert findings.warnings == [f"left out 3 songs of {slakh}/omitted"]


# --------------------------------------------------------------------- all


@pytest.mark.parametrize(
    "dataset, text, reason",
    (
        ("moisesdb", "", "Expecting value"),
        ("moisesdb", '{"stems": {}}', "expected stems of list, got {}"),
        ("moisesdb", '{"stems": []}', "no stem"),
        ("slakh2100", "stems: {S00: [", "node content"),
        ("slakh2100", "!!python/object:os.system {}", "not determine a const"),
    ),
)
def test_broken_metadata_is_named(moises, slakh, dataset, text, reason):
    folder, file = {
        "moisesdb": (moises, f"{UUID}/data.json"),
        "slakh2100": (slakh, "train/Track00001/metadata.yaml"),
    }[dataset]
    (folder / file).write_text(text)
    songs, findings = load(dataset, folder)
    assert songs and os.path.dirname(file) not in songs
    (found,) = skipped(findings, folder).items()
    assert found[0] == file
    assert reason in found[1] and "\n" not in found[1]
    assert len(findings.warnings) == 1


def test_folder_may_be_the_one_above_and_relative(moises, slakh, monkeypatch):
    for dataset, folder in (("moisesdb", moises), ("slakh2100", slakh)):
        below, _ = load(dataset, folder)
        above, findings = load(dataset, folder.parent)
        assert above == below
        assert findings.skipped == []
        monkeypatch.chdir(folder.parent)
        assert load(dataset, folder.name)[0] == below


@pytest.mark.parametrize(
    "dataset, other", list(itertools.permutations(LAYOUTS, 2))
)
def test_another_dataset_is_recognised(dataset, other, moises, musdb, slakh):
    folder = {"moisesdb": moises, "musdb18hq": musdb, "slakh2100": slakh}[other]
    with pytest.raises(ValueError) as error:
        load(dataset, folder)
    expected = LAYOUTS[dataset].expected
    assert str(error.value) == (
        f"no songs under {folder}, expected {expected}; it looks like dataset: "
        f"{other}"
    )


def test_no_songs_at_all(tmp_path, moises):
    write(tmp_path / "other" / "album" / "song.wav")
    with pytest.raises(ValueError, match="dataset: stems or mixtures"):
        load("musdb18hq", tmp_path / "other")
    for path in moises.glob("*/data.json"):
        path.write_text("")
    with pytest.raises(ValueError, match="all 2 found were skipped"):
        load("moisesdb", moises)


def song(*tracks, has_stems=True):
    paths = {name: (f"/m/{name}/1.wav", f"/m/{name}/2.wav") for name in tracks}
    return Song("song", paths, has_stems, "train", "/m/mixture.wav")


def test_groups_sum_tracks_in_order():
    before = song("bass", "other_keys", "piano", "Vocals", "any")
    groups = {"Keys": ["PIANO", "*_KEYS"], "any": ["v*", "*keys", "drums"]}
    (after,) = group_stems([before], groups)
    assert list(after.tracks.items()) == [
        ("Keys", before.tracks["other_keys"] + before.tracks["piano"]),
        # a track joins the group of its name
        ("any", before.tracks["Vocals"] + before.tracks["any"]),
        ("bass", before.tracks["bass"]),
    ]
    assert after._replace(tracks=before.tracks) == before
    mixture = song("mixture", has_stems=False)
    assert group_stems([mixture], {"all": ["*"]}) == [mixture]
