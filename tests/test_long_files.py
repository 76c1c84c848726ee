"""Memory of long files, and the picture of a separation."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile

from trackformer_sb.inference.figures import (
    ROWS,
    frequency_bands,
    pooled_spectrogram,
    save_figure,
    separation_figure,
)

RATE = 44100

# A separator that costs nothing, of eight outputs; prints its peak memory after
# each file.
CHEAP = """
import resource, sys, torch
from trackformer_sb.inference.interfaces import PerformerSeparation

class Shares(torch.nn.Module):
    def forward(self, mix_w):
        return torch.ones(8, *mix_w.shape) / 8

class Frame(torch.nn.Module):
    def forward(self, sig):
        return sig.unsqueeze(1)

class Unframe(torch.nn.Module):
    def forward(self, sep_w):
        return sep_w.squeeze(1)

torch.set_num_threads(1)
separator = PerformerSeparation(
    {"encoder": Frame(), "masknet": Shares(), "decoder": Unframe()},
    {"sample_rate": 44100, "num_spks": 8},
    run_opts={"device": "cpu"},
)
for path in sys.argv[2:]:
    separator.separate_file(
        path, sys.argv[1], 2.0, progressbar=False, batch_size=2,
        remix="0:-6", figure=True, outputs="0,rest=1+2",
    )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_short_file(tmp_path):
    """All outputs of the longer one take 110 MB."""
    paths = [tmp_path / f"{seconds}.wav" for seconds in (5, 40)]
    rng = np.random.default_rng(0)
    for path, seconds in zip(paths, (5, 40)):
        soundfile.write(path, rng.normal(0, 0.1, (RATE * seconds, 2)), RATE)
    done = subprocess.run(
        [sys.executable, "-c", CHEAP, tmp_path, *paths],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    short, long = map(int, done.stdout.split())
    assert long < 1.1 * short
    for path in paths:
        rest, _ = soundfile.read(tmp_path / f"{path.stem}_rest.wav")
        assert np.allclose(rest, soundfile.read(path)[0] / 4, atol=1e-6)


def sine(hertz, rate, frames):
    return np.sin(2 * np.pi * hertz / rate * np.arange(frames))


def in_blocks(sig, size):
    return (sig[i : i + size] for i in range(0, len(sig), size))


@pytest.mark.parametrize("rate", [8000, 44100, 96000])
def test_bands_hold_every_bin_once(rate):
    bands, edges = frequency_bands(rate, 2048)
    assert bands.shape == (ROWS, 1025)
    assert np.allclose(bands.sum(1), 1)
    assert edges[-1] == rate / 2
    frequencies = np.fft.rfftfreq(2048, 1 / rate)
    # above, bands are wider than bins and take each of them
    high = frequencies > 2000
    assert ((bands[:, high] > 0).sum(0) == 1).all()


@pytest.mark.parametrize("hertz", [100, 1000, 3000])
@pytest.mark.parametrize("size", [700, 16384])
def test_spectrogram_shows_a_tone_where_and_when_it_is(hertz, size):
    rate, frames = 8000, 24000
    sig = np.stack([sine(hertz, rate, frames), 0 * np.arange(frames)], 1)
    sig[:12000] = 0
    power, square = pooled_spectrogram(in_blocks(sig, size), frames, rate, 30)
    _, edges = frequency_bands(rate, 256)
    row = power[:, 20].argmax()
    half_bin = rate / 256 / 2
    assert edges[row] - half_bin <= hertz <= edges[row + 1] + half_bin
    assert power[:, :14].max() < 1e-12
    # amplitude 1 in one of two channels
    assert np.allclose(square[15:], 0.25, atol=1e-3)
    assert np.allclose(square[:15], 0)


@pytest.mark.parametrize("frames", [1, 2, 255, 256, 257, 24001])
def test_spectrogram_does_not_depend_on_the_blocks(frames):
    sig = np.random.default_rng(0).normal(0, 0.1, (frames, 2))
    power, square = pooled_spectrogram([sig], frames, 8000)
    for size in (1 if frames < 300 else 999, 4096):
        blocks = in_blocks(sig, size)
        again, again_square = pooled_spectrogram(blocks, frames, 8000)
        assert np.allclose(again, power)
        # the window begins with a zero
        assert power.max() > 0 or frames == 1
        assert np.allclose(again_square, square)
    # columns differ by one sample at most
    assert np.isclose(square.mean(), (sig**2).mean(), rtol=0.05)


@pytest.mark.parametrize("rate", [1000, 8000, 44100])
@pytest.mark.parametrize("names", [[], ["source0"], ["a", "b", "c"]])
def test_figure(tmp_path, rate, names):
    sig = np.random.default_rng(0).normal(0, 0.1, (rate, 1))
    outputs = {name: lambda: [sig / 2] for name in names}
    path = tmp_path / "figure.png"
    # neither a formula nor letters that the font lacks
    title = "$song$ \u97f3\u697d"
    save_figure(path, lambda: [sig], outputs, rate, rate, title)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_labels_of_the_figure():
    power, square = np.ones((ROWS, 4)), np.full(4, 0.25)
    figure = separation_figure(
        {"mixture": power, "drums": power / 10, "rest": 0 * power},
        {"mixture": square, "drums": square / 10, "rest": 0 * square},
        seconds=150.0,
        sample_rate=44100,
        title="song",
    )
    axes = figure.axes[:4]
    assert [axis.get_title(loc="left") for axis in axes] == [
        "mixture",
        "drums: -10.0 dB of the mixture",
        "rest: silent",
        "activity",
    ]
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels == ["100", "1k", "10k"]
    rows = [label.get_text() for label in axes[3].get_yticklabels()]
    assert rows == ["drums", "rest"]
    assert axes[3].get_xlabel() == "time in minutes"
    assert axes[3].xaxis.get_major_formatter()(150.0, 0) == "2:30"
