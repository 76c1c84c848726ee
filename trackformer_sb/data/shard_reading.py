"""Training items from shards, the tar files of `trackformer_sb.data.shards`.

An epoch deals the shards to the readers, the loader workers of all ranks. A
reader goes through its shards from start to end, again if it needs more, each
time in another order. Half a buffer of segments is shuffled and given out while
the next half is read; partners come from it and the half before it. All draws
are seeded by (seed, epoch, rank, worker) and the place in the reader's stream,
so that any place can be gone to directly.
"""

import io
import itertools
import json
import math
from contextlib import closing, suppress

import numpy as np
import soundfile
import torch

from trackformer_sb.data import shards
from trackformer_sb.data.audio import UnreadableAudio
from trackformer_sb.data.augment import Augmentation
from trackformer_sb.data.mixtures import SILENCE_RMS

# First number of a seed, so that no two kinds of draws share one.
DEAL, TURN, BLOCK, ITEM = range(4)


class ShardedMixtures(torch.utils.data.IterableDataset):
    """Mixtures of mixtures from shards, as `MixtureOfMixtures` makes them.

    An item is {"id", "song", "mixtures", "skipped"}: a segment and its song,
    [2, time] of it and a partner of another song, and (file, message) of what
    could not be read on the way to it. A damaged segment is replaced by a drawn
    one; a missing shard, or the rest of a truncated one, is left out.

    Every rank gives the same number of items. If there are as many shards as
    readers (ranks times workers) or a multiple, or fewer (readers then share
    shards), each segment comes once an epoch, but for a batch a worker and the
    one segment by which shards differ. Otherwise some readers start over while
    others leave segments to another epoch.

    The loader needs the `batch_size` given here, `PaddedBatch` as collate_fn,
    and the same num_workers on every rank. A worker holds at most one and a
    half buffers of encoded segments; shards are streamed.

    Arguments
    ---------
    urls : str, Path or list of them
        What `list_shards` takes.
    sample_rate : int
        Rate of the shards in Hz.
    duration : float
        Length of the mixtures in seconds; of longer segments a drawn part.
    seed : int
        Seed of all draws, from 0.
    rank, world_size : int
        Number of this process, from 0, and how many train together.
    epoch_segments : int, optional
        Items of an epoch, of all ranks together; default the number of
        segments, from the indices or by reading the shards through.
    batch_size : int
        Items of a batch. Workers are asked for batches in turn.
    gain_db, single_stem_share, silent_share, equal_levels, augmentation
        As in `MixtureOfMixtures`; what an augmentation can read of a song is
        the packed segment, so pack longer ones for changes in time.
    channel : str
        "mean": shards are mono.
    max_failures : int
        Unreadable segments or shards at one item that are an error.
    buffer_segments : int
        Segments among which order and partners are drawn, from 2.

    Raises
    ------
    FileNotFoundError, ImportError
        If there are no shards, or webdataset is not installed.
    ValueError
        If an argument is out of range or, when items are made, not that of the
        shards, or they hold one song only.
    UnreadableAudio
        If nothing can be read, or after `max_failures`.

    Example
    -------
    >>> import soundfile, tempfile
    >>> from trackformer_sb.data.shards import make_shards
    >>> folder = tempfile.TemporaryDirectory()
    >>> rows = {}
    >>> for song, level in (("loud", 0.5), ("soft", 0.125)):
    ...     path = f"{folder.name}/{song}.wav"
    ...     soundfile.write(path, np.full(4, level), 4)
    ...     rows[song] = {"song": song, "tracks": {"mixture": path}}
    ...     rows[song].update(start=0.0, duration=1.0, has_stems=False)
    >>> _ = make_shards(rows, folder.name, "train", sample_rate=4)
    >>> dataset = ShardedMixtures(folder.name, 4, duration=1.0, seed=0)
    >>> items = {item["id"]: item["mixtures"] for item in dataset}
    >>> items["soft"]
    tensor([[0.1250, 0.1250, 0.1250, 0.1250],
            [0.5000, 0.5000, 0.5000, 0.5000]])
    >>> folder.cleanup()
    """

    def __init__(
        self,
        urls,
        sample_rate,
        duration,
        seed,
        rank=0,
        world_size=1,
        epoch_segments=None,
        batch_size=1,
        gain_db=0.0,
        single_stem_share=0.0,
        silent_share=0.0,
        equal_levels=False,
        channel="mean",
        augmentation=None,
        buffer_segments=256,
        max_failures=20,
    ):
        shards.import_webdataset()
        for key, value, low, high in (
            ("seed", seed, 0, math.inf),
            ("samples", round(duration * sample_rate), 1, math.inf),
            ("rank", rank, 0, world_size - 1),
            ("batch_size", batch_size, 1, math.inf),
            ("gain_db", gain_db, 0, math.inf),
            ("single_stem_share", single_stem_share, 0, 1),
            ("silent_share", silent_share, 0, round(1 - single_stem_share, 9)),
            ("buffer_segments", buffer_segments, 2, math.inf),
        ):
            if not low <= value <= high:
                words = f"expected {key} from {low} to {high}, got {value}"
                raise ValueError(words)
        if channel != "mean":
            raise ValueError(f"expected channel mean for shards, got {channel}")
        self.urls = shards.list_shards(urls)
        self.pattern = str(urls)
        self.sample_rate, self.duration = sample_rate, duration
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.batch_size = batch_size
        self.gain_db, self.equal_levels = gain_db, equal_levels
        self.single_stem_share = single_stem_share
        self.silent_share = silent_share
        self.augmentation = augmentation or Augmentation()
        self.buffer_segments = buffer_segments
        self.max_failures = max_failures
        # Epoch and batches to pass over, where persistent workers see them too.
        self._start = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._counts = shards.count_segments(self.urls)
        self._every = [(shard, 0, 1) for shard in range(len(self.urls))]
        if epoch_segments is None:
            lost = []
            counts = [self._num_segments(x, lost) for x in self._every]
            epoch_segments = sum(counts)
            if lost and not epoch_segments:
                raise self._unreadable(lost)
        if epoch_segments < world_size:
            raise ValueError(
                f"expected epoch_segments of at least {world_size}, got "
                f"{epoch_segments} of {self.pattern}"
            )
        self.epoch_segments = epoch_segments

    def __len__(self):
        """Items of this rank in an epoch."""
        return self.epoch_segments // self.world_size

    def set_epoch(self, epoch, skip_batches=0):
        """What the next iterations give; to be called before each epoch.

        Batches are passed over without decoding, whole shards without opening.
        What follows equals the uninterrupted epoch if arguments and num_workers
        do; segments missing from a shard that is passed over count as given.

        Arguments
        ---------
        epoch : int
            Number of the epoch, from 0.
        skip_batches : int
            Batches of it that the loader gave before an interruption:
            `Brain.step` when the stage starts, what a SaveableDataLoader saves.
        """
        self._start.copy_(torch.tensor([epoch, skip_batches]))

    def __iter__(self):
        # Not a generator: the epoch is that of the call.
        epoch, skip_batches = self._start.tolist()
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # A resumed loader asks its worker 0 first, whosever turn it was.
        worker = (worker + skip_batches) % num_workers
        batches, rest = divmod(len(self), self.batch_size)
        count = len(range(worker, batches, num_workers)) * self.batch_size
        count += rest * (batches % num_workers == worker)
        done = len(range(worker, skip_batches, num_workers)) * self.batch_size
        stream = self._stream(epoch, worker, num_workers, done)
        return itertools.islice(stream, max(0, count - done))

    def _num_segments(self, piece, problems=None):
        """Segments of a piece: every `parts`-th of a shard from `part` on."""
        shard, part, parts = piece
        if self._counts[shard] is None:
            lost = [] if problems is None else problems
            samples = _read_samples(self.urls[shard], None, lost)
            self._counts[shard] = sum(1 for _ in samples)
        return len(range(part, self._counts[shard], parts))

    def _stream(self, epoch, worker, num_workers, skip):
        """Items of a reader without end, from item `skip` of the epoch on."""
        readers, parts = self.world_size * num_workers, 1
        if len(self.urls) < readers:
            parts = readers // math.gcd(readers, len(self.urls))
        pieces = itertools.product(range(len(self.urls)), range(parts), [parts])
        pieces = _permuted(list(pieces), DEAL, self.seed, epoch)
        pieces = pieces[self.rank :: self.world_size][worker::num_workers]
        key = (self.seed, epoch, self.rank, worker)
        number, problems = skip, []
        for turn in itertools.count():
            total = sum(map(self._num_segments, pieces)) if skip else 0
            if 0 < total <= skip:
                skip -= total
                continue
            ordered = _permuted(pieces, TURN, *key, turn)
            empty = not skip
            for pool, i in self._draw(ordered, skip, (*key, turn), problems):
                empty = False
                rng = np.random.default_rng((ITEM, *key, number))
                yield self._make_item(pool, i, rng, problems)
                number += 1
            skip = 0
            if empty and sorted(pieces) == self._every:
                raise self._unreadable(problems)
            if empty:
                # Nothing of its own can be read, but other ranks wait for it.
                pieces = self._every

    def _draw(self, pieces, skip, key, problems):
        """(segments, index of the next one among them) after `skip` of them."""
        size = self.buffer_segments // 2
        block, skip = divmod(skip, size)
        segments = self._segments(pieces, max(0, block - 1) * size, problems)
        before = list(itertools.islice(segments, size)) if block else []
        current = list(itertools.islice(segments, size))
        while current:
            pool, upcoming = current + before, []
            order = _permuted(range(len(current)), BLOCK, *key, block)
            for place, i in enumerate(order):
                # Reading is spread over the items.
                upcoming.extend(itertools.islice(segments, 1))
                if place >= skip:
                    yield pool, i
            before, current, skip, block = current, upcoming, 0, block + 1

    def _segments(self, pieces, skip, problems):
        """(song, members) of the segments of pieces but the first `skip`."""
        for piece in pieces:
            if skip and skip >= self._num_segments(piece):
                skip -= self._num_segments(piece)
                continue
            shard, part, parts = piece
            url, count = self.urls[shard], self._counts[shard]
            samples = _read_samples(url, count, problems)
            for members in itertools.islice(samples, part, None, parts):
                if skip:
                    skip -= 1
                    continue
                song = None
                with suppress(KeyError, TypeError, ValueError):
                    meta = json.loads(members["json"])
                    members["meta"], song = meta, meta["song"]
                yield song, members

    def _make_item(self, pool, index, rng, problems):
        """The item of a segment of the pool; takes the problems with it."""
        partner_draw, kind, *places = rng.random(4)
        gains = 10 ** (rng.uniform(-self.gain_db, self.gain_db, (2, 1)) / 20)
        changes = [self.augmentation.draw(rng) for _ in places]
        num_samples = round(self.duration * self.sample_rate)
        mixtures = torch.zeros(2, num_samples)

        def mix(i, segment, others, single=False):
            if len(problems) >= self.max_failures:
                raise self._unreadable(problems)
            song, members = segment
            try:
                tracks = self._decode(members, places[i], changes[i])
            except UnreadableAudio as error:
                problems.append((error.path, str(error)))
                other = others[int(rng.integers(len(others)))]
                return mix(i, other, others, single)
            if single and members["meta"]["has_stems"]:
                tracks = tracks[rng.permutation(len(tracks))]
                sounds = tracks.square().mean(dim=1).sqrt() > SILENCE_RMS
                tracks = tracks[sounds.int().argmax()].unsqueeze(0)
            mixtures[i] = self.augmentation.apply(
                changes[i], tracks.sum(dim=0), num_samples, self.sample_rate
            )
            return song, members["meta"]["id"]

        song, segment_id = mix(0, pool[index], pool)
        if kind >= self.silent_share:
            others = [x for x in pool if x[0] not in (None, song)]
            others = others or [self._stranger(song, partner_draw)]
            partner = others[int(partner_draw * len(others))]
            single = kind < self.silent_share + self.single_stem_share
            mix(1, partner, others, single)
        levels = mixtures.square().mean(dim=1).sqrt()
        if self.equal_levels and levels.min() >= SILENCE_RMS:
            mixtures[1] *= levels[0] / levels[1]
        mixtures *= torch.from_numpy(gains)
        item = {"id": segment_id, "song": song, "skipped": list(problems)}
        problems.clear()
        return {**item, "mixtures": mixtures}

    def _decode(self, members, place, change):
        """[tracks, time] of a segment; `place`, 0 to 1, in a longer one."""
        path = f"{members['__url__']}/{members['__key__']}"
        flacs = [members[name] for name in members if name.endswith("flac")]
        sigs = []
        try:
            for file in map(io.BytesIO, flacs):
                sig, rate = soundfile.read(
                    file, dtype="float32", always_2d=True
                )
                sigs.append(sig.T)
            tracks = np.concatenate(sigs) / members["meta"]["gain"]
            if len(tracks) != len(members["meta"]["names"]):
                raise KeyError("flac")
        except (soundfile.SoundFileError, LookupError, ValueError) as error:
            # LookupError: a file or an entry of the json is not there.
            damaged = UnreadableAudio(f"{path}: damaged or incomplete")
            damaged.path = path
            raise damaged from error
        length = tracks.shape[1]
        spare = length - round(self.duration * rate)
        if rate != self.sample_rate or spare < 0:
            raise ValueError(
                f"expected sample_rate={rate} and duration up to "
                f"{length / rate}, those of {path}, got {self.sample_rate} and "
                f"{self.duration}"
            )
        start, seconds = self.augmentation.source(
            change,
            int(place * (spare + 1)) / rate,
            self.duration,
            length / rate,
        )
        first = round(start * rate)
        return torch.from_numpy(
            tracks[:, first : first + round(seconds * rate)]
        )

    def _stranger(self, song, draw):
        """A segment of another song, where the buffer has none."""
        first = int(draw * len(self.urls))
        pieces = self._every[first:] + self._every[:first]
        for segment in self._segments(pieces, 0, []):
            if segment[0] not in (None, song):
                return segment
        raise ValueError(
            "mixtures of mixtures need segments of at least 2 songs, but all "
            f"of {self.pattern} are of {song}"
        )

    def _unreadable(self, problems):
        reasons = "; ".join(dict.fromkeys(reason for _, reason in problems))
        return UnreadableAudio(
            f"no readable segment found in {self.pattern}: {reasons}"
        )


def _read_samples(url, count, problems):
    """The members of each segment of a shard; adds what is wrong with it."""
    tar = shards.import_webdataset().tariterators
    errors, found = [], 0
    try:
        with closing(shards.open_shard(url)) as stream:
            source = [{"url": url, "stream": stream}]
            # A handler that returns nothing ends the shard.
            files = tar.tar_file_expander(source, handler=errors.append)
            for members in tar.group_by_keys(files, handler=errors.append):
                found += 1
                yield members
            # tarfile takes a damaged header for the end.
            if stream.read(2**20).strip(b"\0"):
                errors.append("segments after the end")
    except (OSError, ValueError) as error:
        errors.append(error)
    if errors or (count is not None and found < count):
        found = f"after {found} of {'?' if count is None else count} segments"
        problems.append((url, f"{url}: missing, truncated or damaged {found}"))


def _permuted(items, *seed):
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in order]
