"""Shards: what is packed comes back, once, on every rank, after any stop."""

import collections
import functools
import http.server
import io
import itertools
import json
import shutil
import tarfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
import torch

from trackformer_sb.audio import UnreadableAudio, read_segment
from trackformer_sb.cli import main
from trackformer_sb.data import shards as shards_module
from trackformer_sb.data.augment import Augmentation
from trackformer_sb.data.manifest import MappedManifest
from trackformer_sb.data.mixtures import read_tracks
from trackformer_sb.data.music import Music
from trackformer_sb.data.shards import ShardedMixtures, pack

webdataset = pytest.importorskip("webdataset")

RATE = 1000
SECONDS = 0.5
SIX = 6 * 2 * 2 * RATE * SECONDS / 1e6  # MB: six segments of two stems


def write_songs(folder, songs=8, stems=("bass", "drums"), seconds=3.0):
    """Noise in 16 bits; of eight songs four are for training."""
    rng = np.random.default_rng(0)
    for song, name in itertools.product(range(songs), stems):
        path = folder / f"söng.{song}" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sig = rng.integers(-(2**13), 2**13, round(seconds * RATE))
        soundfile.write(path, sig.astype(np.int16), RATE)
    return folder


def music_of(folder, **more):
    options = {"cache_folder": folder.parent, "sample_rate": RATE, **more}
    return Music(folder, "stems", **options)


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    return write_songs(tmp_path_factory.mktemp("music") / "songs")


@pytest.fixture(scope="module")
def packed(songs, tmp_path_factory):
    """Four shards of six segments, for reading only."""
    folder = tmp_path_factory.mktemp("packed")
    report = pack(music_of(songs), folder, SECONDS, SIX)
    assert [x["segments"] for x in report["shards"]] == [6] * 4
    return folder


@pytest.fixture(scope="module")
def rows(packed):
    return dict(MappedManifest(packed / "manifests", "train"))


@pytest.fixture
def shards(packed, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def dataset_of(folder, **more):
    options = {"batch_size": 1, "sample_rate": RATE, "seed": 0, **more}
    return ShardedMixtures(folder, options.pop("duration", SECONDS), **options)


def ids_of(items):
    return [item["id"] for item in items]


def load(dataset, num_workers=0):
    loader = torch.utils.data.DataLoader(
        dataset, dataset.batch_size, num_workers=num_workers, collate_fn=list
    )
    return list(loader)


def members(shard):
    with tarfile.open(shard) as tar:
        return {x.name: tar.extractfile(x).read() for x in tar}


def segments_in(shard):
    names = [name for name in members(shard) if name.endswith("json")]
    return [name.removesuffix(".json").replace("%2E", ".") for name in names]


# --- what comes back ---------------------------------------------------------


def test_items_are_those_of_the_files(packed, rows):
    for item in dataset_of(packed):
        row, mixtures = rows[item["id"]], item["mixtures"]
        assert mixtures.dtype == torch.float32 and item["skipped"] == []
        assert item["song"] == row["song"]
        assert torch.equal(mixtures[0], read_tracks(row, RATE).sum(0))
        [partner] = [
            other
            for other in rows.values()
            if torch.equal(mixtures[1], read_tracks(other, RATE).sum(0))
        ]
        assert partner["song"] != row["song"]


def test_partners_of_one_stem_and_of_silence(packed, rows):
    stems = torch.cat([read_tracks(row, RATE) for row in rows.values()])
    for item in dataset_of(packed, single_stem_share=1.0):
        assert (stems == item["mixtures"][1]).all(1).sum() == 1
    for item in dataset_of(packed, silent_share=1.0):
        assert not item["mixtures"][1].any()


def test_beyond_full_scale(tmp_path):
    folder = write_songs(tmp_path / "songs", stems=[f"s{i}" for i in range(9)])
    rng = np.random.default_rng(0)
    for path in folder.glob("*/s8.wav"):
        sig = rng.uniform(-1.7, 1.7, 3 * RATE)
        soundfile.write(path, sig, RATE, "FLOAT")
    pack(music_of(folder), tmp_path / "out", SECONDS)
    rows = MappedManifest(tmp_path / "out" / "manifests", "train")
    for item in dataset_of(tmp_path / "out"):
        expected = read_tracks(rows[item["id"]], RATE).sum(0)
        error = (item["mixtures"][0] - expected).abs().max()
        # nine times half a step of 16 bits at half the level
        assert 0 < error <= 9 * 2**-15


def test_webdataset_reads_them_as_its_own(packed, rows):
    urls = str(packed / "train-{000000..000003}.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert {json.loads(x["json"])["id"] for x in samples} == set(rows)
    for sample in samples:
        assert json.loads(sample["json"])["names"] == ["bass", "drums"]
        assert sample["00.flac"].startswith(b"fLaC") and sample["01.flac"]


def test_parts_of_longer_segments(packed, rows):
    """Short training items, and shifted ones, stay in the packed segment."""
    whole = {key: read_tracks(row, RATE).sum(0) for key, row in rows.items()}
    for more in ({}, {"augmentation": Augmentation(time_shift_seconds=0.1)}):
        dataset = dataset_of(packed, duration=0.2, epoch_segments=240, **more)
        starts = set()
        for item in dataset:
            parts = whole[item["id"]].unfold(0, 200, 1)
            [start] = (parts == item["mixtures"][0]).all(1).nonzero()
            starts.add(int(start))
        assert min(starts) < 10 and max(starts) > 290 and len(starts) > 80


# --- who reads what ----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("world_size", "num_workers", "per_shard", "block"),
    [(1, 0, 6, 256), (2, 3, 6, 256), (2, 2, 24, 4), (3, 2, 5, 1)],
)
def test_every_segment_once_over_all_ranks(
    songs, rows, tmp_path, world_size, num_workers, per_shard, block
):
    pack(music_of(songs), tmp_path, SECONDS, SIX * per_shard / 6)
    orders = collections.defaultdict(list)
    for epoch, rank in itertools.product((0, 0, 1), range(world_size)):
        dataset = dataset_of(
            tmp_path,
            batch_size=3,
            rank=rank,
            world_size=world_size,
            block_segments=block,
        )
        dataset.set_epoch(epoch)
        batches = load(dataset, num_workers)
        count = 24 // world_size
        assert list(map(len, batches)) == [3] * (count // 3) + [
            count % 3
        ] * bool(count % 3)
        orders[rank, epoch].append([ids_of(batch) for batch in batches])
    for epoch in (0, 1):
        seen = [orders[rank, epoch][0] for rank in range(world_size)]
        seen = itertools.chain(*itertools.chain(*seen))
        assert sorted(seen) == sorted(rows)
    # the same seed and epoch give the same order, another epoch another one
    assert orders[0, 0][0] == orders[0, 0][1] != orders[0, 1][0]


def test_epochs_of_more_or_fewer_segments(packed, rows):
    for count in (5, 60):
        dataset = dataset_of(packed, epoch_segments=count)
        seen = collections.Counter(ids_of(dataset))
        assert seen.total() == len(dataset) == count
        times = {count // 24, -(-count // 24)}
        assert {seen[segment] for segment in rows} == times


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_batches_is_resuming(packed, num_workers):
    def items(skip):
        dataset = dataset_of(
            packed,
            epoch_segments=50,
            batch_size=4,
            gain_db=6.0,
            block_segments=7,
        )
        dataset.set_epoch(2, skip)
        return list(itertools.chain(*load(dataset, num_workers)))

    whole = items(0)
    for skip in (1, 2, 9, 12):
        rest = items(skip)
        assert ids_of(rest) == ids_of(whole)[4 * skip :]
        for one, other in zip(rest, whole[4 * skip :], strict=True):
            assert torch.equal(one["mixtures"], other["mixtures"])


# --- damage ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["inside", "header", "missing"])
def test_damaged_shard_is_named_and_the_rest_goes_on(shards, rows, how):
    path = shards / "train-000001.tar"
    with tarfile.open(path) as tar:
        fourth = tar.getmembers()[9]
    lost, data = segments_in(path)[3:], path.read_bytes()
    if how == "inside":
        path.write_bytes(data[: fourth.offset_data + 20])
    elif how == "header":
        after = data[fourth.offset + 512 :]
        path.write_bytes(data[: fourth.offset] + b"?" * 512 + after)
    else:
        lost = segments_in(path)
        path.unlink()
    for rank in range(2):
        dataset = dataset_of(shards, rank=rank, world_size=2)
        items = list(dataset)
        assert len(items) == 12 and not set(ids_of(items)) & set(lost)
    items = list(dataset_of(shards, epoch_segments=24 - len(lost)))
    assert sorted(ids_of(items)) == sorted(rows.keys() - lost)
    words = f"{path}: damaged after {6 - len(lost)} of 6 segments"
    for file, reason in itertools.chain(*(x["skipped"] for x in items)):
        assert file == str(path) and reason.startswith(words)


def rewrite(path, damaged):
    """Writes a shard again, a bit of some audio flipped."""
    content = members(path)
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            if damaged(name):
                data = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_damaged_segment_is_named_and_replaced(shards, rows):
    path = shards / "train-000001.tar"
    name = next(iter(members(path)))
    rewrite(path, lambda other: other == name)
    [segment] = [x for x in rows if name.startswith(x.replace(".", "%2E"))]
    items = list(dataset_of(shards))
    assert sorted(ids_of(items)) == sorted(rows)
    skipped = list(itertools.chain(*(x["skipped"] for x in items)))
    named = f"{path}/{segment}"
    [(where, words)] = set(skipped)
    assert where == named and words.startswith(f"{named}: damaged, ")
    for shard in shards.glob("*.tar"):
        rewrite(shard, lambda other: other.endswith("flac"))
    with pytest.raises(UnreadableAudio, match="no readable segment"):
        list(dataset_of(shards))


def test_shards_from_the_network(shards, packed):
    served = shards / "served"
    served.mkdir()
    for path in shards.glob("*.tar"):
        path.rename(served / path.name)
    handler = http.server.SimpleHTTPRequestHandler
    handler = functools.partial(handler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        urls = f"http://127.0.0.1:{httpd.server_port}/{{}}"
        items = list(dataset_of(shards, urls=urls))
        httpd.shutdown()
        thread.join()
    same_items(items, dataset_of(packed))


def same_items(items, others):
    for one, other in zip(items, others, strict=True):
        assert one["id"] == other["id"] and one["skipped"] == []
        assert torch.equal(one["mixtures"], other["mixtures"])


def test_shards_from_object_storage_and_from_a_program(shards, packed):
    for path in shards.glob("*.tar"):
        with fsspec.open(f"memory://bucket/{path.name}", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()
    items = dataset_of(shards, urls="memory://bucket/{}")
    same_items(items, dataset_of(packed))
    items = dataset_of(shards, urls=f"pipe:cat {packed}/{{}}")
    same_items(items, dataset_of(packed))


# --- packing -----------------------------------------------------------------


def make(folder, out, *options):
    words = [str(folder), str(out), "--dataset=stems", "--sample_rate=500"]
    words += ["--segment_seconds=1", "--shard_megabytes=0.01", *options]
    return main(["shards", "make", *words])


def test_shards_make(tmp_path, capsys):
    music, out = write_songs(tmp_path / "music"), tmp_path / "take:1#"
    assert make(music, out) == 0
    shards = {x: x.stat().st_mtime_ns for x in out.glob("train-*.tar")}
    assert capsys.readouterr().out == (
        f"12 segments of 4 songs in {len(shards)} shards in {out}, "
        "0 files skipped\n"
    )
    assert len(shards) > 2
    # again: nothing is left to do
    assert make(music, out) == 0
    assert {x: x.stat().st_mtime_ns for x in shards} == shards
    assert len(list(dataset_of(out, sample_rate=500))) == 12
    # what is evaluated is the same music at the rate of the shards
    original = MappedManifest(out / "manifests", "test")
    packed = MappedManifest(out, "test")
    assert list(packed) == list(original) and len(packed) == 6
    for key, row in packed.items():
        for name, path in row["tracks"].items():
            assert Path(path).is_relative_to(out)
            source = original[key]["tracks"][name]
            expected = read_segment(source, row["start"], 1.0, 500)
            found = read_segment(path, row["start"], 1.0, 500)
            np.testing.assert_allclose(found, expected, atol=1e-6)
    # other settings or music in the same folder
    capsys.readouterr()
    assert make(music, out, "--music={seed: 5}") == 2
    said = capsys.readouterr().err
    assert said.startswith("trackformer shards: ") and "settings" in said


@pytest.mark.parametrize("out", ["a/packed", "b"])
def test_shards_do_not_become_songs(tmp_path, out):
    music = music_of(tmp_path / "a", test_folder=tmp_path / "b")
    with pytest.raises(ValueError, match="expected a folder outside of"):
        pack(music, tmp_path / out)


def test_songs_that_break_while_they_are_packed(tmp_path, caplog):
    songs = write_songs(tmp_path / "songs", songs=10)
    options = {"split_ratio": (40, 20, 40)}
    look = music_of(songs, **options).prepare(tmp_path / "look", SECONDS)
    broken = {x: look["splits"][x]["song_names"][0] for x in ("train", "test")}
    for name in broken.values():
        # names are made safe; the last character is the number of the song
        path = songs / f"söng.{name[-1]}" / "bass.wav"
        sig, _ = soundfile.read(path)
        sig[RATE] = np.nan
        soundfile.write(path, sig, RATE, "FLOAT")
    music = music_of(songs, **options)
    report = pack(music, tmp_path / "out", SECONDS)
    assert ["NaN" in x["reason"] for x in report["skipped"]] == [True, True]
    assert len([x for x in caplog.messages if "NaN" in x]) == 2
    rows = MappedManifest(tmp_path / "out" / "manifests", "train")
    packed = ids_of(dataset_of(tmp_path / "out"))
    assert rows.keys() - packed == {f"{broken['train']}_0002"}
    tested = MappedManifest(tmp_path / "out", "test").values()
    names = {*look["splits"]["test"]["song_names"]} - {broken["test"]}
    assert {row["song"] for row in tested} == names


def test_stopped_packing_leaves_whole_shards_and_goes_on(
    songs, packed, tmp_path, monkeypatch
):
    calls = []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) >= 16:
            raise KeyboardInterrupt
        return read_tracks(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "read_tracks", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(music_of(songs), tmp_path, SECONDS, SIX)
    assert len(list(tmp_path.glob("train-*.tar"))) == 2
    assert not (tmp_path / "data_report.json").exists()
    pack(music_of(songs), tmp_path, SECONDS, SIX)
    for path in packed.glob("train*"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
