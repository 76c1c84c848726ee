"""Checkpoints outlive a kill, a full disk and a change of the model."""

import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from trackformer_sb.training.checkpoints import (
    AtomicCheckpointer,
    TrainingHistory,
)

WIDTH = 200  # 160 kB of weights

# Saves weights of 1 whole and weights of 2 in part.
CHILD = f"""
import os
import resource
import signal
import sys
import time

import torch
from trackformer_sb.training.checkpoints import AtomicCheckpointer

folder, what = sys.argv[1:]
net = torch.nn.Linear({WIDTH}, {WIDTH})
checkpointer = AtomicCheckpointer(folder, {{"net": net}})
torch.nn.init.constant_(net.weight, 1.0)
checkpointer.save_checkpoint({{"score": 1.0}}, name="whole")
torch.nn.init.constant_(net.weight, 2.0)
whole_save = torch.save


def half_save(state, path):
    whole_save(state, path)
    os.truncate(path, os.path.getsize(path) // 2)
    print("half", flush=True)
    time.sleep(600)


if what == "kill":
    torch.save = half_save
    checkpointer.save_checkpoint({{"score": 2.0}}, name="torn")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
try:
    checkpointer.save_checkpoint({{"score": 2.0}}, name="torn")
except OSError as error:
    print("OSError:", error)
# somebody makes room
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
checkpointer.save_checkpoint({{"score": 3.0}}, name="later")
"""


def child(folder, what):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), what],
        stdout=subprocess.PIPE,
        text=True,
    )


def network(weight=0.0):
    net = torch.nn.Linear(WIDTH, WIDTH)
    torch.nn.init.constant_(net.weight, weight)
    return net


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_kill_in_a_save_leaves_the_last_whole_checkpoint(tmp_path):
    with child(tmp_path, "kill") as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    net = network()
    checkpointer = AtomicCheckpointer(tmp_path, {"net": net})
    for max_key in (None, "score"):
        found = checkpointer.recover_if_possible(max_key=max_key)
        assert found.path.name == "CKPT+whole" and found.meta["score"] == 1.0
        assert torch.equal(net.weight, torch.ones(WIDTH, WIDTH))
    # the next save removes what the killed one left
    checkpointer.save_checkpoint(name="next")
    assert names(tmp_path) == ["CKPT+next", "CKPT+whole"]


def test_full_disk_is_named_and_saving_goes_on_with_room(tmp_path):
    with child(tmp_path, "full") as process:
        message = process.stdout.read()
    assert process.returncode == 0
    pattern = (
        f"^OSError: could not write a checkpoint in {re.escape(str(tmp_path))}"
        r", \d+ MB are free there: .*Earlier checkpoints are whole"
    )
    assert re.search(pattern, message, re.S), message
    assert names(tmp_path) == ["CKPT+later", "CKPT+whole"]
    net = network()
    checkpointer = AtomicCheckpointer(tmp_path, {"net": net})
    assert checkpointer.recover_if_possible().meta["score"] == 3.0
    assert torch.equal(net.weight, torch.full((WIDTH, WIDTH), 2.0))


def test_checkpoint_that_does_not_load_is_named(tmp_path):
    net = network()
    of_other_sizes = {"net": torch.nn.Linear(3, 2)}
    saved = {"net": net, "optimizer": torch.optim.SGD([net.weight])}
    of_another_optimizer = {"optimizer": torch.optim.SGD(net.parameters())}
    AtomicCheckpointer(tmp_path, saved).save_checkpoint(name="first")
    message = (
        r"CKPT\+first does not load: it is damaged, and to be removed .*"
        " other sizes or another optimizer, .* another output_folder"
    )
    for other in (of_other_sizes, of_another_optimizer):
        with pytest.raises(ValueError, match=message):
            AtomicCheckpointer(tmp_path, other).recover_if_possible()
    path = tmp_path / "CKPT+first" / "net.ckpt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=message):
        AtomicCheckpointer(tmp_path, saved).recover_if_possible()


def test_history_comes_back_with_a_checkpoint(tmp_path):
    history = TrainingHistory()
    history.add(1, loss=np.float32(-0.5), score=torch.tensor(2.0))
    history.add(2, loss=np.float64(0.1), seconds=4, score=None)
    assert history.epochs[1] == {"epoch": 2, "loss": 0.1, "seconds": 4.0}
    AtomicCheckpointer(tmp_path, {"history": history}).save_checkpoint()
    loaded = TrainingHistory()
    loaded.add(9, loss=9.0)
    AtomicCheckpointer(tmp_path, {"history": loaded}).recover_if_possible()
    assert loaded.epochs == history.epochs
    assert loaded.series("loss") == ([1, 2], [-0.5, 0.1])
    assert loaded.series("score") == ([1], [2.0])
