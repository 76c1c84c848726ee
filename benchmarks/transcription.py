"""Notes: from the mixture, from our stems, from the true stems.

Pieces by make-music, of MIDI files that no training has heard: which notes are
rendered is known. Each has a synthesised singer beside it, half as loud, who
sings a melody that is known. `trackformer transcribe` hears each class in three
signals: the mixture, our stem and the true one. So the first two columns say
what separation gives, and the last what remains to gain.

F1 of notes and, in brackets, precision and recall, means of pieces. A note is
right if its onset is within 50 ms and its pitch within 50 cents of one in the
piece (mir_eval.transcription, offsets left out), a stroke of the drums if it is
within 50 ms (mir_eval.onset); toms, cymbals and others are none of the three,
and count as wrong where they are heard as one.
"""

import pathlib
import re
import sys
import warnings
from collections import defaultdict
from importlib.util import find_spec
from unittest import mock

import mir_eval
import numpy as np
import torch
from common import Record, new_parser, parse_args, say, table
from mir_eval.util import hz_to_midi, midi_to_hz

from trackformer_sb.audio import read_segment
from trackformer_sb.data import voices
from trackformer_sb.data.midi import load_midi, midi_class
from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import STEM_CLASSES
from trackformer_sb.inference.separator import load_separator
from trackformer_sb.inference.transcription import Note, cut_notes, stem_notes

VOICE_RMS = 0.5  # beside the others
DRUMS = {"kick": (35, 36), "snare": (38, 40), "hi-hat": (42, 44, 46)}
SIGNALS = ("mixture", "our stems", "true stems")
WINDOW = 0.05  # seconds


def pieces(music, midi, seconds, number):
    """Rendered pieces and their scores.

    Arguments
    ---------
    music, midi : path
        What make-music left, and the MIDI files it was made of.
    seconds : float
        How much of each.
    number : int
        How many, in the order of their names.

    Yields
    ------
    tuple
        Path of the MIDI file, its symusic.Score in seconds, and the stems:
        name -> [2, time] at 44.1 kHz.
    """
    songs = Music(music, "stems", stem_groups=STEM_CLASSES).songs()
    for song in sorted(songs, key=lambda song: song.title)[:number]:
        name = pathlib.Path(song.path).name
        (path,) = (
            path
            for path in sorted(pathlib.Path(midi).rglob("*.mid"))
            if name.endswith("_" + re.sub(r"\W", "_", path.stem) + "_0")
        )
        what = 0.0, min(seconds, song.seconds), 44100
        stems = {
            name: read_segment(paths[0], *what, channel="both")
            for name, paths in song.tracks.items()
        }
        yield path, load_midi(path, seconds), stems


def score_notes(score, seconds):
    """Notes of a score by class; of drums the strokes of each kind."""
    notes = {}
    for track in score.tracks:
        name = midi_class(track, ("bass",))
        for note in track.notes:
            if note.time < seconds - WINDOW:
                what = note.time, note.time + note.duration, note.pitch
                notes.setdefault(name, []).append(Note(*what))
    for name in notes:
        kept, last = [], {}
        # instruments in unison are heard as one
        for note in sorted(notes[name]):
            if note.onset > last.get(note.pitch, -1.0) + WINDOW:
                kept.append(note)
                last[note.pitch] = note.onset
        notes[name] = kept
    return notes


def sung(rng, seconds):
    """A singer [2, time] and the notes that are sung."""
    singer = voices.Singer.draw(rng)
    singer = singer._replace(tonic=round(singer.tonic))
    sig, notes, pitches = np.zeros(int(seconds * 44100)), [], []

    def melody(singer, rng, frames):
        """Steps of a scale [frames] with vibrato, in Hz."""
        time = voices.FRAME * np.arange(frames)
        beats = (time // singer.beat).astype(int)
        steps = rng.choice([0, 2, 4, 5, 7, 9], frames)[beats]
        vibrato = 0.25 * np.sin(2 * np.pi * 5.5 * time)
        return midi_to_hz(singer.tonic + steps + vibrato)

    import pyworld

    synthesize = pyworld.synthesize

    def synthesised(pitch, *timbre):
        pitches.append(pitch)  # 0 where there is no voice
        return synthesize(pitch, *timbre)

    time = 0.5
    with (
        mock.patch.object(voices, "make_melody", melody),
        mock.patch.object(pyworld, "synthesize", synthesised),
        voices.speech_synthesizer() as speak,
    ):
        while time < seconds:
            words = " ".join(rng.choice(voices.WORDS, rng.integers(3, 9)))
            held = (1.8, 3.5)
            (take,) = voices.sing(speak(words, singer), singer, rng, (), held)
            begin = int(time * 44100)
            part = sig[begin:]
            part[: len(take)] += take[: len(part)]
            pitch = np.where(pitches[-1] > 0, pitches[-1], np.nan)
            pitch = np.round(hz_to_midi(pitch))
            notes += [
                Note(time + note.onset, time + note.offset, note.pitch)
                for note in cut_notes(pitch, 0 * pitch, voices.FRAME)
                if time + note.onset < seconds - WINDOW
            ]
            time += len(take) / 44100 + rng.uniform(0.2, 1.5)
    return torch.tensor(sig, dtype=torch.float32).expand(2, -1), notes


def note_scores(true, found):
    """F1, precision and recall of notes."""
    if not found:
        return 0.0, 0.0, 0.0
    sides = []
    for notes in (true, found):
        sides.append(np.array([note[:2] for note in notes]))
        sides.append(midi_to_hz(np.array([note.pitch for note in notes])))
    precision, recall, f1, _ = (
        mir_eval.transcription.precision_recall_f1_overlap(
            *sides, onset_tolerance=WINDOW, offset_ratio=None
        )
    )
    return f1, precision, recall


def stroke_scores(true, found):
    """F1, precision and recall of the strokes of one drum."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are none
        times = (np.array([x.onset for x in side]) for side in (true, found))
        return mir_eval.onset.f_measure(*times, window=WINDOW)


def compare(name, true, signals):
    """Yields what is compared, how many notes it has, and scores by signal."""
    found = [stem_notes(name, sig, 44100) for sig in signals]
    if name != "drums":
        if true:
            yield name, len(true), [note_scores(true, x) for x in found]
        return
    for kind, keys in DRUMS.items():
        strokes = [
            [note for note in notes if note.pitch in keys]
            for notes in (true, *found)
        ]
        if strokes[0]:
            scores = [stroke_scores(strokes[0], x) for x in strokes[1:]]
            yield kind, len(strokes[0]), scores


def main():
    """Measures and writes the record."""
    parser = new_parser(__doc__, "transcription")
    parser.add_argument("music", help="pieces by make-music, not trained on")
    parser.add_argument("midi", help="folder with their MIDI files")
    parser.add_argument("--model", default="default")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--pieces", type=int, default=8)
    args = parse_args(parser)
    for folder in (args.music, args.midi):
        if not pathlib.Path(folder).is_dir():
            sys.exit(f"skipped: needs {folder}")
    classes = ["vocals", "bass", "drums", "other"]
    if not find_spec("basic_pitch"):
        say("other: skipped, needs pip install --no-deps basic-pitch")
        classes.remove("other")
    record = Record("Transcription", __doc__, args.output, args.device)
    separator = load_separator(args.model, args.device)
    rng = np.random.default_rng(0)
    numbers, scores = defaultdict(list), defaultdict(list)
    for path, score, stems in pieces(
        args.music, args.midi, args.seconds, args.pieces
    ):
        seconds = next(iter(stems.values())).shape[1] / 44100
        true = score_notes(score, seconds)
        voice, true["vocals"] = sung(rng, seconds)
        level = sum(stems.values()).std() / voice.std()
        stems["vocals"] = VOICE_RMS * level * voice
        mix = sum(stems.values())
        ours = separator.separate(mix)
        for name in [x for x in classes if x in stems]:
            signals = mix, ours[name], stems[name]
            for kind, *what in compare(name, true.get(name, []), signals):
                numbers[kind].append(what[0])
                scores[kind].append(what[1])
        say(f"{path.stem}: {', '.join(stems)}")
        rows = []
        for kind, number in numbers.items():
            cells = [
                f"{f1:.2f} ({precision:.2f}, {recall:.2f})"
                for f1, precision, recall in np.mean(scores[kind], 0)
            ]
            rows.append([kind, len(number), sum(number), *cells])
        block = table(["class", "pieces", "notes", *SIGNALS], rows)
        record.write("## F1 (precision, recall)", block)
    say(block)


if __name__ == "__main__":
    main()
