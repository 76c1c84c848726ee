"""The demo band: short songs with known stems, composed from a seed.

A machine without any music can train a separator on them and measure real
separation: every song has its own tempo, key, harmony, form, patterns and
timbres, and its stems (drums, bass, chords, lead) sum to the mixture.

This module composes and keeps the folder; ``synth`` plays.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from trackformer_sb.data.files import write_json
from trackformer_sb.data.synth import Player, make_kit, pick

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

    Arguments as ``make_band``. The stems [time] share one gain, so that neither
    their sum nor any of them exceeds 0.9.

    Example
    -------
    >>> stems = make_song(seed=0, seconds=2.0, sample_rate=16000)
    >>> list(stems), stems["bass"].shape
    (['drums', 'bass', 'chords', 'lead'], (32000,))
    >>> print(f"{abs(sum(stems.values())).max():.2f}")
    0.90
    """
    samples = max(1, round(seconds * sample_rate))
    # A generator for each part: a change in one leaves the others as they are.
    rngs = [np.random.default_rng([seed, part]) for part in range(5)]
    score = _compose(rngs[0], seconds)
    stems = {}
    for name, rng in zip(STEMS, rngs[1:], strict=True):
        player = Player(name, score, rng, samples, sample_rate)
        _PARTS[name](player, score, rng)
        stem = player.stem
        # Of the sounding parts alone: what plays little is not turned up.
        rms = math.sqrt(np.dot(stem, stem) / max(1, np.count_nonzero(stem)))
        level = 10 ** ((LEVELS[name] + rng.uniform(-4.0, 4.0)) / 20)
        stems[name] = stem * np.float32(level / max(rms, 1e-8))
    loudest = [sum(stems.values()), *stems.values()]
    gain = np.float32(PEAK / max(1e-8, *(abs(sig).max() for sig in loudest)))
    return {name: stem * gain for name, stem in stems.items()}


def make_band(folder, num_songs=60, seconds=24.0, seed=0, sample_rate=44100):
    """Writes a folder of songs, each a folder of four 16-bit wav stems.

    `band.json` holds the settings. A complete band is kept as it is, an
    interrupted one is completed. Song i depends on `seed`, 0 or more, and i
    alone. `num_songs` is 1 or more, `seconds`, of each song, above 0,
    `sample_rate` 8000 Hz or more. Returns the folder [pathlib.Path]. Arguments
    out of range, a band of other settings in the folder, or files that are no
    band, are a ValueError.

    Example
    -------
    >>> import tempfile
    >>> folder = make_band(tempfile.mkdtemp(), num_songs=2, seconds=0.1)
    >>> sorted(path.name for path in folder.iterdir())
    ['band.json', 'song_000', 'song_001']
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"expected seconds above 0, got {seconds}")
    least = {"seed": 0, "sample_rate": 8000, "num_songs": 1}
    for name, value in zip(least, (seed, sample_rate, num_songs), strict=True):
        if not isinstance(value, int) or value < least[name]:
            raise ValueError(
                f"expected {name} to be an integer of {least[name]} or more, "
                f"got {value}"
            )
    settings = {"num_songs": num_songs, "seconds": float(seconds), "seed": seed}
    settings |= {"sample_rate": sample_rate, "version": VERSION}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "band.json"
    # Hidden files may be the first traces of another process at work.
    names = sorted(path.name for path in folder.glob("[!.]*"))
    if marker.exists():
        check_same(settings, marker)
    elif names:
        raise ValueError(
            f"expected an empty folder or a demo band, got {folder} with "
            f"{names[0]!r} and no band.json: choose another folder"
        )
    else:
        write_json(marker, settings)
    for index in tqdm(range(num_songs), "demo band", disable=None):
        song = folder / f"song_{index:03d}"
        if all((song / f"{name}.wav").exists() for name in STEMS):
            continue
        state = np.random.SeedSequence([seed, index])
        (song_seed,) = state.generate_state(1, "uint64")
        stems = make_song(int(song_seed), seconds, sample_rate)
        with tempfile.TemporaryDirectory(prefix=".song_", dir=folder) as new:
            for name, sig in stems.items():
                soundfile.write(f"{new}/{name}.wav", sig, sample_rate, "PCM_16")
            # One by one, for some of them may be there.
            song.mkdir(exist_ok=True)
            for name in STEMS:
                os.replace(f"{new}/{name}.wav", song / f"{name}.wav")
    return folder


def check_same(settings, path):
    """Refuses other settings than those of a file of ``write_json``."""
    found = json.loads(path.read_text())
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"expected {name} {value}, got {found.get(name)} in {path}: "
                "ask for what is there, or choose another folder"
            )


def _compose(rng, seconds):
    """Tempo, key, harmony and form of a song of at least `seconds`."""
    tempo, bar = rng.uniform(70.0, 160.0), pick(rng, (16, 16, 16, 12))
    swing = pick(rng, (0.0, 0.0, rng.uniform(0.1, 0.34)))
    swing_unit, tonic = pick(rng, (1, 2)), pick(rng, range(12))
    mode = pick(rng, ("major", "major", "minor", "minor", *MODES))
    scale, progressions = MODES[mode]
    # Four chords make a section. At 4 to 9 seconds it is long enough to hear
    # who plays and short enough for several in a song.
    length = bar // 2 if bar * 15.0 / tempo > 2.2 else bar
    degrees = {letter: pick(rng, progressions) for letter in "AB"}
    form, everyone = pick(rng, "AABA ABAB ABBA AABB"), pick(rng, (1, 2))
    seventh, inverted = pick(rng, (0.0, 0.3, 1.0)), pick(rng, (0.0, 0.25))

    chords = []
    for section in range(math.ceil(seconds * tempo / 15.0 / length / 4) + 1):
        letter = form[section % 4]
        order = sorted(STEMS, key=lambda _: rng.random())
        absent = pick(rng, (0, 0, 0, 1, 1, 1, 1, 2, 2, 3))
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


def _play_chords(player, score, rng):
    """Plays bass or chords: a pattern for each section over its harmony."""
    name, gate = player.name, rng.uniform(0.6, 1.0)
    patterns = {letter: pick(rng, PATTERNS[name]) for letter in "AB"}
    # All tones in one octave: this makes the inversions and the voice leading.
    low = pick(rng, range(28, 33) if name == "bass" else range(50, 59))
    strum = pick(rng, (0.0, 0.0, 0.12))  # sixteenths from tone to tone
    for chord, after in zip(score.chords, score.chords[1:], strict=False):
        lead_in = after.bass + pick(rng, (-1, 1))
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
        cells = [pick(rng, PATTERNS["cell"]) for _ in range(score.bar // 2)]
        cells[0], cells[-1] = "x.x.", pick(rng, "x... .... ....")
        events = _events("".join(cells), 2 * score.bar)
        motifs[letter] = [(*event[:2], pick(rng, LEAPS)) for event in events]
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
    kit = make_kit(rng, player.sample_rate)
    patterns = {
        (letter, piece): pick(rng, PATTERNS[f"{piece}{score.bar}"])
        for letter in "AB"
        for piece in ("kick", "snare", "hat")
    }
    fills, crash = pick(rng, (0.0, 0.5, 1.0)), pick(rng, (0.3, 1.0))
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
            take = pick(rng, kit[drum])
            player.mix_in(begin, take, gain * rng.uniform(0.8, 1.0))


_PARTS = {
    "drums": _play_drums,
    "bass": _play_chords,
    "chords": _play_chords,
    "lead": _play_lead,
}
