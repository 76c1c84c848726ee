"""Figures show what was measured, and never fail for lack of it."""

import warnings

import matplotlib.image
import numpy as np
import pytest
import torch

from trackformer_sb import plots
from trackformer_sb.training.checkpoints import TrainingHistory

RATE = 8000


@pytest.fixture(autouse=True)
def no_warnings():
    """Not from matplotlib either: about letters, layouts or empty axes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def panels(figure):
    """Axes that show something, without colour bars."""
    return [
        axis
        for axis in figure.axes
        if axis.axison and axis.get_label() != "<colorbar>"
    ]


def titles(figure):
    return [axis.get_title(loc="left") for axis in panels(figure)]


# --- spectrograms ------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 44100, 96000])
@pytest.mark.parametrize("hertz", [60, 440, 3000])
def test_a_tone_lies_in_its_band(rate, hertz):
    sig = np.sin(2 * np.pi * hertz * np.arange(rate) / rate)
    # opposite in two channels: nothing cancels
    power, mean_square = plots.spectrogram(
        [np.stack([sig, -sig], 1)], rate, rate
    )
    row = power.sum(1).argmax()
    low, high = plots.band_edges(rate)[[row, row + 1]]
    # a bin is 15 to 31 Hz wide
    assert low - 32 <= hertz <= high + 32
    assert mean_square == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("seconds", [1, 60])
def test_a_sound_lies_in_its_columns(seconds):
    frames = seconds * RATE
    sig = np.zeros((frames, 1))
    sig[frames // 2 : 3 * frames // 4] = 0.5
    power = plots.spectrogram([sig], frames, RATE)[0].sum(0)
    loud = np.flatnonzero(power > 0.01 * power.max()) / len(power)
    # but for half a window of 64 ms
    assert loud.min() == pytest.approx(0.5, abs=0.04)
    assert loud.max() == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("frames", [1, 255, 257, 24001])
def test_spectrogram_does_not_depend_on_the_blocks(frames):
    sig = np.random.default_rng(0).normal(0, 0.1, (frames, 2))
    power, mean_square = plots.spectrogram([sig], frames, RATE)
    assert mean_square == pytest.approx((sig**2).mean())
    for size in (99, 4096):
        blocks = (sig[i : i + size] for i in range(0, frames, size))
        again, _ = plots.spectrogram(blocks, frames, RATE)
        assert np.allclose(again, power)


def test_saved_spectrograms_are_comparable(tmp_path):
    power = np.array([[1e-8, 0.01], [1.0, 100.0]])
    plots.save_spectrogram(power, 100.0, tmp_path / "a.png")
    plots.save_spectrogram(power / 100, 100.0, tmp_path / "b.png")
    a, b = (matplotlib.image.imread(tmp_path / f"{x}.png") for x in "ab")
    # low frequencies below; 20 dB less is another colour
    assert a[0].sum() > a[1].sum()
    assert (a[0, 0] == b[0, 1]).all() and (a[0, 1] != b[0, 1]).any()


# --- separations -------------------------------------------------------------


def item(num_spks=3, num_stems=2, time=4000):
    """Noise; output i is 6 + 20 i dB below the mixture."""
    mix = torch.randn(time)
    gain = 0.5 * 10.0 ** -torch.arange(num_spks)
    return {
        "mix": mix,
        "est_source": (gain.unsqueeze(1) * mix).bfloat16(),
        "est_mask": torch.rand(num_spks, 65, 20, requires_grad=True),
        "stems": mix.repeat(num_stems, 1),
        "names": [f"$x$ {i}" for i in range(num_stems)],
        "sample_rate": RATE,
    }


@pytest.mark.parametrize(
    ("num_spks", "num_stems"), [(3, 2), (2, 4), (3, 0), (1, 0)]
)
def test_panels_of_an_item(num_spks, num_stems, tmp_path):
    figure = plots.item_figure(**item(num_spks, num_stems))
    stems, outputs = range(num_stems), range(num_spks)
    assert sorted(titles(figure)) == [
        *(f"mask {i}" for i in outputs),
        "mixture",
        *(
            f"output {i}: {-6.02 - 20 * i:.1f} dB of the mixture"
            for i in outputs
        ),
        *(f"stem $x$ {i}: 0.0 dB of the mixture" for i in stems),
    ]
    plots.save_figure(figure, tmp_path / "new" / "item.png")
    picture = matplotlib.image.imread(tmp_path / "new" / "item.png")
    assert picture[..., :3].std() > 0.1


def test_silence_is_drawn(tmp_path):
    what = item()
    what["mix"] = torch.zeros(4000)
    what["est_source"] = torch.zeros(3, 4000)
    figure = plots.item_figure(**what)
    assert titles(figure).count("output 0: silent") == 1
    for axis in panels(figure):
        assert np.isfinite(axis.images[0].get_array()).all()
    plots.save_figure(figure, tmp_path / "silence.png")


def test_figure_of_a_long_song():
    power = np.ones((plots.ROWS, 4))
    column = {"mixture": (power, 0.2), "音楽" + "n" * 50: (power / 10, 0.02)}
    figure = plots.separation_figure([column], 150.0, 44100)
    name = "▯▯" + "n" * 21 + "…"
    assert titles(figure) == ["mixture", f"{name}: -10.0 dB of the mixture"]
    first, last = panels(figure)
    ticks = [label.get_text() for label in first.get_yticklabels()]
    assert ticks == ["100", "1k", "10k"]
    assert last.get_xlabel() == "time in minutes"
    assert last.xaxis.get_major_formatter()(150.0, 0) == "2:30"
    # one scale for all
    assert {axis.images[0].get_clim() for axis in panels(figure)} == {(-70, 0)}
    assert last.images[0].get_array().max() == pytest.approx(-10)


def test_panels_of_a_reconstruction():
    target, prediction = torch.randn(2, 50, 65)
    # one row of masks for all channels, as AudioMAE expands it
    hidden = (torch.rand(50, 1) < 0.3).expand(-1, 65)
    figure = plots.reconstruction_figure(
        target, prediction.bfloat16().requires_grad_(), hidden, RATE, 32
    )
    assert [axis.get_ylabel() for axis in panels(figure)] == ["kHz"] * 4
    images = [axis.images[0] for axis in panels(figure)]
    assert images[0].get_extent() == [0, 50 * 32 / RATE, 0, RATE / 2000]
    given, seen, rebuilt, error = (image.get_array() for image in images)
    target, hidden = target.T.numpy(), hidden.T.numpy()
    prediction = prediction.bfloat16().float().T.numpy()
    assert np.array_equal(given, target)
    assert np.array_equal(np.ma.getmaskarray(seen), hidden)
    assert np.array_equal(rebuilt, np.where(hidden, prediction, target))
    assert np.allclose(error, np.where(hidden, abs(prediction - target), 0))


# --- curves and data ---------------------------------------------------------


def test_curves_show_each_epoch_that_was_measured():
    history = TrainingHistory()
    for epoch in (1, 2, 3):
        valid_loss = None if epoch == 2 else -2 * epoch
        history.add(epoch, train_loss=-epoch, valid_loss=valid_loss)
    loss, *others = plots.training_curves(history).axes
    lines = {line.get_label(): line.get_xydata() for line in loss.lines}
    assert lines["train_loss"].tolist() == [[1, -1], [2, -2], [3, -3]]
    assert lines["valid_loss"].tolist() == [[1, -2], [3, -6]]
    for axis in others:
        assert axis.texts[0].get_text() == "not measured"


@pytest.mark.parametrize(
    "values", [[3.0], [0.001, 1e5], [2.0, float("nan"), float("-inf"), 2.0]]
)
@pytest.mark.parametrize("log", [False, True])
def test_any_values_of_songs_are_counted(values, log, tmp_path):
    figure = plots.songs_figure({"train": values, "test": []}, "", "", log)
    (axis,) = figure.axes
    counted = sum(bar.get_height() for bar in axis.patches)
    assert counted == np.isfinite(values).sum()
    plots.save_figure(figure, tmp_path / "songs.png")


def test_activity_of_many_stems_of_any_name(tmp_path):
    names = ["Гітара", "two\nlines", "s\udcf6ng", "$x$ and $\\frac$", "_a"]
    activity = {
        **{name: [0.0, 0.25, 0.5, 0.75, 1.0] for name in names},
        **{f"stem{i}": [0.5] for i in range(25)},
    }
    figure = plots.activity_figure(activity)
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[:3] == [
        *("Гітара (5 songs)", "two▯lines (5 songs)", "s▯ng (5 songs)")
    ]
    assert len(labels) == 20
    assert axis.get_title().endswith("(the 20 most frequent of 30)")
    plots.save_figure(figure, tmp_path / "activity.png")
