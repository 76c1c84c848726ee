"""``trackformer transcribe``: notes of stems, and the MIDI file."""

import numpy as np
import pytest
import soundfile
import torch
from separators import RATE, named

from trackformer_sb.cli import main
from trackformer_sb.data.synth import make_kit
from trackformer_sb.inference import transcription
from trackformer_sb.inference.transcription import (
    Note,
    cut_notes,
    drum_notes,
    heard_stems,
    stem_notes,
    transcribe_file,
    write_midi,
)

SAMPLE_RATE = 44100


def tones(notes, seconds, partials=6):
    """Plucked notes [2, time], of (onset, pitch), 0.5 s each."""
    sig = np.zeros(int(seconds * SAMPLE_RATE))
    time = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    for onset, pitch in notes:
        freq = 440 * 2 ** ((pitch - 69) / 12)
        tone = sum(
            np.sin(2 * np.pi * k * freq * time) / k
            for k in range(1, partials + 1)
        )
        begin = int(onset * SAMPLE_RATE)
        fade = np.minimum(1, 40 * (0.5 - time))
        sig[begin : begin + len(time)] += 0.1 * tone * np.exp(-3 * time) * fade
    return torch.tensor(sig, dtype=torch.float32).expand(2, -1)


def drums(hits, seconds, sample_rate=SAMPLE_RATE):
    """Strokes [time], of (onset, name of a drum)."""
    kit = make_kit(np.random.default_rng(0), sample_rate)
    sig = np.zeros(int((seconds + 1) * sample_rate), np.float32)
    for onset, name in hits:
        stroke = kit[name][0]
        begin = int(onset * sample_rate)
        sig[begin : begin + len(stroke)] += 0.5 * stroke
    return torch.from_numpy(sig[: int(seconds * sample_rate)])


def heard(notes):
    return [(note.onset, note.pitch) for note in notes]


def close(found, expected):
    """Requires the pitches, and onsets within 50 ms."""
    assert [x[1] for x in found] == [x[1] for x in expected]
    times = np.subtract([x[0] for x in found], [x[0] for x in expected])
    assert abs(times).max() < 0.05


# --- notes -------------------------------------------------------------------


def test_a_note_ends_where_another_is_struck_and_where_nothing_sounds():
    pitch = np.full(60, 48.2)
    pitch[40:50] = np.nan
    pitch[56] = 50.0
    struck = np.zeros(60)
    struck[20] = True
    assert cut_notes(pitch, struck, 0.01) == [
        Note(0.0, 0.2, 48),
        Note(0.2, 0.4, 48),
        # the rest of it is too short, and so is a jump
        Note(0.5, 0.56, 48),
    ]


def test_strokes_are_found_and_a_hi_hat_is_no_drum():
    names = ("kick", "hat", "snare", "hat")
    hits = [(0.5 + 0.5 * k, names[k % 4]) for k in range(8)]
    found = heard(drum_notes(drums(hits, 5.0), SAMPLE_RATE))
    for name, key in (("kick", 36), ("snare", 38), ("hat", 42)):
        for onset, one in hits:
            keys = [x[1] for x in found if abs(x[0] - onset) < 0.05]
            if one == name:
                assert key in keys
            if one == "hat":
                assert keys == [42]
    # and nothing between them
    assert all(abs(2 * x[0] - round(2 * x[0])) < 0.1 for x in found)


def test_melodies_are_heard():
    pytest.importorskip("torchcrepe", reason="needs the extra transcribe")
    melody = [(0.2, 40), (0.8, 40), (1.4, 43), (2.4, 35)]
    notes = stem_notes("bass", tones(melody, 3.0), SAMPLE_RATE)
    close(heard(notes), melody)
    melody = [(onset, pitch + 24) for onset, pitch in melody]
    notes = stem_notes("vocals", tones(melody, 3.0), SAMPLE_RATE)
    close(heard(notes), melody)
    assert 0.3 < notes[-1].offset - notes[-1].onset < 0.6


def test_chords_are_heard():
    pytest.importorskip("basic_pitch", reason="needs basic-pitch")
    pytest.importorskip("onnxruntime", reason="needs the extra transcribe")
    # more than a window of the model
    chords = [(t, p) for t in (0.5, 1.5, 2.5, 3.5) for p in (60, 64, 67)]
    notes = stem_notes("other", tones(chords, 4.5, 1), SAMPLE_RATE)
    close(sorted(heard(notes), key=lambda x: (round(x[0], 1), x[1])), chords)


# --- files -------------------------------------------------------------------


def test_midi_file_byte_by_byte(tmp_path):
    # a second and a beat of 480 ticks are 0x3C0 = 7 * 128 + 64 and 480
    write_midi(tmp_path / "a.mid", {"drums": [Note(1.0, 1.25, 36)]})
    track = (
        b"\x00\xff\x03\x05drums" + b"\x00\xc9\x00"
        b"\x80\x80\x87\x40\x99\x24\x5a" + b"\x80\x80\x81\x70\x89\x24\x5a"
        b"\x00\xff\x2f\x00"
    )
    assert (tmp_path / "a.mid").read_bytes() == (
        b"MThd\x00\x00\x00\x06\x00\x01\x00\x01\x01\xe0"
        b"MTrk\x00\x00\x00" + bytes([len(track)]) + track
    )


def test_another_program_reads_the_midi_file(tmp_path):
    symusic = pytest.importorskip("symusic", reason="needs the extra music")
    tracks = {
        "drums": [Note(0.0, 0.1, 36), Note(0.0, 0.1, 42)],
        "bass": [Note(0.5, 1.0, 40), Note(1.0, 700.25, 40)],
        "vocals": [],
        "other": [Note(2.0, 3.0, 60)],
    }
    write_midi(tmp_path / "a.mid", tracks)
    score = symusic.Score(tmp_path / "a.mid").to("second")
    read = {track.name: track for track in score.tracks if track.notes}
    assert [*read] == ["drums", "bass", "other"]
    assert [track.is_drum for track in read.values()] == [True, False, False]
    assert [track.program for track in read.values()] == [0, 33, 0]
    for name, track in read.items():
        for note, true in zip(track.notes, tracks[name], strict=True):
            assert note.pitch == true.pitch
            assert (note.time, note.end) == pytest.approx(true[:2], abs=1e-3)


def test_a_song_and_what_has_no_notes(tmp_path, capsys):
    torch.manual_seed(0)
    # a separator of one stem: the song is its drums
    model = str(named(["drums"]).export(tmp_path / "model"))
    sig = drums([(0.5, "kick"), (1.5, "kick")], 2.0, RATE)
    songs = {"song": sig, "silence": 0 * sig, "short": sig[:3]}
    for name, sig in songs.items():
        path, out = tmp_path / f"{name}.wav", tmp_path / "out"
        soundfile.write(path, sig, RATE)
        command = ["transcribe", str(path), "--model", model]
        assert main([*command, "--out", str(out), "--device", "cpu"]) == 0
        result = out / f"{name}.mid"
        printed = capsys.readouterr()
        assert printed.out == f"{result}\n"
        strokes = result.read_bytes().count(b"\x99\x24")
        assert strokes == (2 if name == "song" else 0)
        assert ("no notes found" in printed.err) == (name != "song")
    assert main([*command, "--stems", "piano"]) == 2
    assert "this model has drums; got piano" in capsys.readouterr().err


def test_a_bad_file_does_not_stop_the_others(tmp_path, capsys):
    model = str(named(["drums"]).export(tmp_path / "model"))
    music, out = tmp_path / "music", tmp_path / "out"
    music.mkdir()
    for name in ("a", "b", "c"):
        sig = drums([(0.5, "kick")], 1.0, RATE)
        soundfile.write(music / f"{name}.wav", sig, RATE)
    (music / "b.wav").write_text("no audio")
    # as where a disk is full, in the middle of a file
    (out / ".c.mid.partial").mkdir(parents=True)
    (out / "c.mid").write_bytes(b"of before")
    command = ["transcribe", str(music), "--model", model, "--out", str(out)]
    assert main([*command, "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{out / 'a.mid'}\n"
    lines = printed.err.splitlines()
    assert len(lines) == 2
    assert f"{music / 'b.wav'}: format not recognised" in lines[0]
    assert f"{music / 'c.wav'}: " in lines[1]
    assert (out / "c.mid").read_bytes() == b"of before"


def test_what_is_missing_is_named(tmp_path, monkeypatch, caplog):
    separator = named(["drums", "bass", "other"])
    path = tmp_path / "song.wav"
    soundfile.write(path, 0.1 * np.ones(4000), RATE)

    def without(package):
        monkeypatch.setattr(
            transcription, "find_spec", lambda name: name != package
        )

    monkeypatch.setattr(transcription, "stem_notes", lambda *args: [])
    without("basic_pitch")
    outputs = heard_stems(separator)
    tracks = transcribe_file(separator, path, tmp_path / "song.mid", outputs)
    assert [*tracks] == ["drums", "bass"]
    assert "other: expected basic_pitch: pip install --no-deps" in caplog.text
    with pytest.raises(ImportError, match="other: expected basic_pitch"):
        heard_stems(separator, "other")
    without("torchcrepe")
    with pytest.raises(ImportError, match=r"trackformer_sb\[transcribe\]"):
        heard_stems(separator)
