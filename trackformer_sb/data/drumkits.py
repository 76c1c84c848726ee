"""Drum clips: Hydrogen kits that play MIDI drum tracks and made-up patterns.

A kit is a folder with drumkit.xml and recordings. Its voices are found by name,
for the notes that kits claim for themselves follow no common map.
"""

import xml.etree.ElementTree as ElementTree
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from scipy.signal import oaconvolve, resample_poly

SAMPLE_RATE = 44100
SECONDS = 45.0
PEAK = 0.8
KICK, SNARE, CLOSED, OPEN, CRASH = 36, 38, 42, 46, 49
TOMS = (45, 47, 50)
HATS = (CLOSED, 44, OPEN)
# General MIDI note -> words in the names of instruments
WORDS = {
    **dict.fromkeys((35, KICK), "kick bass bd"),
    **dict.fromkeys((SNARE, 40), "snare sd clap slap"),
    **dict.fromkeys((41, 43, 45, 47, 48, 50), "tom"),
    **dict.fromkeys((CRASH, 52, 55, 57), "crash cymbal splash"),
    **dict.fromkeys((51, 53, 59), "ride cymbal bell"),
    **{37: "stick rim click", 39: "clap snap", 54: "tamb shaker maraca"},
    **{56: "cowbell bell", CLOSED: "closed chh hat", 44: "pedal closed hat"},
    **{OPEN: "open ohh hat"},
}
# seconds to -42 dB at least and at most, where not those of a drum
DECAYS = {
    **dict.fromkeys((CLOSED, 44), (0.05, 0.2)),
    OPEN: (0.2, 0.6),
    **dict.fromkeys((49, 51, 52, 53, 55, 57, 59), (0.8, 2.5)),
}
OTHERS = "perc conga bongo djembe shaker clave drum"


class Hit(NamedTuple):
    """One stroke: its time in seconds, its General MIDI note, its gain."""

    time: float
    note: int
    gain: float


@lru_cache(64)
def load_kit(folder):
    """The voices of a kit: name, and the recording of its loudest stroke.

    One without recordings is a ValueError, one that is damaged another error.
    """
    path = Path(folder, "drumkit.xml")
    kit = []
    for instrument in ElementTree.parse(path).iterfind(".//{*}instrument"):
        name = instrument.findtext("{*}name") or ""
        layers = [one.text for one in instrument.iterfind(".//{*}filename")]
        files = [path.with_name(layer) for layer in layers if layer]
        files = [file for file in files if file.is_file()]
        files = [file for file in files if soundfile.info(file).frames]
        if files:
            kit.append((name.lower(), files[-1]))
    if not kit:
        raise ValueError("expected recordings beside it, got none")
    return kit


def make_pattern(rng, seconds=SECONDS):
    """A groove: kick, snare, hats, fills and a bar of rest now and then."""
    step = 15 / rng.uniform(85, 165)  # a sixteenth
    swing = rng.uniform(0, 0.3) if rng.random() < 0.3 else 0.0
    hat_step = int(rng.choice([1, 2, 4]))
    kicks = {0, 4, 8, 12}
    if rng.random() < 0.55:
        kicks = {0, *rng.choice(16, rng.integers(1, 4), replace=False)}
    snares = (4, 12) if rng.random() < 0.85 else (8,)
    hits = []
    for bar in range(int(seconds / (16 * step)) + 1):
        if bar and rng.random() < 0.06:
            continue
        for i in range(16):
            strokes = []
            if i in kicks and rng.random() < 0.97:
                strokes.append((KICK, 1.0))
            if i in snares:
                strokes.append((SNARE, 1.0))
            elif rng.random() < 0.04:
                strokes.append((SNARE, 0.4))
            # every fourth: an open hat off the beat
            if i % hat_step == (2 if hat_step == 4 else 0):
                is_open = hat_step == 4 or rng.random() < 0.06
                gain = 0.9 if i % 4 == 0 else 0.5
                strokes.append((OPEN if is_open else CLOSED, gain))
            if bar % 8 == 7 and i >= 12 and rng.random() < 0.6:
                strokes.append((int(rng.choice(TOMS)), 0.8))
            if bar % 8 == 0 and i == 0 and rng.random() < 0.7:
                strokes.append((CRASH, 0.9))
            time = (16 * bar + i + (swing if i % 2 else 0)) * step
            time = max(0.0, time + rng.normal(0, 0.003))
            hits += [
                Hit(time, note, gain * rng.uniform(0.8, 1.1))
                for note, gain in strokes
            ]
    return sorted(hit for hit in hits if hit.time < seconds)


def midi_hits(score, rng, seconds=SECONDS):
    """The drums of a stretch of a score [symusic.Score, in seconds]."""
    hits = [
        Hit(note.time, note.pitch, note.velocity / 127)
        for track in score.tracks
        for note in track.notes
        if track.is_drum
    ]
    last = max((hit.time for hit in hits), default=0.0)
    start = rng.uniform(0, max(0.0, last - seconds))
    return sorted(
        hit._replace(time=hit.time - start)
        for hit in hits
        if start <= hit.time < start + seconds
    )


def make_drums(kits, hits, rng, seconds=SECONDS):
    """Plays hits on a kit, with another one's voices among its own.

    Float [time, 2] at 44.1 kHz with a peak of 0.8. The second of `kits`, which
    may be the first, stands in for some voices. Each is tuned, placed, weighted
    and damped in its own way; a hat stops at the next one. Half of the clips
    stand in a room, many are saturated.
    """
    sig = np.zeros((int(seconds * SAMPLE_RATE), 2))
    voices = {}
    hats = [hit.time for hit in hits if hit.note in HATS]
    for hit in hits:
        if hit.note not in voices:
            kit = kits[int(rng.random() > 0.7)]
            voices[hit.note] = _draw_voice(load_kit(kit), hit.note, rng)
        stroke = voices[hit.note]
        if hit.note in HATS:
            following = [time for time in hats if time > hit.time + 0.02]
            stroke = _choke(stroke, min(following, default=seconds) - hit.time)
        begin = int(hit.time * SAMPLE_RATE)
        part = sig[begin : begin + len(stroke)]
        part += hit.gain * stroke[: len(part)]
    if np.abs(sig).max() < 1e-3:
        raise ValueError(f"expected drums that sound in {kits[0]}, got silence")
    sig /= np.abs(sig).max()
    if rng.random() < 0.5:
        level = 10 ** (rng.uniform(-24, -8) / 20)
        sig += level * reverb(sig, rng, rng.uniform(0.2, 1.2))
    if rng.random() < 0.6:
        sig = np.tanh(rng.uniform(1, 4) * sig)
    sig -= sig.mean(0)
    return sig * (PEAK / np.abs(sig).max())


def reverb(sig, rng, seconds, predelay=0.0):
    """A room around a dry sound [time, 2], alone and as loud as the sound.

    Noise that decays by 60 dB in `seconds`, after `predelay` seconds.
    """
    length = int(seconds * SAMPLE_RATE)
    decay = 10 ** (-3 * np.arange(length) / length)
    response = rng.standard_normal((length, 2)) * decay[:, None]
    response[: int(predelay * SAMPLE_RATE)] = 0
    wet = oaconvolve(sig, response.astype(sig.dtype), axes=0)[: len(sig)]
    return wet * np.sqrt(np.square(sig).mean() / np.square(wet).mean())


def _draw_voice(kit, note, rng):
    """A recording for a note as it sounds in this clip, [time, 2]."""
    words = WORDS.get(note, OTHERS).split()
    fitting = [one for one in kit if any(word in one[0] for word in words)]
    _, path = (fitting or kit)[rng.integers(len(fitting or kit))]
    rate = soundfile.info(path).samplerate
    sig = soundfile.read(path, 4 * rate, always_2d=True)[0]
    sig = sig[:, [0, -1]]
    tuning = 2 ** (rng.uniform(-3, 3) / 12)
    ratio = Fraction(SAMPLE_RATE / rate / tuning).limit_denominator(50)
    sig = resample_poly(sig, ratio.numerator, ratio.denominator, axis=0)
    decay = rng.uniform(*DECAYS.get(note, (0.15, 0.7)))
    time = np.arange(len(sig)) / SAMPLE_RATE
    sig *= np.minimum(1, 10 ** (-3 * (time / decay - 0.3)))[:, None]
    pan = 0.0 if note in (35, KICK, SNARE, 40) else rng.uniform(-0.4, 0.4)
    gains = rng.uniform(0.5, 1.2) * np.array([1 - pan, 1 + pan])
    return sig[: int(2 * decay * SAMPLE_RATE)] * gains


def _choke(sig, seconds):
    """Ends a sound [time, 2] after some seconds, without a click."""
    sig = sig[: int(seconds * SAMPLE_RATE)].copy()
    fade = np.linspace(1, 0, min(len(sig), SAMPLE_RATE // 100))
    sig[len(sig) - len(fade) :] *= fade[:, None]
    return sig
