"""What a large library costs: the memory of loader workers, and its catalogue.

    python benchmarks/library_scale.py [--segments 10000 100000 1000000] \
        [--files 20000]

Memory. The dataset of a training serves every segment of a manifest once, in
random order, by two loader workers; nothing is decoded. Then the memory of its
own of each worker is read: what it has written (private dirty pages), which is
all that it takes of the machine, and its unique set size, which also counts
pages of mapped files that no other process happens to have touched. Beside
ours, SpeechBrain's DynamicItemDataset of the same rows in a dict, as
`from_json` makes it. Each in a fresh process.

Catalogue. `Music.prepare` on --files wav files of a quarter of a second and
more: into an empty folder, for another experiment, and after one file in a
hundred was written anew, with the size of what it leaves. Songs differ in
length, as songs do; then with a library of clips of one length, of which each
has to be listened to, for it might be a copy. All reads come from the system's
cache.
"""

import multiprocessing
import os
import pathlib
import tempfile
import time

import numpy as np
import psutil
import soundfile
from common import (
    Record,
    in_fresh_process,
    new_parser,
    parse_args,
    say,
    table,
)
from speechbrain.dataio.dataset import DynamicItemDataset
from torch.utils.data import DataLoader

from trackformer_sb.data.manifest import MappedManifest, write_manifest
from trackformer_sb.data.music import Music
from trackformer_sb.training.dataio import SegmentDataset

SEGMENTS_A_SONG = 60  # three minutes in segments of three seconds
RATE = 8000
TRACKS = ("bass", "drums", "other", "vocals")


def write_rows(folder, segments):
    """A manifest of songs with four stems."""
    songs = -(-segments // SEGMENTS_A_SONG)

    def lines():
        for i in range(songs):
            name = f"artist_{i % 997:03d}_song_{i:07d}"
            line = {
                "song": name,
                "tracks": {t: f"/music/{name}/{t}.wav" for t in TRACKS},
                "duration": 3.0,
                "hop": 3.0,
                "song_seconds": 180.0,
                "has_stems": True,
            }
            left = segments - i * SEGMENTS_A_SONG
            yield line, np.arange(min(SEGMENTS_A_SONG, left))

    ordered = sorted(lines(), key=lambda item: item[0]["song"])
    write_manifest(folder, "train", ordered)


def mapped(folder):
    """The dataset of a training."""
    dataset = SegmentDataset(MappedManifest(folder, "train"))
    dataset.set_output_keys(["id", "tracks", "start"])
    return dataset


def in_dict(folder):
    """SpeechBrain's dataset of the same rows in memory."""
    dataset = DynamicItemDataset(dict(MappedManifest(folder, "train")))
    dataset.set_output_keys(["id", "tracks", "start"])
    return dataset


def worker_memory(make_dataset, folder):
    """Private dirty memory and unique set size of the workers, in MB."""
    loader = DataLoader(
        make_dataset(folder),
        batch_size=100,
        shuffle=True,
        num_workers=2,
        collate_fn=len,
        # as in a training on Linux; a fresh process would spawn
        multiprocessing_context="fork",
        persistent_workers=True,  # otherwise they end with the last batch
    )
    start = time.perf_counter()
    served = sum(loader)
    seconds = time.perf_counter() - start
    found = []
    for child in multiprocessing.active_children():
        process = psutil.Process(child.pid)
        dirty = sum(m.private_dirty for m in process.memory_maps())
        found.append((dirty / 2**20, process.memory_full_info().uss / 2**20))
    return served, seconds, max(found)


def memory_rows(sizes):
    """Rows of the table of memory."""
    rows = []
    for segments in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(folder, segments)
            for name, make in (
                ("trackformer_sb", mapped),
                ("DynamicItemDataset", in_dict),
            ):
                say(name, segments)
                result, reason = in_fresh_process(worker_memory, make, folder)
                if result is None:
                    rows.append([f"{segments:,}", name, reason, "", ""])
                    continue
                served, seconds, (dirty, unique) = result
                if served != segments:
                    raise RuntimeError(f"served {served} of {segments}")
                rows.append(
                    [
                        f"{segments:,}",
                        name,
                        f"{dirty:.1f}",
                        f"{unique:.1f}",
                        f"{segments / seconds:,.0f}",
                    ]
                )
    return rows


def write_files(folder, count, longer, step=1, seed=0):
    """Short files in folders of a hundred, each with its own content.

    Every one is `longer` samples longer than the one before.
    """
    rng = np.random.default_rng(seed)
    for i in range(0, count, step):
        path = folder / f"album {i // 100:05d}" / f"song {i:07d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sig = rng.integers(-9999, 9999, RATE // 4 + i * longer, np.int16)
        soundfile.write(path, sig, RATE, "PCM_U8")


def catalogue_rows(count, longer):
    """Rows of the table of catalogues."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        say("writing", count, "files")
        write_files(folder / "music", count, longer)
        for name, out in (
            ("first time", "a"),
            ("another experiment", "b"),
            ("1 % of the files changed", "b"),
            ("nothing changed", "b"),
        ):
            if "1 %" in name:
                write_files(folder / "music", count, longer, 100, seed=1)
            start = time.perf_counter()
            music = Music(folder / "music", "mixtures")
            report = music.prepare(folder / out, segment_seconds=0.25)
            seconds = time.perf_counter() - start
            songs = sum(part["songs"] for part in report["splits"].values())
            if songs != count:
                raise RuntimeError(f"{songs} songs of {count} files")
            size = sum(p.stat().st_size for p in (folder / out).iterdir())
            rows.append(
                [
                    name,
                    f"{seconds:.2f}",
                    f"{count / seconds:,.0f}",
                    f"{size / count:.0f}",
                ]
            )
    return rows


def main():
    """Measures memory, then the catalogue; writes the record."""
    parser = new_parser(__doc__, "library_scale")
    parser.add_argument(
        "--segments",
        type=int,
        nargs="+",
        default=[10_000, 100_000, 1_000_000],
    )
    parser.add_argument("--files", type=int, default=20_000)
    args = parse_args(parser)
    record = Record("A large library", __doc__, args.output, args.device)
    blocks = [
        "## Memory of a loader worker",
        table(
            [
                "segments",
                "dataset",
                "private dirty MB",
                "unique set MB",
                "rows/s",
            ],
            memory_rows(args.segments),
        ),
    ]
    record.write(*blocks)
    for longer, lengths in (
        (1, "each of its own length"),
        (0, "of one length"),
    ):
        blocks += [
            f"## Catalogue of {args.files:,} files, {lengths}",
            table(
                ["run", "seconds", "files/s", "bytes left a file"],
                catalogue_rows(args.files, longer),
            ),
        ]
    record.write(*blocks)
    say(args.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
