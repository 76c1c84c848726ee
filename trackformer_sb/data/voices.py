"""Singing, made of speech: espeak-ng speaks, WORLD gives it a melody.

WORLD (Morise et al., IEICE Trans. Inf. Syst. 2016) takes speech apart into
pitch, spectral envelope and aperiodicity; vowels are held, the pitch is
replaced. Takes are doubled or become a choir, a room and a compressor follow,
and noise fills the octave above the synthesiser's band.
"""

import _ctypes
import ctypes
import os
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from scipy.signal import butter, medfilt, resample_poly, sosfilt

from trackformer_sb.data.drumkits import PEAK, SAMPLE_RATE, SECONDS, reverb

SPEECH_RATE = 22050  # espeak-ng's, in Hz
FRAME = 0.005  # seconds
DOUBLE_DELAY = 0.02  # seconds
LANGUAGES = (
    "en en-us it es de fr pt-br ja sv nl pl fi id ro hu cs el tr vi hi"
).split()
VARIANTS = (
    "m1 m3 m5 m7 f1 f2 f3 f4 f5 Alicia Andrea Annie belinda linda Michael "
    "steph quincy rob max Lee Denis zac"
).split()
WORDS = (
    "love night fire running home the and never ever you me we are falling "
    "down river sun moon dancing light ooh yeah baby time again hold on let it "
    "go away dream world heart stars shine walking alone summer rain la la na "
    "na hey oh aah tonight forever one more take my hand feel the rhythm of "
    "dust winter stone golden ocean carry us over mountain silver"
).split()
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))
# of the second take, in semitones: a double, or a harmony
INTERVALS = (0, 0, 4, 7, -5, 12)
# of a choir's
CHORDS = ((0, 4, 7), (0, 3, 7), (-12, 0, 7), (-5, 4, 12), (0, 0, 0))
DOUBLE_SHARE, CHOIR_SHARE = 0.3, 0.25


class Singer(NamedTuple):
    """Who sings, and in which key."""

    voice: str  # espeak-ng's
    words_per_minute: int
    pitch: int  # of the speech, 0 to 99
    formant_shift: float  # below 1 a larger head, above 1 a smaller one
    breath: float  # share of the aperiodicity that is kept
    tonic: float  # MIDI note
    scale: tuple
    beat: float  # seconds

    @classmethod
    def draw(cls, rng):
        """A singer [Singer] at random."""
        return cls(
            f"{rng.choice(LANGUAGES)}+{rng.choice(VARIANTS)}",
            int(rng.integers(90, 150)),
            int(rng.integers(20, 80)),
            rng.uniform(0.85, 1.18),
            rng.uniform(0.6, 1.0),
            rng.uniform(46, 66),
            SCALES[rng.integers(2)],
            rng.uniform(0.25, 0.55),
        )


@contextmanager
def speech_synthesizer():
    """Loads espeak-ng, for as long as the context lasts.

    What it gives takes a text and a `Singer`: speech [time] at 22.05 kHz.
    """
    import espeakng_loader

    # Loaded anew: it keeps random numbers from one text to the next, and a
    # song would depend on those made before it.
    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    data = os.fsencode(espeakng_loader.get_data_path())
    library.espeak_Initialize(2, 200, data, 0)  # 2: synchronous, no sound card
    blocks = []

    @ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_short),
        ctypes.c_int,
        ctypes.c_void_p,
    )
    def take(block, count, events):
        if block and count:
            blocks.append(np.ctypeslib.as_array(block, (count,)).copy())
        return 0

    def speak(text, singer):
        blocks.clear()
        if library.espeak_SetVoiceByName(singer.voice.encode()):
            raise ValueError(f"expected a voice, got {singer.voice}")
        library.espeak_SetParameter(1, singer.words_per_minute, 0)
        library.espeak_SetParameter(3, singer.pitch, 0)
        text = text.encode()
        size = ctypes.c_size_t(len(text) + 1)
        # 1: UTF-8
        library.espeak_Synth(text, size, 0, 1, 0, 1, None, None)
        return np.concatenate(blocks) / 32768

    library.espeak_SetSynthCallback(take)
    try:
        yield speak
    finally:
        library.espeak_Terminate()
        unload = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary
        unload(library._handle)


def make_melody(singer, rng, num_frames):
    """Pitch that walks on a scale, with glides, vibrato and drift.

    In Hz [frames], a frame each 5 ms.
    """
    notes, degree, length = [], int(rng.integers(7)), 0
    while length < num_frames:
        beats = rng.choice([0.5, 1, 1, 1.5, 2, 3])
        time = np.arange(0, singer.beat * beats, FRAME)
        degree += int(rng.choice([-3, -2, -1, -1, 0, 1, 1, 2, 3]))
        degree = min(max(degree, -3), 10)
        octave, step = divmod(degree, 7)
        note = singer.tonic + 12 * octave + singer.scale[step]
        depth = rng.uniform(0.1, 0.5) * np.clip((time - 0.25) / 0.3, 0, 1)
        vibrato = np.sin(2 * np.pi * rng.uniform(4.8, 6.5) * time)
        notes.append(note + depth * vibrato)
        length += len(time)
    glide = round(0.06 / FRAME)
    notes = np.pad(np.concatenate(notes)[:num_frames], glide // 2, "edge")
    notes = np.convolve(notes, np.ones(glide) / glide, "same")
    notes = notes[glide // 2 :][:num_frames]
    notes += 0.5 * np.cumsum(rng.normal(0, 0.004, num_frames))
    notes += rng.normal(0, 0.03, num_frames)
    return 440 * 2 ** ((notes - 69) / 12)


def sing(speech, singer, rng, intervals, held):
    """Sings a phrase of speech [time] at 22.05 kHz, vowels `held` longer.

    Takes [takes, time] at 44.1 kHz, of equal level: one, and one more for each
    of the intervals, in semitones.
    """
    import pyworld

    period = 1000 * FRAME
    pitch, time = pyworld.dio(speech, SPEECH_RATE, frame_period=period)
    pitch = pyworld.stonemask(speech, pitch, time, SPEECH_RATE)
    envelope = pyworld.cheaptrick(speech, pitch, time, SPEECH_RATE)
    breath = pyworld.d4c(speech, pitch, time, SPEECH_RATE)
    voiced = pitch > 0
    held, spoken = rng.uniform(*held), rng.uniform(0.9, 1.2)
    ends = np.cumsum(np.where(medfilt(voiced.astype(float), 5), held, spoken))
    places = np.interp(np.arange(ends[-1]), ends, np.arange(len(ends)))
    bins = singer.formant_shift * np.arange(envelope.shape[1])
    envelope = _interpolate(np.log(envelope + 1e-16).T, bins).T
    envelope = np.exp(_interpolate(envelope, places))
    breath = singer.breath * _interpolate(breath, places)
    melody = make_melody(singer, rng, len(places)) * voiced[places.astype(int)]
    takes = [melody]
    for interval in intervals:
        semitones = interval + rng.normal(0, 0.12)
        takes.append(melody * 2 ** (semitones / 12))
    timbre = [np.ascontiguousarray(part) for part in (envelope, breath)]
    takes = [
        pyworld.synthesize(take, *timbre, SPEECH_RATE, period) for take in takes
    ]
    takes = resample_poly(takes, SAMPLE_RATE, SPEECH_RATE, axis=1)
    return takes / np.sqrt(np.square(takes).mean(1, keepdims=True) + 1e-9)


def make_voice(rng, seconds=SECONDS):
    """A clip of one singer, or of a choir, with rests between the phrases.

    Float [time, 2] at 44.1 kHz with a peak of 0.8.
    """
    sig = np.zeros((int(seconds * SAMPLE_RATE), 2))
    singer = Singer.draw(rng)
    kind = rng.random()
    choir = kind < CHOIR_SHARE
    intervals, held, wet = (), (1.8, 3.5), (-22, -6)
    if choir:
        intervals = CHORDS[rng.integers(len(CHORDS))]
        held, wet = (2.5, 9.0), (-14, 2)
    elif kind < CHOIR_SHARE + DOUBLE_SHARE:
        intervals = (rng.choice(INTERVALS),)
    pans = rng.uniform(-0.6, 0.6, len(intervals))
    gains = [(1.0, 1.0), *((0.6 - pan, 0.6 + pan) for pan in pans)]
    time = rng.uniform(0, 2)
    with speech_synthesizer() as speak:
        while time < seconds:
            words = rng.choice(WORDS, rng.integers(3, 9))
            phrase = speak(" ".join(words), singer)
            takes = sing(phrase, singer, rng, intervals, held)
            for take, gain in zip(takes, np.array(gains)):
                begin = int(time * SAMPLE_RATE)
                part = sig[begin : begin + len(take)]
                part += take[: len(part), None] * gain
                time += DOUBLE_DELAY
            time += len(takes[0]) / SAMPLE_RATE
            rest = (3, 8) if rng.random() < 0.2 else (0.2, 2.5)
            time += rng.uniform(*rest)
    level, seconds = 10 ** (rng.uniform(*wet) / 20), rng.uniform(0.3, 1.8)
    sig += level * reverb(sig, rng, seconds * (1 + choir), predelay=0.01)
    sig = _filter(_compress(sig), 1, rng.uniform(80, 250), "high")
    if rng.random() < 0.8:
        sig = sig + _air(sig, rng)
    return sig * (PEAK / np.abs(sig).max())


def _interpolate(rows, places):
    """Rows at places between them, the last beyond the end."""
    places = np.minimum(places, len(rows) - 1)
    left = places.astype(int)
    weight = (places - left)[:, None]
    right = np.minimum(left + 1, len(rows) - 1)
    return (1 - weight) * rows[left] + weight * rows[right]


def _compress(sig):
    """Bends what is above 3 times the level of what sounds."""
    threshold = 3 * np.sqrt(np.square(sig[np.abs(sig) > 1e-3]).mean())
    return threshold * np.tanh(sig / threshold)


def _air(sig, rng):
    """Noise from 9 kHz up that follows the band below it."""
    band = _filter(sig, 3, (5000, 9500), "band")
    envelope = _filter(np.abs(band), 1, 40, "low")
    noise = rng.standard_normal((len(sig), 1))
    noise = _filter(noise, 3, (9000, 17500), "band")
    level = 10 ** (rng.uniform(-8, 2) / 20)
    return level * np.maximum(0, envelope) * noise / noise.std()


def _filter(sig, order, cutoff, kind):
    sos = butter(order, cutoff, kind, fs=SAMPLE_RATE, output="sos")
    return sosfilt(sos, sig, axis=0)
