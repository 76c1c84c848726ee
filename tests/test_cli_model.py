"""trackformer export and trackformer info."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from hub_server import serving, use_hub
from separators import OF_SPEECHBRAIN, PERFORMER, mixtures, trained
from speechbrain.utils.checkpoints import Checkpointer

from trackformer_sb.cli import main
from trackformer_sb.inference.measure import card_tables, describe_model
from trackformer_sb.inference.separator import Separator

SCORES = {1: 2.0, 2: 5.0, 3: 3.0}
METRICS = {"si_snr": -1.234, "si_snri": 4.567, "sdr": None}
NOISE = ("--device", "cpu", "--seconds", "0.25")


def command(*args):
    return main([str(arg) for arg in args])


def make_run(folder, text=PERFORMER, scores=SCORES):
    """The folder of a training, and its modules as of each epoch."""
    _, modules = trained(folder, text)
    recoverables = {
        name: module for name, module in modules.items() if module.state_dict()
    }
    checkpointer = Checkpointer(folder / "save", recoverables)
    states = {}
    for epoch, score in scores.items():
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
    results = {**METRICS, "test_loss": -5.0, "epochs": max(scores)}
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


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "separator"
    assert command("export", finished[0], out) == 0
    return out


def check_state(folder, expected):
    state = Separator.from_pretrained(folder).masknet.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    return card_tables((folder / "README.md").read_text())


# --- export ------------------------------------------------------------------


def test_export_of_the_best(finished, exported):
    card = check_state(exported, finished[1][2])
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


@pytest.mark.parametrize("epochs", [2, None])
def test_no_test_results_of_what_was_not_tested(run, tmp_path, epochs):
    folder, states = run
    results = json.loads((folder / "metrics.json").read_text())
    path = folder / "metrics.json"
    path.write_text(json.dumps({**results, "epochs": epochs}))
    if epochs is None:
        path.unlink()
    assert command("export", folder, tmp_path / "separator") == 0
    card = check_state(tmp_path / "separator", states[2])
    assert list(card) == ["Training"]


def test_export_of_other_parts(tmp_path):
    states = make_run(tmp_path / "run", OF_SPEECHBRAIN, {1: 0.5})
    assert command("export", tmp_path / "run", tmp_path / "separator") == 0
    check_state(tmp_path / "separator", states[1])


def test_export_runs_nothing_but_the_modules(run, tmp_path):
    folder, _ = run
    trace = tmp_path / "trace"
    with open(folder / "hyperparams.yaml", "a") as file:
        file.write(f'more: !apply:builtins.open ["{trace}", w]\n')
    assert command("export", folder, tmp_path / "separator") == 0
    assert not trace.exists()


def damage(folder):
    path = folder / "save" / "CKPT+epoch2" / "masknet.ckpt"
    path.write_bytes(path.read_bytes()[:2000])


def lose(folder):
    (folder / "save" / "CKPT+epoch2" / "masknet.ckpt").unlink()


def resize(folder):
    path = folder / "hyperparams.yaml"
    path.write_text(path.read_text().replace("d_model: 16", "d_model: 32"))


def cut_checkpoint(folder):
    (folder / "save" / "CKPT+epoch2" / "CKPT.yaml").write_text("{end")


@pytest.mark.parametrize(
    "change, options, message",
    [
        (damage, (), "PytorchStreamReader failed"),
        (lose, (), "epoch2: no weights of the masknet"),
        (resize, (), "masknet.ckpt: Error(s) in loading state_dict"),
        (cut_checkpoint, (), "save: a CKPT.yaml in it is damaged"),
        (lambda f: shutil.rmtree(f / "save"), (), "no checkpoint of a finish"),
        (lambda f: (f / "hyperparams.yaml").unlink(), (), "yaml not found"),
        (None, ("--checkpoint", "CKPT+x"), "CKPT+x: no checkpoint"),
    ],
)
def test_export_that_fails(run, tmp_path, capsys, change, options, message):
    folder, _ = run
    if change:
        change(folder)
    assert command("export", folder, tmp_path / "separator", *options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("trackformer export: ")
    assert message in line
    assert not (tmp_path / "separator").exists()


def test_push(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "separator"
    push = ("export", run[0], out, "--push")
    with serving() as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        hub.token = "hf_right"
        assert command(*push, "me/mine") == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("trackformer export: me/mine: not uploaded: 401")
        # the folder is there all the same
        separator = Separator.from_pretrained(out)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        assert command(*push, "me/mine") == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[-1].startswith(f"{hub.url}/me/mine/commit/")
        files = hub.repos["me/mine"]["main"]
        assert files == {path.name: path.read_bytes() for path in out.iterdir()}
        again = Separator.from_pretrained("me/mine")
        assert torch.equal(again(mixtures()), separator(mixtures()))
        assert command(*push, "a/b/c") == 1
        assert "a/b/c: not uploaded" in capsys.readouterr().err


# --- info --------------------------------------------------------------------


def test_info(exported, capsys):
    assert command("info", exported, *NOISE) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = dict(
        line.split(maxsplit=1)
        for line in printed.out.splitlines()
        if " " in line
    )
    masknet = Separator.from_pretrained(exported).masknet
    count = sum(p.numel() for p in masknet.parameters())
    assert lines["model"] == str(exported)
    assert lines["classes"] == "STFTEncoder, PerformerMaskNet, STFTDecoder"
    assert lines["outputs"] == "3"
    assert lines["rate"] == "8000 Hz"
    assert lines["parameters"].startswith(f"{count:,} (0.0 MB")
    assert lines["speed"].startswith("0.25 s in ")
    assert lines["memory"].endswith(" MB at most, the whole process")
    assert lines["epoch"] == "2"
    assert lines["si_snri"] == "4.57"


def test_info_as_json(exported, tmp_path, capsys):
    assert command("info", exported, *NOISE, "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["num_spks"], about["sample_rate"]) == (3, 8000)
    assert about["card"]["Training"]["segments"] == "3.0 s"
    assert about["real_time_factor"] > 0
    # python and torch alone take more than that
    assert 50 < about["peak_memory_mb"] < 100000
    folder = shutil.copytree(exported, tmp_path / "separator")
    (folder / "README.md").unlink()
    assert describe_model(folder, seconds=0.1)["card"] == {}


def test_info_of_the_model_in_the_package(capsys):
    assert command("info", *NOISE) == 0
    assert "drums, bass, vocals, other" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (("nosuch",), "nosuch not found: expected a folder"),
        (("{tmp}",), "config.json not found"),
        (("{model}", "--device", "cuda"), "torch finds no CUDA device"),
        (("{model}", "--device", "tpu9"), "tpu9"),
    ],
)
def test_info_that_fails(
    exported, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = [o.format(tmp=tmp_path, model=exported) for o in options]
    assert command("info", *options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("trackformer info: ")
    assert message in printed.err


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys, argparse, trackformer_sb.cli_model as cli; "
        "commands = argparse.ArgumentParser().add_subparsers(); "
        "cli.add_export(commands); cli.add_info(commands); "
        "print(sys.modules.keys() & {'torch', 'speechbrain', 'yaml'})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "set()", result.stderr
