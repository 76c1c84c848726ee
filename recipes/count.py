#!/usr/bin/env python3
"""Recipe for the counter of a separator, which itself stays as it is.

    python recipes/count.py results/separator/1234/separator MUSIC COUNTING

COUNTING is the separator with a counter: how many instruments sound, and which
classes do. It learns from MUSIC, which `trackformer make-music` made: there it
is known. Classes are left out, and voices added, by chance; an eighth of the
songs is held out, for the thresholds. --instrumentals names songs without
stems that are known to have no singer: of these, with and without a voice that
was made, only the voice is learnt.
"""

import argparse
import json
import pathlib
import zlib

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from trackformer_sb.audio import read_segment
from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import STEM_CLASSES, db, energy, equalise
from trackformer_sb.inference.separator import Separator
from trackformer_sb.nnet.counting import LOUD_SHARE

SECONDS = 6.0
COUNT_RATE = 10  # of counts.json
HELD_OUT = 8  # one song of so many
ABSENT_SHARE = 0.3  # of the classes of a piece
DENSE_SHARE = 0.25  # of items with another piece's instruments as well
DRUMS_SHARE = 0.2  # of items with a recording of drums
VOICE_SHARE = 0.45
VOICE_DB = -12.0, 4.0  # beside all others
REAL_SHARE = 0.2  # of items that are instrumentals
RMS, LEVEL_DB = 0.12, 6.0
COLOURED_SHARE = 0.4
SILENT_ENERGY = 1e-7


class Items:
    """Windows of music with how many instruments of each class sound.

    Arguments
    ---------
    songs : list of Song
        Made by `make-music`.
    instrumentals : list of Song
        Without stems and without a singer.
    classes : list of str
        Those of the separator; `vocals` and `drums` among them.
    sample_rate : int
        In Hz.
    """

    def __init__(self, songs, instrumentals, classes, sample_rate):
        self.classes, self.sample_rate = classes, sample_rate
        self.instrumentals = instrumentals
        self.pieces = [song for song in songs if len(song.tracks) > 1]
        if not self.pieces:
            raise ValueError(
                "MUSIC: expected pieces of several stems, got none"
            )
        self.solos = {
            name: [song for song in songs if [*song.tracks] == [name]]
            for name in ("vocals", "drums")
        }

    def draw(self, songs, rng, name=None):
        """Class -> signal [2, time] and count [tenths] of a drawn window."""
        song = songs[int(rng.integers(len(songs)))]
        start = rng.uniform(0, max(0.0, song.seconds - SECONDS))
        path = pathlib.Path(song.path, "counts.json")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: make this music again by make-music"
            )
        counts = json.loads(path.read_text("utf-8"))
        first, steps = int(start * COUNT_RATE), int(SECONDS * COUNT_RATE)
        found = {}
        for track in [name] if name else song.tracks:
            count = counts.get(track, [])[first:][:steps]
            count = np.pad(count, (0, steps - len(count)))
            found[track] = self.read(song.tracks[track][0], start), count
        return found

    def read(self, path, start):
        """[2, time] of `SECONDS`."""
        what = start, SECONDS, self.sample_rate
        sig = read_segment(path, *what, channel="both").numpy()
        length = int(SECONDS * self.sample_rate)
        return np.pad(sig, ((0, 0), (0, max(0, length - sig.shape[1]))))[
            :, :length
        ]

    def make(self, rng):
        """Mixture [2, time], counts [classes, tenths], and whether all is so.

        Of an instrumental only the count of vocals is.
        """
        item = {}
        real = bool(self.instrumentals) and rng.random() < REAL_SHARE
        steps = int(SECONDS * COUNT_RATE)
        if real:
            index = int(rng.integers(len(self.instrumentals)))
            song = self.instrumentals[index]
            start = rng.uniform(0, max(0.0, song.seconds - SECONDS))
            item["other"] = self.read(song.files[0], start), np.zeros(steps)
        else:
            found = self.draw(self.pieces, rng)
            for name, (sig, count) in found.items():
                if rng.random() < ABSENT_SHARE:
                    continue
                if rng.random() < COLOURED_SHARE:
                    sig = equalise(sig, rng, self.sample_rate)
                gain = db(rng.uniform(-LEVEL_DB, LEVEL_DB))
                item[name] = gain * sig, count
            if rng.random() < DENSE_SHARE and "other" in item:
                more = self.draw(self.pieces, rng).get("other")
                if more:
                    item["other"] = [a + b for a, b in zip(item["other"], more)]
            if rng.random() < DRUMS_SHARE and self.solos["drums"]:
                item |= self.draw(self.solos["drums"], rng, "drums")
        if rng.random() < VOICE_SHARE and self.solos["vocals"]:
            drawn = self.draw(self.solos["vocals"], rng, "vocals")
            sig, count = drawn["vocals"]
            level = energy(sum(one for one, _ in item.values())) if item else 0
            if level > SILENT_ENERGY and energy(sig) > SILENT_ENERGY:
                gain = np.sqrt(level / energy(sig)) * db(rng.uniform(*VOICE_DB))
                item["vocals"] = np.float32(gain) * sig, count
        if not item:
            return self.make(rng)
        mix = sum(sig for sig, _ in item.values())
        if energy(mix) < SILENT_ENERGY:
            return self.make(rng)
        gain = RMS / np.sqrt(energy(mix)) * db(rng.uniform(-LEVEL_DB, LEVEL_DB))
        nothing = 0, np.zeros(steps)
        counts = [item.get(name, nothing)[1] for name in self.classes]
        return np.float32(gain) * mix, np.stack(counts), not real


@torch.no_grad()
def heard(separator, items, number, rng):
    """What the counter hears of items, and what it should say.

    Levels [items, num_spks, bands, steps], counts [items, classes, steps] and
    whether all classes are known [items].
    """
    levels, counts, known = [], [], []
    for _ in tqdm(range(number), unit="item"):
        mix, count, whole = items.make(rng)
        mix_w = separator.encoder(torch.from_numpy(mix)).unsqueeze(0)
        level = separator.counter.levels(mix_w, separator.masknet(mix_w))
        steps = level.shape[-1]
        middle = (np.arange(steps) + 0.5) * count.shape[1] / steps
        levels.append(level[0])
        counts.append(torch.from_numpy(count[:, middle.astype(int)]))
        known.append(whole)
    counts = torch.stack(counts).float()
    return torch.stack(levels), counts, torch.tensor(known)


def losses(counter, levels, counts, known, vocals):
    """Cross entropy of the classes, and the error of the count.

    Where not all classes are known, the vocals are.
    """
    count, logits = counter.of_levels(levels)
    judged = known[:, None].repeat(1, counts.shape[1])
    judged[:, vocals] = True
    sounds = (counts > 0).float()
    entropy = F.binary_cross_entropy_with_logits(
        logits, sounds, reduction="none"
    )
    error = (count - counts.sum(1)).abs()[known]
    return entropy[judged].mean(), error.mean()


def fit(counter, data, vocals, epochs, batch_size=16):
    """Trains the counter on what is heard of items."""
    steps = epochs * len(data[0]) // batch_size
    optimizer = torch.optim.AdamW(counter.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in tqdm(range(steps), unit="step"):
        chosen = torch.randint(len(data[0]), (batch_size,))
        levels, counts, known = (part[chosen] for part in data)
        # other levels of slots, and some not heard
        levels = levels + 0.15 * torch.randn(*levels.shape[:3], 1)
        entropy, error = losses(counter, levels, counts, known, vocals)
        optimizer.zero_grad()
        (entropy + 0.3 * error).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def calibrate(counter, data, vocals):
    """Sets the thresholds: least false alarms and misses of each class."""
    levels, counts, known = data
    probability = counter.of_levels(levels)[1].sigmoid()
    highest = probability.quantile(1 - LOUD_SHARE, dim=-1)
    grid = torch.linspace(0.05, 0.95, 91)
    thresholds = []
    for k in range(counts.shape[1]):
        judged = known | (k == vocals)
        share = (counts[judged, k] > 0).float().mean(-1)
        above = highest[judged, k, None] > grid
        alarms = above[share == 0].float().mean(0)
        misses = 1 - above[share >= LOUD_SHARE].float().mean(0)
        least = grid[alarms + misses == (alarms + misses).min()]
        thresholds.append(round(least.mean().item(), 3))
        least = (alarms + misses).min()
        print(f"class {k}: {least:.3f} false alarms and misses, held out")
    return thresholds


def main():
    """Hears items, trains, calibrates, and writes the separator."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a separator, or default")
    parser.add_argument("music", help="folder that `make-music` made")
    parser.add_argument("out", help="folder of the separator with a counter")
    parser.add_argument("--instrumentals", help="folder of songs")
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    separator = Separator.from_pretrained(args.model)
    classes = list(separator.groups or ())
    if "vocals" not in classes:
        raise ValueError(f"{args.model}: expected a stem vocals, got {classes}")
    config = separator.config | {
        "counter": {
            "class": "trackformer_sb.nnet.counting.Counter",
            "in_channels": separator.config["masknet"]["in_channels"],
            "num_spks": separator.num_spks,
            "num_classes": len(classes),
        }
    }
    counting = Separator(**config).eval()
    counting.load_state_dict(separator.state_dict(), strict=False)
    songs = Music(args.music, "stems", stem_groups=STEM_CLASSES).songs()
    real = []
    if args.instrumentals:
        real = Music(args.instrumentals, "mixtures").songs(SECONDS)
    data, counter = [], counting.counter
    for held_out, share in ((False, 1), (True, 1 / 4)):
        parts = (
            [
                song
                for song in part
                if (zlib.crc32(song.name.encode()) % HELD_OUT == 0) == held_out
            ]
            for part in (songs, real)
        )
        items = Items(*parts, classes, separator.sample_rate)
        rng = np.random.default_rng((args.seed, held_out))
        number = int(share * args.items)
        data.append(heard(counting, items, number, rng))
    vocals = classes.index("vocals")
    fit(counter, data[0], vocals, args.epochs)
    entropy, error = losses(counter, *data[1], vocals)
    print(f"held out: cross entropy {entropy:.3f}, error of count {error:.3f}")
    config["counter"]["thresholds"] = calibrate(counter, data[1], vocals)
    result = Separator(**config)
    result.load_state_dict(counting.state_dict())
    result.counter.bfloat16()
    weights = separator.state_dict().values()
    if all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in weights):
        result.bfloat16()  # as it was saved
    print(result.export(args.out))


if __name__ == "__main__":
    main()
