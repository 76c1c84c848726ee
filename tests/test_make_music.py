"""``trackformer make-music``: stems of MIDI files, drum clips, singing."""

import json
import pathlib
import struct
from time import sleep

import numpy as np
import pytest
import soundfile

pytest.importorskip("symusic", reason="needs the extra music")
pytest.importorskip("espeakng_loader", reason="needs the extra music")
pytest.importorskip("pyworld", reason="needs the extra music")

from symusic import ControlChange, Note, Score, Tempo, Track

from trackformer_sb.cli import main
from trackformer_sb.data import make_music
from trackformer_sb.data.drumkits import Hit, make_drums
from trackformer_sb.data.midi import (
    count_instruments,
    load_midi,
    make_piece,
)
from trackformer_sb.data.voices import make_voice

SAMPLE_RATE = 44100
ROOT = pathlib.Path(__file__).parents[1]
SHARED = "data/soundfont/FluidR3_GM_rebuilt.sf3"
SOUNDFONTS = (
    ROOT.parent / "shared" / SHARED,
    pathlib.Path("/usr/share/sounds/sf2/TimGM6mb.sf2"),
    pathlib.Path("/usr/share/sounds/sf2/FluidR3_GM.sf2"),
)


@pytest.fixture(scope="module")
def soundfont():
    for path in SOUNDFONTS:
        if path.exists():
            return path
    pytest.skip(f"needs a soundfont, one of {', '.join(map(str, SOUNDFONTS))}")


def write_midi(path, seconds=2.0, parts=((0, False), (33, False), (0, True))):
    """Two notes a second for each part, a program and whether it is drums."""
    score = Score(480)
    score.tempos.append(Tempo(0, 120))
    for program, is_drum in parts:
        track = Track("", program, is_drum)
        pitch = 38 if is_drum else 60 - program // 2
        for time in range(0, int(960 * seconds), 480):
            track.notes.append(Note(time, 400, pitch, 100))
        score.tracks.append(track)
    path.parent.mkdir(exist_ok=True)
    score.dump_midi(path)
    return path


def write_kit(folder):
    """A Hydrogen kit of three drums and one voice without a recording."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    instruments = ""
    for name in ("Kick", "Snare", "Hat closed", "Lost"):
        if name != "Lost":
            sig = rng.uniform(-0.5, 0.5, 22050)
            soundfile.write(folder / f"{name}.wav", sig, 22050)
        instruments += (
            f"<instrument><name>{name}</name><layer><filename>{name}.wav"
            "</filename></layer></instrument>"
        )
    (folder / "drumkit.xml").write_text(
        '<drumkit_info xmlns="http://www.hydrogen-music.org/drumkit">'
        f"<instrumentList>{instruments}</instrumentList></drumkit_info>"
    )
    return folder


def rng():
    return np.random.default_rng(0)


# --- pieces ------------------------------------------------------------------


def test_stems_are_of_one_length_and_their_sum_does_not_clip(
    soundfont, tmp_path
):
    path = write_midi(tmp_path / "a.mid")
    stems = make_piece(path, soundfont, rng(), seconds=1.5)
    assert sorted(stems) == ["bass", "drums", "other"]
    assert {sig.shape for sig in stems.values()} == {(66150, 2)}
    peaks = [abs(sig).max() for sig in (sum(stems.values()), *stems.values())]
    assert max(peaks) == pytest.approx(0.98, abs=1e-3)
    assert min(peaks) > 0.01


def test_channel_and_program_say_the_stem(soundfont, tmp_path):
    # program 118 is a synth drum, but on a channel of its own
    parts = ((118, False), (33, False))
    path = write_midi(tmp_path / "a.mid", parts=parts)
    assert sorted(make_piece(path, soundfont, rng())) == ["bass", "other"]
    # and a guitar may be a class of its own
    path = write_midi(tmp_path / "a.mid", parts=((27, False), (0, False)))
    stems = make_piece(path, soundfont, rng(), classes=("bass", "guitar"))
    assert sorted(stems) == ["guitar", "other"]
    # a recorded choir sings, a synthesised one does not
    path = write_midi(tmp_path / "a.mid", parts=((52, False), (54, False)))
    stems = make_piece(path, soundfont, rng())
    assert sorted(stems) == ["other", "vocals"]


def test_volume_and_pan_are_heard(soundfont, tmp_path):
    path = write_midi(tmp_path / "a.mid", parts=((33, False), (0, True)))
    score = Score(path)
    score.tracks[0].controls.append(ControlChange(0, 10, 0))
    score.dump_midi(path)
    stems = make_piece(path, soundfont, rng())
    assert np.allclose(stems["bass"][:, 1], 0, atol=1e-4)
    assert abs(stems["drums"][:, 1]).max() > 0.1


def test_instruments_are_counted_while_they_play(tmp_path):
    # two tracks of one program are one instrument; strings enter after 1 s
    parts = ((0, False), (0, False), (48, False), (33, False), (0, True))
    path = write_midi(tmp_path / "a.mid", parts=parts)
    score = Score(path)
    for note in score.tracks[2].notes:
        note.time += 960
    score.dump_midi(path)
    counts = count_instruments(load_midi(path, 2.0), 2.0, ("bass",))
    assert {name: list(count[[5, 15]]) for name, count in counts.items()} == {
        "other": [1, 2],
        "bass": [1, 1],
        "drums": [1, 1],
    }


def test_a_note_that_never_ends_is_closed(soundfont, tmp_path):
    path = write_midi(tmp_path / "a.mid")
    score = Score(path)
    score.tracks[0].notes.append(Note(0, 10**8, 72, 100))
    score.dump_midi(path)
    stems = make_piece(path, soundfont, rng(), seconds=3.0)
    assert {len(sig) for sig in stems.values()} == {3 * SAMPLE_RATE}
    assert abs(stems["other"][-10:]).max() < 0.01
    assert load_midi(path, 3.0).end() <= 3.01


def test_drums_ring_until_the_next_of_their_kind(tmp_path):
    path = tmp_path / "a.mid"
    score = Score(480)
    score.tracks.append(Track("", 0, True))
    # open hat, closed hat, crash: at 120 beats a minute
    for time, pitch in ((0, 46), (480, 42), (0, 49)):
        score.tracks[0].notes.append(Note(time, 10, pitch, 100))
    score.dump_midi(path)
    notes = load_midi(path, 10.0).tracks[0].notes
    rings = {note.pitch: note.duration for note in notes}
    assert rings == pytest.approx({46: 0.5, 42: 2.0, 49: 2.0}, abs=1e-3)


def test_midi_that_is_cut_or_has_no_notes(tmp_path):
    path = tmp_path / "a.mid"
    path.write_bytes(write_midi(path).read_bytes()[:60])
    with pytest.raises(ValueError, match="expected a MIDI file, got one that"):
        load_midi(path, 10.0)
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 480)
    path.write_bytes(header + b"MTrk\0\0\0\4\0\xff\x2f\0")
    with pytest.raises(ValueError, match="expected notes, got none"):
        load_midi(path, 10.0)


# --- drums -------------------------------------------------------------------


def test_drums_sound_where_they_are_hit(tmp_path):
    kit = write_kit(tmp_path / "kit")
    sig = make_drums([kit, kit], [Hit(1.0, 36, 1.0)], rng(), seconds=2.0)
    assert sig.shape == (88200, 2) and np.isfinite(sig).all()
    assert abs(sig).max() == pytest.approx(0.8)
    assert abs(sig[:44000]).max() < 1e-3 < abs(sig[44100:50000]).max()


# --- voices ------------------------------------------------------------------


def test_voices_sing_and_rest():
    voice = make_voice(rng(), seconds=12.0)
    assert voice.shape == (12 * SAMPLE_RATE, 2) and np.isfinite(voice).all()
    assert abs(voice).max() == pytest.approx(0.8)
    blocks = np.square(voice).reshape(-1, 4410, 2).mean((1, 2)) ** 0.5
    assert (blocks > 0.03).mean() > 0.4
    assert (blocks < 0.003).mean() > 0.02


# --- the command -------------------------------------------------------------


@pytest.fixture(scope="module")
def made(soundfont, tmp_path_factory):
    """A folder of music, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("music")
    write_midi(folder / "midi" / "a.mid")
    (folder / "midi" / "b.mid").write_bytes(b"no music")
    write_midi(folder / "midi" / "c.mid", parts=((0, True),))
    write_kit(folder / "kits" / "kit")
    (folder / "kits" / "none").mkdir()
    (folder / "kits" / "none" / "drumkit.xml").write_text("no xml")
    args = ["make-music", folder / "out", "--midi", folder / "midi"]
    args += ["--soundfont", soundfont, folder / "midi" / "a.mid"]
    args += ["--drumkits", folder / "kits", "--drums", 1, "--voices", 1]
    args += ["--electronic", 1, "--seconds", 10]
    args = list(map(str, args))
    assert main([*args, "--jobs", "2"]) == 0
    return folder / "out", args


def test_command_writes_a_folder_of_stems(made):
    out, _ = made
    files = {str(path.relative_to(out)) for path in out.rglob("*.wav")}
    assert files == {
        "midi_a_0/bass.wav",
        "midi_a_0/drums.wav",
        "midi_a_0/other.wav",
        "drums_000/drums.wav",
        "voices_000/vocals.wav",
        "electronic_000/bass.wav",
        "electronic_000/drums.wav",
        "electronic_000/other.wav",
    }
    for path in out.glob("*/counts.json"):
        counts = json.loads(path.read_text())
        assert {*counts} == {wav.stem for wav in path.parent.glob("*.wav")}
        # chords and lead are two of the synthesisers
        most = 2 if path.parent.name == "electronic_000" else 1
        assert max(map(max, counts.values())) == most
    for path in out.rglob("*.wav"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels) == (44100, 2)
        assert info.subtype == "PCM_16"
    sources = json.loads((out / "music.json").read_text())["sources"]
    names = {pathlib.Path(path).name for path in sources}
    assert {"a.mid", "drumkit.xml"} < names
    assert "b.mid" not in names


def test_command_goes_on_and_names_what_it_leaves_out(made, capsys):
    out, args = made
    sig = soundfile.read(out / "midi_a_0" / "other.wav")[0]
    for path in (out / "midi_a_0").iterdir():
        path.unlink()
    (out / "midi_a_0").rmdir()
    assert main([*args, "--jobs", "1"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == (
        f"1 made, 3 there before, 4 left out in {out}"
    )
    for reason in (
        "midi/b.mid: expected a MIDI file, got one that is cut",
        "expected two stems or more",
        "midi/a.mid: ",
        "kits/none: ",
    ):
        assert text.count(reason) == 1
    # and the piece is the same, whatever made it
    again = soundfile.read(out / "midi_a_0" / "other.wav")[0]
    assert np.array_equal(sig, again)


def test_folder_of_other_settings_is_refused(made, capsys):
    _, args = made
    assert main([*args, "--seed", "1"]) == 2
    assert "expected seed 1, got 0 in" in capsys.readouterr().err


def test_nothing_to_make_is_an_error(tmp_path, capsys):
    assert main(["make-music", str(tmp_path / "out")]) == 2
    assert "nothing to make" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def make_noise(rng, settings, seconds):
    sleep(seconds)
    return {"other": rng.normal(0, 0.1, (100, 2))}, {}


def test_a_song_without_end_is_left_out(tmp_path):
    tasks = {"endless": (make_noise, 600)}
    tasks |= {f"short{k}": (make_noise, 0) for k in range(3)}
    done = dict(make_music._run_all(tmp_path, tasks, {"seed": 0}, 2, limit=3))
    assert done.pop("endless") == "expected endless within 3 s: no end"
    assert done == dict.fromkeys(["short0", "short1", "short2"])
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted(done)
