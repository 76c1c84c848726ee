"""Manifests on disk: the rows of a split, whatever reads them."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackformer_sb.data.manifest import (
    Manifest,
    MappedManifest,
    write_manifest,
)


def line(song):
    return {
        "song": song,
        "tracks": {"bass": f"/{song}/b.wav", "rest": ["x/1.wav", "/2.wav"]},
        "duration": 3.0,
        "hop": 0.1,
        "song_seconds": 60.0,
        "has_stems": True,
    }


def write(folder, numbers):
    """A manifest of songs named a, b, ... with these segments."""
    names = sorted(f"song_{i:05d}" for i in range(len(numbers)))
    write_manifest(folder, "train", zip(map(line, names), numbers))
    return MappedManifest(folder, "train")


@given(
    st.lists(
        st.lists(st.integers(0, 20000), unique=True, min_size=1, max_size=5),
        min_size=1,
        max_size=20,
    )
)
def test_on_disk_as_in_memory(tmp_path_factory, numbers):
    numbers = [sorted(part) for part in numbers]
    mapped = write(tmp_path_factory.mktemp("manifest"), numbers)
    memory = Manifest(dict(mapped))
    assert len(mapped) == len(memory) == sum(map(len, numbers))
    assert mapped.num_songs == memory.num_songs == len(numbers)
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


def test_memory_of_a_worker_does_not_grow_with_the_library(tmp_path):
    write(tmp_path, [np.arange(200)] * 2000)
    tracemalloc.start()
    manifest = MappedManifest(tmp_path, "train")
    for i in np.random.default_rng(0).integers(len(manifest), size=200):
        assert manifest.index(manifest.ids[int(i)]) == i
        manifest.row(int(i))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 400,000 ids alone would be 25 MB
    assert peak < 1e6
