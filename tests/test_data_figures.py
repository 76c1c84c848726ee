"""Pictures of catalogues: right numbers, readable names, whole files."""

import itertools
import math
import time
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trackformer_sb.data import figures
from trackformer_sb.data.figures import (
    activity_figure,
    catalogue_figures,
    durations_figure,
    levels_figure,
    stem_activity,
)
from trackformer_sb.data.levels import AudioLevels, measure_levels
from trackformer_sb.data.songs import Song

REAL_MUSIC = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def no_warnings():
    """Not from matplotlib either: about letters, layouts or empty axes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def levels_of(*decibels):
    """Levels with the given dBFS in their windows of 0.1 s."""
    codes = 2 * (np.array(decibels, dtype=float) + 100)
    return AudioLevels(codes.astype("uint8"), 0.5, 0.0, 0.0)


def mixture(name, seconds):
    return Song(name, {"mixture": (f"/{name}.wav",)}, False, seconds=seconds)


def stems(name, tracks, seconds=1.0, **others):
    """A song whose tracks are given by the numbers of their files."""
    tracks = {
        track: tuple(f"/{name}/{track}{i}.wav" for i in range(count))
        for track, count in tracks.items()
    }
    return Song(name, tracks, True, seconds=seconds, **others)


def boxes(axis):
    """Of each row the box's first and third quartile, in %."""
    return [
        (bar.get_x(), bar.get_x() + bar.get_width()) for bar in axis.patches
    ]


def bars(axis):
    """Edges and counts of the bars that are not empty, by their colour."""
    found = {}
    for bar in axis.patches:
        if bar.get_height():
            color = matplotlib.colors.to_hex(bar.get_facecolor())
            edges = bar.get_x(), bar.get_x() + bar.get_width()
            found.setdefault(color, []).append((*edges, bar.get_height()))
    return found


def texts_overlap(figure):
    """Pairs of labels that lie on each other, or a label cut off."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    (axis,) = figure.axes
    texts = [axis.title, axis.xaxis.label, axis.yaxis.label]
    for side in (axis.xaxis, axis.yaxis):
        low, high = sorted(side.get_view_interval())
        ticks = zip(side.get_ticklocs(), side.get_ticklabels())
        texts += [label for place, label in ticks if low <= place <= high]
    extents = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in texts
        if text.get_text() and text.get_visible()
    ]
    width, height = figure.get_size_inches() * figure.dpi
    outside = [
        name
        for name, box in extents
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]
    over = [
        (a, b)
        for (a, one), (b, two) in itertools.combinations(extents, 2)
        if one.overlaps(two)
    ]
    return outside + over


# --- lengths -----------------------------------------------------------------


def test_lengths_are_counted_by_split():
    songs = {
        "train": [mixture("a", 10.0), mixture("b", 11.0), mixture("c", 300.0)],
        "valid": [mixture("d", 10.5)],
        "test": [],
    }
    figure = durations_figure(songs)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "train: 3 songs, 0.1 h",
        "valid: 1 song, 0.0 h",
        "test: 0 songs, 0.0 h",
    ]
    found = bars(axis)
    blue, orange = found["#1f77b4"], found["#ff7f0e"]
    assert sum(count for *_, count in blue) == 3
    assert sum(count for *_, count in orange) == 1
    (low, high, _), *_ = orange
    assert low <= 10.5 <= high
    assert any(low <= 300 <= high for low, high, _ in blue)


@pytest.mark.parametrize(
    "seconds",
    [
        [180.0],
        [200.0] * 30,
        [0.5, 7200.0],
        [0.0, 1e7],
        [3.0],
        [0.05],
        list(np.geomspace(1, 30000, 50)),
    ],
)
def test_any_lengths_are_in_the_picture(seconds):
    songs = {"train": [mixture(f"{i}", s) for i, s in enumerate(seconds)]}
    figure = durations_figure(songs)
    (axis,) = figure.axes
    counted = sum(count for part in bars(axis).values() for *_, count in part)
    assert counted == len(seconds)
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert 1 <= len(labels) <= 10
    assert texts_overlap(figure) == []


def test_length_ticks_say_what_they_are():
    figure = durations_figure({"train": [mixture("a", 8.0), mixture("b", 60)]})
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert dict(zip(axis.get_xticks(), labels)) == {
        8: "8 s",
        15: "15 s",
        30: "30 s",
        60: "1 min",
    }


# --- levels ------------------------------------------------------------------


@pytest.fixture
def loudness(monkeypatch):
    """What was given to the figure of the levels last."""
    given = {}

    def draw(loudness):
        given.update(loudness)
        return levels_figure(loudness)

    monkeypatch.setattr(figures, "levels_figure", draw)
    return given


def test_levels_of_songs_are_those_of_their_sums(tmp_path, loudness):
    songs = {
        "train": [stems("sum", {"bass": 2}), mixture("half", 0.2)],
        "valid": [stems("part", {"bass": 1, "drums": 1})],
        "test": [mixture("silent", 0.2), mixture("unknown", 0.2)],
    }
    levels = {
        "/sum/bass0.wav": levels_of(-20, -20),
        "/sum/bass1.wav": levels_of(-20, -20),
        "/half.wav": levels_of(-30, -100),
        "/part/bass0.wav": levels_of(-12, -12),
        "/silent.wav": levels_of(-100, -100),
    }
    catalogue_figures(songs, levels, tmp_path)
    assert loudness["train"] == pytest.approx([-17, -33.01], abs=0.02)
    assert loudness["valid"] == [None]
    assert loudness["test"] == [-math.inf, None]


def test_finished_mixture_goes_before_the_sum_of_stems(tmp_path, loudness):
    song = stems("song", {"bass": 1}, mixture="/song/mix.wav")
    levels = {"/song/bass0.wav": levels_of(-30)}
    catalogue_figures({"train": [song]}, levels, tmp_path)
    assert loudness == {"train": pytest.approx([-30])}
    levels["/song/mix.wav"] = levels_of(-12)
    catalogue_figures({"train": [song]}, levels, tmp_path)
    assert loudness == {"train": pytest.approx([-12])}


def test_level_histogram():
    loudness = {
        "train": [-20.3, -20.4, -14.0, -math.inf, None],
        "test": [-20.2, -math.inf],
        "valid": [-math.inf],
    }
    figure = levels_figure(loudness)
    (axis,) = figure.axes
    assert axis.get_title().endswith("(3 silent songs not shown)")
    assert bars(axis) == {
        "#1f77b4": [(-21, -20, 2), (-14, -13, 1)],
        "#2ca02c": [(-21, -20, 1)],
    }
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "train: 3 songs, median -20.3 dBFS",
        "test: 1 song, median -20.2 dBFS",
        "valid: 0 songs",
    ]
    assert texts_overlap(figure) == []


@pytest.mark.parametrize("loudness", [[-math.inf], [-99.0, 20.0], [-20.0]])
def test_any_levels_are_in_the_picture(loudness):
    figure = levels_figure({"train": loudness})
    (axis,) = figure.axes
    counted = sum(count for part in bars(axis).values() for *_, count in part)
    assert counted == sum(map(math.isfinite, loudness))
    assert texts_overlap(figure) == []


# --- activity ----------------------------------------------------------------


def test_activity_is_over_the_song_of_the_sum_of_a_track_s_files():
    songs = {
        "train": [stems("a", {"bass": 2, "drums": 1}, seconds=0.4)],
        "valid": [stems("b", {"bass": 1}, seconds=0.4)],
        "test": [mixture("c", 0.4)],
    }
    levels = {
        "/a/bass0.wav": levels_of(-20, -100, -100, -100),
        "/a/bass1.wav": levels_of(-100, -59, -61),
        "/a/drums0.wav": levels_of(-30),  # silent to the end of the song
        "/b/bass0.wav": levels_of(-30, -30, -30, -30),
        "/c.wav": levels_of(-30, -30, -30, -30),
    }
    activity = stem_activity(songs, levels)
    assert activity == {"bass": [0.5, 1.0], "drums": [0.25]}
    assert list(activity) == ["bass", "drums"]
    del levels["/a/bass1.wav"]
    assert stem_activity(songs, levels) == {"bass": [1.0], "drums": [0.25]}


def test_activity_rows():
    activity = {"drums": [0, 0.25, 0.5, 0.75, 1], "voice": [0.5]}
    figure = activity_figure(activity)
    (axis,) = figure.axes
    assert boxes(axis) == [(25, 75), (50, 50)]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["drums (5 songs)", "voice (1 song)"]
    whiskers, medians = axis.collections
    ends = [line[:, 0].tolist() for line in whiskers.get_segments()]
    assert ends == [[0, 100], [50, 50]]
    assert [line[0, 0] for line in medians.get_segments()] == [50, 50]
    # the first name on top
    assert axis.get_ylim() == (1.5, -0.5)


def test_the_most_frequent_names_are_drawn_and_the_rest_is_counted():
    songs = [
        stems(f"song{i}", {f"stem{j:02d}": 1 for j in range(i, 30)})
        for i in range(30)
    ]
    levels = {path: levels_of(-20) for song in songs for path in song.files}
    activity = stem_activity({"train": songs}, levels)
    assert len(activity) == 30
    figure = activity_figure(activity)
    labels = [x.get_text() for x in figure.axes[0].get_yticklabels()]
    assert labels[0] == "stem29 (30 songs)" and len(labels) == 20
    title = figure.axes[0].get_title()
    assert title.endswith("(the 20 most frequent of 30)")
    assert texts_overlap(figure) == []


NAMES = {
    "Гітара": "Гітара",
    "søng ü": "søng ü",
    "琵琶": "▯▯",
    "🥁 drums": "▯ drums",
    "s\udcf6ng": "s▯ng",
    "two\nlines\t": "two▯lines▯",
    "$x$ and $\\frac$": "$x$ and $\\frac$",
    "_hidden": "_hidden",
    "%s {} \\": "%s {} \\",
    "n" * 200: "n" * 23 + "…",
}


def test_any_name_is_drawn(tmp_path):
    activity = {name: [0.5] for name in NAMES}
    figure = activity_figure(activity)
    labels = [x.get_text() for x in figure.axes[0].get_yticklabels()]
    assert labels == [f"{name} (1 song)" for name in NAMES.values()]
    figure.savefig(tmp_path / "names.png")
    assert texts_overlap(figure) == []


# --- all of them -------------------------------------------------------------


@pytest.mark.parametrize(
    ("songs", "levels", "names"),
    [
        ({}, {}, ["durations"]),
        ({"train": []}, {}, ["durations"]),
        ({"train": [mixture("a", 200.0)]}, {}, ["durations"]),
        (
            {"train": [mixture("a", 0.1)], "valid": [], "test": []},
            {"/a.wav": levels_of(-100)},
            ["durations", "levels"],
        ),
        (
            {"train": [stems("a", {"bass": 1})]},
            {"/a/bass0.wav": levels_of()},
            ["durations", "levels", "activity"],
        ),
        (
            {"everything": [stems("a", {"bass": 1, "пісня": 2})]},
            {"/a/bass0.wav": levels_of(-20), "/b.wav": levels_of(-20)},
            ["durations", "activity"],
        ),
    ],
)
def test_what_is_there_is_drawn(tmp_path, songs, levels, names):
    folder = tmp_path / "new" / "figures"
    paths = catalogue_figures(songs, levels, folder)
    assert paths == [folder / f"{name}.png" for name in names]
    assert sorted(folder.iterdir()) == sorted(paths)
    for path in paths:
        image = matplotlib.image.imread(path)
        assert image.shape[1] == 880
        assert image.std() > 0.01


def test_killed_run_leaves_the_last_picture(tmp_path, monkeypatch):
    songs = {"train": [mixture("a", 200.0)]}
    (path,) = catalogue_figures(songs, {}, tmp_path)
    before = path.read_bytes()

    def killed(self, file, **options):
        Path(file).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        catalogue_figures(songs, {}, tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_ten_thousand_songs(tmp_path):
    curve = levels_of(*np.random.default_rng(0).integers(-70, -10, 2400))
    tracks = {"bass": 1, "drums": 2, "voice": 1}
    songs = [stems(f"{i}", tracks, 240.0) for i in range(10000)]
    levels = {path: curve for song in songs for path in song.files}
    begin = time.process_time()
    paths = catalogue_figures({"train": songs}, levels, tmp_path)
    assert len(paths) == 3
    assert time.process_time() - begin < 30  # 4 s measured


@pytest.mark.skipif(
    not REAL_MUSIC.is_dir(), reason=f"no real music at {REAL_MUSIC}"
)
def test_real_music(tmp_path):
    songs, levels = [], {}
    for name in ("Resonate_breakbeat", "kyzfrintin_orange"):
        tracks = {
            path.stem: (str(path),)
            for path in sorted((REAL_MUSIC / "stems" / name).glob("*.ogg"))
        }
        song = Song(name, tracks, True)
        found = {path: measure_levels(path) for path in song.files}
        seconds = max(len(x.codes) for x in found.values()) / 10
        songs.append(song._replace(seconds=seconds))
        levels |= found
    paths = catalogue_figures({"test": songs}, levels, tmp_path)
    assert len(paths) == 3
    activity = stem_activity({"test": songs}, levels)
    assert {"drums", "melody", "pad", "spookpad"} <= activity.keys()
    assert all(0.1 < shares[0] <= 1 for shares in activity.values())
