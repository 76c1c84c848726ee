"""Memory of long files."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile

RATE = 44100

# A separator that costs nothing, of eight outputs; prints its peak memory after
# each file.
CHEAP = """
import resource, sys, torch
from trackformer_sb.inference.separator import Separator

class Shares(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, mix_w):
        return torch.ones(8, *mix_w.shape) / 8

class Frame(torch.nn.Module):
    def forward(self, sig):
        return sig.unsqueeze(1)

class Unframe(torch.nn.Module):
    def forward(self, sep_w):
        return sep_w.squeeze(1)

torch.set_num_threads(1)
separator = Separator(Frame(), Shares(), Unframe(), 44100, 8)
for path in sys.argv[2:]:
    separator.separate_file(
        path, sys.argv[1], chunk_seconds=2.0, progressbar=False,
        batch_size=2, remix="0:-6", figure=True, outputs="0,rest=1+2",
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
