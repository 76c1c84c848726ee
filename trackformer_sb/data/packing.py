"""A folder of music packed for training at scale: shards and test songs.

What is trained on becomes shards. What is evaluated is read in the same order
every time, so it stays a manifest with files, at the rate of the shards.
"""

import hashlib
import json
import os
from pathlib import Path

import soundfile
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from trackformer_sb.data.audio import UnreadableAudio, read_segment
from trackformer_sb.data.files import file_stat
from trackformer_sb.data.manifest import (
    MappedManifest,
    read_songs,
    write_manifest,
)
from trackformer_sb.data.music import MIN_SONGS, REPORT
from trackformer_sb.data.shards import import_webdataset, make_shards

logger = get_logger(__name__)

EVALUATED = ("valid", "test")
MANIFESTS = "manifests"


def pack(
    music,
    out_folder,
    segment_seconds=3.0,
    shard_megabytes=256,
    subtype="PCM_16",
):
    """Packs a dataset: OUT/train-000000.tar ..., and songs to evaluate on.

    Called again it goes on where it was stopped. The folder is what the keys
    ``dataset: shards`` and ``data_folder`` of a training take.

    Arguments
    ---------
    music : Music
        What to pack; its `sample_rate` is that of everything.
    out_folder : str or Path
        Where everything goes.
    segment_seconds : float
        Length of a segment.
    shard_megabytes, subtype
        See ``shards.make_shards``.

    Returns
    -------
    dict
        The index of the shards, see ``shards.make_shards``.

    Raises
    ------
    FileNotFoundError, ValueError
        As ``Music.prepare`` and ``shards.make_shards``.
    """
    import_webdataset()
    out_folder = Path(out_folder)
    for folder in filter(None, (music.folder, music.test_folder)):
        out = out_folder.resolve()
        if Path(folder).resolve() in (out, *out.parents):
            raise ValueError(
                f"{out_folder}: expected a folder outside of {folder}, or what "
                "is packed would be songs of it"
            )
    manifests = out_folder / MANIFESTS
    report = music.prepare(manifests, segment_seconds)
    index = make_shards(
        MappedManifest(manifests, "train"),
        out_folder,
        "train",
        music.sample_rate,
        shard_megabytes=shard_megabytes,
        subtype=subtype,
        seed=music.seed,
        progress=True,
    )
    packed = report["splits"]["train"]
    packed["segments"], packed["songs"] = index["segments"], index["songs"]
    packed.pop("song_paths")
    skipped = [
        {"file": x["file"], "reason": f"{x['id']}: {x['reason']}"}
        for x in index["skipped"]
    ]
    for split in EVALUATED:
        lines, errors = _copy_songs(
            manifests, out_folder, split, music.sample_rate
        )
        skipped += errors
        part = report["splits"][split]
        part["songs"] = len(lines)
        part["song_names"] = [line["song"] for line, _ in lines]
        part.pop("song_paths")
        part["segments"] = sum(len(numbers) for _, numbers in lines)
        part["hours"] = sum(x["song_seconds"] for x, _ in lines) / 3600
    if music.strict and skipped:
        raise ValueError(
            f"strict: {skipped[0]['file']}: {skipped[0]['reason']}"
        )
    for split, part in report["splits"].items():
        if part["songs"] < MIN_SONGS:
            raise ValueError(
                f"packed {part['songs']} songs of {split}, expected at least "
                f"{MIN_SONGS}; {len(skipped)} could not be read, first "
                f"{skipped[0]['file']}"
            )
    report["skipped"] = report["skipped"] + skipped
    text = json.dumps(report, indent=2)
    unfinished = out_folder / f".{REPORT}.part"
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, out_folder / REPORT)
    return index


def _copy_songs(manifests, out_folder, split, sample_rate):
    """Writes the songs of a split as mono float wav, and their manifest.

    Returns the lines of the manifest, and what was left out.
    """
    numbers = {}
    manifest = MappedManifest(manifests, split)
    for segment_id in manifest:
        song, _, number = segment_id.rpartition("_")
        numbers.setdefault(song, []).append(int(number))
    lines, skipped = [], []
    for line in tqdm(read_songs(manifests, split), desc=split, unit="song"):
        try:
            line["tracks"] = _copy_tracks(line, out_folder, split, sample_rate)
        except UnreadableAudio as error:
            logger.warning(f"a song is left out of {split}: {error}")
            reason = str(error).removeprefix(f"{error.path}: ")
            skipped.append({"file": error.path, "reason": reason})
        else:
            lines.append((line, numbers[line["song"]]))
    write_manifest(out_folder, split, lines)
    return lines, skipped


def _copy_tracks(line, out_folder, split, sample_rate):
    """Writes the tracks of a song; returns their paths below the folder."""
    tracks = {}
    folder = out_folder / split / line["song"]
    what = 0.0, line["song_seconds"], sample_rate
    # names of tracks are free text
    for i, (name, files) in enumerate(line["tracks"].items()):
        files = [files] if isinstance(files, str) else files
        # a copy is that of these files as they are
        made_of = [what, [(path, file_stat(path)) for path in files]]
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
        path = folder / f"{i}_{digest}.wav"
        tracks[name] = str(path.relative_to(out_folder))
        if path.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        first, *others = files
        sig = read_segment(first, *what)
        for other in others:
            sig += read_segment(other, *what)
        unfinished = path.with_name(f".{path.name}.part")
        soundfile.write(
            unfinished, sig.numpy(), sample_rate, "FLOAT", format="WAV"
        )
        os.replace(unfinished, path)
    current = {out_folder / path for path in tracks.values()}
    for path in folder.glob("*.wav"):
        if path not in current:
            path.unlink()
    return tracks
