"""The demo band sounds like a band, and its folder is made once and whole."""

import json
from itertools import combinations

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from trackformer_sb.data import band
from trackformer_sb.data.band import STEMS, make_band, make_song
from trackformer_sb.data.synth import (
    TABLE_ROWS,
    TABLE_SIZE,
    Timbre,
    make_tables,
    read_tables,
)

RATE = 44100
SEEDS = range(8)
TINY = {"num_songs": 2, "seconds": 0.25, "sample_rate": 8000}


@pytest.fixture(scope="module")
def songs():
    return [make_song(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def scores():
    # The very score of make_song: its generator is the first of the song.
    return [
        band._compose(np.random.default_rng([seed, 0]), 24.0) for seed in SEEDS
    ]


def power_spectrum(sig):
    return np.abs(np.fft.rfft(sig)) ** 2, np.fft.rfftfreq(len(sig), 1 / RATE)


def centroid(sig):
    power, freqs = power_spectrum(sig)
    return (power * freqs).sum() / power.sum()


def share_above(sig, hertz):
    power, freqs = power_spectrum(sig)
    return power[freqs > hertz].sum() / power.sum()


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- songs -------------------------------------------------------------------


def test_a_seed_is_a_song():
    first, again, other = (make_song(seed, 8.0, 16000) for seed in (5, 5, 6))
    for name in STEMS:
        assert np.array_equal(first[name], again[name])
        assert not np.allclose(first[name], other[name], atol=1e-2)


def test_the_songs_of_this_version_are_the_recorded_ones():
    # Levels of the stems. Where this fails on purpose, raise band.VERSION.
    stems = make_song(7, 12.0, 16000)
    recorded = {
        "drums": 0.07249,
        "bass": 0.0384,
        "chords": 0.04194,
        "lead": 0.08519,
    }
    for name in STEMS:
        rms = np.sqrt(np.mean(np.square(stems[name], dtype=float)))
        assert rms == pytest.approx(recorded[name], abs=2e-5)


def test_stems_are_finite_audible_centred_and_leave_headroom(songs):
    for stems in songs:
        assert tuple(stems) == STEMS
        for sig in stems.values():
            assert sig.dtype == np.float32 and sig.shape == (24 * RATE,)
            assert np.isfinite(sig).all()
            assert np.abs(sig).max() <= 0.901
            assert np.sqrt(np.mean(sig**2)) > 0.01
            assert abs(sig.mean()) < 1e-3
        assert 0.5 < np.abs(sum(stems.values())).max() <= 0.901


def test_stems_are_not_copies_of_each_other(songs):
    for stems in songs:
        for one, other in combinations(STEMS, 2):
            assert abs(np.corrcoef(stems[one], stems[other])[0, 1]) < 0.2


def test_instruments_keep_to_their_registers(songs):
    for stems in songs:
        low = centroid(stems["bass"])
        assert low < 600
        assert low < centroid(stems["chords"])
        assert low < centroid(stems["lead"])
        assert share_above(stems["drums"], 5000) > 0.01
        assert share_above(stems["bass"], 5000) < 0.002


def test_44100_samples_a_second_are_of_use(songs):
    for stems in songs:
        assert share_above(stems["drums"], 12000) > 1e-3


def test_drums_come_in_hits_and_other_stems_in_partials(songs):
    def flatness(sig):
        frames = sig[: len(sig) // 4096 * 4096].reshape(-1, 4096)
        frames = frames[np.mean(frames**2, axis=1) > 1e-5] * np.hanning(4096)
        # 200 Hz to 4 kHz
        power = np.abs(np.fft.rfft(frames))[:, 19:372] ** 2 + 1e-9
        ratio = np.exp(np.log(power).mean(1)) / power.mean(1)
        return np.median(ratio)

    for stems in songs:
        assert flatness(stems["chords"]) < 0.5 * flatness(stems["drums"])
        assert flatness(stems["lead"]) < 0.5 * flatness(stems["drums"])


def test_songs_differ_in_tempo_key_meter_and_feel():
    scores = [
        band._compose(np.random.default_rng([seed, 0]), 24.0)
        for seed in range(40)
    ]
    tempos = [score.tempo for score in scores]
    assert 70 <= min(tempos) < 85 and 145 < max(tempos) <= 160
    assert len({score.tonic for score in scores}) == 12
    assert {score.mode for score in scores} == set(band.MODES)
    assert {score.bar for score in scores} == {12, 16}
    assert {score.swing > 0 for score in scores} == {False, True}


def test_chords_sound_in_the_key_of_the_score(songs, scores):
    for stems, score in zip(songs, scores, strict=True):
        power, freqs = power_spectrum(stems["chords"])
        inside = (freqs > 120) & (freqs < 550)  # fundamentals
        midi = 69 + 12 * np.log2(freqs[inside] / 440)
        chroma = np.bincount(
            np.round(midi).astype(int) % 12, power[inside], minlength=12
        )
        tones = {tone % 12 for chord in score.chords for tone in chord.tones}
        assert chroma[sorted(tones)].sum() > 0.9 * chroma.sum()
        assert len(tones) <= 8


def test_drums_hit_on_the_grid_of_the_score(songs, scores):
    for stems, score in zip(songs, scores, strict=True):
        bars = int(24 / score.time(score.bar)) + 1
        grid = np.array([score.time(i) for i in range(bars * score.bar)])
        # Sharp (differentiated) energy well above that of the 20 ms before.
        hop = RATE // 200
        sharp = np.diff(stems["drums"].astype(float), n=2) ** 2
        energy = np.add.reduceat(sharp, np.arange(0, len(sharp), hop))
        before = np.lib.stride_tricks.sliding_window_view(energy, 4)
        hit = energy[4:] > 4 * before[:-1].max(axis=1) + 0.02 * energy.max()
        hits = (4 + np.flatnonzero(hit)) * hop / RATE
        distance = np.abs(hits[:, None] - grid).min(axis=1)
        assert len(hits) > 5
        # Players are up to 4 ms late, frames 5 ms long.
        assert np.mean(distance < 0.011) > 0.95


def test_swing_delays_every_second_note_only():
    score = band._Score(60.0, 16, 1 / 3, 2, 0, "major", [])
    # Triplet feel: at 60 beats a minute the off-beat falls on 2/3 second.
    times = [score.time(step) for step in (0, 2, 4, 6)]
    assert times == pytest.approx([0.0, 2 / 3, 1.0, 5 / 3])


def test_most_songs_have_a_stem_that_pauses_and_a_passage_of_all(songs):
    pausing, tutti = 0, 0
    for stems in songs:
        half_seconds = np.stack(list(stems.values())).reshape(4, 48, -1)
        silent = np.abs(half_seconds).max(axis=2) < 1e-3
        windows = np.lib.stride_tricks.sliding_window_view(silent, 6, axis=1)
        pausing += windows.all(axis=2).any()
        tutti += (~silent).all(axis=0).sum() >= 4
    assert pausing >= len(songs) // 2
    assert tutti == len(songs)


@pytest.mark.parametrize("wave", ("saw", "square", "organ", "fm", "pluck"))
def test_tones_have_no_partials_beside_their_own(wave):
    # 2349.5 Hz: what aliases would not fall on a multiple of it. The naive saw
    # has aliases at -20 dB.
    timbre = Timbre(wave, ratio=3, index=2.0)
    tables = make_tables(timbre, 2349.5, RATE)
    cycles = 2349.5 * np.arange(RATE) / RATE
    note = read_tables(tables, cycles, np.zeros(RATE))
    power, freqs = power_spectrum(note * np.blackman(RATE))
    beside = np.abs((freqs + 1174.75) % 2349.5 - 1174.75) > 10
    assert power[beside].max() < 1e-6 * power.max()


def test_a_table_is_read_between_its_columns_and_rows():
    rows = np.arange(TABLE_ROWS, dtype=np.float32)[:, None]
    ramp = np.linspace(0, 1, TABLE_SIZE + 1, dtype=np.float32)
    cycles, row = np.array([0.0, 0.3, 2.75]), np.array([0.0, 2.5, 7.0])
    value = read_tables(rows + ramp, cycles, row)
    assert value == pytest.approx([0.0, 2.8, 7.75], abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    samples=st.integers(1, 12000),
    sample_rate=st.sampled_from((8000, 16000, 48000)),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_length_and_rate(samples, sample_rate, seed):
    stems = make_song(seed, samples / sample_rate, sample_rate)
    for sig in stems.values():
        assert sig.shape == (samples,)
        assert np.isfinite(sig).all() and np.abs(sig).max() <= 0.901


@pytest.mark.parametrize(
    "wrong, message",
    (
        ({"seconds": 0.0}, "expected seconds above 0, got 0.0"),
        ({"seconds": float("nan")}, "expected seconds above 0, got nan"),
        ({"sample_rate": 7999}, "sample_rate .* 8000 or more, got 7999"),
        ({"seed": -1}, "seed .* 0 or more, got -1"),
        ({"num_songs": 0}, "num_songs .* 1 or more, got 0"),
        ({"num_songs": 1.5}, "num_songs to be an integer .* got 1.5"),
    ),
)
def test_arguments_are_checked(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_band(tmp_path / "band", **wrong)
    assert not (tmp_path / "band").exists()
    if "num_songs" not in wrong:
        with pytest.raises(ValueError, match=message):
            make_song(**{"seed": 0, **wrong})


# --- the folder --------------------------------------------------------------


def test_the_folder_holds_the_stems_and_the_settings(tmp_path):
    folder = make_band(str(tmp_path / "a" / "band"), **TINY)
    names = [f"song_{i:03d}/{name}.wav" for i in range(2) for name in STEMS]
    assert set(content(folder)) == {*names, "band.json"}
    assert json.loads((folder / "band.json").read_text()) == {
        **TINY,
        "seed": 0,
        "version": band.VERSION,
    }
    for name in names:
        info = soundfile.info(str(folder / name))
        assert (info.samplerate, info.frames, info.channels) == (8000, 2000, 1)
        assert info.subtype == "PCM_16"


def test_a_song_does_not_depend_on_how_many_there_are(tmp_path):
    few = content(make_band(tmp_path / "few", **TINY))
    many = content(make_band(tmp_path / "many", **{**TINY, "num_songs": 3}))
    other = content(make_band(tmp_path / "other", **TINY, seed=1))
    for name in few.keys() - {"band.json"}:
        assert few[name] == many[name]
    assert few["song_000/drums.wav"] != few["song_001/drums.wav"]
    assert few["song_001/drums.wav"] != other["song_000/drums.wav"]


def test_a_complete_band_is_kept(tmp_path, monkeypatch):
    folder = make_band(tmp_path, **TINY)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(band, "make_song", None)
    assert make_band(tmp_path, **TINY) == folder
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_an_interrupted_band_is_completed(tmp_path, monkeypatch):
    whole = content(make_band(tmp_path / "whole", **TINY))
    folder, written = tmp_path / "band", []

    def write_some(path, *args, **kwargs):
        if len(written) == 6:  # in the middle of the second song
            raise KeyboardInterrupt
        written.append(path)
        soundfile_write(path, *args, **kwargs)

    soundfile_write = soundfile.write
    with monkeypatch.context() as patch:
        patch.setattr(soundfile, "write", write_some)
        with pytest.raises(KeyboardInterrupt):
            make_band(folder, **TINY)
    assert not (folder / "band.json").exists()
    assert not (folder / "song_001").exists()
    with pytest.raises(ValueError, match="expected seed 4, got 0"):
        make_band(folder, **TINY, seed=4)
    assert content(make_band(folder, **TINY)) == whole


def test_a_lost_stem_is_written_again(tmp_path):
    whole = content(make_band(tmp_path, **TINY))
    (tmp_path / "song_001" / "lead.wav").unlink()
    assert content(make_band(tmp_path, **TINY)) == whole


@pytest.mark.parametrize(
    "name, value",
    (
        ("num_songs", 3),
        ("seconds", 0.5),
        ("seed", 9),
        ("sample_rate", 16000),
    ),
)
def test_other_settings_are_refused_by_name(tmp_path, name, value):
    whole = content(make_band(tmp_path, **TINY))
    with pytest.raises(ValueError, match=f"expected {name} {value}, got .*ask"):
        make_band(tmp_path, **{**TINY, name: value})
    assert content(tmp_path) == whole


def test_another_version_is_refused(tmp_path, monkeypatch):
    make_band(tmp_path, **TINY)
    monkeypatch.setattr(band, "VERSION", band.VERSION + 1)
    with pytest.raises(ValueError, match="expected version"):
        make_band(tmp_path, **TINY)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"'thesis\.txt' and no band\.json"):
        make_band(tmp_path, **TINY)
    assert content(tmp_path) == {"thesis.txt": b"precious"}
