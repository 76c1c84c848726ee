"""Augmentation: tones and clicks end up where physics puts them."""

import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torchaudio.functional import resample

from trackformer_sb.data import augment as augment_module
from trackformer_sb.data.audio import FILTER_BETA, FILTER_ROLLOFF, FILTER_WIDTH
from trackformer_sb.data.augment import Augmentation, Change

REAL_MUSIC = Path(__file__).parents[2] / "shared" / "data" / "stems"
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
FIELDS = dict(zip(ALL_ON, Change._fields, strict=True))

factors = st.floats(0.6, 1.4)
changes = st.builds(
    Change,
    sign=st.sampled_from((1.0, -1.0)),
    speed=st.integers(101, 299).map(lambda steps: steps / 200),
    tempo=factors,
    semitones=st.floats(-12, 12),
)


def change_all(change, whole, num_samples=TIME, sample_rate=RATE):
    """The first `num_samples` of a changed song."""
    duration = num_samples / sample_rate
    song_seconds = whole.shape[-1] / sample_rate
    start, seconds = Augmentation.source(change, 0.0, duration, song_seconds)
    first, count = round(start * sample_rate), round(seconds * sample_rate)
    sig = whole[..., first : first + count]
    return Augmentation.apply(change, sig, num_samples, sample_rate)


def tone(frequency, num_samples=2 * TIME):
    """A sine of amplitude 1, in double computed and rounded once."""
    time = torch.arange(num_samples, dtype=torch.float64) / RATE
    return torch.sin(2 * torch.pi * frequency * time).float()


def frequency_of(sig):
    """The strongest frequency, to 0.02 Hz for a tone of 3 s."""
    window = torch.hann_window(len(sig))
    size = 8 * 2 ** math.ceil(math.log2(len(sig)))
    return int(torch.fft.rfft(sig * window, size).abs().argmax()) * RATE / size


def clicks(seconds, num_samples=2 * TIME):
    """Ones in silence."""
    sig = torch.zeros(num_samples)
    sig[[round(second * RATE) for second in seconds]] = 1
    return sig


def music(seconds, batch=2):
    """Decaying chords over noise, [batch, time]: tones, onsets and hiss."""
    rng = np.random.default_rng(0)
    time = np.arange(round(seconds * RATE)) / RATE
    sig = 0.01 * rng.standard_normal((batch, len(time)))
    for beat in np.arange(0, seconds, 0.4):
        decay = np.where(time >= beat, np.exp(-6 * (time - beat)), 0)
        for frequency in rng.uniform(150, 3000, size=(4, batch, 1)):
            sig += 0.1 * decay * np.sin(2 * np.pi * frequency * time)
    return torch.from_numpy(sig).float()


# --- arguments ---------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("polarity_share", -0.01, "from 0 to 1"),
        ("polarity_share", 1.01, "from 0 to 1"),
        ("time_shift_seconds", -1.0, "a finite number from 0"),
        ("time_shift_seconds", math.inf, "a finite number from 0"),
        ("speed_percent", -5, "0, or from 0.5, the step, to below 50"),
        # would round to no change at all
        ("speed_percent", 0.4, "0, or from 0.5, the step, to below 50"),
        ("speed_percent", 50, "0, or from 0.5, the step, to below 50"),
        ("time_stretch_percent", -0.1, "from 0 to below 50"),
        ("time_stretch_percent", 50, "from 0 to below 50"),
        ("pitch_shift_semitones", -1, "from 0 to 12"),
        ("pitch_shift_semitones", 12.1, "from 0 to 12"),
        *((key, math.nan, ".*") for key in ALL_ON),
    ],
)
def test_out_of_range(key, value, expected):
    with pytest.raises(
        ValueError, match=f"expected {key} {expected}, got {value}"
    ):
        Augmentation(**{key: value})


def test_ends_of_the_ranges_are_allowed():
    Augmentation(1, 1e6, 0.5, 49.9, 12)
    Augmentation(0, 0, 49.5, 0, 0)


def test_off_by_default():
    assert Augmentation().is_off
    assert Augmentation(0, 0, 0, 0, 0).is_off
    for key, value in ALL_ON.items():
        assert not Augmentation(**{key: value}).is_off


def test_off_is_the_identity():
    rng = np.random.default_rng(0)
    sig = torch.randn(2, 1000)
    for _ in range(20):
        change = Augmentation().draw(rng)
        assert change == Change()
        # nothing is rounded or moved back, even at the end of a song
        source = Augmentation.source(change, 0.1 + 0.2, 3.0, 3.3)
        assert source == (0.1 + 0.2, 3.0)
        assert Augmentation.apply(change, sig, 1000, RATE) is sig


# --- draws -------------------------------------------------------------------


def test_always_as_many_draws():
    rngs = [np.random.default_rng(7) for _ in range(3)]
    Augmentation().draw(rngs[0])
    Augmentation(**ALL_ON).draw(rngs[1])
    rngs[2].random(5)
    states = [rng.bit_generator.state for rng in rngs]
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("key", ALL_ON)
def test_kinds_are_drawn_independently(key):
    for seed in range(20):
        every = Augmentation(**ALL_ON).draw(np.random.default_rng(seed))
        alone = Augmentation(**{key: ALL_ON[key]}).draw(
            np.random.default_rng(seed)
        )
        field = FIELDS[key]
        assert alone == Change()._replace(**{field: getattr(every, field)})


def test_draws_fill_their_ranges():
    rng = np.random.default_rng(0)
    augmentation = Augmentation(0.25, 2.0, 1.7, 20.0, 4.0)
    drawn = np.array([augmentation.draw(rng) for _ in range(4000)])
    sign, shift, speed, tempo, semitones = drawn.T
    assert np.mean(sign == -1) == pytest.approx(0.25, abs=0.03)
    assert set(sign) == {1, -1}
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
        assert np.all(np.abs(values - middle) <= limit)
    # the multiples of half a percent up to 1.7 %, equally often
    steps, counts = np.unique(speed, return_counts=True)
    assert steps.tolist() == [0.985, 0.99, 0.995, 1, 1.005, 1.01, 1.015]
    assert counts / 4000 == pytest.approx(1 / 7, abs=0.03)


@pytest.mark.parametrize("share, signs", [(0, {1}), (1, {-1})])
def test_polarity_never_and_always(share, signs):
    rng = np.random.default_rng(0)
    augmentation = Augmentation(polarity_share=share, speed_percent=1)
    assert {augmentation.draw(rng).sign for _ in range(200)} == signs


def test_same_generator_same_result():
    augmentation = Augmentation(**ALL_ON)
    # as in a worker of a DataLoader
    copy = pickle.loads(pickle.dumps(augmentation))
    sig = music(SECONDS)

    def result(augmentation, seed):
        change = augmentation.draw(np.random.default_rng(seed))
        return augmentation.apply(change, sig, TIME, RATE)

    assert torch.equal(result(augmentation, 1), result(copy, 1))
    assert not torch.equal(result(augmentation, 1), result(augmentation, 2))


# --- source ------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, source",
    [
        (Change(sign=-1.0), (10.0, 4.0)),
        (Change(semitones=7.0), (10.0, 4.0)),
        (Change(shift_seconds=-1.5), (8.5, 4.0)),
        (Change(shift_seconds=-11.0), (0.0, 4.0)),
        (Change(shift_seconds=30.0), (16.0, 4.0)),
        (Change(speed=1.5), (10.0, 6.0)),
        (Change(tempo=0.75), (10.0, 3.0)),
        (Change(speed=1.5, tempo=1.25), (10.0, 7.5)),
        (Change(speed=1.5, tempo=2.0), (8.0, 12.0)),
        (Change(shift_seconds=-5.0, speed=8.0), (0.0, 20.0)),
    ],
)
def test_source(change, source):
    assert Augmentation.source(change, 10.0, 4.0, 20.0) == source


@given(st.floats(-5, 5), factors, factors, st.floats(0, 20), st.floats(0.1, 40))
def test_source_is_in_the_song(shift, speed, tempo, start, song_seconds):
    change = Change(shift_seconds=shift, speed=speed, tempo=tempo)
    assume(shift != 0 or change.seconds_read != 1)
    begin, seconds = Augmentation.source(change, start, 3.0, song_seconds)
    assert 0 <= begin <= song_seconds
    assert begin + seconds <= song_seconds + 1e-9
    # all that is needed, unless the song is too short
    assert seconds == min(3.0 * change.seconds_read, song_seconds)


# --- physics -----------------------------------------------------------------


def test_polarity_is_an_exact_sign():
    sig = music(SECONDS)
    kept = sig.clone()
    assert torch.equal(change_all(Change(sign=-1.0), sig), -sig)
    for change in (Change(speed=1.1), Change(tempo=0.9, semitones=1.0)):
        flipped = change_all(change._replace(sign=-1.0), sig)
        assert torch.equal(flipped, -change_all(change, sig))
    assert torch.equal(sig, kept)


@pytest.mark.parametrize("semitones", (-12, -3.5, -1, 0.03, 0.5, 2, 7, 12))
def test_pitch_shift_moves_a_tone(semitones):
    sig = change_all(Change(semitones=semitones), tone(440))
    assert sig.shape == (TIME,)
    # 0.25 %, the rounding of the factor, are 4.3 cents
    cents = 1200 * math.log2(frequency_of(sig) / 440)
    assert cents == pytest.approx(100 * semitones, abs=4.4)
    # in amplitude as well, and with no other tone
    middle = sig[RATE // 2 : -RATE // 2]
    assert middle.square().mean() == pytest.approx(0.5, rel=0.01)
    peak = torch.fft.rfft(middle * torch.hann_window(len(middle))).abs()
    near = slice(int(peak.argmax()) - 20, int(peak.argmax()) + 21)
    rest = peak.square().sum() - peak[near].square().sum()
    assert rest / peak.square().sum() < 1e-6


def test_whole_semitones_are_off_by_two_cents_at_most():
    # the most is that of a just fifth, 2 / 3
    for semitones in range(-12, 13):
        sig = change_all(Change(semitones=semitones), tone(440))
        cents = 1200 * math.log2(frequency_of(sig) / 440)
        assert cents == pytest.approx(100 * semitones, abs=2.2)


@pytest.mark.parametrize("tempo", (0.6, 0.9, 1.06, 1.4))
def test_stretch_keeps_a_tone(tempo):
    sig = change_all(Change(tempo=tempo), tone(440))
    assert sig.shape == (TIME,)
    assert frequency_of(sig) == pytest.approx(440, rel=1e-4)
    middle = sig[RATE // 2 : -RATE // 2]
    assert middle.square().mean() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("speed", (0.6, 0.99, 1.005, 1.25))
def test_speed_moves_a_tone(speed):
    sig = change_all(Change(speed=speed), tone(440))
    assert sig.shape == (TIME,)
    assert frequency_of(sig) == pytest.approx(440 * speed, rel=1e-4)
    assert sig.square().mean() == pytest.approx(0.5, rel=0.01)


def test_all_at_once_moves_a_tone():
    change = Change(speed=1.1, tempo=0.8, semitones=-5.0)
    sig = change_all(change, tone(440))
    expected = 440 * 1.1 * 2 ** (-5 / 12)
    assert frequency_of(sig) == pytest.approx(expected, rel=0.0025)


@pytest.mark.parametrize(
    "change",
    [
        Change(tempo=0.8),
        Change(tempo=1.2),
        Change(semitones=3.0),
        Change(semitones=-0.7),
        Change(speed=0.9),
        Change(speed=1.1, tempo=0.8, semitones=-5.0),
    ],
)
def test_clicks_move_with_the_tempo(change):
    seconds = (0.2, 0.9, 1.35, 2.1)
    sig = change_all(change, clicks(seconds)).abs()
    factor = change.seconds_read
    for second in seconds:
        due = round(second / factor * RATE)
        around = sig[due - RATE // 10 : due + RATE // 10]
        off = (int(around.argmax()) - RATE // 10) / RATE
        if change == Change(speed=0.9):
            assert abs(off) <= 1 / RATE
        # a click stays where it is in its window, whose middle alone is right
        assert abs(off) < 0.007
        # it is one click still, within 3 ms
        energy = around.square()
        peak = int(energy.argmax())
        assert energy[peak - 66 : peak + 67].sum() > 0.7 * energy.sum()


@pytest.mark.parametrize(
    "change",
    [
        Change(tempo=0.9),
        # 0.2 % off, as pitch is rounded; without a vocoder that made up for it
        # the last click would be 38 ms off
        Change(semitones=0.05),
    ],
)
def test_clicks_do_not_drift(change):
    # the last of 20 s is no more off than the first
    sig = clicks((1, 18), 20 * RATE)
    changed = Augmentation.apply(change, sig, 22 * RATE, RATE)
    for second in (1, 18):
        due = round(second / change.seconds_read * RATE)
        around = changed[due - 4000 : due + 4000].abs()
        assert abs(int(around.argmax()) - 4000) < 150
        # 2 / pi where resampling puts it between two samples
        assert around.max() > 0.6


@pytest.mark.parametrize("speed", (0.97, 1.005, 1.3))
def test_speed_alone_is_resampling_alone(speed, monkeypatch):
    monkeypatch.setattr(augment_module, "_stretch", None)
    whole = music(2 * SECONDS)
    sig = change_all(Change(speed=speed), whole)
    expected = resample(
        whole,
        round(200 * speed),
        200,
        lowpass_filter_width=FILTER_WIDTH,
        rolloff=FILTER_ROLLOFF,
        resampling_method="sinc_interp_kaiser",
        beta=FILTER_BETA,
    )
    # but at the end, where the segment is cut
    torch.testing.assert_close(sig[:, :-100], expected[:, : TIME - 100])


def test_speed_up_does_not_alias():
    # 20 kHz would be at 26 kHz, beyond the Nyquist frequency
    sig = change_all(Change(speed=1.3), tone(20000))
    assert sig[1000:-1000].abs().max() < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        Change(tempo=0.8),
        Change(tempo=1.2),
        Change(semitones=2.0),
        Change(semitones=-2.0),
        Change(speed=1.05),
    ],
)
def test_energy_is_kept(change):
    # frames that are rotated bin by bin cancel: that loses 3 dB
    whole = music(2 * SECONDS)
    kept = whole[..., : round(TIME * change.seconds_read)].square().mean()
    ratio = change_all(change, whole).square().mean() / kept
    assert abs(10 * math.log10(ratio)) < 0.5


# --- the vocoder -------------------------------------------------------------


def stretch_reference(sig, rate, num_samples, n_fft):
    """Identity phase locking in loops over frames, bins and samples."""
    hop = n_fft // 4
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)

    def spectrum(centre):
        frame = np.zeros(n_fft)
        for i in range(n_fft):
            at = centre - n_fft // 2 + i
            if 0 <= at < len(sig):
                frame[i] = window[i] * sig[at]
        return np.fft.rfft(frame)

    def is_peak(magnitude, f):
        return magnitude[f] == max(magnitude[max(0, f - 2) : f + 3])

    total = np.zeros(num_samples + 2 * n_fft)
    weight = np.zeros(num_samples + 2 * n_fft)
    last = None
    for k in range(math.ceil(num_samples / hop) + 1):
        now = spectrum(round(k * hop * rate))
        before = spectrum(round(k * hop * rate) - hop)
        magnitude = np.abs(now)
        peaks = [f for f in range(len(now)) if is_peak(magnitude, f)]
        frame = now.copy()
        if last is not None:
            for f in range(len(now)):
                p = min(peaks, key=lambda peak: abs(peak - f))
                going_on = np.angle(now[p]) - np.angle(before[p])
                turn = np.angle(last[p]) + going_on - np.angle(now[p])
                frame[f] *= np.exp(1j * turn)
        last = frame
        begin = k * hop + n_fft // 2
        total[begin : begin + n_fft] += window * np.fft.irfft(frame)
        weight[begin : begin + n_fft] += window**2
    return (total / np.maximum(weight, 1e-9))[n_fft : n_fft + num_samples]


@pytest.mark.parametrize("rate", (0.5, 0.83, 1.0, 1.27, 2.4))
@pytest.mark.parametrize("n_fft", (16, 64))
def test_vocoder_equals_its_reference(rate, n_fft):
    sig = torch.randn(500, dtype=torch.float64)
    # beyond the end of the input as well
    num_samples = round(520 / rate)
    stretched = augment_module._stretch(sig, rate, num_samples, n_fft)
    expected = stretch_reference(sig.numpy(), rate, num_samples, n_fft)
    np.testing.assert_allclose(stretched.numpy(), expected, atol=1e-6)


def test_vocoder_at_rate_one_is_the_identity():
    sig = torch.randn(2, 5000)
    stretched = augment_module._stretch(sig, 1.0, 5000, 256)
    torch.testing.assert_close(stretched, sig, atol=1e-5, rtol=0)


def test_nearest_peaks():
    magnitude = torch.tensor([[[0.0, 1, 0, 0, 0, 2, 1, 3, 0], [5.0] + [0] * 8]])
    peaks = augment_module._nearest_peaks(magnitude)
    # bin 4 is as far from 1 as from 7; 5 is no peak, 7 being near and stronger
    assert peaks[0, 0].tolist() == [1, 1, 1, 1, 1, 7, 7, 7, 7]
    # in silence every bin is a peak
    assert peaks[0, 1].tolist() == [0, 0, 3, 3, 4, 5, 6, 7, 8]


def test_sound_after_silence_is_there():
    # phases that go on from silence must not be nothing
    sig = torch.cat((torch.zeros(RATE), tone(440, RATE)))
    stretched = change_all(Change(tempo=0.9), sig, round(2 * RATE / 0.9))
    begin = round(RATE / 0.9)
    assert stretched[: begin - 3000].abs().max() == 0
    after = stretched[begin + 3000 : -3000]
    assert after.square().mean() == pytest.approx(0.5, rel=0.01)


def test_window_follows_the_rate():
    # 46 ms or so at any rate; what is above the smallest is a power of two
    sizes = {rate: augment_module._window_size(rate) for rate in (4, 100)}
    assert sizes == {4: 16, 100: 16}
    assert augment_module._window_size(8000) == 512
    assert augment_module._window_size(44100) == 2048
    assert augment_module._window_size(48000) == 2048
    assert augment_module._window_size(96000) == 4096


# --- shapes and odd inputs ---------------------------------------------------


@given(
    changes,
    st.integers(0, 3000),
    st.integers(1, 3000),
    st.sampled_from((4, 8000, 44100)),
    st.booleans(),
)
def test_exactly_as_long_as_asked(change, time, num_samples, rate, silent):
    sig = torch.zeros(time) if silent else 0.3 * torch.randn(time)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = Augmentation.apply(change, sig, num_samples, rate)
    assert changed.shape == (num_samples,)
    assert changed.dtype == torch.float32
    assert torch.isfinite(changed).all()
    if silent or time == 0:
        assert torch.equal(changed, torch.zeros(num_samples))


@pytest.mark.parametrize("change", (Change(speed=1.1), Change(tempo=0.9)))
def test_zeros_where_the_song_is_too_short(change):
    sig = change_all(change, music(1.0))
    end = round(RATE / change.seconds_read)
    assert sig[:, end - 2000 : end].square().mean() > 1e-5
    # nothing but what the last window reaches
    assert sig[:, end + 2048 :].abs().max() == 0


def test_unchanged_but_of_another_length():
    sig = torch.arange(1.0, 5.0)
    longer = Augmentation.apply(Change(), sig, 6, RATE)
    assert longer.tolist() == [1, 2, 3, 4, 0, 0]
    assert Augmentation.apply(Change(), sig, 3, RATE).tolist() == [1, 2, 3]


def test_empty_batch():
    sig = torch.zeros(0, 2, 500)
    changed = Augmentation.apply(Change(tempo=0.9), sig, 300, RATE)
    assert changed.shape == (0, 2, 300)


@pytest.mark.parametrize(
    "change", (Change(speed=0.9), Change(tempo=1.1, semitones=3.0))
)
def test_signals_of_a_batch_do_not_meet(change):
    sig = music(0.5, batch=6)
    alone = [Augmentation.apply(change, one, 20000, RATE) for one in sig]
    together = Augmentation.apply(change, sig.view(2, 3, -1), 20000, RATE)
    assert together.shape == (2, 3, 20000)
    torch.testing.assert_close(together.view(6, -1), torch.stack(alone))
    # dimensions that no view can merge
    strided = sig.view(2, 3, -1).transpose(0, 1).contiguous().transpose(0, 1)
    again = Augmentation.apply(change, strided, 20000, RATE)
    torch.testing.assert_close(again, together)


def test_double_stays_double():
    change = Change(speed=1.1, tempo=0.9)
    single = music(0.5)
    double = Augmentation.apply(change, single.double(), 20000, RATE)
    assert double.dtype == torch.float64
    changed = Augmentation.apply(change, single, 20000, RATE)
    assert (double - changed).square().mean() < 1e-3 * double.square().mean()


@pytest.mark.skipif(not REAL_MUSIC.is_dir(), reason="no music beside the code")
@pytest.mark.parametrize("change", (Change(tempo=0.9), Change(tempo=1.06)))
def test_real_music_keeps_its_energy(change):
    songs = sorted(path for path in REAL_MUSIC.iterdir() if path.is_dir())
    for song in songs[:3]:
        mixture = 0
        for path in sorted(song.glob("*.ogg")):
            with soundfile.SoundFile(path) as file:
                file.seek(file.frames // 2)
                sig = file.read(4 * RATE, dtype="float32", always_2d=True)
            sig = torch.from_numpy(sig.mean(axis=1))
            sig = torch.nn.functional.pad(sig, (0, 4 * RATE - len(sig)))
            mixture = mixture + sig
        kept = mixture[: round(TIME * change.seconds_read)].square().mean()
        ratio = change_all(change, mixture).square().mean() / kept
        assert abs(10 * math.log10(ratio)) < 0.5
