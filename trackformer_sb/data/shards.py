"""Shards: the segments of a manifest packed into tar files.

Training on millions of small files waits for the disk or the network. A shard
is read from its start to its end instead, which is fast everywhere. Shards are
in the format of the WebDataset library (https://github.com/webdataset): the
files of a segment lie side by side and are alike up to the first dot,

    <key>.flac, <key>.more01.flac ...   the audio, eight tracks a file
    <key>.json                          id, song, start, duration, names of the
                                        tracks, has_stems and gain

The key is the segment id, percent-encoded with the dots. A mixture is one
track, a song with stems keeps all of them. 16-bit audio of the same rate comes
back bit for bit.
"""

import hashlib
import io
import json
import math
import os
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
import soundfile
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from trackformer_sb.data.audio import UnreadableAudio
from trackformer_sb.data.manifest import Manifest
from trackformer_sb.data.mixtures import read_tracks

logger = get_logger(__name__)

SUBTYPES = {"PCM_16": 16, "PCM_24": 24}  # bits of a sample
MAX_CHANNELS = 8  # of a FLAC file


def import_webdataset():
    """The webdataset library, or an ImportError that says how to get it."""
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(
            "reading and writing shards needs the extra [shards]: "
            "pip install trackformer_sb[shards]"
        ) from error
    return webdataset


def make_shards(
    rows,
    out_folder,
    prefix,
    sample_rate,
    shard_megabytes=256,
    subtype="PCM_16",
    seed=0,
    num_workers=None,
    progress=False,
):
    """Packs segments into OUT_FOLDER/PREFIX-000000.tar and so on.

    The segments are shuffled over all songs before, because a partner of
    another song is drawn among the segments that lie side by side. All shards
    get the same number of segments, to within one, before unreadable ones are
    left out.

    A run that was stopped goes on where it was when called again: a shard gets
    its name when it is whole, and the index, OUT_FOLDER/PREFIX.json, lists it.
    Changed audio under the same paths is not noticed.

    Arguments
    ---------
    rows : Mapping
        A manifest: segment id -> row, see ``mixtures.read_tracks``.
    out_folder : str or Path
        Where the shards go.
    prefix : str
        Start of their names, of A-Z a-z 0-9 _ . -
    sample_rate : int
        Rate of the shards in Hz; other audio is resampled.
    shard_megabytes : float
        Largest size of a shard in 10**6 bytes, counted before compression:
        FLAC leaves about two thirds of it.
    subtype : str
        PCM_16 or PCM_24. A segment beyond full scale, as a sum of stems may
        be, is halved until it fits, and reading undoes that.
    seed : int
        Seed of the shuffle.
    num_workers : int, optional
        Threads that read and encode; default one a processor.
    progress : bool
        Shows a progress bar.

    Returns
    -------
    dict
        The index: "settings", "segments" and "songs" packed, "shards", a list
        of {"file", "segments", "bytes"}, "skipped", a list of {"id", "file",
        "reason"} of segments that cannot be read, and "complete".

    Raises
    ------
    ImportError
        If webdataset is not installed.
    ValueError
        If there are no rows, an argument is out of range, or the folder has
        shards of the same prefix made with other settings.
    UnreadableAudio
        If no segment can be read.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/song.wav", np.zeros(6 * 100), 100)
    ...     row = {"song": "song", "tracks": {"mixture": f"{folder}/song.wav"}}
    ...     row.update(duration=1.0, has_stems=False)
    ...     rows = {f"song_{i}": {**row, "start": float(i)} for i in range(6)}
    ...     index = make_shards(rows, folder, "train", 100, 0.0005)
    >>> [(shard["file"], shard["segments"]) for shard in index["shards"]]
    [('train-000000.tar', 2), ('train-000001.tar', 2), ('train-000002.tar', 2)]
    """
    import_webdataset()
    # The prefix becomes part of brace patterns and URLs.
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", prefix):
        raise ValueError(f"expected prefix of A-Za-z0-9_.-, got {prefix!r}")
    if subtype not in SUBTYPES:
        raise ValueError(f"expected subtype in {[*SUBTYPES]}, got {subtype!r}")
    if not (len(rows) and sample_rate > 0 and shard_megabytes > 0):
        raise ValueError(
            "expected rows, sample_rate > 0 and shard_megabytes > 0, got "
            f"{len(rows)} rows, {sample_rate} and {shard_megabytes}"
        )
    rows = rows if isinstance(rows, Manifest) else Manifest(rows)
    songs, audio_bytes, digest = Counter(), 0, hashlib.sha256()
    for place, segment_id in enumerate(rows.ids):
        row = rows.row(place)
        songs[row["song"]] += 1
        tracks = len(row["tracks"]) if row["has_stems"] else 1
        samples = tracks * round(row["duration"] * sample_rate)
        audio_bytes += samples * SUBTYPES[subtype] // 8
        digest.update(json.dumps([segment_id, row], sort_keys=True).encode())
    settings = {
        "sample_rate": sample_rate,
        "shard_megabytes": shard_megabytes,
        "subtype": subtype,
        "seed": seed,
        "segments": len(rows),
        "rows_sha256": digest.hexdigest(),
    }
    out_folder = Path(out_folder)
    out_folder.mkdir(parents=True, exist_ok=True)
    index = _last_index(out_folder, prefix, settings)
    _write_index(out_folder, prefix, index)
    parts = np.array_split(
        np.random.default_rng(seed).permutation(len(rows)),
        min(math.ceil(audio_bytes / (shard_megabytes * 1e6)), len(rows)),
    )
    done = {shard["file"]: shard for shard in index["shards"]}
    num_workers = num_workers or os.cpu_count()
    named = set()
    with (
        ThreadPoolExecutor(num_workers) as pool,
        tqdm(total=len(rows), unit="segments", disable=not progress) as bar,
    ):
        for i, part in enumerate(parts):
            path = out_folder / f"{prefix}-{i:06d}.tar"
            known = done.get(path.name)
            if known and path.is_file():
                if path.stat().st_size == known["bytes"]:
                    bar.update(len(part))
                    continue
            part_ids = [rows.ids[j] for j in part]
            # The row is looked up here: a mapping need not be safe in threads.
            calls = (
                (x, rows.row(j), sample_rate, subtype)
                for x, j in zip(part_ids, part)
            )
            encoded = _in_order(pool, _encode, calls, 4 * num_workers)
            count, skipped = _write_shard(path, encoded, bar)
            for entry in skipped:
                file, reason = entry["file"], entry["reason"]
                if file not in named:
                    logger.warning(f"segments are skipped: {file}: {reason}")
                named.add(file)
            again = set(part_ids)
            kept = [x for x in index["skipped"] if x["id"] not in again]
            index["skipped"] = kept + skipped
            shard = {"file": path.name, "segments": count}
            done[path.name] = {**shard, "bytes": path.stat().st_size}
            index["shards"] = [done[name] for name in sorted(done)]
            _write_index(out_folder, prefix, index)
    songs.subtract(rows[x["id"]]["song"] for x in index["skipped"])
    index["segments"], index["songs"] = songs.total(), len(+songs)
    if not index["segments"]:
        first = index["skipped"][0]
        raise UnreadableAudio(
            f"none of {len(rows)} segments can be read, first {first['file']}: "
            f"{first['reason']}"
        )
    index["complete"] = True
    _write_index(out_folder, prefix, index)
    return index


def _last_index(out_folder, prefix, settings):
    """The index that an earlier run of the same settings left, or a new one."""
    path = out_folder / f"{prefix}.json"
    change = "choose another out_folder or prefix, or remove the shards"
    if not path.exists():
        for name in sorted(os.listdir(out_folder)):
            if re.fullmatch(rf"{re.escape(prefix)}-\d+\.tar", name):
                raise ValueError(
                    f"{out_folder / name} has no index {path}: {change}"
                )
        index = {"settings": settings, "complete": False}
        return {**index, "segments": 0, "shards": [], "skipped": []}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        known = index["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of shards: {change}") from error
    for key, value in settings.items():
        if known.get(key) != value:
            raise ValueError(
                f"{path} lists shards of other settings, {key} was "
                f"{known.get(key)!r}, now {value!r}: {change}"
            )
    return index


def _in_order(pool, function, calls, ahead):
    """The results of the calls, at most `ahead` of them under way."""
    waiting = deque()
    for arguments in calls:
        waiting.append(pool.submit(function, *arguments))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encode(segment_id, row, sample_rate, subtype):
    """The members of a segment, or {"id", "file", "reason"} if unreadable."""
    try:
        tracks = read_tracks(row, sample_rate).numpy()
    except UnreadableAudio as error:
        reason = str(error).removeprefix(f"{error.path}: ")
        return {"id": segment_id, "file": error.path, "reason": reason}
    if not row["has_stems"]:
        tracks = tracks.sum(axis=0, keepdims=True)
    samples, gain = _quantize(tracks.T, SUBTYPES[subtype])
    names = list(row["tracks"]) if row["has_stems"] else ["mixture"]
    meta = {"id": segment_id, "names": names, "gain": gain}
    meta.update({x: row[x] for x in ("song", "start", "duration", "has_stems")})
    # WebDataset splits a name at its first dot.
    key = quote(segment_id, safe="", errors="surrogateescape")
    members = {
        "__key__": key.replace(".", "%2E"),
        "json": json.dumps(meta).encode(),
    }
    for first in range(0, samples.shape[1], MAX_CHANNELS):
        file, part = io.BytesIO(), samples[:, first : first + MAX_CHANNELS]
        soundfile.write(file, part, sample_rate, subtype, format="FLAC")
        # In the order of their names, which is how they are written.
        name = f"more{first // MAX_CHANNELS:02d}.flac" if first else "flac"
        members[name] = file.getvalue()
    return members


def _quantize(sig, bits):
    """Integers as soundfile takes them, and the gain that made them fit.

    libsndfile would scale floats by 2**15 - 1 when writing and by 2**-15 when
    reading. Halving is the one gain that itself rounds nothing.
    """
    full_scale, gain = 2 ** (bits - 1), 1.0
    while True:
        samples = np.rint(sig * np.float32(full_scale * gain))
        if samples.max() < full_scale and samples.min() >= -full_scale:
            break
        gain /= 2
    if bits == 16:
        return samples.astype(np.int16), gain
    # soundfile takes 24 bits as the upper ones of 32.
    return samples.astype(np.int32) << 8, gain


def _write_shard(path, encoded, bar):
    """Writes a shard; returns the number of its segments and those skipped."""
    count, skipped = 0, []
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with (
            open(unfinished, "wb") as file,
            # Without times and users equal segments make equal files.
            import_webdataset().TarWriter(
                file, user="", group="", encoder=False, mtime=0
            ) as tar,
        ):
            for segment in encoded:
                bar.update()
                if "__key__" in segment:
                    tar.write(segment)
                    count += 1
                else:
                    skipped.append(segment)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count, skipped


def _write_index(out_folder, prefix, index):
    path = out_folder / f"{prefix}.json"
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps(index, indent=2), encoding="utf-8")
    os.replace(unfinished, path)


def list_shards(urls):
    """The shards that a pattern stands for.

    Arguments
    ---------
    urls : str, Path or list of them
        A brace pattern ("OUT/train-{000000..000099}.tar"), also of http, https
        or another URL that webdataset opens, or a folder with shards of one
        prefix.

    Returns
    -------
    list of str
        Paths and URLs of plain tar files.

    Raises
    ------
    FileNotFoundError
        If none is there, as far as files are concerned.
    ValueError
        If a folder has shards of several prefixes.

    Example
    -------
    >>> list_shards("http://host/music-{08..10}.tar")[1:]
    ['http://host/music-09.tar', 'http://host/music-10.tar']
    """
    shards = []
    single = isinstance(urls, (str, os.PathLike))
    for pattern in map(os.fspath, [urls] if single else urls):
        if not os.path.isdir(pattern):
            shards += import_webdataset().shardlists.expand_urls(pattern)
            continue
        names = [x for x in sorted(os.listdir(pattern)) if x.endswith(".tar")]
        prefixes = sorted({re.sub(r"-\d+\.tar$", "", x) for x in names})
        if len(prefixes) > 1:
            raise ValueError(
                f"expected shards of one prefix in {pattern}, got "
                f"{', '.join(prefixes)}: name one, as in {prefixes[0]}-"
                "{000000..000099}.tar"
            )
        shards += [os.path.join(pattern, name) for name in names]
    if not any(os.path.isfile(x) or re.match(r"\w\w+:", x) for x in shards):
        raise FileNotFoundError(
            f"no shards at {urls}, expected a folder with PREFIX-000000.tar "
            "and so on, a pattern such as PREFIX-{000000..000099}.tar, or URLs"
        )
    return shards


def open_shard(url):
    """A shard, or its index, as a stream of bytes."""
    # webdataset would take the path "a:b" for a URL.
    exists = os.path.exists(url)
    return open(url, "rb") if exists else import_webdataset().gopen(url)


def count_segments(urls):
    """The number of segments of every shard, None if no index has it."""
    indices, counts = {url: {} for url in urls}, []  # no shard is an index
    for url in urls:
        where = re.sub(r"-\d+\.tar(\?.*)?$", ".json", url)
        if where not in indices:
            indices[where] = {}
            with suppress(OSError, LookupError, TypeError, ValueError):
                with closing(open_shard(where)) as file:
                    index = json.loads(file.read())
                shards = index["shards"]
                indices[where] = {x["file"]: x["segments"] for x in shards}
                if not index["complete"]:
                    logger.warning(f"{where}: packing is not finished")
        counts.append(indices[where].get(os.path.basename(url)))
    return counts
