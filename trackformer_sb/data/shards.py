"""Music packed for training at scale: shards, and songs to evaluate on.

Training on millions of small files waits for the disk or the network. A shard
is read from its start to its end instead, which is fast everywhere. What is
evaluated is read in the same order every time, so it stays a manifest with
files, at the rate of the shards. All of it is mono.

Shards are in the format of the WebDataset library
(https://github.com/webdataset): the files of a segment lie side by side,

    <key>.00.flac, <key>.01.flac ...   the tracks
    <key>.json                         id, song, start, duration, has_stems,
                                       names of the tracks, and gain

A mixture is one track, a song with stems keeps all of them. 16-bit audio of the
same rate comes back bit for bit.

An epoch is all segments in a row: the shards in an order of its own, in each
the segments as they lie. The ranks, and in a rank its loader workers, each take
a stretch of the row, block by block; order and partners are drawn within a
block. A place in the row and the seed tell all draws.
"""

import io
import itertools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from trackformer_sb.audio import UnreadableAudio, naming
from trackformer_sb.data.files import write_json
from trackformer_sb.data.manifest import (
    MappedManifest,
    read_songs,
    write_manifest,
)
from trackformer_sb.data.mixtures import (
    SILENCE_RMS,
    MixtureOfMixtures,
    read_tracks,
)
from trackformer_sb.data.music import REPORT

logger = get_logger(__name__)

MANIFESTS = "manifests"
INDEX = "train.json"


def pack(music, out_folder, segment_seconds=3.0, shard_megabytes=256):
    """Packs a dataset: OUT/train-000000.tar ..., and songs to evaluate on.

    Segments are shuffled over all songs, because a partner of another song is
    drawn among those that lie side by side. Called again it goes on where it
    was stopped. The folder is what the keys ``dataset: shards`` and
    ``data_folder`` of a training take.

    Arguments
    ---------
    music : Music
        What to pack; its `sample_rate` is that of everything.
    out_folder : str or Path
        Where everything goes.
    segment_seconds : float
        Length of a segment.
    shard_megabytes : float
        Largest size of a shard in 10**6 bytes, counted before compression:
        FLAC leaves about two thirds of it.

    Returns
    -------
    dict
        The report of ``Music.prepare``; files that turned out to be damaged
        are added to its "skipped", and "shards" is a list of {"file",
        "segments"}.

    Raises
    ------
    FileNotFoundError, ValueError
        As ``Music.prepare``, or if the folder is one of the music's or was
        packed from other music or settings.
    """
    out_folder = Path(out_folder).resolve()
    for folder in filter(None, (music.folder, music.test_folder)):
        if Path(folder).resolve() in (out_folder, *out_folder.parents):
            raise ValueError(
                f"{out_folder}: expected a folder outside of {folder}, or what "
                "is packed would be songs of it"
            )
    report = music.prepare(out_folder / MANIFESTS, segment_seconds)
    made_of = [report["fingerprint"], shard_megabytes]
    index = {"made_of": made_of, "shards": [], "skipped": []}
    if (out_folder / INDEX).exists():
        index = json.loads((out_folder / INDEX).read_text("utf-8"))
    if index["made_of"] != made_of:
        raise ValueError(
            f"{out_folder} was packed from other music or settings: choose "
            "another folder, or remove this one"
        )
    _write_shards(out_folder, index, music)
    for split in ("valid", "test"):
        _copy_songs(out_folder, split, index, music)
    report["skipped"] = report["skipped"] + index["skipped"]
    report["shards"] = index["shards"]
    write_json(out_folder / REPORT, report)
    return report


@contextmanager
def _skipping(index):
    """Leaves out what is damaged, and names each file in the index once."""
    try:
        yield
    except UnreadableAudio as error:
        if error.path not in {entry["file"] for entry in index["skipped"]}:
            logger.warning(f"left out: {error}")
            reason = str(error).removeprefix(f"{error.path}: ")
            index["skipped"].append({"file": error.path, "reason": reason})


def _write_shards(out_folder, index, music):
    """Writes the shards that are not in the index yet.

    A shard gets its name, and its place in the index, when it is whole.
    """
    # Imported here: an optional extra.
    from webdataset import TarWriter

    rows = MappedManifest(out_folder / MANIFESTS, "train")
    rate = music.sample_rate
    seconds = sum(row["duration"] * len(row["tracks"]) for row in rows.values())
    num_shards = math.ceil(seconds * rate * 2 / 1e6 / index["made_of"][1])
    shuffled = np.random.default_rng(music.seed).permutation(len(rows))
    parts = np.array_split(shuffled, min(num_shards, len(rows)))
    with ThreadPoolExecutor() as pool:
        done = len(index["shards"])
        for part in tqdm(parts[done:], "shards", len(parts), initial=done):
            segments = [pool.submit(_encode, rows, i, rate) for i in part]
            written, unfinished = 0, out_folder / ".shard.part"
            with (
                open(unfinished, "wb") as file,
                # without times and users equal segments make equal files
                TarWriter(
                    file, user="", group="", encoder=False, mtime=0
                ) as tar,
            ):
                for segment in segments:
                    with _skipping(index):
                        tar.write(segment.result())
                        written += 1
            name = f"train-{len(index['shards']):06d}.tar"
            os.replace(unfinished, out_folder / name)
            index["shards"].append({"file": name, "segments": written})
            write_json(out_folder / INDEX, index)


def _encode(rows, place, sample_rate):
    """The files of a segment, as a sample of WebDataset."""
    segment_id, row = rows.ids[place], rows.row(place)
    tracks, names = read_tracks(row, sample_rate).numpy(), list(row["tracks"])
    # beyond full scale it is halved until it fits, which rounds nothing
    peak = max(1.0, float(np.abs(tracks).max()))
    gain = 0.5 ** math.ceil(math.log2(peak))
    samples = np.rint(tracks * np.float32(gain * 2**15))
    samples = samples.clip(-(2**15), 2**15 - 1).astype(np.int16)
    meta = {x: row[x] for x in ("song", "start", "duration", "has_stems")}
    meta.update(id=segment_id, names=names, gain=gain)
    # WebDataset splits a name at its first dot
    sample = {
        "__key__": segment_id.replace(".", "%2E"),
        "json": json.dumps(meta).encode(),
    }
    for number, track in enumerate(samples):
        file = io.BytesIO()
        soundfile.write(file, track, sample_rate, "PCM_16", format="FLAC")
        sample[f"{number:02d}.flac"] = file.getvalue()
    return sample


def _copy_songs(out_folder, split, index, music):
    """Writes the songs of a split as mono float wav, and their manifest."""
    rate, numbers, lines = music.sample_rate, {}, []
    for segment_id in MappedManifest(out_folder / MANIFESTS, split):
        song, _, number = segment_id.rpartition("_")
        numbers.setdefault(song, []).append(int(number))
    songs = read_songs(out_folder / MANIFESTS, split)
    for line in tqdm(songs, split):
        folder = out_folder / split / line["song"]
        folder.mkdir(parents=True, exist_ok=True)
        row, tracks = {"start": 0.0, "duration": line["song_seconds"]}, {}
        with _skipping(index):
            for i, (name, files) in enumerate(line["tracks"].items()):
                path = folder / f"{i}.wav"
                if not path.exists():
                    sig = read_tracks({**row, "tracks": {name: files}}, rate)
                    part = path.with_suffix(".part")
                    soundfile.write(part, sig[0], rate, "FLOAT", format="WAV")
                    os.replace(part, path)
                tracks[name] = str(path.relative_to(out_folder))
            lines.append(({**line, "tracks": tracks}, numbers[line["song"]]))
    write_manifest(out_folder, split, lines)


class ShardedMixtures(torch.utils.data.IterableDataset):
    """Mixtures of mixtures from shards, as `MixtureOfMixtures` makes them.

    An item is {"id", "song", "mixtures", "skipped"}: a segment and its song,
    [2, time] of it and a partner of another song, and (file, message) of what
    could not be read on the way to it. A damaged segment is replaced by a drawn
    one; of a missing or damaged shard the rest is left out, and the next one
    read in its place.

    All ranks give as many items; each segment comes once an epoch, whatever the
    number of shards, ranks and workers. The loader needs the `batch_size` given
    here and the same num_workers on every rank. A worker holds a block of
    encoded segments.

    Arguments
    ---------
    folder : str or Path
        What ``pack`` made.
    duration : float
        Length of the mixtures in seconds; of longer segments a drawn part.
    batch_size : int
        Items of a batch. Workers are asked for batches in turn.
    urls : str, optional
        Where the shards are if not in the folder, with {} for their names:
        what fsspec opens, "s3://bucket/{}" with s3fs, or "pipe:command {}".
    rank, world_size : int
        Number of this process, from 0, and how many train together.
    epoch_segments : int, optional
        Items of an epoch, of all ranks together; default all segments.
    block_segments : int
        Segments among which order and partners are drawn.
    **options
        As `MixtureOfMixtures` takes them, but `channel`: shards are the mean.
        What an augmentation can read of a song is the packed segment, so pack
        longer ones for changes in time.

    Raises
    ------
    FileNotFoundError
        If the folder was not packed.
    ValueError
        If the options have a `channel`, as what was packed is the mean.
    UnreadableAudio
        While iterating, if no shard can be read.

    Example
    -------
    >>> import tempfile
    >>> from trackformer_sb.data.music import Music
    >>> folder = tempfile.TemporaryDirectory()
    >>> music = Path(folder.name, "music")
    >>> music.mkdir()
    >>> for i in range(8):
    ...     soundfile.write(music / f"{i}.wav", np.full(600, i / 8), 100)
    >>> music = Music(music, cache_folder=folder.name, sample_rate=100)
    >>> report = pack(music, f"{folder.name}/out")
    >>> options = {"duration": 1.0, "batch_size": 2, "sample_rate": 100}
    >>> dataset = ShardedMixtures(f"{folder.name}/out", seed=0, **options)
    >>> len(dataset), next(iter(dataset))["mixtures"].shape
    (8, torch.Size([2, 100]))
    >>> folder.cleanup()
    """

    def __init__(
        self,
        folder,
        duration,
        batch_size,
        urls=None,
        rank=0,
        world_size=1,
        epoch_segments=None,
        block_segments=256,
        **options,
    ):
        if options.get("channel", "mean") != "mean":
            raise ValueError(
                "channel: expected mean, all that shards hold, got "
                f"{options['channel']!r}"
            )
        folder = Path(folder).absolute()
        index = json.loads((folder / INDEX).read_text("utf-8"))
        urls = urls or f"{folder}/{{}}"
        self.urls = [urls.replace("{}", x["file"]) for x in index["shards"]]
        self.counts = np.array([x["segments"] for x in index["shards"]])
        self.duration, self.batch_size = duration, batch_size
        self.rank, self.world_size = rank, world_size
        self.epoch_segments = epoch_segments or int(self.counts.sum())
        self.block_segments = block_segments
        self.options = options
        self.silent_share = options.get("silent_share", 0.0)
        self.set_epoch(0)

    def __len__(self):
        """Items of this rank in an epoch."""
        return self.epoch_segments // self.world_size

    def set_epoch(self, epoch, skip_batches=0):
        """What the next iterations give; to be called before each epoch.

        Batches of it that the loader gave before an interruption are read, not
        decoded, and what follows equals the uninterrupted epoch.
        """
        self.epoch, self.skip_batches = epoch, skip_batches

    def __iter__(self):
        # not a generator: the epoch is that of the call
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # a resumed loader asks its worker 0 first, whosever turn it was
        worker = (worker + self.skip_batches) % num_workers
        batches, rest = divmod(len(self), self.batch_size)
        sizes = [
            self.batch_size * len(range(i, batches, num_workers))
            for i in range(num_workers)
        ]
        sizes[batches % num_workers] += rest
        done = len(range(worker, self.skip_batches, num_workers))
        first = self.rank * len(self) + sum(sizes[:worker])
        return self._items(first, sizes[worker], done * self.batch_size)

    def _items(self, first, size, done):
        """`size` items from place `first` of the epoch on, less `done`."""
        if not size:
            return
        seed, epoch = self.options["seed"], self.epoch
        rng = np.random.default_rng((1, seed, epoch, first))
        problems = []
        stream = self._segments(first, rng, problems)
        # in a block each comes once, and again with other draws in the next
        largest = min(self.block_segments, self.counts.sum())
        num_blocks = math.ceil(size / largest)
        for part in np.array_split(np.arange(size), num_blocks):
            block = list(itertools.islice(stream, len(part)))
            rows, ahead = dict(block), []
            # without another song, partners come from further on
            while len({row["song"] for row in rows.values()}) < 2:
                if len(ahead) == self.counts.sum():
                    break
                ahead.append(next(stream))
                rows.update(ahead[-1:])
            stream = itertools.chain(ahead, stream)
            # draws of its own, as if it were a rank
            pairs = _PackedPairs(rows, rank=first + part[0], **self.options)
            pairs.set_epoch(epoch)
            for number, i in zip(part, rng.permutation(len(block))):
                if number >= done:
                    segment_id, row = block[i]
                    mixtures, _, skipped = pairs(segment_id)
                    yield {
                        "id": segment_id,
                        "song": row["song"],
                        "mixtures": mixtures,
                        "skipped": problems + skipped,
                    }
                    problems.clear()

    def _segments(self, place, rng, problems):
        """(id, row) of the segments from a place on, round and round."""
        seed = 2, self.options["seed"], self.epoch
        order = np.random.default_rng(seed).permutation(len(self.urls))
        ends = self.counts[order].cumsum()
        place %= ends[-1]
        turn = np.searchsorted(ends, place, side="right")
        skip = place - ends[turn] + self.counts[order[turn]]
        empty, rate = 0, self.options["sample_rate"]
        for shard in itertools.cycle(np.roll(order, -turn)):
            url, count = self.urls[shard], self.counts[shard]
            samples = _read_shard(url, count, problems)
            for meta, flacs in itertools.islice(samples, skip, None):
                spare = round((meta["duration"] - self.duration) * rate)
                yield (
                    meta["id"],
                    {
                        **{x: meta[x] for x in ("song", "has_stems", "gain")},
                        "start": int(rng.integers(spare + 1)) / rate,
                        "duration": self.duration,
                        "song_seconds": meta["duration"],
                        "path": f"{url}/{meta['id']}",
                        "flacs": flacs,
                    },
                )
                empty = 0
            skip, empty = 0, empty + 1
            if empty > len(order):
                raise UnreadableAudio(problems[-1][1])


def _read_shard(url, count, problems):
    """(json, list of FLAC files) of each segment; adds what is wrong."""
    import fsspec
    from webdataset import gopen
    from webdataset.handlers import ignore_and_stop
    from webdataset.tariterators import group_by_keys, tar_file_expander

    found, reason = 0, "the rest is unreadable"
    try:
        # webdataset asks programs for what is not a file
        opened = gopen(url) if url.startswith("pipe:") else fsspec.open(url)
        with opened as stream:
            source = [{"url": url, "stream": stream}]
            files = tar_file_expander(source, handler=ignore_and_stop)
            for sample in group_by_keys(files):
                flacs = [sample[x] for x in sample if x.endswith("flac")]
                yield json.loads(sample["json"]), flacs
                found += 1
    except (OSError, KeyError, ValueError) as error:
        reason = str(error)
    if found < count:
        words = f"damaged after {found} of {count} segments, {reason}"
        problems.append((url, f"{url}: {words}"))


class _PackedPairs(MixtureOfMixtures):
    """Pairs of segments whose rows hold their encoded audio."""

    def _read_mixture(self, row, channel, change):
        sig = self._decode(row, change).sum(0)
        return self._changed(sig, row, change), sig.new_zeros(0, len(sig))

    def _read_partner(self, row, single, rng, channel, change):
        tracks = self._decode(row, change)
        if single and row["has_stems"]:
            tracks = tracks[rng.permutation(len(tracks))]
            sounds = tracks.square().mean(1).sqrt() > SILENCE_RMS
            tracks = tracks[sounds.int().argmax()].unsqueeze(0)
        return self._changed(tracks.sum(0), row, change)

    def _decode(self, row, change):
        """[tracks, time] of what a change needs of a segment."""
        source = self._source(row, change)
        first, count = (
            round(source[x] * self.sample_rate) for x in ("start", "duration")
        )
        with naming(row["path"], "damaged, "):
            tracks = [
                soundfile.read(
                    io.BytesIO(flac),
                    count,
                    first,
                    dtype="float32",
                    fill_value=0.0,
                )[0]
                for flac in row["flacs"]
            ]
        return torch.from_numpy(np.stack(tracks) / row["gain"])
