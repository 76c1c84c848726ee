"""Training items: two songs, decided by seed, epoch, segment and rank alone."""

import itertools
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trackformer_sb.audio import UnreadableAudio
from trackformer_sb.data.augment import Augmentation
from trackformer_sb.data.mixtures import MixtureOfMixtures

RATE = 100
SECONDS = 0.5
SEGMENTS = {"a": 4, "b": 1, "c": 3, "d": 8}  # of every song
STEMS = ("bass", "drums", "vocals")


def level(song, stem, segment):
    """Every stem of every segment has its own constant level.

    In units of 1/512 the fraction is .25, that of a sum of three stems .75.
    """
    song, stem = sorted(SEGMENTS).index(song), STEMS.index(stem)
    return (1.25 + segment + 8 * stem + 32 * song) / 512


def make_rows(folder, segments=SEGMENTS, stems=STEMS):
    """A manifest and its files, constant over a segment."""
    rows = {}
    for song, count in segments.items():
        tracks = {}
        for stem in stems:
            tracks[stem] = str(folder / f"{song}_{stem}.wav")
            levels = [level(song, stem, segment) for segment in range(count)]
            sig = np.repeat(levels, round(SECONDS * RATE))
            soundfile.write(tracks[stem], sig, RATE, subtype="FLOAT")
        for segment in range(count):
            rows[f"{song}_{segment:04d}"] = {
                "song": song,
                "tracks": tracks,
                "start": segment * SECONDS,
                "duration": SECONDS,
                "has_stems": len(stems) > 1,
            }
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"))


def make(rows, seed=0, **options):
    return MixtureOfMixtures(rows, RATE, seed, **options)


def segment_at(mixture):
    """The song and segment whose stems sum to this constant mixture."""
    for song, count in SEGMENTS.items():
        for i in range(count):
            total = sum(level(song, stem, i) for stem in STEMS)
            if abs(mixture[0].item() - total) < 1e-6:
                return song, i
    raise AssertionError(f"{mixture[0].item()} is no mixture of stems")


def partners(rows, epoch=0, **options):
    make_item = make(rows, **options)
    make_item.set_epoch(epoch)
    return [segment_at(make_item(key)[0][1]) for key in rows]


def same(item, other):
    return item[2] == other[2] and all(
        torch.equal(a, b) for a, b in zip(item[:2], other[:2])
    )


def test_an_item_is_a_segment_and_a_partner(rows):
    make_item = make(rows)
    for key, row in rows.items():
        mixtures, stems, skipped = make_item(key)
        assert mixtures.shape == (2, 50)
        assert stems.shape == (0, 50)
        assert skipped == []
        assert segment_at(mixtures[0]) == (row["song"], int(key[-4:]))
        assert segment_at(mixtures[1])[0] != row["song"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.data())
def test_every_segment_of_the_other_songs_is_as_likely(counts, data):
    rows = {
        f"{song}_{i}": {"song": str(song)}
        for song, count in enumerate(counts)
        for i in range(count)
    }
    make_item = make(rows)
    ids = make_item.rows.ids
    index = data.draw(st.integers(0, len(ids) - 1))
    own = rows[ids[index]]["song"]
    others = [key for key in ids if rows[key]["song"] != own]
    draws = (np.arange(5 * len(others)) + 0.5) / (5 * len(others))
    found = [ids[make_item._partner(index, draw)] for draw in draws]
    assert sorted(found) == sorted(5 * others)


# ---------------------------------------------------------------- determinism


def test_same_seed_epoch_index_and_rank_make_the_same_item(rows):
    options = {
        "seed": 3,
        "rank": 1,
        "gain_db": 6,
        "single_stem_share": 0.4,
        "silent_share": 0.2,
    }
    first, resumed = make(rows, **options), make(rows, **options)
    first.set_epoch(7)
    expected = {key: first(key) for key in rows}
    resumed.set_epoch(7)
    keys = list(rows) * 2
    random.Random(0).shuffle(keys)
    assert all(same(resumed(key), expected[key]) for key in keys)
    copied = pickle.loads(pickle.dumps(first))
    assert all(same(copied(key), expected[key]) for key in rows)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"rank": 1}])
def test_seed_epoch_and_rank_each_change_partners(rows, change):
    before, after = partners(rows), partners(rows, **change)
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    assert changed > len(rows) / 2


def test_evaluation_stays_in_epoch_0(rows):
    fixed = partners(rows, with_stems=True)
    assert partners(rows, with_stems=True, epoch=5) == fixed


def test_gain_and_shares_leave_partners_alone(rows):
    """Experiments that differ in one option stay comparable."""
    silent = make(rows, silent_share=0.5)
    for key, partner in zip(rows, partners(rows), strict=True):
        mixtures = silent(key)[0]
        if mixtures[1].any():
            assert segment_at(mixtures[1]) == partner
    louder = make(rows, gain_db=6)
    plain = make(rows)
    for key in rows:
        ratio = louder(key)[0] / plain(key)[0]
        assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))


# -------------------------------------------------------- gains, stems, silence


def test_gains_are_uniform_in_decibels_and_independent(rows):
    plain, scaled = make(rows), make(rows, gain_db=6)
    gains = []
    for epoch in range(20):
        plain.set_epoch(epoch)
        scaled.set_epoch(epoch)
        for key in rows:
            gains.append((scaled(key)[0] / plain(key)[0])[:, 0])
    decibels = 20 * torch.stack(gains).log10()
    assert decibels.abs().max() <= 6 + 1e-4
    # 320 draws uniform in -6..6: deviation 3.46, mean 0 within 4 errors.
    assert decibels.mean(dim=0).abs().max() < 4 * 3.46 / 320**0.5
    assert (decibels.std(dim=0) - 3.46).abs().max() < 0.5
    assert torch.corrcoef(decibels.T)[0, 1].abs() < 0.2


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 30), st.integers(0, 1000))
def test_mixture_is_the_sum_of_its_stems(rows, gain_db, seed):
    make_item = make(rows, seed, gain_db=gain_db, with_stems=True)
    for key in ("a_0001", "d_0007"):
        mixtures, stems, _ = make_item(key)
        assert stems.shape == (3, 50)
        torch.testing.assert_close(stems.sum(dim=0), mixtures[0])
        levels = [level(key[0], stem, int(key[-4:])) for stem in STEMS]
        ratio = stems / torch.tensor(levels)[:, None]
        torch.testing.assert_close(ratio, ratio[:1, :1].expand(3, 50))


def test_share_of_silent_and_single_stem_partners(rows):
    make_item = make(rows, single_stem_share=0.3, silent_share=0.2)
    stem_of_level = {
        level(song, stem, i) * 512: (song, stem)
        for song, count in SEGMENTS.items()
        for stem, i in itertools.product(STEMS, range(count))
    }
    kinds = {0.0: [], 0.25: [], 0.75: []}
    for epoch, (key, row) in itertools.product(range(100), rows.items()):
        make_item.set_epoch(epoch)
        mixtures = make_item(key)[0]
        assert segment_at(mixtures[0])[0] == row["song"]
        value = mixtures[1][0].item() * 512
        assert torch.equal(mixtures[1] * 512, torch.full((50,), value))
        kinds[value % 1].append((row["song"], value))
    single = [(song, *stem_of_level[value]) for song, value in kinds[0.25]]
    assert not any(song == partner for song, partner, _ in single)
    assert {stem for _, _, stem in single} == set(STEMS)
    assert not any(value for _, value in kinds[0.0])
    # Of 1600 draws; 0.04 and 0.046 are four standard errors.
    items = sum(map(len, kinds.values()))
    assert len(kinds[0.0]) / items == pytest.approx(0.2, abs=0.04)
    assert len(kinds[0.25]) / items == pytest.approx(0.3, abs=0.046)


def test_single_stem_sounds_if_one_does(tmp_path):
    rows = make_rows(tmp_path)
    for song, stem in itertools.product("abd", ("bass", "vocals")):
        path = rows[f"{song}_0000"]["tracks"][stem]
        soundfile.write(path, np.full(1000, 2e-5), RATE, subtype="FLOAT")
    make_item = make(rows, single_stem_share=1.0)
    drums = {
        round(level(song, "drums", i) * 512)
        for song in "abd"
        for i in range(SEGMENTS[song])
    }
    for epoch in range(30):
        make_item.set_epoch(epoch)
        value = make_item("c_0000")[0][1][0].item() * 512
        assert round(value) in drums


def test_silent_songs_stay_finite(tmp_path):
    rows = make_rows(tmp_path)
    for path in {p for row in rows.values() for p in row["tracks"].values()}:
        soundfile.write(path, np.zeros(1000), RATE)
    make_item = make(rows, gain_db=6, single_stem_share=0.5, silent_share=0.2)
    for key in rows:
        mixtures, _, skipped = make_item(key)
        assert torch.equal(mixtures, torch.zeros(2, 50))
        assert skipped == []


# ------------------------------------------------------------ unreadable files


def test_unreadable_segment_is_replaced_and_named(tmp_path):
    rows = make_rows(tmp_path)
    broken = Path(rows["d_0000"]["tracks"]["drums"])
    sig, _ = soundfile.read(broken)
    sig[150:200] = np.nan  # segment 3 of 8
    soundfile.write(broken, sig, RATE, subtype="FLOAT")
    make_item = make(rows, seed=1, with_stems=True)
    mixtures, stems, skipped = make_item("d_0003")
    assert len(skipped) == 1
    assert "d_drums.wav: NaN or infinite samples" in skipped[0][1]
    assert segment_at(mixtures[0]) != ("d", 3)
    torch.testing.assert_close(stems.sum(dim=0), mixtures[0])
    assert same(make_item("d_0003"), (mixtures, stems, skipped))


def test_evaluation_goes_on_without_a_readable_partner(tmp_path):
    rows = make_rows(tmp_path)
    for song in "bcd":
        Path(rows[f"{song}_0000"]["tracks"]["bass"]).write_bytes(b"")
    mixtures, stems, skipped = make(rows, with_stems=True)("a_0002")
    assert segment_at(mixtures[0]) == ("a", 2)
    torch.testing.assert_close(stems.sum(dim=0), mixtures[0])
    assert not mixtures[1].any()
    assert len(skipped) == 20
    with pytest.raises(UnreadableAudio, match=r"after 20 tries: .* is empty"):
        make(rows)("a_0002")


# ------------------------------------------------------------------- the rest


def test_one_song_has_no_partner(tmp_path):
    rows = make_rows(tmp_path, {"a": 3})
    with pytest.raises(ValueError, match="2 songs, got 3 segments of 1 songs"):
        make(rows)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"silent_share": 0.6, "single_stem_share": 0.6}, "got 0.6 and 0.6"),
        ({"gain_db": -1}, "gain_db and seed from 0, got -1 and 0"),
        ({"channel": "side"}, "channel must be one of mean, left"),
    ],
)
def test_impossible_options(rows, options, match):
    with pytest.raises(ValueError, match=match):
        make(rows, **options)


# ------------------------------------------------- levels, channels, changes


def song_row(song, files, start):
    """A row without stems, of a song of 8 s."""
    return {
        "song": song,
        "tracks": {"mixture": files},
        "start": start,
        "duration": SECONDS,
        "song_seconds": 8.0,
        "has_stems": False,
    }


def stereo_rows(folder, left=0.5, right=-0.25):
    """Two songs of constant level, each in two files that are added."""
    rows = {}
    for song, level in (("a", 1.0), ("b", 0.125)):
        files = [str(folder / f"{song}{i}.wav") for i in range(2)]
        for path in files:
            sig = np.full((800, 2), [level * left / 2, level * right / 2])
            soundfile.write(path, sig, RATE, subtype="FLOAT")
        rows[f"{song}_0000"] = song_row(song, files, 0.0)
    return rows


@pytest.mark.parametrize(
    ("channel", "levels"),
    [
        ("mean", {0.125}),
        ("left", {0.5}),
        ("right", {-0.25}),
        ("random", {0.5, -0.25}),
    ],
)
def test_channel_of_stereo_files(tmp_path, channel, levels):
    make_item = make(stereo_rows(tmp_path), channel=channel)
    heard, pairs = set(), set()
    for epoch in range(20):
        make_item.set_epoch(epoch)
        mixtures, _, _ = make_item("a_0000")
        heard.add(mixtures[0, 0].item())
        pairs.add(tuple(np.sign(mixtures[:, 0].tolist())))
        assert (mixtures == mixtures[:, :1]).all()
    assert heard == levels
    # each mixture draws its own
    assert len(pairs) == len(levels) ** 2


def test_equal_levels(tmp_path):
    rows = stereo_rows(tmp_path)
    mixtures, _, _ = make(rows, equal_levels=True)("b_0000")
    assert mixtures[:, 0].tolist() == [0.125 / 8, 0.125 / 8]
    # silence stays
    for path in rows["b_0000"]["tracks"]["mixture"]:
        soundfile.write(path, np.zeros((200, 2)), RATE)
    mixtures, _, _ = make(rows, equal_levels=True)("a_0000")
    assert mixtures[:, 0].tolist() == [0.125, 0.0]


def ramp_rows(folder):
    """Songs whose samples tell their place: 0.001 a sample, 8 s."""
    rows = {}
    for song, sign in (("a", 1), ("b", -1)):
        path = str(folder / f"{song}.wav")
        soundfile.write(path, sign * np.arange(800) / 1000, RATE, "FLOAT")
        rows[f"{song}_0000"] = song_row(song, path, 4.0)
    return rows


def test_augmentation_of_each_mixture(tmp_path):
    rows = ramp_rows(tmp_path)
    plain = make(rows, gain_db=3.0)
    shifted = make(
        rows,
        gain_db=3.0,
        augmentation=Augmentation(time_shift_seconds=2.0, polarity_share=0.5),
    )
    flips, starts = set(), set()
    for epoch in range(30):
        plain.set_epoch(epoch)
        shifted.set_epoch(epoch)
        before, after = plain("a_0000")[0], shifted("a_0000")[0]
        assert torch.equal(after, shifted("a_0000")[0])
        # the gains stay what they were: a sample later is as much more
        steps = before.diff().mean(1), after.diff().mean(1)
        torch.testing.assert_close(steps[0].abs(), steps[1].abs())
        sign = torch.sign(steps[1] / steps[0])
        flips.add(tuple(sign.tolist()))
        gains = steps[0] / torch.tensor([0.001, -0.001])
        seconds = after[:, 0] * sign / gains * torch.tensor([10.0, -10.0])
        assert ((seconds > 1.99) & (seconds < 6.01)).all()
        starts.add(tuple(seconds.tolist()))
    assert len(flips) == 4 and len(starts) == 30


def test_evaluation_hears_the_mean_of_what_is_there(tmp_path):
    rows = ramp_rows(tmp_path)
    mixtures, _, _ = make(
        stereo_rows(tmp_path), channel="left", with_stems=True
    )("a_0000")
    assert mixtures[0, 0] == 0.125
    change = Augmentation(time_shift_seconds=2.0, polarity_share=1.0)
    mixtures, _, _ = make(rows, augmentation=change, with_stems=True)("a_0000")
    assert mixtures[0, 0].item() == pytest.approx(0.4)
