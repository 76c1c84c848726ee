"""Checkpoints outlive a kill, a full disk and a change of the model."""

import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from speechbrain.utils.checkpoints import (
    Checkpointer,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)

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
from speechbrain.utils.checkpoints import Checkpointer
from trackformer_sb.training.checkpoints import AtomicCheckpointer

kind, folder, what = sys.argv[1:]
net = torch.nn.Linear({WIDTH}, {WIDTH})
checkpointer = globals()[kind](folder, {{"net": net}})
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
if what == "full, then not":
    checkpointer.save_checkpoint({{"score": 3.0}}, name="later")
"""


def child(kind, folder, what):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, kind.__name__, str(folder), what],
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_in_a_save(kind, folder):
    with child(kind, folder, "kill") as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL


def network(weight=0.0):
    net = torch.nn.Linear(WIDTH, WIDTH)
    torch.nn.init.constant_(net.weight, weight)
    return net


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- a kill ------------------------------------------------------------------


def test_kill_in_a_save_leaves_the_last_whole_checkpoint(tmp_path):
    kill_in_a_save(AtomicCheckpointer, tmp_path)
    assert names(tmp_path) == ["CKPT+whole", "unfinished-CKPT+torn"]
    net = network()
    checkpointer = AtomicCheckpointer(tmp_path, {"net": net})
    for max_key in (None, "score"):
        found = checkpointer.recover_if_possible(max_key=max_key)
        assert found.path.name == "CKPT+whole" and found.meta["score"] == 1.0
        assert torch.equal(net.weight, torch.ones(WIDTH, WIDTH))
    # the next save removes what the killed one left
    checkpointer.save_checkpoint(name="next")
    assert names(tmp_path) == ["CKPT+next", "CKPT+whole"]


def test_why_the_stock_class_is_not_enough(tmp_path):
    kill_in_a_save(Checkpointer, tmp_path)
    checkpointer = Checkpointer(tmp_path, {"net": network()})
    # it takes the torso for the newest checkpoint, and for the best
    for max_key in (None, "score"):
        found = checkpointer.find_checkpoint(max_key=max_key)
        assert found.path.name == "CKPT+torn"
        with pytest.raises(RuntimeError, match="zip archive"):
            checkpointer.recover_if_possible(max_key=max_key)


# --- a full disk -------------------------------------------------------------


def test_full_disk_is_named_and_earlier_checkpoints_are_whole(tmp_path):
    with child(AtomicCheckpointer, tmp_path, "full") as process:
        message = process.stdout.read()
    assert process.returncode == 0
    pattern = (
        f"^OSError: could not write a checkpoint in {re.escape(str(tmp_path))}"
        r", (\d+) MB are free there: .*Earlier checkpoints are whole"
    )
    found = re.search(pattern, message, re.S)
    assert found, message
    free = shutil.disk_usage(tmp_path).free / 1e6
    assert int(found[1]) == pytest.approx(free, rel=0.5)
    assert names(tmp_path) == ["CKPT+whole"]
    net = network()
    AtomicCheckpointer(tmp_path, {"net": net}).recover_if_possible()
    assert torch.equal(net.weight, torch.ones(WIDTH, WIDTH))


def test_saving_goes_on_when_there_is_room_again(tmp_path):
    with child(AtomicCheckpointer, tmp_path, "full, then not") as process:
        assert "OSError" in process.stdout.read()
    assert process.returncode == 0
    assert names(tmp_path) == ["CKPT+later", "CKPT+whole"]
    net = network()
    checkpointer = AtomicCheckpointer(tmp_path, {"net": net})
    found = checkpointer.recover_if_possible()
    assert found.meta["score"] == 3.0
    assert torch.equal(net.weight, torch.full((WIDTH, WIDTH), 2.0))


# --- another model -----------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    (
        {"net": torch.nn.Linear(3, 2)},
        {"net": torch.nn.Sequential(torch.nn.Linear(2, 2))},
        {"net": torch.nn.Linear(2, 2), "more": torch.nn.Linear(2, 2)},
        {
            "net": torch.nn.Linear(2, 2),
            "optimizer": torch.optim.SGD([torch.zeros(1), torch.zeros(1)]),
        },
    ),
)
def test_checkpoint_of_another_architecture_is_named(other, tmp_path):
    net = torch.nn.Linear(2, 2)
    recoverables = {"net": net}
    if "optimizer" in other:
        recoverables["optimizer"] = torch.optim.SGD([net.weight])
    saver = AtomicCheckpointer(tmp_path, recoverables)
    saver.save_checkpoint(name="first")
    checkpointer = AtomicCheckpointer(tmp_path, other)
    message = r"CKPT\+first does not fit.* other sizes .*output_folder"
    with pytest.raises(ValueError, match=message):
        checkpointer.recover_if_possible()


def test_damaged_checkpoint_is_named_before_anything_is_written(tmp_path):
    checkpointer = AtomicCheckpointer(tmp_path, {"net": network()})
    checkpointer.save_checkpoint(name="first")
    path = tmp_path / "CKPT+first" / "net.ckpt"
    path.write_bytes(path.read_bytes()[:100])
    message = r"CKPT\+first is damaged, remove it to go on from the one before"
    for load in (checkpointer.check_fits, checkpointer.recover_if_possible):
        with pytest.raises(ValueError, match=message):
            load()


# --- what the stock class can do ---------------------------------------------


def test_best_and_newest_are_kept(tmp_path):
    net = network()
    checkpointer = AtomicCheckpointer(tmp_path, {"net": net})
    left = []
    for score in (1.0, 3.0, 2.0, 0.5):
        torch.nn.init.constant_(net.weight, score)
        checkpointer.save_and_keep_only({"score": score}, max_keys=["score"])
        checkpoints = checkpointer.list_checkpoints()
        left.append(sorted(one.meta["score"] for one in checkpoints))
    assert left == [[1.0], [3.0], [2.0, 3.0], [0.5, 3.0]]
    assert all(name.startswith("CKPT+") for name in names(tmp_path))
    for max_key, weight in ((None, 0.5), ("score", 3.0)):
        checkpointer.recover_if_possible(max_key=max_key)
        assert net.weight[0, 0] == weight


def test_saves_within_a_second_have_different_names(tmp_path):
    checkpointer = AtomicCheckpointer(tmp_path, {"net": network()})
    saved = [checkpointer.save_checkpoint() for _ in range(3)]
    assert len({checkpoint.path for checkpoint in saved}) == 3
    assert len(checkpointer.list_checkpoints()) == 3


def test_a_save_tells_where_the_checkpoint_is(tmp_path):
    checkpointer = AtomicCheckpointer(tmp_path, {"net": network(5.0)})
    saved = checkpointer.save_checkpoint({"score": 1.0}, name="a")
    assert saved.path == tmp_path / "CKPT+a"
    assert saved == checkpointer.find_checkpoint()
    state = torch.load(saved.paramfiles["net"], weights_only=True)
    assert state["weight"][0, 0] == 5.0


def test_save_under_the_same_name_replaces(tmp_path):
    net = network(1.0)
    checkpointer = AtomicCheckpointer(tmp_path, {"net": net})
    checkpointer.save_checkpoint(name="a")
    torch.nn.init.constant_(net.weight, 2.0)
    checkpointer.save_checkpoint(name="a")
    assert names(tmp_path) == ["CKPT+a"]
    torch.nn.init.constant_(net.weight, 3.0)
    checkpointer.recover_if_possible()
    assert net.weight[0, 0] == 2.0


@register_checkpoint_hooks
class Place:
    """Remembers whether it was loaded from the end of an epoch."""

    end_of_epoch = None

    @mark_as_saver
    def save(self, path):
        """Nothing to keep."""
        path.touch()

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """Takes note."""
        self.end_of_epoch = end_of_epoch


@pytest.mark.parametrize("end_of_epoch", (True, False))
def test_intra_epoch_flag_reaches_the_loaders(end_of_epoch, tmp_path):
    place = Place()
    checkpointer = AtomicCheckpointer(tmp_path, {"place": place})
    checkpointer.save_checkpoint(end_of_epoch=end_of_epoch)
    found = checkpointer.recover_if_possible()
    assert found.meta["end-of-epoch"] is end_of_epoch
    assert place.end_of_epoch is end_of_epoch


def test_nothing_to_recover(tmp_path):
    checkpointer = AtomicCheckpointer(tmp_path / "new", {"net": network(4.0)})
    assert checkpointer.recover_if_possible() is None
    assert checkpointer.find_checkpoint(max_key="score") is None


# --- history -----------------------------------------------------------------


def test_history_comes_back_with_a_checkpoint(tmp_path):
    history = TrainingHistory()
    history.add(
        1, loss=np.float32(-0.5), seconds=np.int64(3), score=torch.tensor(2.0)
    )
    history.add(2, loss=np.float64(0.1), seconds=4, score=None)
    assert history.epochs[1] == {"epoch": 2, "loss": 0.1, "seconds": 4.0}
    AtomicCheckpointer(tmp_path, {"history": history}).save_checkpoint()
    loaded = TrainingHistory()
    loaded.add(9, loss=9.0)
    AtomicCheckpointer(tmp_path, {"history": loaded}).recover_if_possible()
    assert loaded.epochs == history.epochs
    assert loaded.series("loss") == ([1, 2], [-0.5, 0.1])
    assert loaded.series("score") == ([1], [2.0])
    assert loaded.series("never measured") == ([], [])
    assert loaded.total("seconds") == 7.0
    assert loaded.total("never measured") == 0


def test_histories_do_not_share_their_epochs():
    TrainingHistory().add(1, loss=1.0)
    assert TrainingHistory().epochs == []
