"""The instruments of the demo band: notes and drums from a generator.

Tones are read from wavetables that hold only the partials below the Nyquist
frequency, so nothing aliases audibly. The rows of a table are the timbre from
the start of a note to its end: a filter envelope, the decay of an FM index or
of a Karplus-Strong string, for the price of one interpolation.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.signal import butter, sosfilt

TABLE_SIZE = 2048
TABLE_ROWS = 8


def pick(rng, options):
    """Draws one of several options, or of the words of a string."""
    # `random` and `uniform` alone are drawn from: of numpy's streams these are
    # the least likely to change with its version.
    options = options.split(" ") if isinstance(options, str) else options
    return options[int(rng.random() * len(options))]


class Player:
    """One stem and the notes of one timbre that are mixed into it.

    The ``time(step)`` of the score is the second at which a sixteenth sounds.
    """

    def __init__(self, name, score, rng, samples, sample_rate):
        self.name, self.score, self.rng = name, score, rng
        self.stem = np.zeros(samples, np.float32)
        self.sample_rate = sample_rate
        self.timbre = _draw_timbre(name, rng)
        # Out of tune by a few cents: exact unisons would correlate the stems.
        self.cents = rng.uniform(-4.0, 4.0)
        self.tables, self.notes = {}, {}

    def mix_in(self, seconds, sig, gain):
        """Adds a sound [time] that begins at a time; the end may cut it."""
        begin = round(seconds * self.sample_rate)
        end = min(begin + len(sig), len(self.stem))
        self.stem[begin:end] += np.float32(gain) * sig[: max(0, end - begin)]

    def play(self, step, length, midi, bend=0):
        """Adds a note at a sixteenth, of a length in sixteenths.

        It slides in from `bend` semitones above its pitch, 3 at most.
        """
        rng, begin = self.rng, self.score.time(step)
        seconds = self.score.time(step + length) - begin + self.timbre.release
        # Few different lengths, so that notes repeat and are rendered once.
        key = midi, max(1, round(seconds * self.sample_rate / 256)) * 256, bend
        gain = rng.uniform(0.8, 1.0) * (0.8 if step % 4 else 1.0)
        begin += rng.uniform(0.0, 0.006)
        if begin * self.sample_rate < len(self.stem):
            if key not in self.notes:
                self.notes[key] = self._note(*key)
            self.mix_in(begin, self.notes[key], gain)

    def _note(self, midi, samples, bend):
        freq = 440.0 * 2 ** ((midi - 69 + self.cents / 100) / 12)
        if midi not in self.tables:
            self.tables[midi] = make_tables(self.timbre, freq, self.sample_rate)
        what = self.timbre, self.tables[midi], freq, samples, bend
        return _render(*what, self.sample_rate, self.rng)


class Timbre(NamedTuple):
    """What the notes of one instrument have in common."""

    wave: str  # sine, saw, square, organ, flute, fm, pluck
    cutoff: tuple = (8000.0, 8000.0)  # low-pass at the end, start of a note, Hz
    decay: float = 0.3  # seconds, from the first table row to the last
    attack: float = 0.005  # seconds
    release: float = 0.06  # seconds
    sustain: float = math.inf  # seconds, time constant of the level
    detune: tuple = (0.0,)  # cents, one voice each
    vibrato: float = 0.0  # cents
    glide: bool = False
    breath: float = 0.0  # level of noise
    ratio: int = 1  # of FM
    index: float = 0.0  # of FM


def _draw_timbre(name, rng):
    draw = rng.uniform
    if name == "bass":
        wave = pick(rng, "sine saw square pluck")
        cutoff = draw(150, 350), draw(500, 2500)
        return Timbre(wave, cutoff, draw(0.08, 0.4), 0.006, 0.04, draw(0.8, 3))
    if name == "chords":
        warm, cents = (draw(700, 1500), draw(1500, 5000)), draw(4, 9)
        pad = Timbre("saw", warm, draw(0.3, 1), draw(0.02, 0.12), 0.2)
        piano = Timbre("fm", ratio=pick(rng, (1, 1, 7)), index=draw(0.8, 2))
        return pick(
            rng,
            (
                pad._replace(detune=(-cents, cents)),
                piano._replace(sustain=draw(0.7, 1.5), release=0.1),
                Timbre("pluck", release=0.15),
                Timbre("organ", release=0.03, vibrato=draw(0, 12)),
            ),
        )
    cutoff, vibrato = (draw(1500, 4000), draw(4000, 9000)), draw(5, 30)
    glide = rng.random() < 0.5
    square = Timbre("square", cutoff, vibrato=vibrato, glide=glide)
    bell = Timbre("fm", ratio=pick(rng, (2, 3)), index=draw(1, 2.5))
    return pick(
        rng,
        (
            square,
            square._replace(wave="saw", detune=(-5.0, 5.0)),
            bell._replace(sustain=draw(0.5, 1.2), release=0.15),
            Timbre("flute", attack=0.05, vibrato=vibrato, breath=0.1),
        ),
    )


def _render(timbre, tables, freq, samples, bend, sample_rate, rng):
    """A note [time] that slides to `freq` from `bend` semitones above it."""
    t = np.arange(samples) / sample_rate
    row = (TABLE_ROWS - 1) * (1.0 - np.exp(-t / timbre.decay))
    warped = t.copy()  # the integral of the pitch over `freq`
    if bend:
        slide = 0.04  # seconds
        warped -= slide * (2 ** (bend / 12) - 1) * np.expm1(-t / slide)
    if timbre.vibrato:
        rate = 2 * math.pi * 5.5  # swells over half a second
        depth = (2 ** (timbre.vibrato / 1200) - 1) / rate
        warped += depth * np.minimum(2.0 * t, 1.0) * np.sin(rate * t)
    note = np.zeros(samples)
    for cents in timbre.detune:
        cycles = freq * 2 ** (cents / 1200) * warped + rng.random()
        note += read_tables(tables, cycles, row)
    if timbre.breath:
        noise = rng.uniform(-1.0, 1.0, samples + 3)
        note += timbre.breath * np.convolve(noise, np.ones(4) / 4, "valid")
    note *= np.minimum(t / timbre.attack, 1.0)
    note *= np.minimum(t[::-1] / timbre.release, 1.0)
    return (note * np.exp(-t / timbre.sustain)).astype(np.float32)


def make_tables(timbre, freq, sample_rate):
    """One cycle of a tone at each stage of a note, without aliases.

    Float32 [rows, size + 1] without partials above 0.42 of the sample rate; the
    last column repeats the first. The first row, the start of a note, has an
    RMS of 1.
    """
    # 3 semitones above 0.42, where a slide begins, are 0.5.
    count = min(int(0.42 * sample_rate / freq), TABLE_SIZE // 5)
    k = np.arange(1, max(1, count) + 1)
    env = np.linspace(1.0, 0.0, TABLE_ROWS)[:, None]  # exp(-t / decay)
    if timbre.wave == "fm":
        cycle = 2 * math.pi * np.arange(TABLE_SIZE) / TABLE_SIZE
        index = timbre.index * (0.15 + 0.85 * env)
        sig = np.sin(cycle + index * np.sin(timbre.ratio * cycle))
        partials = 1j * np.fft.rfft(sig)[:, k]
    elif timbre.wave == "pluck":
        # Karplus-Strong: in each period the two-point average of the string
        # multiplies partial k by cos(pi k f / 44100).
        turn = np.minimum(math.pi * k * freq / 44100, 1.5)
        loss = 0.8 - freq * np.log(np.cos(turn))
        start = np.abs(np.sin(0.43 * k)) / k**0.8
        partials = start * env ** (timbre.decay * loss)
    else:
        partials = {
            "sine": (k == 1) + 0.3 * (k == 2) + 0.1 * (k == 3) + 0.02 / k,
            "saw": 1.0 / k,
            "square": (k % 2) / k,
            "organ": np.isin(k, (1, 2, 3, 4, 6, 8, 12, 16)) / k**0.7,
            "flute": np.exp(-0.8 * (k - 1)) * (0.4 + 0.6 * (k % 2)),
        }[timbre.wave]
    low, high = timbre.cutoff
    cutoff = low * (high / low) ** env
    spectrum = np.zeros((TABLE_ROWS, TABLE_SIZE // 2 + 1), complex)
    # Sines, not cosines, whose peaks would coincide.
    spectrum[:, k] = -1j * partials / np.sqrt(1.0 + (k * freq / cutoff) ** 4)
    tables = np.fft.irfft(spectrum, TABLE_SIZE)
    tables /= np.sqrt(np.mean(tables[0] ** 2))
    return np.append(tables, tables[:, :1], axis=1).astype(np.float32)


def read_tables(tables, cycles, row):
    """The tables at a phase and a row [time], both interpolated linearly.

    The phase is in cycles, the row from 0, the start of a note, to rows - 1.
    """
    column = (cycles - np.floor(cycles)) * TABLE_SIZE
    left = np.minimum(column.astype(np.int32), TABLE_SIZE - 1)
    above = np.minimum(row.astype(np.int32), TABLE_ROWS - 2)
    across = (column - left).astype(np.float32)
    down = (row - above).astype(np.float32)
    flat, first = tables.ravel(), above * (TABLE_SIZE + 1) + left
    second = first + TABLE_SIZE + 1
    upper = flat[first] + across * (flat[first + 1] - flat[first])
    lower = flat[second] + across * (flat[second + 1] - flat[second])
    return upper + down * (lower - upper)


def make_kit(rng, sample_rate):
    """Each drum in several takes [time], for no two hits are alike."""

    def noise(seconds, low, high):
        t = np.arange(max(64, round(6 * seconds * sample_rate))) / sample_rate
        # Towards the Nyquist frequency a band becomes an octave below it.
        high = min(high, 0.45 * sample_rate)
        edges = min(low, high / 2), high
        filters = butter(2, edges, "band", fs=sample_rate, output="sos")
        sig = sosfilt(filters, rng.uniform(-1.0, 1.0, len(t)))
        return sig * np.exp(-t / seconds)

    def sweep(seconds, top, bottom, slide):
        t = np.arange(round(6 * seconds * sample_rate)) / sample_rate
        cycles = bottom * t - (top - bottom) * slide * np.expm1(-t / slide)
        return np.sin(2 * math.pi * cycles) * np.exp(-t / seconds)

    def layers(level, *sigs):
        sig = np.zeros(max(map(len, sigs)))
        for layer in sigs:
            sig[: len(layer)] += layer
        # A bump takes the DC away: a constant would sound on after the drum.
        sig *= np.hanning(2 * len(sig))[len(sig) :]
        bump = np.hanning(len(sig))
        sig -= bump * (sig.sum() / bump.sum())
        return (sig * (level / np.abs(sig).max())).astype(np.float32)

    draw = rng.uniform
    body, tone, ring = draw(42, 60), draw(160, 240), draw(0.3, 1.2)
    kick = sweep(draw(0.06, 0.16), draw(150, 400), body, draw(0.01, 0.04))
    snare = ring * sweep(0.05, 1.3 * tone, tone, 0.01)
    snare += 0.5 * ring * sweep(0.05, 1.7 * tone, 1.6 * tone, 0.01)
    click, rattle, hats = draw(0.1, 0.5), draw(0.05, 0.13), draw(0.25, 0.45)
    bright, tick, wash = draw(5500, 9000), draw(0.012, 0.03), draw(0.06, 0.16)
    kit = {"kick": [], "snare": [], "hat": [], "open": []}
    for _ in range(3):
        kit["kick"].append(layers(1.0, kick, click * noise(0.004, 1500, 9000)))
        kit["snare"].append(layers(0.8, snare, noise(rattle, 1200, 9000)))
        kit["hat"].append(layers(hats, noise(tick, bright, 19000)))
        kit["open"].append(layers(hats, noise(wash, bright, 19000)))
    kit["crash"] = [layers(0.5, noise(0.35, 3500, 17000))]
    for i, pitch in enumerate((190, 140, 100)):
        skin = sweep(0.12, 1.6 * pitch, pitch, 0.03)
        kit[f"tom{i}"] = [layers(0.8, skin, 0.1 * noise(0.02, 800, 5000))]
    return kit
