"""Manifests on disk: the rows of a split, whatever reads them."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from speechbrain.dataio.dataloader import make_dataloader

from trackformer_sb.data.manifest import (
    Manifest,
    MappedManifest,
    write_manifest,
)
from trackformer_sb.training.dataio import SegmentDataset


def line(song, **more):
    return {
        "song": song,
        "tracks": {"bass": f"/{song}/b.wav", "rest": ["x/1.wav", "/2.wav"]},
        "duration": 3.0,
        "hop": 0.1,
        "song_seconds": 60.0,
        "has_stems": True,
        **more,
    }


def write(folder, numbers, split="train"):
    """A manifest of songs named a, b, ... with these segments."""
    names = sorted(f"song_{i:05d}" for i in range(len(numbers)))
    write_manifest(folder, split, zip(map(line, names), numbers))
    return MappedManifest(folder, split)


def test_rows_are_what_was_written(tmp_path):
    manifest = write(tmp_path, [[0, 3], [7]])
    assert manifest["song_00001_0007"] == {
        "song": "song_00001",
        "tracks": {
            "bass": "/song_00001/b.wav",
            # relative paths are below the folder
            "rest": [str(tmp_path / "x" / "1.wav"), "/2.wav"],
        },
        "start": 0.7,
        "duration": 3.0,
        "song_seconds": 60.0,
        "has_stems": True,
    }


@given(
    st.lists(
        st.lists(st.integers(0, 20000), unique=True, max_size=5),
        min_size=1,
        max_size=20,
    ).filter(any)
)
def test_on_disk_as_in_memory(tmp_path_factory, numbers):
    numbers = [sorted(part) for part in numbers]
    mapped = write(tmp_path_factory.mktemp("manifest"), numbers)
    memory = Manifest(dict(mapped))
    assert len(mapped) == len(memory) == sum(map(len, numbers))
    assert mapped.num_songs == memory.num_songs == sum(map(bool, numbers))
    assert set(mapped.ids) == set(memory.ids)
    pickled = pickle.dumps(mapped)
    assert len(pickled) < 500 and dict(pickle.loads(pickled)) == dict(mapped)
    for place, segment_id in enumerate(mapped.ids):
        assert mapped.index(segment_id) == place
        assert mapped.row(place) == memory[segment_id]
        first, end = mapped.song_range(place)
        songs = [mapped.row(i)["song"] for i in range(len(mapped))]
        assert {songs[i] for i in range(first, end)} == {songs[place]}
        assert songs.count(songs[place]) == end - first


def test_what_is_not_there(tmp_path):
    manifest = write(tmp_path, [[0, 2], [0]])
    for wrong in ("song_00000", "song_00000_0001", "song_00009_0000", "x_y"):
        assert wrong not in manifest
    with pytest.raises(FileNotFoundError, match=r"valid\.npy"):
        MappedManifest(tmp_path, "valid")


def test_dataset_of_speechbrain(tmp_path):
    dataset = SegmentDataset(write(tmp_path, [[0, 1], [5]]))
    dataset.add_dynamic_item(len, takes="song", provides="letters")
    dataset.set_output_keys(["id", "start", "letters"])
    assert len(dataset) == 3
    loader = make_dataloader(
        dataset, batch_size=2, num_workers=2, drop_last=False
    )
    batches = list(loader)
    assert [x for batch in batches for x in batch.id] == list(dataset.data_ids)
    assert batches[1].start.tolist() == [0.5]
    assert batches[0].letters.tolist() == [10, 10]


# Reads from two manifests; prints what the process then holds, in MB. Pages of
# the files are the system's.
READER = """
import sys
import numpy as np, psutil
from trackformer_sb.data.manifest import MappedManifest

for folder in sys.argv[1:]:
    manifest = MappedManifest(folder, "train")
    for i in np.random.default_rng(0).integers(len(manifest), size=2000):
        manifest.index(manifest.ids[int(i)])
        manifest.row(int(i))
    print(psutil.Process().memory_full_info().data / 2**20)
"""


def test_memory_of_a_worker_does_not_grow_with_the_library(tmp_path):
    """The data segment of a process that reads from few and many segments."""
    folders = [tmp_path / "few", tmp_path / "many"]
    for folder, songs, segments in zip(folders, (10, 2000), (10, 200)):
        folder.mkdir()
        write(folder, [np.arange(segments)] * songs)
    done = subprocess.run(
        [sys.executable, "-c", READER, *folders], capture_output=True, text=True
    )
    few, many = map(float, done.stdout.split())
    # 400,000 ids alone would be 25 MB
    assert many - few < 8
