"""The demo band: short songs with known stems, composed from a seed.

A machine without any music can train a separator on them and measure real
separation: every song has its own tempo, key, harmony, form, patterns and
timbres, and its stems (drums, bass, chords, lead) sum to the mixture.

Tones are read from wavetables that hold only the partials below the Nyquist
frequency, so nothing aliases audibly. The rows of a table are the timbre from
the start of a note to its end: a filter envelope, the decay of an FM index or
of a Karplus-Strong string, for the price of one interpolation.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from scipy.signal import butter, sosfilt
from tqdm import tqdm

VERSION = 1  # one of the settings of a band: raise it when the songs change
LEVELS = {"drums": 0.0, "bass": 0.0, "chords": -3.0, "lead": -2.0}  # dB RMS
STEMS = tuple(LEVELS)
PEAK = 0.9

MODES = {
    "major": ((0, 2, 4, 5, 7, 9, 11), "1564 1645 2516 6415 1465 1345 1425"),
    "minor": ((0, 2, 3, 5, 7, 8, 10), "1637 1451 1765 1473 6715 1465"),
    "dorian": ((0, 2, 3, 5, 7, 9, 10), "1414 1741 1374 1214"),
    "mixolydian": ((0, 2, 4, 5, 7, 9, 10), "1741 1471 1754 1426"),
}
# Patterns run over the sixteenths of a bar; triple meter stops after 12.
PATTERNS = {
    # root, octave, third, fifth, approach to the next chord
    "bass": "r............... r.r.r.r.r.r.r.r. r.o.r.o.r.o.r.o. "
    "r...t...f...a... r..r..o.r.f...o. r.....r.f.....a. r..rr..rr..rf.a.",
    # the whole chord, or single tones of it
    "chords": "x............... x.......x....... ..x...x...x...x. "
    "x..x..x...x..x.. x...x...x...x... 0.1.2.1.0.1.2.1. 0123012301230123",
    # hit, soft hit, open hat
    "kick16": "x.......x....... x...x...x...x... x.....x.x....... "
    "x..x......xs..x. x.s...x..x......",
    "snare16": "....x.......x... ....x..s.s..x... ....x.......x..s",
    "hat16": "x.s.x.s.x.s.x.s. xsssxsssxsssxsss ..o...o...o...o. "
    "x...x...x...x... x.s.x.o.x.s.x.ss x.xsx.xsx.xsx.o.",
    "kick12": "x........... x.....x..... x.......s.x.",
    "snare12": "....x...x... ......x..... ........x..s",
    "hat12": "x.s.x.s.x.s. x...x...x... x.sx.sx.sx.s ..o...o...o.",
    "cell": "x... x.x. x.x. x..x .xx. xxx. ..x. ....",  # one beat of melody
}
LEAPS = (-4, -2, -1, -1, -1, 0, 1, 1, 1, 2, 3)  # melody, in scale steps

TABLE_SIZE = 2048
TABLE_ROWS = 8


class _Chord(NamedTuple):
    start: int  # in sixteenths, as is the length
    length: int
    tones: list  # pitch classes
    bass: int
    letter: str  # of its section, A or B
    active: list  # the stems that play
    place: int  # in its section, 0 to 3


class _Score(NamedTuple):
    tempo: float
    bar: int  # sixteenths
    swing: float
    swing_unit: int  # sixteenths
    tonic: int
    mode: str
    chords: list

    def time(self, step):
        """Seconds at which a sixteenth sounds: swing delays every second."""
        inside = step % (2 * self.swing_unit)
        delay = self.swing * min(inside, 2 * self.swing_unit - inside)
        return (step + delay) * 15.0 / self.tempo


def make_song(seed, seconds=24.0, sample_rate=44100):
    """Composes and renders one song of the demo band.

    Arguments
    ---------
    seed : int
        Non-negative; the song is a function of it.
    seconds : float
        Length of the song, above 0.
    sample_rate : int
        Samples per second, 8000 or more.

    Returns
    -------
    stems : dict
        `drums`, `bass`, `chords` and `lead`, each a float32 array [time]. They
        share one gain, so that neither their sum nor any of them exceeds 0.9.

    Raises
    ------
    ValueError
        If an argument is outside its range.

    Example
    -------
    >>> stems = make_song(seed=0, seconds=2.0, sample_rate=16000)
    >>> list(stems), stems["bass"].shape
    (['drums', 'bass', 'chords', 'lead'], (32000,))
    >>> print(f"{abs(sum(stems.values())).max():.2f}")
    0.90
    """
    _check_settings(seed, seconds, sample_rate)
    samples = max(1, round(seconds * sample_rate))
    # A generator for each part: a change in one leaves the others as they are.
    rngs = [np.random.default_rng([seed, part]) for part in range(5)]
    score = _compose(rngs[0], seconds)
    stems = {}
    for name, rng in zip(STEMS, rngs[1:], strict=True):
        player = _Player(name, score, rng, samples, sample_rate)
        _PARTS[name](player, score, rng)
        stem = player.stem
        # Of the sounding parts alone: what plays little is not turned up.
        rms = math.sqrt(np.dot(stem, stem) / max(1, np.count_nonzero(stem)))
        level = 10 ** ((LEVELS[name] + rng.uniform(-4.0, 4.0)) / 20)
        stems[name] = stem * np.float32(level / max(rms, 1e-8))
    loudest = [sum(stems.values()), *stems.values()]
    gain = np.float32(PEAK / max(1e-8, *(abs(sig).max() for sig in loudest)))
    return {name: stem * gain for name, stem in stems.items()}


def make_band(
    folder,
    num_songs=60,
    seconds=24.0,
    seed=0,
    sample_rate=44100,
    progress=False,
):
    """Writes a folder of songs, each a folder of four 16-bit wav stems.

    `band.json` holds the settings and is written last: where it stands, the
    band is complete. A complete band is kept as it is, an interrupted one is
    completed.

    Arguments
    ---------
    folder : str or pathlib.Path
        Where to write; made if missing.
    num_songs : int
        Number of songs, 1 or more. Song i depends on `seed` and i alone.
    seconds : float
        Length of each song, above 0.
    seed : int
        Non-negative; another seed is another band.
    sample_rate : int
        Samples per second, 8000 or more.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    folder : pathlib.Path
        The folder, with `song_000/drums.wav` and so on.

    Raises
    ------
    ValueError
        If an argument is outside its range, or the folder holds a band with
        other settings, or files that are no band.

    Example
    -------
    >>> import tempfile
    >>> folder = make_band(tempfile.mkdtemp(), num_songs=2, seconds=0.1)
    >>> sorted(path.name for path in folder.iterdir())
    ['band.json', 'song_000', 'song_001']
    """
    _check_settings(seed, seconds, sample_rate, num_songs)
    num_songs, sample_rate, seed = int(num_songs), int(sample_rate), int(seed)
    settings = {"num_songs": num_songs, "seconds": float(seconds), "seed": seed}
    settings |= {"sample_rate": sample_rate, "version": VERSION}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker, started = folder / "band.json", folder / "band.partial.json"
    if marker.exists() or started.exists():
        _check_same(settings, marker if marker.exists() else started)
    else:
        # Hidden files may be the first traces of another process at work.
        names = sorted(path.name for path in folder.glob("[!.]*"))
        if names:
            raise ValueError(
                f"expected an empty folder or a demo band, got {folder} with "
                f"{names[0]!r} and no band.json: choose another folder"
            )
        _write_json(started, settings)
    for index in tqdm(range(num_songs), "demo band", disable=not progress):
        song = folder / f"song_{index:03d}"
        if all((song / f"{name}.wav").exists() for name in STEMS):
            continue
        state = np.random.SeedSequence([seed, index]).generate_state(
            1, "uint64"
        )
        stems = make_song(int(state[0]), seconds, sample_rate)
        with tempfile.TemporaryDirectory(prefix=".song_", dir=folder) as new:
            # Not called wav before the rename: what a killed run leaves behind
            # must not be taken for music.
            for name, sig in stems.items():
                path = os.path.join(new, name)
                soundfile.write(path, sig, sample_rate, "PCM_16", format="WAV")
            # One by one, for some of them may be there.
            song.mkdir(exist_ok=True)
            for name in STEMS:
                os.replace(os.path.join(new, name), song / f"{name}.wav")
    if not marker.exists():
        _write_json(marker, settings)
    started.unlink(missing_ok=True)
    return folder


def _check_settings(seed, seconds, sample_rate, num_songs=1):
    if not 0 < seconds < math.inf:
        raise ValueError(f"expected seconds above 0, got {seconds}")
    least = {"seed": 0, "sample_rate": 8000, "num_songs": 1}
    for name, value in zip(least, (seed, sample_rate, num_songs), strict=True):
        if value != int(value) or value < least[name]:
            raise ValueError(
                f"expected {name} to be an integer of {least[name]} or more, "
                f"got {value}"
            )


def _check_same(settings, path):
    found = json.loads(path.read_text())
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"expected {name} {value}, got {found.get(name)} in {path}: "
                "ask for the band that is there, or choose another folder"
            )


def _write_json(path, settings):
    with tempfile.TemporaryDirectory(prefix=".band_", dir=path.parent) as new:
        new = Path(new, path.name)
        new.write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(new, path)


def _pick(rng, options):
    # `random` and `uniform` alone are drawn from: of numpy's streams these are
    # the least likely to change with its version.
    options = options.split(" ") if isinstance(options, str) else options
    return options[int(rng.random() * len(options))]


def _compose(rng, seconds):
    """Tempo, key, harmony and form of a song of at least `seconds`."""
    tempo, bar = rng.uniform(70.0, 160.0), _pick(rng, (16, 16, 16, 12))
    swing = _pick(rng, (0.0, 0.0, rng.uniform(0.1, 0.34)))
    swing_unit, tonic = _pick(rng, (1, 2)), _pick(rng, range(12))
    mode = _pick(rng, ("major", "major", "minor", "minor", *MODES))
    scale, progressions = MODES[mode]
    # Four chords make a section. At 4 to 9 seconds it is long enough to hear
    # who plays and short enough for several in a song.
    length = bar // 2 if bar * 15.0 / tempo > 2.2 else bar
    degrees = {letter: _pick(rng, progressions) for letter in "AB"}
    form, everyone = _pick(rng, "AABA ABAB ABBA AABB"), _pick(rng, (1, 2))
    seventh, inverted = _pick(rng, (0.0, 0.3, 1.0)), _pick(rng, (0.0, 0.25))

    chords = []
    for section in range(math.ceil(seconds * tempo / 15.0 / length / 4) + 1):
        letter = form[section % 4]
        order = sorted(STEMS, key=lambda _: rng.random())
        absent = _pick(rng, (0, 0, 0, 1, 1, 1, 1, 2, 2, 3))
        active = order[0 if section == everyone else absent :]
        for place in range(4):
            degree = int(degrees[letter][place]) - 1
            thirds = (0, 2, 4, 6) if rng.random() < seventh else (0, 2, 4)
            tones = [tonic + scale[(degree + third) % 7] for third in thirds]
            if mode == "minor" and degree == 4:
                tones[1] += 1  # the leading tone of harmonic minor
            bass = tones[rng.random() < inverted]
            start = (4 * section + place) * length
            chords.append(
                _Chord(start, length, tones, bass, letter, active, place)
            )
    return _Score(tempo, bar, swing, swing_unit, tonic, mode, chords)


def _events(pattern, length):
    """(step, steps to the next event, symbol) for each event of a pattern."""
    at = [step for step in range(length) if pattern[step] != "."]
    steps = np.diff([*at, length]).tolist()
    return [(a, n, pattern[a]) for a, n in zip(at, steps, strict=True)]


class _Player:
    """One stem and the notes of one timbre that are mixed into it."""

    def __init__(self, name, score, rng, samples, sample_rate):
        self.name, self.score, self.rng = name, score, rng
        self.stem = np.zeros(samples, np.float32)
        self.sample_rate = sample_rate
        self.timbre = _timbre(name, rng)
        # Out of tune by a few cents: exact unisons would correlate the stems.
        self.cents = rng.uniform(-4.0, 4.0)
        self.tables, self.notes = {}, {}

    def mix_in(self, seconds, sig, gain):
        begin = round(seconds * self.sample_rate)
        end = min(begin + len(sig), len(self.stem))
        self.stem[begin:end] += np.float32(gain) * sig[: max(0, end - begin)]

    def play(self, step, length, midi, bend=0):
        """A note of `length` sixteenths; it slides in from `bend` semitones."""
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
            self.tables[midi] = _tables(self.timbre, freq, self.sample_rate)
        what = self.timbre, self.tables[midi], freq, samples, bend
        return _render(*what, self.sample_rate, self.rng)


def _play_chords(player, score, rng):
    """Plays bass or chords: a pattern for each section over its harmony."""
    name, gate = player.name, rng.uniform(0.6, 1.0)
    patterns = {letter: _pick(rng, PATTERNS[name]) for letter in "AB"}
    # All tones in one octave: this makes the inversions and the voice leading.
    low = _pick(rng, range(28, 33) if name == "bass" else range(50, 59))
    strum = _pick(rng, (0.0, 0.0, 0.12))  # sixteenths from tone to tone
    for chord, after in zip(score.chords, score.chords[1:], strict=False):
        lead_in = after.bass + _pick(rng, (-1, 1))
        tones = [*chord.tones, chord.bass, lead_in]
        *tones, root, approach = [low + (tone - low) % 12 for tone in tones]
        pitches = {"r": [root], "o": [root + 12], "a": [approach]}
        pitches |= {"t": tones[1:2], "f": tones[2:3], "x": sorted(tones)}
        pitches |= {str(i): [(sorted(tones) * 2)[i]] for i in range(4)}
        pattern = patterns[chord.letter] if name in chord.active else "." * 16
        for step, length, symbol in _events(pattern, chord.length):
            for i, midi in enumerate(pitches[symbol]):
                at = chord.start + step + i * strum
                player.play(at, length * gate, midi)


def _play_lead(player, score, rng):
    """A motif of two bars for each section, walking on the scale."""
    motifs = {}
    for letter in "AB":
        cells = [_pick(rng, PATTERNS["cell"]) for _ in range(score.bar // 2)]
        cells[0], cells[-1] = "x.x.", _pick(rng, "x... .... ....")
        events = _events("".join(cells), 2 * score.bar)
        motifs[letter] = [(*event[:2], _pick(rng, LEAPS)) for event in events]
    low = 64 + int(6 * rng.random())
    notes, scale = range(low, low + 22), MODES[score.mode][0]
    ladder = [midi for midi in notes if (midi - score.tonic) % 12 in scale]
    place, before, until = 0, 0, -1
    for chord in score.chords:
        if chord.place == 0:
            place = int(rng.uniform(0.3, 0.7) * len(ladder))
        tones = {tone % 12 for tone in chord.tones}
        fitting = [midi for midi in notes if midi % 12 in tones]
        offset = chord.start % (2 * score.bar)
        for step, length, leap in motifs[chord.letter]:
            inside = offset <= step < offset + chord.length
            if not inside or "lead" not in chord.active or rng.random() < 0.06:
                continue
            place = min(max(place + leap, 0), len(ladder) - 1)
            midi, at = ladder[place], chord.start + step - offset
            if step % 4 == 0 or length > 4:  # strong and long notes fit
                midi = min(fitting, key=lambda m: abs(m - ladder[place]))
            tied = player.timbre.glide and at <= until
            # From 3 semitones above at most: higher, partials would alias.
            bend = min(before - midi, 3) if tied else 0
            player.play(at, 0.92 * min(length, 8), midi, bend)
            before, until = midi, at + length
    dry, echo = player.stem.copy(), rng.uniform(0.0, 0.35)
    for i in (1, 2):
        player.mix_in(i * 45.0 / score.tempo, dry, echo**i)


def _play_drums(player, score, rng):
    """A pattern for each section, a crash before and a fill after it."""
    kit = _kit(rng, player.sample_rate)
    patterns = {
        (letter, piece): _pick(rng, PATTERNS[f"{piece}{score.bar}"])
        for letter in "AB"
        for piece in ("kick", "snare", "hat")
    }
    fills, crash = _pick(rng, (0.0, 0.5, 1.0)), _pick(rng, (0.3, 1.0))
    for chord in score.chords:
        if "drums" not in chord.active:
            continue
        opens = chord.place == 0 and rng.random() < crash
        hits = [("crash", 0, 1.0)] if opens else []
        closes = chord.place == 3 and rng.random() < fills
        until = chord.length // 2 if closes else chord.length
        offset = chord.start % score.bar
        for piece in ("kick", "snare", "hat"):
            pattern = patterns[chord.letter, piece][offset:]
            for step, _, symbol in _events(pattern, until):
                drum = "open" if symbol == "o" else piece
                hits.append((drum, step, 0.4 if symbol == "s" else 1.0))
        for step in range(until, chord.length):
            part = (step - until) / (chord.length - until)
            drum = ("snare", "tom0", "tom1", "tom2")[int(4 * part)]
            if rng.random() < 0.8:
                hits.append((drum, step, 0.6 + 0.4 * part))
        for drum, step, gain in hits:
            begin = score.time(chord.start + step) + rng.uniform(0.0, 0.004)
            take = _pick(rng, kit[drum])
            player.mix_in(begin, take, gain * rng.uniform(0.8, 1.0))


_PARTS = {
    "drums": _play_drums,
    "bass": _play_chords,
    "chords": _play_chords,
    "lead": _play_lead,
}


class _Timbre(NamedTuple):
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


def _timbre(name, rng):
    draw = rng.uniform
    if name == "bass":
        wave = _pick(rng, "sine saw square pluck")
        cutoff = draw(150, 350), draw(500, 2500)
        return _Timbre(wave, cutoff, draw(0.08, 0.4), 0.006, 0.04, draw(0.8, 3))
    if name == "chords":
        warm, cents = (draw(700, 1500), draw(1500, 5000)), draw(4, 9)
        pad = _Timbre("saw", warm, draw(0.3, 1), draw(0.02, 0.12), 0.2)
        piano = _Timbre("fm", ratio=_pick(rng, (1, 1, 7)), index=draw(0.8, 2))
        return _pick(
            rng,
            (
                pad._replace(detune=(-cents, cents)),
                piano._replace(sustain=draw(0.7, 1.5), release=0.1),
                _Timbre("pluck", release=0.15),
                _Timbre("organ", release=0.03, vibrato=draw(0, 12)),
            ),
        )
    cutoff, vibrato = (draw(1500, 4000), draw(4000, 9000)), draw(5, 30)
    glide = rng.random() < 0.5
    square = _Timbre("square", cutoff, vibrato=vibrato, glide=glide)
    bell = _Timbre("fm", ratio=_pick(rng, (2, 3)), index=draw(1, 2.5))
    return _pick(
        rng,
        (
            square,
            square._replace(wave="saw", detune=(-5.0, 5.0)),
            bell._replace(sustain=draw(0.5, 1.2), release=0.15),
            _Timbre("flute", attack=0.05, vibrato=vibrato, breath=0.1),
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
        note += _read(tables, cycles, row)
    if timbre.breath:
        noise = rng.uniform(-1.0, 1.0, samples + 3)
        note += timbre.breath * np.convolve(noise, np.ones(4) / 4, "valid")
    note *= np.minimum(t / timbre.attack, 1.0)
    note *= np.minimum(t[::-1] / timbre.release, 1.0)
    return (note * np.exp(-t / timbre.sustain)).astype(np.float32)


def _tables(timbre, freq, sample_rate):
    """One cycle at each stage of a note, [rows, size + 1]."""
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


def _read(tables, cycles, row):
    """The tables at a phase and a row, both interpolated linearly."""
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


def _kit(rng, sample_rate):
    """Each drum in several takes, for no two hits are alike."""

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
