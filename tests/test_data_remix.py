"""Items of named stems, and of two songs without."""

import numpy as np
import pytest
import soundfile
import torch
from test_data_layouts import write_moises, write_slakh

from trackformer_sb.audio import UnreadableAudio
from trackformer_sb.data import remix
from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import STEM_CLASSES, NamedWindows, RemixedItems

RATE, SECONDS = 8000, 0.5
CLASSES = ["drums", "bass", "vocals", "other"]
MOISES_STEMS = (
    "bass bowed_strings drums guitar other_keys other_plucked percussion "
    "piano vocals wind"
).split()


def write(path, seconds=2.0, level=0.1, channels=2, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = round(seconds * RATE), channels
    sig = level * np.random.default_rng(seed).standard_normal(shape)
    soundfile.write(path, sig.astype(np.float32), RATE)


@pytest.fixture
def music(tmp_path):
    folder = tmp_path / "music"
    for song in range(3):
        for seed, name in enumerate(("drums", "Bass guitar", "piano")):
            write(folder / f"song{song}" / f"{name}.wav", seed=10 * song + seed)
    write(folder / "voice0" / "vocals.wav", channels=1)
    for song in range(3):
        write(tmp_path / "songs" / f"{song}.wav", seed=100 + song)
    return folder


def songs_of(folder, dataset="midi"):
    return Music(folder, dataset, stem_groups=STEM_CLASSES).songs()


def make_items(music, **options):
    songs = songs_of(music) + songs_of(music.parent / "songs", "mixtures")
    options = {"mixture_share": 0.3, "num_items": 40, **options}
    return RemixedItems(
        songs, CLASSES, sample_rate=RATE, segment_seconds=SECONDS, **options
    )


def test_items_are_finite_and_at_one_level(music):
    items = make_items(music)
    kinds = set()
    for stems, named, _ in (items[k] for k in range(20)):
        assert stems.shape == (4, 2, round(SECONDS * RATE))
        assert stems.dtype == torch.float32
        assert stems.isfinite().all()
        if named:
            level = stems.sum(0).square().mean().sqrt()
            assert level == pytest.approx(remix.ITEM_RMS, rel=0.2)
        else:
            assert (stems[:2].square().mean((1, 2)) > 1e-4).all()
            assert not stems[2:].any()
        kinds.add(named)
    assert kinds == {True, False}


def test_a_panned_class_has_one_place_and_keeps_its_power():
    sig = np.random.default_rng(0).standard_normal((2, 4000), np.float32)
    power = 2 * np.square(sig.mean(0)).sum()
    levels, delays = [], []
    for seed in range(40):
        left, right = remix.pan(sig, np.random.default_rng(seed))
        alike = np.correlate(left, right, "full")
        delays.append(int(alike.argmax()) - 3999)
        # one place: the channels differ by level and delay alone
        assert alike.max() ** 2 == pytest.approx(
            np.square(left).sum() * np.square(right).sum(), rel=0.03
        )
        assert np.square([left, right]).sum() == pytest.approx(power, rel=0.03)
        levels.append(10 * np.log10(np.square(right).sum() / left.dot(left)))
    assert 9 < max(map(abs, levels)) < 12.2
    assert min(delays) < -20 and 20 < max(delays) <= remix.PAN_DELAY


def test_stems_of_datasets_are_mapped_to_classes(tmp_path):
    stems = {name: ["a", "b"] for name in MOISES_STEMS}
    write_moises(tmp_path / "moisesdb", "uuid", stems)
    names = "Guitar Drums Chromatic_Percussion Percussive Bass Strings".split()
    stems = {name: (name.replace("_", " "), True) for name in names}
    write_slakh(tmp_path / "slakh2100", "train/Track00001", stems)
    for dataset, expected in (
        ("moisesdb", {"bass": 2, "drums": 4, "other": 12, "vocals": 2}),
        ("slakh2100", {"bass": 1, "drums": 2, "other": 3}),
    ):
        (song,) = songs_of(tmp_path / dataset, dataset)
        found = {name: len(paths) for name, paths in song.tracks.items()}
        assert found == expected


def test_what_both_songs_lack_is_known(music):
    absent = {"[01].WAV": ["vocals", "drums"], "0*": ["bass"]}
    items = make_items(music, mixture_share=1.0, absent=absent)
    found = {tuple(items[k][2].tolist()) for k in range(20)}
    assert found == {(True, False, True, False), (False,) * 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture_share": 25}, "0 to 1, got 25"),
        ({"absent": {"*": "vocals"}}, "bass, vocals, other, got .*vocals"),
        ({"absent": {"*": ["voice"]}}, "bass, vocals, other, got .*voice"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RemixedItems([], CLASSES, **options)


def test_an_item_depends_on_seed_epoch_and_number_alone(music):
    items, again = make_items(music), make_items(music)
    _ = items[3]
    assert torch.equal(items[5][0], again[5][0])
    again.set_epoch(1)
    assert not torch.equal(items[5][0], again[5][0])
    assert not torch.equal(items[5][0], make_items(music, seed=1)[5][0])


def test_a_song_that_breaks_later_is_left_out_and_named(music):
    items = make_items(music, mixture_share=0.0)
    broken = music / "song0" / "drums.wav"
    broken.write_bytes(b"RIFF")
    for k in range(10):
        assert items[k][0].isfinite().all()
    assert list(items.skipped) == [str(broken)]


def test_silence_alone_is_an_error(tmp_path):
    for name in ("drums", "bass"):
        write(tmp_path / "music" / "song" / f"{name}.wav", level=0.0)
    songs = songs_of(tmp_path / "music")
    items = RemixedItems(songs, sample_rate=RATE, segment_seconds=SECONDS)
    with pytest.raises(UnreadableAudio, match="no sound found"):
        items[0]


def test_windows_are_spread_over_songs_and_ranks(music):
    songs = {"held out": songs_of(music)}
    options = {"sample_rate": RATE, "seconds": SECONDS}
    whole = NamedWindows(songs, **options)
    assert len(whole) == 4 * 4
    few = NamedWindows(songs, per_song=2, **options)
    assert [start for *_, start in few.windows[:2]] == [0.5, 1.5]
    parts = [
        NamedWindows(songs, rank=r, world_size=2, **options) for r in range(2)
    ]
    assert sum(map(len, parts)) == 16
    stems, group = whole[0]
    assert group == "held out"
    assert sorted(stems) == ["bass", "drums", "other"]
    level = sum(stems.values()).square().mean().sqrt()
    assert level == pytest.approx(0.1)
