"""Pictures show what was measured, and never fail for lack of it."""

import matplotlib.image
import numpy as np
import pytest
import torch

from trackformer_sb.training.checkpoints import TrainingHistory
from trackformer_sb.training.figures import (
    CURVES,
    PRETRAINING_CURVES,
    RANGE_DB,
    reconstruction_figure,
    save_figure,
    separation_figure,
    training_curves,
)

RATE = 8000


def panels(figure):
    """Axes of a figure without its colour bars."""
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]


def titles(figure):
    return [axis.get_title() for axis in panels(figure) if axis.get_title()]


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def separation(num_spks=3, num_stems=2, time=4000, scale=1.0):
    """Noise for a picture; output i is 20 i dB below the mixture."""
    mix = scale * torch.randn(time)
    gain = 10.0 ** -torch.arange(num_spks)
    return {
        "mix": mix,
        "est_source": gain.unsqueeze(1) * mix,
        "est_mask": torch.rand(num_spks, 65, 20),
        "stems": scale * torch.randn(num_stems, time),
        "names": [f"stem{i}" for i in range(num_stems)],
        "sample_rate": RATE,
    }


# --- curves ------------------------------------------------------------------


def test_curves_show_each_epoch_that_was_measured():
    history = TrainingHistory()
    for epoch in (1, 2, 3):
        history.add(
            epoch,
            train_loss=-epoch,
            valid_loss=None if epoch == 2 else -2 * epoch,
            valid_mask_overlap=0.5,
        )
    figure = training_curves(history)
    loss, separated, overlap, count = panels(figure)
    assert titles(figure) == [title for title, _, _ in CURVES]
    lines = {line.get_label(): line for line in loss.lines}
    assert list(lines["train_loss"].get_xdata()) == [1, 2, 3]
    assert list(lines["train_loss"].get_ydata()) == [-1, -2, -3]
    assert list(lines["valid_loss"].get_xdata()) == [1, 3]
    assert loss.get_legend() is not None
    assert len(overlap.lines) == 1 and overlap.get_legend() is None
    for axis in (separated, count):
        assert not axis.lines
        assert axis.texts[0].get_text() == "not measured"


def test_curves_without_epochs(tmp_path):
    figure = training_curves(TrainingHistory())
    assert texts(figure) == ["not measured"] * 4
    save_figure(figure, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_curves_of_a_pretraining():
    history = TrainingHistory()
    for epoch, share in ((1, 0.1), (2, 0.4)):
        history.add(
            epoch,
            train_loss=1 - share,
            valid_loss=1 - share / 2,
            valid_explained_variance=share,
            # of a separator's training, which this is not
            valid_si_snri=3.0,
        )
    figure = training_curves(history, PRETRAINING_CURVES)
    loss, explained = panels(figure)
    assert titles(figure) == [title for title, _, _ in PRETRAINING_CURVES]
    lines = {line.get_label(): line for line in loss.lines}
    assert list(lines) == ["train_loss", "valid_loss"]
    assert list(lines["valid_loss"].get_ydata()) == [0.95, 0.8]
    (line,) = explained.lines
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == [0.1, 0.4]
    assert texts(figure) == []


# --- separation --------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_spks", "num_stems"), ((3, 2), (2, 4), (3, 0), (1, 0))
)
def test_panels_of_a_separation(num_spks, num_stems):
    what = separation(num_spks, num_stems)
    figure = separation_figure(**what)
    stems = [f"stem: stem{i}" for i in range(num_stems)]
    outputs = [f"output {i} ({-20 * i} dB)" for i in range(num_spks)]
    masks = [f"mask {i}" for i in range(num_spks)]
    assert titles(figure) == ["mixture", *stems, *outputs, *masks]
    # what is left of the grid is empty and without a frame
    assert len(panels(figure)) == 3 * max(num_spks, num_stems + 1)
    for axis in panels(figure):
        assert axis.axison == bool(axis.images)


def test_pictures_share_one_scale():
    what = separation()
    figure = separation_figure(**what)
    images = [axis.images[0] for axis in panels(figure) if axis.images]
    assert len(images) == 3 + 3 + 3
    peak = images[0].get_array().max()
    for image in images[:6]:
        assert image.get_clim() == pytest.approx((peak - RANGE_DB, peak))
        assert image.get_extent()[:2] == [0, 4000 / RATE]
    for image, mask in zip(images[6:], what["est_mask"]):
        assert image.get_clim() == (0, 1)
        assert np.array_equal(image.get_array(), mask.numpy())


def test_louder_half_is_the_brighter_one():
    # the second half of the song alone: time runs to the right
    what = separation()
    what["mix"][:2000] = 0.0
    image = panels(separation_figure(**what))[0].images[0].get_array()
    frames = image.shape[1] // 2
    first, second = image[:, : frames - 2], image[:, frames + 2 :]
    assert first.max() < second.mean() - RANGE_DB


def test_silence_is_drawn(tmp_path):
    what = separation(scale=0.0)
    figure = separation_figure(**what)
    assert "output 0 (-120 dB)" in titles(figure)
    for axis in figure.axes:
        for image in axis.images:
            assert np.isfinite(image.get_array()).all()
    save_figure(figure, tmp_path / "silence.png")
    pixels = matplotlib.image.imread(tmp_path / "silence.png")
    assert np.isfinite(pixels).all() and pixels.std() > 0


def test_silent_output_beside_others():
    what = separation()
    what["est_source"][1] = 0.0
    images = [axis.images for axis in panels(separation_figure(**what))]
    assert all(np.isfinite(one[0].get_array()).all() for one in images if one)


def test_inputs_are_left_as_they_are():
    what = separation()
    what["est_mask"].requires_grad_()
    before = {
        name: value.detach().clone()
        for name, value in what.items()
        if torch.is_tensor(value)
    }
    separation_figure(**what)
    for name, value in before.items():
        assert torch.equal(what[name], value), name


def test_half_precision_is_drawn():
    what = separation()
    what["est_source"] = what["est_source"].bfloat16()
    assert "output 1 (-20 dB)" in titles(separation_figure(**what))


# --- reconstruction ----------------------------------------------------------


def reconstruction(frames=50, channels=65):
    """A spectrogram in the manner of a zscore, a share of it hidden."""
    return {
        "target": torch.randn(frames, channels),
        "prediction": torch.randn(frames, channels),
        "hidden": torch.rand(frames, channels) < 0.3,
        "sample_rate": RATE,
        "hop_length": 32,
    }


def shown(figure):
    """The pictures of a figure, [panels, channels, frames]."""
    images = [axis.images for axis in panels(figure)]
    assert [len(one) for one in images] == [1, 1, 1, 1]
    return [one[0].get_array() for one in images]


def test_panels_of_a_reconstruction():
    what = reconstruction()
    target, prediction, hidden = (
        what[name].T.numpy() for name in ("target", "prediction", "hidden")
    )
    given, seen, rebuilt, error = shown(reconstruction_figure(**what))
    assert np.array_equal(given, target)
    # what is hidden is left out of the second picture
    assert np.array_equal(np.ma.getmaskarray(seen), hidden)
    assert np.array_equal(seen[~hidden], target[~hidden])
    # and taken from the prediction in the third, which shows nothing else of it
    assert np.array_equal(rebuilt, np.where(hidden, prediction, target))
    assert np.allclose(error, np.where(hidden, abs(prediction - target), 0))


def test_reconstruction_is_in_seconds_and_kilohertz():
    figure = reconstruction_figure(**reconstruction())
    axes = panels(figure)
    assert len(titles(figure)) == 4
    for axis in axes:
        image = axis.images[0]
        assert image.get_extent() == [0, 50 * 32 / RATE, 0, RATE / 2000]
        assert image.origin == "lower"
        assert axis.get_ylabel() == "kHz"
    assert axes[-1].get_xlabel() == "s"
    # the first three have one scale, without the outermost values
    limits = {axis.images[0].get_clim() for axis in axes[:3]}
    assert len(limits) == 1
    low, high = limits.pop()
    assert -3.5 < low < -1.5 and 1.5 < high < 3.5


def test_silent_reconstruction_is_drawn(tmp_path):
    what = reconstruction()
    what["target"] = torch.zeros(50, 65)
    figure = reconstruction_figure(**what)
    save_figure(figure, tmp_path / "silence.png")
    pixels = matplotlib.image.imread(tmp_path / "silence.png")
    assert np.isfinite(pixels).all() and pixels.std() > 0


def test_reconstruction_of_more_values_than_torch_sorts():
    what = reconstruction(frames=2**18 + 1)
    assert what["target"].numel() > 2**24
    limits = panels(reconstruction_figure(**what))[0].images[0].get_clim()
    assert limits == pytest.approx((-2.326, 2.326), abs=0.02)


def test_reconstruction_of_a_training_is_drawn_and_left_as_it_is():
    what = reconstruction()
    what["prediction"].requires_grad_()
    what["prediction"] = what["prediction"].bfloat16()
    # one row of masks for all channels, as AudioMAE expands it
    what["hidden"] = what["hidden"][:, :1].expand(-1, 65)
    before = {
        name: value.detach().clone()
        for name, value in what.items()
        if torch.is_tensor(value)
    }
    _, _, rebuilt, _ = shown(reconstruction_figure(**what))
    for name, value in before.items():
        assert torch.equal(what[name], value), name
    hidden = before["hidden"].T.numpy()
    prediction = before["prediction"].float().T.numpy()
    assert np.array_equal(rebuilt[hidden], prediction[hidden])


# --- files -------------------------------------------------------------------


def test_saved_figure_is_a_png_of_its_size(tmp_path):
    path = tmp_path / "new" / "figures" / "curves.png"
    history = TrainingHistory()
    history.add(1, train_loss=1.0)
    save_figure(training_curves(history), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape == (715, 1100, 4)  # 10 x 6.5 inches of 110 dots
    assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()


def test_saved_figure_replaces_an_older_one(tmp_path):
    path = tmp_path / "item.png"
    path.write_text("old")
    save_figure(separation_figure(**separation(num_spks=2)), path)
    height, width, _ = matplotlib.image.imread(path).shape
    assert (height, width) == (825, round(110 * (2.4 * 3 + 1.2)))
