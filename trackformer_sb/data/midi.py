"""General MIDI files and soundfonts in, stems by class of instrument out.

symusic plays notes and programs. Volume (controller 7) and pan (controller 10)
of a track are applied here; pedals and bends are not played. It damps notes
where they end, drums too: these are made to ring, and all stand in a room.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.signal import butter, sosfilt

from trackformer_sb.data.drumkits import HATS, SAMPLE_RATE, reverb

PEAK = 0.98
# Programs from 0, first and last. Drums are channel 10, all else is other.
CLASSES = {"piano": (0, 7), "guitar": (24, 31), "bass": (32, 39)}
CHOIRS = 52, 53  # recorded voices: vocals, whatever the classes are
CENTRED = ("drums", "bass")
QUALITY = 2  # of the interpolation: 4 takes 6 times as long, 0 and 1 alias
RING = 2.0  # seconds that a drum sounds at most
HIGH_PASS = butter(2, 15, "high", fs=SAMPLE_RATE, output="sos")
AUDIBLE = 1e-3  # of the peak of all stems
FADE = 0.05  # seconds, where the limit cuts
COUNT_RATE = 10  # counts a second


def midi_class(track, classes):
    """The stem of a track: drums, vocals, one of `classes`, or other."""
    if track.is_drum:
        return "drums"
    if track.program in CHOIRS:
        return "vocals"
    for name in classes:
        first, last = CLASSES[name]
        if first <= track.program <= last:
            return name
    return "other"


def load_midi(path, seconds):
    """The beginning of a MIDI file from its first note on, in seconds.

    Notes that sound longer than `seconds` end there. A file that is cut or has
    no notes is a ValueError.
    """
    from symusic import Score

    data = Path(path).read_bytes()
    if not _is_whole(data):
        raise ValueError("expected a MIDI file, got one that is cut, or none")
    score = Score.from_midi(data).to("second")
    starts = [note.time for track in score.tracks for note in track.notes]
    if not starts:
        raise ValueError("expected notes, got none")
    for track in score.tracks:
        if track.is_drum:
            _let_ring(track)
    first = min(starts)
    # clip_end would drop the notes that it should shorten
    score = score.clip(first, first + seconds).shift_time(-first)
    for track in score.tracks:
        for note in track.notes:
            note.duration = min(note.duration, seconds - note.time)
    return score


def count_instruments(score, seconds, classes):
    """How many instruments of each class play: name -> int [tenths of seconds].

    A drum kit is one instrument, tracks of one program are one.
    """
    playing = {}
    for track in score.tracks:
        name = midi_class(track, classes)
        program = "kit" if name == "drums" else track.program
        silence = np.zeros(int(seconds * COUNT_RATE), bool)
        plays = playing.setdefault((name, program), silence)
        for note in track.notes:
            end = np.ceil((note.time + note.duration) * COUNT_RATE)
            plays[int(note.time * COUNT_RATE) : int(end)] = True
    counts = {}
    for (name, _), plays in playing.items():
        counts[name] = counts.get(name, 0) + plays.astype(int)
    return counts


@lru_cache(4)
def load_soundfont(path):
    """A symusic.Synthesizer that plays a soundfont (sf2, sf3) at 44.1 kHz.

    One that plays neither a piano nor drums is a ValueError.
    """
    from symusic import Note, Score, Synthesizer, Track

    synth = Synthesizer(str(path), SAMPLE_RATE, QUALITY)
    for is_drum in (True, False):
        score = Score(480).to("second")
        track = Track("", 0, is_drum, ttype="second")
        track.notes.append(Note(0.0, 0.1, 38, 100, ttype="second"))
        score.tracks.append(track)
        if np.any(synth.render(score, stereo=True)):
            return synth
    raise ValueError("expected a piano or drums, got silence")


def render_stems(score, soundfont, rng, classes, drum_soundfont):
    """Plays a score, each class of instruments by itself, see ``make_piece``.

    Classes that are silent are left out. The levels of the others, which no one
    mixed, are brought half as far apart as they are, give or take 2 dB.
    """
    stems = {}
    for track in score.tracks:
        if not track.notes:
            continue
        name = midi_class(track, classes)
        programs = [(track.program, track.is_drum)]
        font = soundfont
        if name == "drums":
            font = drum_soundfont or soundfont
            programs.append((0, True))  # few have all the kits
            if drum_soundfont:
                programs.append((0, False))  # or a kit in a drum's bank
        for track.program, track.is_drum in programs:
            sig = _play(score, track, font)
            if np.any(sig):
                break
        sig *= _track_gains(track, name, rng)
        stems.setdefault(name, []).append(sig)
    length = max(len(sig) for sigs in stems.values() for sig in sigs)
    for name, sigs in stems.items():
        total = np.zeros((length, 2), np.float32)
        for sig in sigs:
            total[: len(sig)] += sig
        # some samples are off centre
        total = sosfilt(HIGH_PASS, total, axis=0)
        if name != "bass" and np.any(total):
            level = 10 ** (rng.uniform(-24, -10) / 20)
            total += level * reverb(total, rng, rng.uniform(0.2, 1.2))
        stems[name] = total.astype(np.float32)
    peak = max(np.abs(sig).max() for sig in stems.values())
    stems = {
        name: sig
        for name, sig in stems.items()
        if np.abs(sig).max() > AUDIBLE * peak
    }
    levels = {name: _level(sig, AUDIBLE * peak) for name, sig in stems.items()}
    for name, sig in stems.items():
        nearer = 0.5 * (max(levels.values()) - levels[name])
        sig *= np.float32(10 ** ((nearer + rng.uniform(-2, 2)) / 20))
    return stems


def make_piece(
    path, soundfont, rng, seconds=75.0, classes=("bass",), drum_soundfont=None
):
    """Stems of the beginning of a MIDI file: name -> float32 [time, 2].

    All are of one length and share one gain, so that neither their sum nor any
    of them clips. `classes` are those of ``CLASSES`` that are stems of their
    own. Raises a ValueError if there are not two stems that sound.
    """
    score = load_midi(path, seconds)
    stems = render_stems(score, soundfont, rng, classes, drum_soundfont)
    if len(stems) < 2:
        raise ValueError(
            f"expected two stems or more that sound in {path}, "
            f"got {', '.join(stems) or 'silence'} alone"
        )
    stems = {
        name: sig[: int(seconds * SAMPLE_RATE)] for name, sig in stems.items()
    }
    loudest = [sum(stems.values()), *stems.values()]
    gain = PEAK / max(np.abs(sig).max() for sig in loudest)
    fade = np.linspace(gain, 0, int(FADE * SAMPLE_RATE), dtype=np.float32)
    for sig in stems.values():
        count = min(len(sig), len(fade))
        sig[: len(sig) - count] *= np.float32(gain)
        sig[len(sig) - count :] *= fade[:count, None]
    return stems


def _is_whole(data):
    """Whether all chunks end within the data: symusic reads on behind it."""
    place = 0
    while data[:4] == b"MThd" and place + 8 <= len(data):
        place += 8 + int.from_bytes(data[place + 4 : place + 8], "big")
    return 0 < place <= len(data)


def _let_ring(track):
    """Ends the notes [track] of drums at the next one of the kind."""
    nexts = {}
    for note in sorted(track.notes, key=lambda note: -note.time):
        kind = HATS if note.pitch in HATS else note.pitch
        end = min(note.time + RING, nexts.get(kind, np.inf))
        note.duration = max(note.duration, end - note.time)
        nexts[kind] = note.time


def _play(score, track, soundfont):
    """One track of a score, [time, 2]."""
    alone = score.copy()
    alone.tracks.clear()
    alone.tracks.append(track)
    sig = load_soundfont(soundfont).render(alone, stereo=True)
    return np.array(sig.T, np.float32)


def _track_gains(track, name, rng):
    """Gains [2] from volume and pan of a track."""
    volumes = [one.value for one in track.controls if one.number == 7]
    pans = [one.value for one in track.controls if one.number == 10]
    # the loudest: pieces fade in from 0
    volume = (max(volumes, default=100) / 127) ** 2
    pan = (pans[0] - 64) / 63 if pans else 0.0
    if name not in CENTRED:
        pan += rng.uniform(-0.4, 0.4)
    return np.float32(volume * np.clip([1 - pan, 1 + pan], 0, 1))


def _level(sig, threshold):
    """RMS in dB of what is above a threshold."""
    return 10 * np.log10(np.square(sig[np.abs(sig) > threshold]).mean())
