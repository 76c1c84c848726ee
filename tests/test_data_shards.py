"""Shards: what is packed comes back, once, on every rank, after any stop."""

import collections
import functools
import http.server
import io
import itertools
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter

from trackformer_sb.data import shard_reading
from trackformer_sb.data import shards as shards_module
from trackformer_sb.data.audio import UnreadableAudio
from trackformer_sb.data.augment import Augmentation
from trackformer_sb.data.shard_reading import ShardedMixtures
from trackformer_sb.data.shards import list_shards, make_shards
from trackformer_sb.training import brain as brain_module
from trackformer_sb.training.brain import MusicBrain

webdataset = pytest.importorskip("webdataset")

REAL_MUSIC = Path(__file__).parents[2] / "shared" / "data"
RATE = 100
SECONDS = 0.5
SONGS, SEGMENTS = 4, 6
MORE_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SIX = 6 * 2 * RATE * SECONDS / 1e6  # MB: six segments a shard


def make_rows(folder, songs=SONGS, segments=SEGMENTS):
    """Mixtures; segment i of all has the constant level i + 1 of 2**15."""
    rows = {}
    for song in range(songs):
        path = folder / f"song{song}.wav"
        levels = 1 + song * segments + np.arange(segments, dtype=np.int16)
        soundfile.write(path, np.repeat(levels, round(SECONDS * RATE)), RATE)
        for segment in range(segments):
            rows[f"song{song}_{segment:04d}"] = {
                "song": f"song{song}",
                "tracks": {"mixture": str(path)},
                "start": segment * SECONDS,
                "duration": SECONDS,
                "has_stems": False,
            }
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("music"))


@pytest.fixture(scope="module")
def packed(rows, tmp_path_factory):
    """Four shards of six segments, for reading only."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(rows, folder, "train", RATE, SIX, num_workers=2)
    return folder


@pytest.fixture
def shards(packed, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def dataset_of(urls, **options):
    return ShardedMixtures(urls, RATE, SECONDS, **{"seed": 0, **options})


def ids_of(items):
    return [item["id"] for item in items]


def batches_of(dataset, num_workers=0, batch_size=1, **options):
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=PaddedBatch,
        **options,
    )
    return [batch.id for batch in loader]


def reasons_of(items):
    return [x for item in items for x in item["skipped"]]


def flat(batches):
    return list(itertools.chain(*batches))


def segment_at(level):
    """Song and segment of a level."""
    index = round(float(level) * 2**15) - 1
    return f"song{index // SEGMENTS}_{index % SEGMENTS:04d}"


def members(shard):
    with tarfile.open(shard) as tar:
        return {x.name: tar.extractfile(x).read() for x in tar}


def write_wav(path, sig, subtype="FLOAT"):
    soundfile.write(path, sig, RATE, subtype=subtype)
    return str(path)


def one_row(tracks, has_stems=True, song="song", seconds=SECONDS):
    return {
        "song": song,
        "tracks": tracks,
        "start": 0.0,
        "duration": seconds,
        "has_stems": has_stems,
    }


def read_back(rows, folder, **options):
    """Mixture 0 of every segment."""
    make_shards(rows, folder, "x", RATE, **options)
    dataset = dataset_of(folder, silent_share=1)
    return {item["id"]: item["mixtures"][0] for item in dataset}


# --- writing -----------------------------------------------------------------


def test_16_bit_audio_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    sig = rng.integers(-(2**15), 2**15, 50).astype(np.int16)
    sig[:2] = -(2**15), 2**15 - 1
    soundfile.write(tmp_path / "a.wav", sig, RATE, subtype="PCM_16")
    rows = {"a": one_row({"mixture": str(tmp_path / "a.wav")}, False)}
    back = read_back(rows, tmp_path / "shards")["a"]
    assert back.dtype == torch.float32
    assert np.array_equal(back.numpy() * 2**15, sig)


@pytest.mark.parametrize(
    "subtype, step", [("PCM_16", 2**-15), ("PCM_24", 2**-23)]
)
@pytest.mark.parametrize("peak, gain", [(0.9, 1), (1.7, 2), (5.0, 8)])
def test_quantization_error_is_half_a_step(tmp_path, subtype, step, peak, gain):
    sig = np.random.default_rng(0).uniform(-peak, peak, 50).astype(np.float32)
    sig[0] = peak
    rows = {
        "a": one_row({"mixture": write_wav(tmp_path / "a.wav", sig)}, False)
    }
    back = read_back(rows, tmp_path / "s", subtype=subtype)["a"].numpy()
    error = np.abs(back - sig).max()
    assert step * gain / 8 < error <= step * gain / 2
    [meta] = [
        json.loads(data)
        for name, data in members(tmp_path / "s" / "x-000000.tar").items()
        if name.endswith("json")
    ]
    assert meta["gain"] == 1 / gain


def test_stems_survive_and_sum_to_the_mixture(tmp_path):
    # more than the eight channels that FLAC has
    names = [f"stem{i}" for i in range(19)]
    sigs = np.random.default_rng(0).uniform(-0.9, 0.9, (19, 50))
    tracks = {
        name: write_wav(tmp_path / f"{name}.wav", sig)
        for name, sig in zip(names, sigs, strict=True)
    }
    back = read_back({"a.b": one_row(tracks)}, tmp_path / "shards")["a.b"]
    assert np.abs(back.numpy() - sigs.sum(0)).max() <= 19 * 2**-16 + 1e-6
    files = members(tmp_path / "shards" / "x-000000.tar")
    flacs = ["a%2Eb.flac", "a%2Eb.more01.flac", "a%2Eb.more02.flac"]
    assert set(files) == {*flacs, "a%2Eb.json"}
    parts = [soundfile.read(io.BytesIO(files[x]))[0].T for x in flacs]
    assert list(map(len, parts)) == [8, 8, 3]
    assert np.abs(np.concatenate(parts) - sigs).max() <= 2**-16 + 1e-7
    assert json.loads(files["a%2Eb.json"]) == {
        "id": "a.b",
        "song": "song",
        "start": 0.0,
        "duration": SECONDS,
        "names": names,
        "has_stems": True,
        "gain": 1.0,
    }


def test_any_segment_id_is_a_key(tmp_path, rows):
    ids = [
        "a.b_0001",
        "a.b.c",
        "Füße/été 1",
        "日本.flac",
        "__x__",
        "a%2Eb",
        "-",
    ]
    ids.append("x" * 300)
    some = dict(zip(ids, rows.values()))
    levels = {x: 1 + list(rows.values()).index(row) for x, row in some.items()}
    back = read_back(some, tmp_path)
    assert set(back) == set(ids)
    for segment_id, level in levels.items():
        assert (back[segment_id] * 2**15 == level).all()


def test_webdataset_reads_them_as_its_own(packed, rows):
    urls = str(packed / "train-{000000..000003}.tar")
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    samples = list(dataset)
    assert {x["__key__"] for x in samples} == set(rows)
    for sample in samples:
        assert sample["__key__"] == json.loads(sample["json"])["id"]
        assert sample["flac"].startswith(b"fLaC")


def test_segments_are_shuffled_into_even_shards(rows, tmp_path):
    # 24 segments, at most 7 a shard
    index = make_shards(rows, tmp_path, "train", RATE, SIX * 7 / 6)
    assert [x["segments"] for x in index["shards"]] == [6, 6, 6, 6]
    assert (index["segments"], index["songs"]) == (24, SONGS)
    assert index["complete"]
    order = []
    for shard in index["shards"]:
        path = tmp_path / shard["file"]
        assert path.stat().st_size == shard["bytes"]
        ids = [x[:-5] for x in members(path) if x.endswith("json")]
        assert len({rows[x]["song"] for x in ids}) > 1
        order += ids
    assert sorted(order) == sorted(rows) != order
    names = sorted(x.name for x in tmp_path.iterdir())
    assert names == [*(f"train-00000{i}.tar" for i in range(4)), "train.json"]


def test_size_of_shards_counts_stems(tmp_path):
    sig = np.zeros(50)
    tracks = {x: write_wav(tmp_path / f"{x}.wav", sig) for x in "abc"}
    rows = {f"{i}": one_row(tracks) for i in range(6)}
    index = make_shards(rows, tmp_path, "x", RATE, SIX)
    assert [x["segments"] for x in index["shards"]] == [2, 2, 2]
    index = make_shards(rows, tmp_path, "y", RATE, SIX, subtype="PCM_24")
    assert [x["segments"] for x in index["shards"]] == [2, 1, 1, 1, 1]


def test_same_files_from_any_number_of_threads(packed, rows, tmp_path):
    reverse = dict(reversed(rows.items()))
    make_shards(reverse, tmp_path, "train", RATE, SIX, num_workers=1)
    for path in packed.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    make_shards(rows, tmp_path, "other", RATE, SIX, seed=1)
    contents = [
        (tmp_path / f"{x}-000000.tar").read_bytes() for x in ("train", "other")
    ]
    assert contents[0] != contents[1]


def test_unreadable_segments_are_skipped_and_named(tmp_path, caplog):
    rows = make_rows(tmp_path)
    path = tmp_path / "song1.wav"
    sig, _ = soundfile.read(path, dtype="float32")
    sig[120:] = np.nan
    soundfile.write(path, sig, RATE, "FLOAT")
    index = make_shards(rows, tmp_path, "x", RATE, SIX)
    skipped = [entry["id"] for entry in index["skipped"]]
    assert sorted(skipped) == [f"song1_{i:04d}" for i in range(2, 6)]
    assert {entry["file"] for entry in index["skipped"]} == {str(path)}
    assert all("NaN" in entry["reason"] for entry in index["skipped"])
    assert (index["segments"], index["songs"]) == (20, SONGS)
    # once a file, not a segment
    warnings = [x for x in caplog.messages if str(path) in x]
    assert len(warnings) == 1 and "NaN" in warnings[0]
    assert sorted(ids_of(dataset_of(tmp_path))) == sorted(rows.keys() - skipped)
    # and it is known without reading again
    caplog.clear()
    assert make_shards(rows, tmp_path, "x", RATE, SIX) == index
    assert not caplog.messages


def test_nothing_readable_is_an_error(tmp_path):
    rows = {"a": one_row({"mixture": str(tmp_path / "none.wav")}, False)}
    with pytest.raises(
        UnreadableAudio, match=r"none of 1 segments .*none\.wav"
    ):
        make_shards(rows, tmp_path, "x", RATE)


KILLED = """
    import json, os, signal, sys
    from trackformer_sb.data import shards
    folder, music = sys.argv[1:]
    rows = json.load(open(music))
    read, calls = shards.read_tracks, []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == 16:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*arguments)

    shards.read_tracks = dying
    shards.make_shards(rows, folder, "train", 100, %r, num_workers=1)
"""


def test_killed_run_leaves_whole_shards_and_goes_on(packed, rows, tmp_path):
    folder = tmp_path / "killed"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code = textwrap.dedent(KILLED % SIX)
    command = [sys.executable, "-c", code, folder, tmp_path / "rows.json"]
    root = Path(__file__).parents[1]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    whole = sorted(folder.glob("*.tar"))
    assert 1 <= len(whole) <= 2
    assert list(folder.glob(".*.part"))
    for path in whole:
        assert path.read_bytes() == (packed / path.name).read_bytes()
    index = json.loads((folder / "train.json").read_text())
    assert [x["file"] for x in index["shards"]] == [x.name for x in whole]
    assert not index["complete"]
    times = [path.stat().st_mtime_ns for path in whole]
    make_shards(rows, folder, "train", RATE, SIX, num_workers=1)
    assert [path.stat().st_mtime_ns for path in whole] == times
    assert {x.name for x in folder.iterdir()} == {
        x.name for x in packed.iterdir()
    }
    for path in packed.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_lost_shard_is_made_again(shards, packed, rows):
    (shards / "train-000001.tar").unlink()
    path = shards / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    make_shards(rows, shards, "train", RATE, SIX)
    for path in packed.iterdir():
        assert path.read_bytes() == (shards / path.name).read_bytes()


def test_failure_leaves_no_part_of_a_shard(rows, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(webdataset.TarWriter, "write", fail)
    with pytest.raises(OSError, match="no space left"):
        make_shards(rows, tmp_path, "x", RATE)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    # and goes on when there is
    monkeypatch.undo()
    assert make_shards(rows, tmp_path, "x", RATE)["complete"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sample_rate": 50}, "sample_rate was 100, now 50"),
        ({"shard_megabytes": 1}, "shard_megabytes was .*, now 1"),
        ({"subtype": "PCM_24"}, "subtype was 'PCM_16', now 'PCM_24'"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"rows": 23}, "segments was 24, now 23"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    shards, rows, change, words
):
    arguments = {"rows": rows, "sample_rate": RATE, "shard_megabytes": SIX}
    if "rows" in change:
        change = {"rows": dict(list(rows.items())[: change["rows"]])}
    before = (shards / "train.json").read_bytes()
    with pytest.raises(ValueError, match=rf"train\.json .*{words}"):
        make_shards(
            **{**arguments, **change}, out_folder=shards, prefix="train"
        )
    assert (shards / "train.json").read_bytes() == before


def test_other_rows_are_refused(shards, rows):
    other = {**rows, "song0_0000": {**rows["song0_0000"], "start": 0.1}}
    with pytest.raises(ValueError, match="rows_sha256 was"):
        make_shards(other, shards, "train", RATE, SIX)


def test_foreign_files_are_not_overwritten(shards, rows):
    (shards / "train.json").unlink()
    with pytest.raises(ValueError, match=r"train-000000\.tar has no index"):
        make_shards(rows, shards, "train", RATE, SIX)
    (shards / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"train\.json is no index of shards"):
        make_shards(rows, shards, "train", RATE, SIX)
    # shards of another prefix are no obstacle
    make_shards(rows, shards, "train-2", RATE, SIX)
    make_shards(rows, shards, "tra", RATE, SIX)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rows": {}}, "got 0 rows"),
        ({"prefix": "a/b"}, "prefix .* got 'a/b'"),
        ({"prefix": ".hidden"}, "prefix"),
        ({"subtype": "FLOAT"}, r"\['PCM_16', 'PCM_24'\], got 'FLOAT'"),
        ({"shard_megabytes": 0}, "shard_megabytes > 0, got 24 rows, 100 and 0"),
    ],
)
def test_bad_arguments_of_packing(rows, tmp_path, change, words):
    arguments = {"rows": rows, "prefix": "x", "sample_rate": RATE, **change}
    with pytest.raises(ValueError, match=words):
        make_shards(out_folder=tmp_path, **arguments)


def test_missing_library_is_named(packed, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    words = r"needs the extra \[shards\]: pip install trackformer_sb\[shards\]"
    with pytest.raises(ImportError, match=words):
        make_shards(rows, tmp_path, "x", RATE)
    with pytest.raises(ImportError, match=words):
        dataset_of(packed)


# --- where shards are --------------------------------------------------------


def test_shards_of_a_pattern_a_list_and_a_folder(packed):
    paths = [f"{packed}/train-00000{i}.tar" for i in range(4)]
    pattern = f"{packed}/train-{{000000..000003}}.tar"
    for urls in (packed, str(packed), pattern, paths, [pattern]):
        assert list_shards(urls) == paths
    mixed = [paths[3], "https://host/a-{00..01}.tar", packed]
    urls = [paths[3], "https://host/a-00.tar", "https://host/a-01.tar", *paths]
    assert list_shards(mixed) == urls


def test_folder_of_two_prefixes_is_refused(shards):
    (shards / "valid-000000.tar").touch()
    with pytest.raises(ValueError, match=r"one prefix .* got train, valid"):
        list_shards(shards)


@pytest.mark.parametrize("name", ["", "none", "none-{0..3}.tar", "train.json"])
def test_no_shards_are_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no shards at {tmp_path}/"):
        dataset_of(f"{tmp_path}/{name}")


def test_folder_that_looks_like_a_url(rows, tmp_path, monkeypatch):
    folder = tmp_path / "take:1"
    make_shards(rows, folder, "x", RATE)
    monkeypatch.chdir(tmp_path)
    assert sorted(ids_of(dataset_of("take:1"))) == sorted(rows)


# --- items -------------------------------------------------------------------


def test_item_is_a_segment_and_one_of_another_song(packed, rows):
    dataset = dataset_of(packed)
    partners = collections.defaultdict(set)
    for epoch in range(12):
        dataset.set_epoch(epoch)
        for item in dataset:
            assert set(item) == {"id", "song", "mixtures", "skipped"}
            mixtures = item["mixtures"]
            assert mixtures.shape == (2, 50)
            assert mixtures.dtype == torch.float32
            assert (mixtures == mixtures[:, :1]).all()
            assert segment_at(mixtures[0, 0]) == item["id"]
            assert rows[item["id"]]["song"] == item["song"]
            partner = segment_at(mixtures[1, 0])
            assert rows[partner]["song"] != item["song"]
            assert item["skipped"] == []
            partners[item["id"]].add(partner)
    assert len(partners) == 24
    assert min(map(len, partners.values())) > 5


def test_gains_single_stems_and_silence(tmp_path):
    rows = {}
    for song in range(8):
        tracks = {
            # stem "quiet" is silent: never the single one
            name: write_wav(tmp_path / f"{song}{name}.wav", np.full(50, level))
            for name, level in (
                ("bass", 2.0**-6),
                ("drums", 2.0**-4),
                ("quiet", 0.0),
            )
        }
        rows[f"{song}"] = one_row(tracks, song=f"{song}")
    make_shards(rows, tmp_path, "x", RATE)
    whole = 2.0**-6 + 2.0**-4

    def levels(**options):
        dataset = dataset_of(tmp_path, epoch_segments=800, **options)
        return torch.stack([x["mixtures"][:, 0] for x in dataset]).T.double()

    first, second = levels(gain_db=6.0)
    for gains in (
        20 * torch.log10(first / whole),
        20 * torch.log10(second / whole),
    ):
        assert -6 <= gains.min() < -5.8 and 5.8 < gains.max() <= 6
        assert abs(gains.mean()) < 0.5
    first, second = levels(single_stem_share=0.5, silent_share=0.25)
    assert (first == whole).all()
    counts = collections.Counter(second.tolist())
    assert set(counts) == {whole, 2.0**-6, 2.0**-4, 0.0}
    assert abs(counts[0.0] - 200) < 50
    assert abs(counts[2.0**-6] - 200) < 50
    assert abs(counts[2.0**-4] - 200) < 50


def test_gains_leave_partners_as_they_are(packed):
    plain, scaled = dataset_of(packed), dataset_of(packed, gain_db=3.0)
    for one, other in zip(plain, scaled, strict=True):
        ratio = other["mixtures"][:, 0] / one["mixtures"][:, 0]
        assert one["id"] == other["id"]
        assert (20 * ratio.log10()).abs().max() <= 3.001


def test_equal_levels(packed):
    def levels(**options):
        items = list(dataset_of(packed, **options))
        return torch.stack([item["mixtures"][:, 0] for item in items])

    plain, equal = levels(), levels(equal_levels=True)
    heard = plain.min(dim=1).values > 1e-4  # the others are silence
    assert heard.sum() > 12
    assert torch.equal(plain[:, 0], equal[:, 0])
    assert torch.equal(plain[~heard], equal[~heard])
    assert torch.allclose(equal[heard, 0], equal[heard, 1])
    assert (levels(equal_levels=True, silent_share=1)[:, 1] == 0).all()
    # gains come on top
    gained = levels(equal_levels=True, gain_db=6.0)[heard]
    ratios = 20 * torch.log10(gained[:, 0] / gained[:, 1])
    assert -12 <= ratios.min() < -3 and 3 < ratios.max() <= 12


def test_channels_are_gone(packed):
    with pytest.raises(ValueError, match="channel mean for shards, got left"):
        dataset_of(packed, channel="left")


@pytest.fixture
def ramps(tmp_path):
    """Segments of 100 samples, 0 1 2 ... and 0 -1 -2 ... of 2**15."""
    rows = {
        song: one_row(
            {"mixture": write_wav(tmp_path / f"{song}.wav", sig, "PCM_16")},
            has_stems=False,
            song=song,
            seconds=1.0,
        )
        for song, sig in (
            ("up", np.arange(100) / 2**15),
            ("down", np.arange(0, -100, -1) / 2**15),
        )
    }
    make_shards(rows, tmp_path, "x", RATE)
    return tmp_path


def test_part_of_longer_segments(ramps):
    dataset = dataset_of(ramps, epoch_segments=300)
    starts = collections.defaultdict(set)
    for item in dataset:
        steps = (item["mixtures"] * 2**15).abs()
        assert (steps.diff() == 1).all()
        for i in range(2):
            starts[i].add(int(steps[i, 0]))
    for i in range(2):
        assert min(starts[i]) == 0 and max(starts[i]) == 50
        assert len(starts[i]) > 40
    with pytest.raises(ValueError, match=r"duration up to 1\.0, .* and 1\.5"):
        next(iter(ShardedMixtures(ramps, RATE, 1.5, seed=0)))
    with pytest.raises(ValueError, match=r"sample_rate=100 .* got 50"):
        next(iter(ShardedMixtures(ramps, 50, 0.5, seed=0)))


def test_augmentation_stays_in_the_packed_segment(ramps):
    plain = list(dataset_of(ramps, epoch_segments=100))
    augmentation = Augmentation(polarity_share=1.0)
    flipped = dataset_of(ramps, epoch_segments=100, augmentation=augmentation)
    for one, other in zip(plain, flipped, strict=True):
        assert torch.equal(one["mixtures"], -other["mixtures"])
    augmentation = Augmentation(time_shift_seconds=0.4)
    moved = dataset_of(ramps, epoch_segments=100, augmentation=augmentation)
    shifts = []
    for one, other in zip(plain, moved, strict=True):
        steps = (other["mixtures"] * 2**15).abs()
        assert (steps.diff() == 1).all()
        assert steps.min() >= 0 and steps.max() < 100
        old = (one["mixtures"] * 2**15).abs()
        shifts += (steps[:, 0] - old[:, 0]).tolist()
    assert -40 <= min(shifts) < -35 and 35 < max(shifts) <= 40
    # half as fast again: 75 samples of the 100 become 50
    augmentation = Augmentation(speed_percent=49.5)
    changes = []
    for item in dataset_of(
        ramps, epoch_segments=100, augmentation=augmentation
    ):
        assert item["mixtures"].shape == (2, 50)
        changes.append(item["mixtures"][0, 20:30].diff().abs().mean() * 2**15)
    assert 0.45 < min(changes) < 0.6 and 1.4 < max(changes) < 1.55


def test_one_song_has_no_partners(rows, tmp_path):
    one = {x: row for x, row in rows.items() if row["song"] == "song0"}
    make_shards(one, tmp_path, "x", RATE)
    with pytest.raises(ValueError, match=f"2 songs, .*{tmp_path} are of song0"):
        list(dataset_of(tmp_path))
    # silence is a partner for everyone
    assert len(list(dataset_of(tmp_path, silent_share=1))) == SEGMENTS


def test_shares_may_be_all_there_is(packed):
    for silent, single in ((0.2, 0.8), (0.1, 0.9), (0.7, 0.3)):
        dataset_of(packed, silent_share=silent, single_stem_share=single)


def test_a_shard_is_not_read_as_its_index(packed, tmp_path, monkeypatch):
    path = sorted(packed.glob("*.tar"))[0]
    odd = shutil.copy(path, tmp_path / "music_0.tar")
    opened, open_shard = [], shards_module.open_shard

    def noting(url):
        opened.append(url)
        return open_shard(url)

    monkeypatch.setattr(shards_module, "open_shard", noting)
    assert shards_module.count_segments([str(odd), str(path)]) == [None, 6]
    index = path.with_name(path.name.replace("-000000.tar", ".json"))
    assert opened == [str(index)]
    shards_module.count_segments(["/no/music-000000.tar?key=1"])
    assert opened[1:] == ["/no/music.json"]


def test_partner_comes_from_afar_if_a_shard_is_one_song(rows, tmp_path):
    for song in range(SONGS):
        one = {x: r for x, r in rows.items() if r["song"] == f"song{song}"}
        make_shards(one, tmp_path, f"part{song}", RATE)
    dataset = dataset_of(
        f"{tmp_path}/part{{0..3}}-000000.tar", buffer_segments=4
    )
    songs = {rows[segment_at(x["mixtures"][1, 0])]["song"] for x in dataset}
    assert len(dataset) == 24
    assert songs == {f"song{i}" for i in range(SONGS)}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"seed": -1}, "seed from 0 to inf, got -1"),
        ({"rank": 2, "world_size": 2}, "rank from 0 to 1, got 2"),
        ({"batch_size": 0}, "batch_size from 1 to inf, got 0"),
        ({"gain_db": -1}, "gain_db from 0 to inf, got -1"),
        ({"single_stem_share": 1.5}, "single_stem_share from 0 to 1, got 1.5"),
        (
            {"single_stem_share": 0.5, "silent_share": 0.75},
            "silent_share from 0 to 0.5, got 0.75",
        ),
        ({"buffer_segments": 1}, "buffer_segments from 2 to inf, got 1"),
        (
            {"world_size": 8, "epoch_segments": 7},
            "epoch_segments of at least 8, got 7",
        ),
    ],
)
def test_bad_arguments_of_reading(packed, options, words):
    with pytest.raises(ValueError, match=words):
        dataset_of(packed, **options)
    with pytest.raises(ValueError, match="samples from 1 to inf, got 0"):
        ShardedMixtures(packed, RATE, duration=0.0, seed=0)


# --- who reads what ----------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("per_shard", [24, 6, 3])  # 1, 4 or 8 shards
def test_every_segment_once_over_all_ranks(
    rows, tmp_path, world_size, num_workers, per_shard
):
    index = make_shards(rows, tmp_path, "x", RATE, SIX * per_shard / 6)
    assert {x["segments"] for x in index["shards"]} == {per_shard}
    seen = []
    for rank in range(world_size):
        dataset = dataset_of(
            tmp_path, rank=rank, world_size=world_size, batch_size=3
        )
        assert len(dataset) == 24 // world_size
        batches = batches_of(dataset, num_workers, batch_size=3)
        assert [len(batch) for batch in batches] == [3] * (8 // world_size)
        seen += flat(batches)
    assert sorted(seen) == sorted(rows)


@MORE_WORKERS
@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_uneven_shards_give_ranks_equally_many(
    rows, tmp_path, num_workers, drop_last
):
    index = make_shards(rows, tmp_path, "x", RATE, SIX * 9 / 6)
    assert [x["segments"] for x in index["shards"]] == [8, 8, 8]
    seen = []
    for rank in range(2):
        dataset = dataset_of(
            tmp_path, rank=rank, world_size=2, epoch_segments=45, batch_size=4
        )
        batches = batches_of(dataset, num_workers, 4, drop_last=drop_last)
        # 22 items: as a map-style dataset would give them
        assert [len(x) for x in batches] == [4] * 5 + [2] * (not drop_last)
        seen.append(collections.Counter(flat(batches)))
    if num_workers == 0:
        # three shards, two ranks: of two shards 22 items are given twice or
        # once, of one shard three times or twice
        large, small = sorted(seen, key=len, reverse=True)
        assert len(large) == 16 and len(small) == 8
        assert set(small.values()) <= {2, 3} and set(large.values()) <= {1, 2}
        assert not large.keys() & small.keys()


def test_order_is_drawn_anew_in_each_epoch(packed):
    dataset = dataset_of(packed)
    orders = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        orders.append(ids_of(dataset))
        assert ids_of(dataset) == orders[-1]
    assert len(set(map(tuple, orders))) == 3
    # whole shards change their places, and segments within them
    packing = [
        x[:-5]
        for i in range(4)
        for x in members(packed / f"train-00000{i}.tar")
        if x.endswith("json")
    ]
    shard = {x: i // 6 for i, x in enumerate(packing)}
    small = dataset_of(packed, buffer_segments=2)  # no shuffle
    small.set_epoch(1)
    runs = [shard[x] for x in ids_of(small)]
    assert [runs[i] for i in range(0, 24, 6)] != [0, 1, 2, 3]
    assert runs == [runs[i] for i in range(0, 24, 6) for _ in range(6)]
    assert [shard[x] for x in orders[1]] != runs
    assert ids_of(dataset_of(packed, seed=1)) != orders[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_depend_on_seed_epoch_and_reader_alone(packed, num_workers):
    def mixtures(rank):
        dataset = dataset_of(packed, rank=rank, world_size=2, gain_db=6.0)
        dataset.set_epoch(3)
        torch.manual_seed(rank)
        loader = torch.utils.data.DataLoader(
            dataset, 4, num_workers=num_workers, collate_fn=PaddedBatch
        )
        return torch.cat([x.mixtures.data for x in loader])

    one = mixtures(0)
    assert one.shape == (12, 2, 50)
    assert torch.equal(one, mixtures(0))
    other = mixtures(1)
    assert not set(one[:, 0, 0].tolist()) & set(other[:, 0, 0].tolist())


def test_persistent_workers_hear_of_the_epoch(packed):
    dataset = dataset_of(packed)
    loader = torch.utils.data.DataLoader(
        dataset, 1, num_workers=1, collate_fn=list, persistent_workers=True
    )
    for epoch, skip in ((0, 0), (1, 0), (2, 5)):
        dataset.set_epoch(epoch, skip)
        seen = ids_of(batch[0] for batch in loader)
        dataset.set_epoch(epoch)
        assert seen == ids_of(dataset)[skip:]


def test_segments_are_read_as_they_are_needed(packed, monkeypatch):
    read = []
    original = shard_reading._read_samples

    def counted(*arguments):
        for sample in original(*arguments):
            read.append(sample)
            yield sample

    monkeypatch.setattr(shard_reading, "_read_samples", counted)
    for taken, _ in enumerate(dataset_of(packed, buffer_segments=8), 1):
        assert len(read) == min(24, 4 + taken)


def test_missing_index_is_made_up_for(shards, rows):
    whole = ids_of(dataset_of(shards))
    (shards / "train.json").unlink()
    dataset = dataset_of(shards)
    assert len(dataset) == 24
    assert ids_of(dataset) == whole
    # nothing is counted where nobody asks
    dataset = dataset_of(shards, epoch_segments=24)
    assert dataset._counts == [None] * 4
    dataset.set_epoch(0, skip_batches=7)
    assert ids_of(dataset) == whole[7:]


def test_unfinished_packing_is_named(shards, caplog):
    path = shards / "train.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "complete": False}))
    assert len(dataset_of(shards)) == 24
    assert f"{path}: packing is not finished" in caplog.messages


# --- resuming ----------------------------------------------------------------


@MORE_WORKERS
@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("buffer_segments", [2, 6, 256])
def test_skipping_batches_is_resuming(packed, num_workers, buffer_segments):
    def dataset():
        # more than one pass: 50 of 24 segments
        return dataset_of(
            packed,
            epoch_segments=50,
            batch_size=4,
            gain_db=6.0,
            buffer_segments=buffer_segments,
        )

    def batches(skip):
        resumed = dataset()
        resumed.set_epoch(2, skip)
        loader = torch.utils.data.DataLoader(
            resumed, 4, num_workers=num_workers, collate_fn=PaddedBatch
        )
        return [(x.id, x.mixtures.data) for x in loader]

    whole = batches(0)
    assert [len(ids) for ids, _ in whole] == [4] * 12 + [2]
    for skip in (1, 2, 8, 13) if num_workers else range(15):
        rest = batches(skip)
        assert [ids for ids, _ in rest] == [ids for ids, _ in whole[skip:]]
        for (_, one), (_, other) in zip(rest, whole[skip:], strict=True):
            assert torch.equal(one, other)


def test_skipping_opens_and_decodes_no_more_than_needed(packed, monkeypatch):
    opened, decoded = [], []
    original_open, original_read = shards_module.open_shard, soundfile.read
    monkeypatch.setattr(
        shards_module,
        "open_shard",
        lambda url: opened.append(url) or original_open(url),
    )
    monkeypatch.setattr(
        soundfile,
        "read",
        lambda *a, **k: decoded.append(a) or original_read(*a, **k),
    )
    dataset = dataset_of(packed, buffer_segments=4)
    opened.clear()
    list(dataset)
    assert len(opened) == 4 and len(decoded) == 48
    order, decoded[:] = list(opened), []
    for batches, shards in ((0, 4), (8, 3), (16, 2), (20, 1)):
        opened.clear()
        decoded.clear()
        dataset.set_epoch(0, batches)
        assert len(list(dataset)) == 24 - batches
        assert opened == order[4 - shards :]
        assert len(decoded) == 2 * (24 - batches)


class Stopped(Exception):
    """In place of a kill."""


class Listener(sb.Brain):
    """Takes note of what it is given; resumes as the training does."""

    def on_stage_start(self, stage, epoch=None):
        self.hparams.dataset.set_epoch(epoch, self.step)

    def fit_batch(self, batch):
        self.hparams.heard.append((self.step, batch.id))
        if len(self.hparams.heard) == self.hparams.stop_after:
            raise Stopped
        return torch.zeros(())


def listen(folder, packed, num_workers, saveable, stop_after=0):
    """Trains two epochs of eight batches; what was heard, until stopped."""
    dataset = dataset_of(packed, batch_size=3)
    options = {"num_workers": num_workers, "collate_fn": PaddedBatch}
    options["batch_size"] = 3
    checkpointer = Checkpointer(folder)
    counter = EpochCounter(2)
    checkpointer.add_recoverable("counter", counter)
    hparams = {"dataset": dataset, "heard": [], "stop_after": stop_after}
    brain = Listener(
        {"model": torch.nn.Linear(1, 1)},
        hparams=hparams,
        run_opts={"ckpt_interval_steps": 3, "noprogressbar": True},
        checkpointer=checkpointer,
    )
    if saveable:
        loader = SaveableDataLoader(dataset, **options)
        checkpointer.add_recoverable("dataloader-TRAIN", loader)
        arguments = {"train_set": loader}
    else:
        arguments = {"train_set": dataset, "train_loader_kwargs": options}
    try:
        brain.fit(counter, **arguments)
    except Stopped:
        pass
    if saveable:
        # its own count goes on, too: PyTorch warns of items beyond len
        given = loader._speechbrain_iterator._num_yielded
        assert given == brain.step if stop_after else 8
        assert len(loader) == 8
    return brain.hparams.heard


@pytest.mark.filterwarnings("error:Length of IterableDataset")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("saveable", [True, False])
def test_training_resumes_in_the_middle(
    packed, tmp_path, num_workers, saveable
):
    whole = listen(tmp_path / "whole", packed, num_workers, saveable)
    assert [step for step, _ in whole] == [*range(1, 9)] * 2
    assert whole[:8] != whole[8:]
    # stopped at step 5, checkpoint at step 3; then at 4 of the second epoch
    first = listen(tmp_path / "a", packed, num_workers, saveable, 5)
    assert first == whole[:5]
    second = listen(tmp_path / "a", packed, num_workers, saveable, 9)
    assert second == whole[3:12]
    third = listen(tmp_path / "a", packed, num_workers, saveable)
    assert third == whole[11:]


# --- over the network --------------------------------------------------------


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and takes note of what was asked for."""

    asked = ()

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def server(shards, monkeypatch):
    """(URL, folder, paths asked for)"""
    if shutil.which("curl") is None:
        pytest.skip("webdataset opens URLs by curl")
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    asked = []
    handler = type("Handler", (QuietHandler,), {"asked": asked})
    handler = functools.partial(handler, directory=shards)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", shards, asked
        httpd.shutdown()
        thread.join()


def test_shards_from_the_network(server, packed):
    url, _, asked = server
    pattern = f"{url}/train-{{000000..000003}}.tar"
    dataset = dataset_of(pattern, buffer_segments=4)
    local = dataset_of(packed, buffer_segments=4)
    assert asked == ["/train.json"] and len(dataset) == 24
    for one, other in zip(dataset, local, strict=True):
        assert one["id"] == other["id"] and one["skipped"] == []
        assert torch.equal(one["mixtures"], other["mixtures"])
    # shards that are passed over are not fetched
    asked.clear()
    dataset.set_epoch(0, skip_batches=16)
    local.set_epoch(0, skip_batches=16)
    assert ids_of(dataset) == ids_of(local)
    assert len(asked) == 2
    assert sorted(flat(batches_of(dataset_of(pattern), 2))) == sorted(
        ids_of(dataset_of(packed))
    )


def test_missing_on_the_network(server, rows):
    url, folder, _ = server
    pattern = f"{url}/train-{{000000..000003}}.tar"
    lost = folder / "train-000002.tar"
    missing = {x[:-5] for x in members(lost) if x.endswith("json")}
    lost.unlink()
    items = list(dataset_of(pattern))
    assert len(items) == 24
    assert set(ids_of(items)) == rows.keys() - missing
    problems = set(reasons_of(items))  # of each pass
    shard = f"{url}/train-000002.tar"
    reason = "missing, truncated or damaged after 0 of 6 segments"
    assert problems == {(shard, f"{shard}: {reason}")}
    # without the index nor anything else
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(
        UnreadableAudio, match=r"no readable.*\{000000\.\.000003"
    ):
        next(iter(dataset_of(pattern, epoch_segments=24)))
    with pytest.raises(
        UnreadableAudio, match=r"no readable.*000003\.tar: miss"
    ):
        dataset_of(pattern)


# --- damage ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["inside", "header", "end", "missing", "empty"])
@pytest.mark.parametrize("index", [True, False])
def test_damaged_shard_is_named_and_the_rest_goes_on(shards, rows, how, index):
    path = shards / "train-000001.tar"
    with tarfile.open(path) as tar:
        files = tar.getmembers()
    # the 4th segment is files 6 and 7
    if how == "inside":
        path.write_bytes(path.read_bytes()[: files[6].offset_data + 20])
    elif how == "header":
        data = bytearray(path.read_bytes())
        data[files[6].offset : files[6].offset + 512] = b"?" * 512
        path.write_bytes(data)
    elif how == "end":
        path.write_bytes(path.read_bytes()[: files[6].offset])
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    found = {"missing": 0, "empty": 0}.get(how, 3)
    lost = [x.name[:-5] for x in files if x.name.endswith("json")][found:]
    if not index:
        (shards / "train.json").unlink()
    urls = f"{shards}/train-{{000000..000003}}.tar"
    dataset = dataset_of(urls, epoch_segments=24 - len(lost))
    items = list(dataset)
    assert sorted(ids_of(items)) == sorted(rows.keys() - lost)
    of = 6 if index else "?"
    reason = f"missing, truncated or damaged after {found} of {of} segments"
    if how == "end" and not index:
        # a tar file cut at a header is whole to all who read it
        assert reasons_of(items) == []
    else:
        assert reasons_of(items) == [(str(path), f"{path}: {reason}")]


def rewrite(path, change):
    """Writes a shard again, its members changed."""
    content = members(path)
    change(content)
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def flip(content, name):
    data = bytearray(content[name])
    data[-5] ^= 1
    content[name] = bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda content, key: flip(content, f"{key}.flac"),
        lambda content, key: content.update({f"{key}.flac": b""}),
        lambda content, key: content.pop(f"{key}.flac"),
        lambda content, key: content.pop(f"{key}.json"),
        lambda content, key: content.update({f"{key}.json": b"{"}),
        lambda content, key: content.update({f"{key}.json": b"[]"}),
        lambda content, key: content.update(
            {
                f"{key}.json": content[f"{key}.json"].replace(
                    b'"mix', b'"a","mix'
                )
            }
        ),
    ],
    ids=["flip", "empty", "no flac", "no json", "cut json", "list", "tracks"],
)
def test_damaged_segment_is_named_and_replaced(shards, rows, change):
    path = shards / "train-000001.tar"
    key = next(iter(members(path))).partition(".")[0]
    rewrite(path, lambda content: change(content, key))
    dataset = dataset_of(shards)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        items = list(dataset)
        assert len(items) == 24
        assert set(ids_of(items)) == rows.keys() - {key}
        reasons = set(reasons_of(items))
        name = f"{path}/{key}"
        assert reasons == {(name, f"{name}: damaged or incomplete")}
        for item in items:
            partner = segment_at(item["mixtures"][1, 0])
            assert rows[partner]["song"] != item["song"]


def test_too_much_damage_is_an_error(shards):
    for path in shards.glob("*.tar"):
        rewrite(
            path,
            lambda content: [flip(content, x) for x in content if "flac" in x],
        )
    dataset = dataset_of(shards, max_failures=5)
    with pytest.raises(UnreadableAudio, match="no readable segment found in"):
        next(iter(dataset))


@pytest.mark.parametrize("whole_shard", [False, True])
def test_first_damage_can_be_an_error(shards, whole_shard):
    path = shards / "train-000001.tar"
    key = next(iter(members(path))).partition(".")[0]
    if whole_shard:
        path.write_bytes(b"")
    else:
        rewrite(path, lambda content: flip(content, f"{key}.flac"))
    named = path if whole_shard else f"{path}/{key}"
    with pytest.raises(UnreadableAudio, match=re.escape(f"{named}: ")):
        list(dataset_of(shards, max_failures=1))
    # it may be drawn again in its own place
    assert len(list(dataset_of(shards, max_failures=3))) == 24


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rank_without_a_readable_shard_reads_others(shards, num_workers):
    for i in range(3):
        (shards / f"train-00000{i}.tar").write_bytes(b"")
    left = {x[:-5] for x in members(shards / "train-000003.tar") if "json" in x}
    for rank in range(2):
        dataset = dataset_of(shards, rank=rank, world_size=2)
        seen = flat(batches_of(dataset, num_workers))
        assert len(seen) == 12
        assert set(seen) <= left


def test_training_names_damage_once(shards, caplog, monkeypatch):
    for i in (1, 2):
        path = shards / f"train-00000{i}.tar"
        key = next(iter(members(path))).partition(".")[0]
        rewrite(path, lambda x, key=key: flip(x, f"{key}.flac"))
    (shards / "train-000003.tar").write_bytes(b"")
    brain = types.SimpleNamespace(skipped={}, sounding={})
    brain.modules = types.SimpleNamespace(training=True)
    dataset = dataset_of(shards, batch_size=4)
    loader = torch.utils.data.DataLoader(
        dataset, 4, num_workers=2, collate_fn=PaddedBatch
    )
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            dataset.set_epoch(epoch)
            for batch in loader:
                MusicBrain.note_input(brain, batch)
    assert len(brain.skipped) == 3
    # all ranks train on segments of their own, and evaluate the same ones
    before = dict(brain.skipped)
    batch.skipped[0].append(("a.wav", "a.wav is damaged"))
    brain.modules.training = False
    monkeypatch.setattr(brain_module, "if_main_process", lambda: False)
    MusicBrain.note_input(brain, batch)
    assert brain.skipped == before
    brain.modules.training = True
    MusicBrain.note_input(brain, batch)
    assert brain.skipped.pop("a.wav") == 1
    caplog.records.pop()
    named = [x for x in caplog.messages if x.startswith("segments are skipped")]
    assert len(named) == 3


# --- real music --------------------------------------------------------------


@pytest.mark.skipif(not REAL_MUSIC.is_dir(), reason="needs real music")
def test_real_music_comes_back(tmp_path):
    paths = sorted((REAL_MUSIC / "mixes").rglob("*.*"))
    paths = [x for x in paths if x.suffix in (".flac", ".wav", ".ogg")][:2]
    rows = {
        f"{path.stem}_{i}": {
            "song": path.stem,
            "tracks": {"mixture": str(path)},
            "start": float(i),
            "duration": 1.0,
            "has_stems": False,
        }
        for path in paths
        for i in range(2)
    }
    make_shards(rows, tmp_path, "x", 44100)
    items = list(ShardedMixtures(tmp_path, 44100, 1.0, seed=0))
    assert sorted(ids_of(items)) == sorted(rows)
    for item in items:
        row = rows[item["id"]]
        [path] = row["tracks"].values()
        info = soundfile.info(path)
        start = round(row["start"] * info.samplerate)
        sig, rate = soundfile.read(
            path, info.samplerate, start, always_2d=True, dtype="float32"
        )
        assert rate == 44100
        error = np.abs(item["mixtures"][0].numpy() - sig.mean(1)).max()
        assert error <= 2**-16 + 1e-7
