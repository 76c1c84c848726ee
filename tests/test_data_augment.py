"""Augmentation: tones and clicks end up where physics puts them."""

import math
import pickle

import numpy as np
import pytest
import torch

from trackformer_sb.data.augment import LARGEST, Augmentation, Change

RATE = 44100
SECONDS = 3
TIME = SECONDS * RATE
ALL_ON = {
    "polarity_share": 0.5,
    "time_shift_seconds": 2.0,
    "speed_percent": 10.0,
    "time_stretch_percent": 20.0,
    "pitch_shift_semitones": 4.0,
}
FIELDS = dict(zip(ALL_ON, Change._fields))


def change_all(change, whole, num_samples=TIME):
    """The first `num_samples` of a changed song."""
    duration, song_seconds = num_samples / RATE, whole.shape[-1] / RATE
    _, seconds = Augmentation.source(change, 0.0, duration, song_seconds)
    sig = whole[..., : round(seconds * RATE)]
    return Augmentation().apply(change, sig, num_samples, RATE)


def tone(frequency, num_samples=2 * TIME):
    """A sine of amplitude 1, in double computed and rounded once."""
    time = torch.arange(num_samples, dtype=torch.float64) / RATE
    return torch.sin(2 * torch.pi * frequency * time).float()


def frequency_of(sig):
    """The strongest frequency, to 0.02 Hz for a tone of 3 s."""
    window = torch.hann_window(len(sig))
    size = 8 * 2 ** math.ceil(math.log2(len(sig)))
    return int(torch.fft.rfft(sig * window, size).abs().argmax()) * RATE / size


@pytest.mark.parametrize(
    "key, value",
    [
        *((key, value) for key in ALL_ON for value in (-0.01, math.nan)),
        *((key, 51) for key in ALL_ON if key != "time_shift_seconds"),
    ],
)
def test_out_of_range(key, value):
    message = f"expected {key} from 0 to {LARGEST[key]}, got {value}"
    with pytest.raises(ValueError, match=message):
        Augmentation(**{key: value})


def test_off_is_the_identity():
    sig = torch.randn(2, 1000)
    assert Augmentation().is_off
    change = Augmentation().draw(np.random.default_rng(0))
    assert change == Change(seed=change.seed)
    # nothing is rounded or moved back, even at the end of a song
    source = Augmentation.source(change, 0.1 + 0.2, 3.0, 3.3)
    assert source == (0.1 + 0.2, 3.0)
    assert torch.equal(Augmentation().apply(change, sig, 1000, RATE), sig)


@pytest.mark.parametrize("key", ALL_ON)
def test_kinds_are_drawn_independently(key):
    alone = Augmentation(**{key: ALL_ON[key]})
    assert not alone.is_off
    for seed in range(20):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        every = Augmentation(**ALL_ON).draw(rngs[0])
        field = FIELDS[key]
        expected = {field: getattr(every, field), "seed": every.seed}
        assert alone.draw(rngs[1]) == Change(**expected)
        assert rngs[0].random() == rngs[1].random()


def test_draws_fill_their_ranges():
    rng = np.random.default_rng(0)
    augmentation = Augmentation(0.25, 2.0, 1.7, 20.0, 4.0)
    drawn = np.array([augmentation.draw(rng) for _ in range(4000)])
    sign, shift, speed, tempo, semitones, _ = drawn.T
    assert np.mean(sign == -1) == pytest.approx(0.25, abs=0.03)
    for values, middle, limit in (
        (shift, 0, 2),
        (tempo, 1, 0.2),
        (semitones, 0, 4),
    ):
        # quartiles of a uniform distribution
        quantiles = (
            np.quantile(values, (0, 0.25, 0.5, 0.75, 1)) - middle
        ) / limit
        assert quantiles == pytest.approx([-1, -0.5, 0, 0.5, 1], abs=0.06)
    # the multiples of half a percent up to 1.7 %, equally often
    steps, counts = np.unique(speed, return_counts=True)
    assert steps.tolist() == [0.985, 0.99, 0.995, 1, 1.005, 1.01, 1.015]
    assert counts / 4000 == pytest.approx(1 / 7, abs=0.03)


@pytest.mark.parametrize(
    "change, source",
    [
        (Change(semitones=7.0), (10.0, 4.0)),
        (Change(shift_seconds=-11.0), (0.0, 4.0)),
        (Change(shift_seconds=30.0), (16.0, 4.0)),
        (Change(speed=1.5, tempo=1.25), (10.0, 7.5)),
        (Change(speed=1.5, tempo=2.0), (8.0, 12.0)),
        (Change(shift_seconds=-5.0, speed=8.0), (0.0, 20.0)),
    ],
)
def test_source_is_in_the_song(change, source):
    assert Augmentation.source(change, 10.0, 4.0, 20.0) == source


@pytest.mark.parametrize(
    "change",
    [
        Change(sign=-1.0),
        Change(semitones=-12.0),
        Change(semitones=0.5),
        Change(tempo=0.6),
        Change(tempo=1.4),
        Change(speed=1.005),
        Change(speed=1.1, tempo=0.8, semitones=-5.0),
    ],
)
def test_a_tone_moves_and_keeps_its_level(change):
    sig = change_all(change, tone(440))
    assert sig.shape == (TIME,)
    # the pitch is rounded to at most 0.25 %, 4.3 cents
    expected = 440 * change.speed * 2 ** (change.semitones / 12)
    assert frequency_of(sig) == pytest.approx(expected, rel=0.0026)
    middle = sig[RATE // 2 : -RATE // 2]
    assert middle.square().mean() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    "change", [Change(tempo=0.8), Change(semitones=3.0), Change(speed=0.9)]
)
def test_clicks_move_with_the_tempo(change):
    sig = torch.zeros(2 * TIME)
    seconds = (0.2, 0.9, 2.1)
    sig[[round(second * RATE) for second in seconds]] = 1
    sig = change_all(change, sig).abs()
    for second in seconds:
        due = round(second / change.seconds_read * RATE)
        around = sig[due - RATE // 10 : due + RATE // 10]
        # within half a window
        assert abs(int(around.argmax()) - RATE // 10) < 1024


@pytest.mark.parametrize("length", [1, 500])
def test_silence_and_short_signals(length):
    change = Change(speed=1.1, tempo=0.9, semitones=1.0)
    for sig in (torch.zeros(length), torch.randn(length)):
        changed = Augmentation().apply(change, sig, 300, 8000)
        assert changed.shape == (300,) and changed.isfinite().all()
        assert bool(changed.any()) == bool(sig.any())


def dropout(sig):
    """Something random of [channels, time]."""
    assert sig.shape == (1, 300)
    return torch.nn.functional.dropout(sig, 0.5)


def test_a_callable_is_seeded_for_each_mixture():
    augmentation = Augmentation(transform=dropout)
    # as in a worker of a DataLoader
    copy = pickle.loads(pickle.dumps(augmentation))
    assert not augmentation.is_off
    rng = np.random.default_rng(0)
    first, second = augmentation.draw(rng), augmentation.draw(rng)
    before = torch.get_rng_state()
    sig = torch.ones(300)
    result = augmentation.apply(first, sig, 300, RATE)
    assert set(result.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(copy.apply(first, sig, 300, RATE), result)
    assert not torch.equal(augmentation.apply(second, sig, 300, RATE), result)
    # nothing else draws other numbers for it
    assert torch.equal(torch.get_rng_state(), before)
