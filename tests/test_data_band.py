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
from trackformer_sb.data.synth import Timbre, make_tables, read_tables

RATE = 44100
TINY = {"num_songs": 2, "seconds": 0.25, "sample_rate": 8000}


@pytest.fixture(scope="module")
def songs():
    return [make_song(seed) for seed in range(8)]


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- songs -------------------------------------------------------------------


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
        for one, other in combinations(STEMS, 2):
            assert abs(np.corrcoef(stems[one], stems[other])[0, 1]) < 0.2


@pytest.mark.parametrize("wave", ("saw", "square", "organ", "fm", "pluck"))
def test_tones_have_no_partials_beside_their_own(wave):
    # 2349.5 Hz: what aliases would not fall on a multiple of it. The naive saw
    # has aliases at -20 dB.
    timbre = Timbre(wave, ratio=3, index=2.0)
    tables = make_tables(timbre, 2349.5, RATE)
    cycles = 2349.5 * np.arange(RATE) / RATE
    note = read_tables(tables, cycles, np.zeros(RATE))
    power = np.abs(np.fft.rfft(note * np.blackman(RATE))) ** 2
    freqs = np.arange(len(power))  # of one second
    beside = np.abs((freqs + 1174.75) % 2349.5 - 1174.75) > 10
    assert power[beside].max() < 1e-6 * power.max()


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
        ({"sample_rate": 7999}, "sample_rate .* 8000 or more, got 7999"),
        ({"seed": -1}, "seed .* 0 or more, got -1"),
        ({"num_songs": 0}, "num_songs .* 1 or more, got 0"),
    ),
)
def test_arguments_are_checked(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_band(tmp_path / "band", **wrong)
    assert not (tmp_path / "band").exists()


# --- the folder --------------------------------------------------------------


def test_the_folder_holds_the_stems_and_the_settings(tmp_path, monkeypatch):
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
    # a complete band is kept
    monkeypatch.setattr(band, "make_song", None)
    assert make_band(folder, **TINY) == folder


def test_a_song_does_not_depend_on_how_many_there_are(tmp_path):
    few = content(make_band(tmp_path / "few", **TINY))
    many = content(make_band(tmp_path / "many", **{**TINY, "num_songs": 3}))
    other = content(make_band(tmp_path / "other", **TINY, seed=1))
    for name in few.keys() - {"band.json"}:
        assert few[name] == many[name]
    assert few["song_000/drums.wav"] != few["song_001/drums.wav"]
    assert few["song_001/drums.wav"] != other["song_000/drums.wav"]


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
    assert not (folder / "song_001").exists()
    assert content(make_band(folder, **TINY)) == whole
    # so is one that lost a stem
    (folder / "song_001" / "lead.wav").unlink()
    assert content(make_band(folder, **TINY)) == whole


def test_other_settings_are_refused_by_name(tmp_path, monkeypatch):
    whole = content(make_band(tmp_path, **TINY))
    with pytest.raises(ValueError, match=r"expected seconds 0\.5, got .*ask"):
        make_band(tmp_path, **{**TINY, "seconds": 0.5})
    monkeypatch.setattr(band, "VERSION", band.VERSION + 1)
    with pytest.raises(ValueError, match="expected version"):
        make_band(tmp_path, **TINY)
    assert content(tmp_path) == whole


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"'thesis\.txt' and no band\.json"):
        make_band(tmp_path, **TINY)
    assert content(tmp_path) == {"thesis.txt": b"precious"}
