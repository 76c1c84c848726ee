"""Tempo, beats, key and search: from the mixture, our stems, the true stems.

Pieces by make-music, of MIDI files that no training has heard, which tell tempo
and beats. The key is that of the notes: whose Krumhansl profile (Cognitive
Foundations of Musical Pitch, 1990) their durations fit best.

- beats: of librosa's tracker (Ellis, J. New Music Res. 2007) from the drums;
  F-measure within 70 ms (mir_eval.beat, without the first 5 s);
- tempo: the share of pieces within 4 %, and with half, double, a third and
  three times of it;
- key: the profile that the chroma fits best, without drums; the share that is
  right, and the score of mir_eval.key, which gives parts for related keys;
- search: features of two windows of 10 s of each song, 20 s apart; the share
  of windows whose nearest neighbour is the other one of their song, by the
  cosine of features that are standardised over all windows.
"""

import pathlib
import sys
import warnings

import librosa
import mir_eval
import numpy as np
import torch
from common import Record, new_parser, parse_args, say, table
from symusic import Note, Score, Track
from transcription import SIGNALS, pieces

from trackformer_sb.audio import read_segment, resample
from trackformer_sb.data.music import Music
from trackformer_sb.inference.features import PerformerFeatures
from trackformer_sb.inference.separator import load_separator
from trackformer_sb.nnet.fusion import fusion_features

RATE = 22050
PITCHES = "C C# D Eb E F F# G Ab A Bb B".split()
# how well each tone of the scale from the tonic on fits, by listeners
PROFILES = {
    "major": "6.35 2.23 3.48 2.33 4.38 4.09 2.52 5.19 2.39 3.66 2.29 2.88",
    "minor": "6.33 2.68 3.52 5.38 2.60 3.53 2.54 4.75 3.98 2.69 3.34 3.17",
}
WINDOW, STARTS = 10.0, (10.0, 30.0)  # seconds


# -- what MIDI files tell


def midi_beats(path, seconds):
    """Times of the quarters of a MIDI file from its first note on."""
    score = Score(path)
    beats = Track()
    for tick in range(0, score.end(), score.ticks_per_quarter):
        beats.notes.append(Note(tick, 1, 60, 1))
    score.tracks.append(beats)
    score = score.to("second")
    *tracks, beats = score.tracks
    first = min(note.time for track in tracks for note in track.notes)
    times = np.array([note.time for note in beats.notes]) - first
    return times[(times > -0.001) & (times < seconds)]


def best_key(chroma):
    """The key whose profile correlates best with a chroma [12].

    Example
    -------
    >>> best_key(np.eye(12)[[0, 4, 7]].sum(0))
    'C major'
    """
    fits = {}
    for mode, profile in PROFILES.items():
        profile = np.array(profile.split(), float)
        for tonic, name in enumerate(PITCHES):
            fit = np.corrcoef(np.roll(profile, tonic), chroma)[0, 1]
            fits[f"{name} {mode}"] = fit
    return max(fits, key=fits.get)


def midi_key(score):
    """The key of all notes but those of drums."""
    chroma = np.zeros(12)
    for track in score.tracks:
        for note in track.notes:
            if not track.is_drum:
                chroma[note.pitch % 12] += note.duration
    return best_key(chroma)


# -- what is heard


def mono(sig):
    """[2, time] at 44.1 kHz as an array at 22.05 kHz."""
    return resample(sig.mean(0), 44100, RATE).numpy()


def beat_scores(sig, true):
    """F-measure of beats, and whether the tempo is right, in two ways."""
    tempo, beats = librosa.beat.beat_track(y=mono(sig), sr=RATE, units="time")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are none
        f_measure = mir_eval.beat.f_measure(
            *(mir_eval.beat.trim_beats(x) for x in (true, beats))
        )
    ratio = float(np.ravel(tempo)[0]) * np.median(np.diff(true)) / 60
    near = [abs(ratio / k - 1) < 0.04 for k in (1, 2, 1 / 2, 3, 1 / 3)]
    return f_measure, near[0], any(near)


def key_scores(sig, true):
    """Whether the key is right, and the score that related keys have too."""
    chroma = librosa.feature.chroma_cqt(y=mono(sig), sr=RATE).mean(1)
    key = best_key(chroma)
    return key == true, mir_eval.key.weighted_score(true, key)


def timbre(sig):
    """Means and deviations [80] of MFCCs, without the level."""
    mfcc = librosa.feature.mfcc(y=mono(sig), sr=RATE, n_mfcc=41)[1:]
    return np.concatenate([mfcc.mean(1), mfcc.std(1)])


def features_of(mix, separator, encoder):
    """Name -> features [any] of a window [2, time]."""
    stems = separator.separate(mix)
    with torch.no_grad():
        mix_w = separator.encoder(mix)[None]
        *_, coarse = separator.masknet.encode(fusion_features(mix_w))
    coarse = coarse[0].flatten(1)
    features = {
        "MFCC of the mixture": timbre(mix),
        "MFCC of our stems": np.concatenate([*map(timbre, stems.values())]),
        "encoder of the separator": torch.cat([coarse.mean(1), coarse.std(1)]),
    }
    if encoder is not None:
        x = encoder.encode_batch(mix.mean(0, keepdim=True))[0]
        features["Audio-MAE"] = torch.cat([x.mean(0), x.std(0)])
    return {name: np.asarray(x) for name, x in features.items()}


def found_share(features):
    """Of windows [songs, 2, any], whose nearest is of the same song."""
    flat = features.reshape(-1, features.shape[-1])
    flat = (flat - flat.mean(0)) / (flat.std(0) + 1e-9)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    likeness = flat @ flat.T
    np.fill_diagonal(likeness, -2)
    return (likeness.argmax(1) // 2 == np.arange(len(flat)) // 2).mean()


# -- the tables


def from_pieces(args, separator):
    """Tables of beats and tempo, and of keys."""
    beats, keys = [], []
    for path, score, stems in pieces(
        args.music, args.midi, args.seconds, args.pieces
    ):
        mix = sum(stems.values())
        ours = separator.separate(mix)
        drums = stems.pop("drums", None)
        if drums is not None:
            true = midi_beats(path, args.seconds)
            signals = mix, ours["drums"], drums
            beats.append([beat_scores(sig, true) for sig in signals])
        signals = mix, mix - ours["drums"], sum(stems.values())
        keys.append([key_scores(sig, midi_key(score)) for sig in signals])
        say(path.stem, beats[-1:], keys[-1])
    for title, measures, scores in (
        ("Beats and tempo", ("beats", "tempo", "or a multiple"), beats),
        ("Key", ("right", "with related keys"), keys),
    ):
        rows = zip(measures, *np.mean(np.array(scores, float), 0))
        rows = [[name, *(f"{x:.2f}" for x in row)] for name, *row in rows]
        yield f"## {title}, {len(scores)} pieces"
        yield table(["measure", *SIGNALS], rows)


def search_table(songs, separator, encoder):
    """Title and table of the search among songs."""
    found = []
    for song in songs:
        windows = [
            read_segment(song.files[0], start, WINDOW, 44100, channel="both")
            for start in STARTS
        ]
        found.append([features_of(x, separator, encoder) for x in windows])
        say(song.title)
    rows = []
    for name in found[0][0]:
        share = found_share(np.array([[x[name] for x in y] for y in found]))
        rows.append([name, f"{share:.2f}"])
    rows.append(["by chance", f"{1 / (2 * len(found) - 1):.2f}"])
    yield f"## Search, {len(found)} songs"
    yield table(["features", "found"], rows)


def main():
    """Measures and writes the record."""
    parser = new_parser(__doc__, "downstream")
    parser.add_argument("music", help="pieces by make-music, not trained on")
    parser.add_argument("midi", help="folder with their MIDI files")
    parser.add_argument("--model", default="default")
    parser.add_argument("--songs", help="folder of songs, for the search")
    parser.add_argument("--encoder", help="folder of an Audio-MAE encoder")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--search", type=int, default=24, metavar="SONGS")
    args = parse_args(parser)
    for folder in filter(None, (args.music, args.midi, args.songs)):
        if not pathlib.Path(folder).is_dir():
            sys.exit(f"skipped: needs {folder}")
    record = Record("Downstream", __doc__, args.output, args.device)
    separator = load_separator(args.model, args.device)
    blocks = [*from_pieces(args, separator)]
    record.write(*blocks)
    if args.songs:
        encoder = None
        if args.encoder:
            encoder = PerformerFeatures.from_pretrained(args.encoder)
        songs = Music(args.songs, "mixtures").songs(STARTS[-1] + WINDOW)
        blocks += search_table(songs[: args.search], separator, encoder)
        record.write(*blocks)
    say(*blocks, sep="\n\n")


if __name__ == "__main__":
    main()
