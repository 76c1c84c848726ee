"""How many instruments sound, and which classes.

Rendered pieces that no training has heard, of which the notes tell the number:
each as it is, and with a synthesised voice in place of a class. Counts are
means over windows of 10 s, in instruments; the baselines are the mean of all
windows, which no method knows, and exp(entropy) of the masks' energies. Real
songs with stems tell whether there is a voice, as do instrumentals.
"""

import json
import pathlib

import numpy as np
import torch
from common import Record, new_parser, parse_args, say, table

from trackformer_sb.audio import read_segment
from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import STEM_CLASSES
from trackformer_sb.inference.counting import SongCount
from trackformer_sb.inference.separator import load_separator
from trackformer_sb.objectives.metrics import effective_mask_count

WINDOW = 10.0  # seconds
COUNT_RATE = 10  # of counts.json
VOICE_RMS = 0.5  # beside the others


class Listener:
    """A separator that is asked what sounds in a mixture [2, time]."""

    def __init__(self, model, device):
        self.separator = load_separator(model, device)
        self.classes = list(self.separator.groups)
        self.rate = self.separator.sample_rate

    @torch.no_grad()
    def __call__(self, mix):
        """Counts and exp(entropy) of whole windows, and what sounds."""
        step = int(WINDOW * self.rate)
        windows = [x for x in mix.split(step, dim=-1) if x.shape[-1] == step]
        seconds = WINDOW * len(windows)
        song = SongCount(self.separator.counter, seconds, WINDOW, 0.0)
        entropies = []
        for sig in windows:
            mix_w = self.separator.encoder(sig.to(self.separator.device))[None]
            masks = self.separator.masknet(mix_w)
            song(None, (mix_w,), masks)
            masks = masks.transpose(0, 1)
            entropies.append(float(effective_mask_count(masks)))
        counts = song.means()[0].reshape(len(windows), -1).mean(1)
        return counts, np.array(entropies), song.outputs(self.classes)[0]


def windows_of(count, number):
    """Means of a count [tenths] over so many windows."""
    steps = int(WINDOW * COUNT_RATE)
    count = np.array(count, float)[: number * steps]
    count = np.pad(count, (0, number * steps - len(count)))
    return count.reshape(number, steps).mean(1)


def rendered(listen, songs, voices, seconds, rng):
    """Rows of window counts, and of classes that sound, of rendered pieces."""
    windows, classes = [], []

    def hear(stems, counts):
        counted, entropies, sounds = listen(sum(stems.values()))
        true = sum(windows_of(x, len(counted)) for x in counts.values())
        windows.extend(zip(true, counted, entropies))
        share = {name: np.mean(np.array(x) > 0) for name, x in counts.items()}
        classes.append(([share.get(x, 0) for x in listen.classes], sounds))

    for number, song in enumerate(songs):
        path = pathlib.Path(song.path, "counts.json")
        counts = json.loads(path.read_text("utf-8"))
        length = WINDOW * (min(seconds, song.seconds) // WINDOW)
        if not length:
            continue
        what = 0.0, length, listen.rate
        stems = {
            name: read_segment(paths[0], *what, channel="both")
            for name, paths in song.tracks.items()
        }
        counts = {
            name: counts[name][: int(COUNT_RATE * length)] for name in stems
        }
        hear(stems, counts)
        # without a class, and sung
        left_out = list(stems)[int(rng.integers(len(stems)))]
        kept = {k: x for k, x in stems.items() if k != left_out}
        counts = {k: counts[k] for k in kept}
        voice = voices[number % len(voices)]
        path = pathlib.Path(voice.path, "counts.json")
        sung = json.loads(path.read_text("utf-8"))["vocals"]
        length = min(length, WINDOW * (voice.seconds // WINDOW))
        what = 0.0, length, listen.rate
        sig = read_segment(voice.tracks["vocals"][0], *what, channel="both")
        kept = {k: x[:, : sig.shape[1]] for k, x in kept.items()}
        level = sum(kept.values()).square().mean().sqrt()
        sig = VOICE_RMS * level / sig.square().mean().sqrt() * sig
        steps = int(COUNT_RATE * length)
        counts = {k: x[:steps] for k, x in counts.items()}
        hear({**kept, "vocals": sig}, {**counts, "vocals": sung[:steps]})
        say(f"{number + 1} of {len(songs)} pieces")
    return np.array(windows), classes


def count_table(windows):
    """Mean error of the count by method, and by how many instruments play."""
    true, counted, entropies = windows.T
    methods = {
        "counter": counted,
        "the mean of all windows": np.full_like(true, true.mean()),
        "exp(entropy) of the masks": entropies,
    }
    parts = {"all": true >= 0, "up to 3": true <= 3.5, "more": true > 3.5}
    rows = [
        [name] + [f"{np.abs(est - true)[x].mean():.2f}" for x in parts.values()]
        for name, est in methods.items()
    ]
    rows.append(["windows", *(int(x.sum()) for x in parts.values())])
    return table(["mean error of", *parts], rows)


def class_table(classes, names):
    """False alarms and misses of each class over the pieces."""
    rows = []
    for k, name in enumerate(names):
        absent = [sounds[k] for share, sounds in classes if share[k] == 0]
        present = [sounds[k] for share, sounds in classes if share[k] >= 0.05]
        alarms, misses = sum(absent), len(present) - sum(present)
        cells = f"{alarms} of {len(absent)}", f"{misses} of {len(present)}"
        rows.append([name, *cells])
    return table(["class", "false alarms", "misses"], rows)


def voice_table(listen, folders, instrumentals, seconds):
    """Whether a voice is found in real songs, and whether there is one."""
    songs = []
    for folder in folders:
        songs += Music(folder, "stems", stem_groups=STEM_CLASSES).songs()
    if instrumentals:
        songs += Music(instrumentals, "mixtures").songs()
    rows = []
    for song in songs:
        length = max(WINDOW, min(song.seconds, seconds))
        what = 0.0, length, listen.rate
        mix = sum(read_segment(x, *what, channel="both") for x in song.files)
        found = listen(mix)[2][listen.classes.index("vocals")]
        answers = "vocals" in song.tracks, found
        rows.append([song.title, *("yes" if x else "no" for x in answers)])
    right = sum(row[1] == row[2] for row in rows)
    return table(["song", "voice", "found"], rows), right, len(rows)


def main():
    """Measures and writes the record."""
    parser = new_parser(__doc__, "counting")
    parser.add_argument("music", help="pieces by make-music, not trained on")
    parser.add_argument("voices", help="folder with voices by make-music")
    parser.add_argument("--model", default="default")
    parser.add_argument("--songs", nargs="*", default=[], help="with stems")
    parser.add_argument("--instrumentals", help="folder of songs")
    parser.add_argument("--piece_seconds", type=float, default=30.0)
    parser.add_argument("--song_seconds", type=float, default=120.0)
    args = parse_args(parser)
    record = Record("Counting", __doc__, args.output, args.device)
    listen = Listener(args.model, args.device)
    songs = Music(args.music, "stems", stem_groups=STEM_CLASSES).songs()
    voices = Music(args.voices, "stems", stem_groups=STEM_CLASSES).songs()
    voices = [
        song
        for song in voices
        if [*song.tracks] == ["vocals"] and song.seconds >= WINDOW
    ]
    rng = np.random.default_rng(0)
    windows, classes = rendered(listen, songs, voices, args.piece_seconds, rng)
    blocks = [
        "## Mean |estimated - true| of windows",
        count_table(windows),
        f"## Which classes sound, {len(classes)} pieces",
        class_table(classes, listen.classes),
    ]
    record.write(*blocks)
    rows, right, number = voice_table(
        listen, args.songs, args.instrumentals, args.song_seconds
    )
    blocks += [
        "## Is there a voice, in real songs",
        f"{right} of {number} right.",
        rows,
    ]
    record.write(*blocks)
    say(*blocks, sep="\n\n")


if __name__ == "__main__":
    main()
