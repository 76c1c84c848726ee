"""trackformer export and trackformer info."""

import argparse
import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi
from separators import trained
from speechbrain.utils.checkpoints import Checkpointer

from trackformer_sb.cli import main
from trackformer_sb.inference.measure import card_tables
from trackformer_sb.inference.separator import Separator

SCORES = {1: 2.0, 2: 5.0, 3: 3.0}
METRICS = {"si_snr": -1.234, "si_snri": 4.567, "sdr": None}
NOISE = ("--device", "cpu", "--seconds", "0.25")


def command(*args):
    return main([str(arg) for arg in args])


def make_run(folder):
    """The folder of a training, and its modules as of each epoch."""
    _, modules = trained(folder)
    recoverables = {
        name: module for name, module in modules.items() if module.state_dict()
    }
    checkpointer = Checkpointer(folder / "save", recoverables)
    states = {}
    for epoch, score in SCORES.items():
        with torch.no_grad():
            for parameter in modules["masknet"].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        meta = {"epoch": epoch, "score": score}
        checkpointer.save_checkpoint(meta, name=f"epoch{epoch}")
        states[epoch] = {
            key: value.clone()
            for key, value in modules["masknet"].state_dict().items()
        }
    # in the middle of an epoch, and the newest of all
    checkpointer.save_checkpoint(name="intra", end_of_epoch=False)
    results = {**METRICS, "test_loss": -5.0, "epochs": max(SCORES)}
    (folder / "metrics.json").write_text(json.dumps(results))
    columns = ",".join(["id", *METRICS])
    (folder / "test_results.csv").write_text(f"{columns}\na,1,2,3\n")
    return states


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "1234"
    return folder, make_run(folder)


@pytest.fixture
def run(finished, tmp_path):
    """A copy to change, and what was trained."""
    folder, states = finished
    return shutil.copytree(folder, tmp_path / "run"), states


def check_state(folder, expected):
    state = Separator.from_pretrained(folder).masknet.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    return card_tables((folder / "README.md").read_text())


# --- export ------------------------------------------------------------------


def test_export_of_the_best(run, capsys):
    folder, states = run
    assert command("export", folder, folder / "separator") == 0
    card = check_state(folder / "separator", states[2])
    assert card["Training"] == {
        "dataset": "stems",
        "seed": "1234",
        "selection_metric": "si_snri",
        "segments": "3.0 s",
        "epoch": "2",
        "validation score": "5.00",
    }
    # no metric that was not measured, and nothing that is none
    measured = {"si_snr": "-1.23", "si_snri": "4.57"}
    assert card["Measured on the test songs"] == measured
    # the folder of a run stands for its separator
    capsys.readouterr()
    assert command("info", folder, *NOISE, "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["card"] == card
    assert (about["num_spks"], about["sample_rate"]) == (3, 8000)
    assert about["real_time_factor"] > 0
    # python and torch alone take more than that
    assert 50 < about["peak_memory_mb"] < 100000


def test_export_of_another_checkpoint(run, tmp_path, capsys):
    folder, states = run
    for name in ("CKPT+epoch3", folder / "save" / "CKPT+epoch3"):
        out = tmp_path / "separator"
        assert command("export", folder, out, "--checkpoint", name) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(out)
        card = check_state(out, states[3])
        assert card["Training"]["epoch"] == "3"
        # which is not what was tested
        assert list(card) == ["Training"]
    command("export", folder, out, "--checkpoint", "CKPT+intra")
    assert check_state(out, states[3])["Training"]["epoch"] == "unfinished"


def damage(folder):
    path = folder / "save" / "CKPT+epoch2" / "masknet.ckpt"
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    "change, options, message",
    [
        (damage, (), "PytorchStreamReader failed"),
        (lambda f: shutil.rmtree(f / "save"), (), "no checkpoint of a finish"),
        (
            lambda f: (f / "hyperparams.yaml").unlink(),
            (),
            "No such file or directory",
        ),
        (None, ("--checkpoint", "CKPT+x"), "CKPT+x: no checkpoint"),
    ],
)
def test_export_that_fails(run, tmp_path, capsys, change, options, message):
    folder, _ = run
    if change:
        change(folder)
    assert command("export", folder, tmp_path / "separator", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trackformer export: ")
    assert message in line
    assert not (tmp_path / "separator").exists()


def test_push(run, tmp_path, monkeypatch, capsys):
    pushed = {}

    def create(api, repo_id, private, exist_ok):
        pushed["private"] = private
        return argparse.Namespace(repo_id=repo_id)

    def upload(api, repo_id, folder_path, **_):
        files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        pushed[repo_id] = files
        return "the commit"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    out = tmp_path / "separator"
    options = ("--push", "me/mine", "--private")
    assert command("export", run[0], out, *options) == 0
    assert capsys.readouterr().out.splitlines() == [str(out), "the commit"]
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert pushed == {"private": True, "me/mine": files}


# --- info --------------------------------------------------------------------


def test_info_of_the_model_in_the_package(capsys):
    assert command("info", *NOISE) == 0
    assert "drums, bass, vocals, other" in capsys.readouterr().out
