"""Figures show what was measured, and never fail for lack of it."""

import matplotlib.image
import numpy as np
import pytest
import torch

from trackformer_sb import plots
from trackformer_sb.training.checkpoints import TrainingHistory

RATE = 8000
# matplotlib's too: about letters, layouts or empty axes
pytestmark = pytest.mark.filterwarnings("error")


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


def test_a_tone_lies_in_its_band(rate=44100, hertz=3000):
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


@pytest.mark.parametrize("frames", [1, 24001])
def test_spectrogram_does_not_depend_on_the_blocks(frames):
    sig = np.random.default_rng(0).normal(0, 0.1, (frames, 2))
    power, mean_square = plots.spectrogram([sig], frames, RATE)
    assert mean_square == pytest.approx((sig**2).mean())
    for size in (99, 4096):
        blocks = (sig[i : i + size] for i in range(0, frames, size))
        again, _ = plots.spectrogram(blocks, frames, RATE)
        assert np.allclose(again, power)


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


@pytest.mark.parametrize("num_stems", [4, 0])
def test_panels_of_an_item(num_stems, tmp_path):
    figure = plots.item_figure(**item(3, num_stems))
    assert sorted(titles(figure)) == [
        *(f"mask {i}" for i in range(3)),
        "mixture",
        *(
            f"output {i}: {-6.02 - 20 * i:.1f} dB of the mixture"
            for i in range(3)
        ),
        *(f"stem $x$ {i}: 0.0 dB of the mixture" for i in range(num_stems)),
    ]
    plots.save_figure(figure, tmp_path / "new" / "item.png")
    picture = matplotlib.image.imread(tmp_path / "new" / "item.png")
    assert picture[..., :3].std() > 0.1


def test_silence_is_drawn():
    what = item()
    what["mix"] = torch.zeros(4000)
    what["est_source"] = torch.zeros(3, 4000)
    figure = plots.item_figure(**what)
    assert titles(figure).count("output 0: silent") == 1
    for axis in panels(figure):
        assert np.isfinite(axis.images[0].get_array()).all()


def test_panels_of_a_separation_have_one_scale():
    power = np.ones((plots.ROWS, 4))
    column = {
        "mixture": (power, 0.2),
        "s\udcf6n": (power / 10, 0.02),
    }
    figure = plots.separation_figure([column], 150.0, 44100)
    assert titles(figure) == ["mixture", "s?n: -10.0 dB of the mixture"]
    first, last = panels(figure)
    ticks = [label.get_text() for label in first.get_yticklabels()]
    assert ticks == ["100", "1k", "10k"]
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


# --- curves ------------------------------------------------------------------


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
