"""Settings of the whole test suite."""

import os
import signal
import tempfile

import hypothesis
import pytest

from trackformer_sb.cli import exit_unless_pair_fits

exit_unless_pair_fits()

import torch
from speechbrain.utils.importutils import LazyModule

# hypothesis asks every loaded module for its file, which SpeechBrain's lazy
# modules answer by an import that fails
LazyModule.__file__ = None

# no deadline: the machine may be busy; the same examples in every run
hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where the networks run: cpu, cuda"
    )


def pytest_configure():
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # as in a background job, and processes started here would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # what is read of audio files is kept in the user's cache
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    # the tensors are small: more threads gain nothing, and on a busy machine
    # they wait for each other (2 threads: 20 times as long)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device(request):
    """Where tensors and modules of a test live."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def matmul_precision():
    """The precision of matrix products, which recipes set, whatever ran."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
