"""trackformer export and trackformer info."""

import argparse
import json
import shutil
import subprocess
import sys

import pytest
import torch
from hub_server import serving, use_hub
from speechbrain.utils.checkpoints import Checkpointer
from test_export import CONV_TASNET, TRAINING, loaded, mixtures, trained

from trackformer_sb.cli_model import add_export, add_info
from trackformer_sb.inference.card import card_tables
from trackformer_sb.inference.export import export_separator
from trackformer_sb.inference.loading import load_separator
from trackformer_sb.inference.measure import describe_model
from trackformer_sb.inference.pretrained import PerformerSeparator

SCORES = {1: 2.0, 2: 5.0, 3: 3.0}
METRICS = {"si_snr": -1.234, "si_snri": 4.567, "sdr": None}
MORE = "\ndataset: stems\nsegment_seconds: 3.0\nselection_metric: si_snri\n"


def command(*args):
    """Runs the command line; its exit code."""
    parser = argparse.ArgumentParser(prog="trackformer")
    commands = parser.add_subparsers(dest="command", required=True)
    add_export(commands)
    add_info(commands)
    args = parser.parse_args([str(arg) for arg in args])
    return args.run(args)


def make_run(folder, text=TRAINING, scores=SCORES):
    """The folder of a training, and its modules as of each epoch."""
    _, modules = trained(folder, text + MORE)
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


def check_state(folder, expected):
    state = loaded(folder).mods.masknet.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    return card_tables((folder / "README.md").read_text())


# --- export ------------------------------------------------------------------


def test_export_of_the_best(run, tmp_path, capsys):
    folder, states = run
    out = tmp_path / "separator"
    assert command("export", folder, out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    card = check_state(out, states[2])
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
    text = "".join(
        path.read_text()
        for path in out.iterdir()
        if path.suffix in (".md", ".json", ".yaml")
    )
    assert str(tmp_path) not in text


def test_export_equals_what_the_training_left(run, tmp_path):
    """The same files, byte for byte, but for the card."""
    folder, states = run
    _, modules = trained(tmp_path / "experiment", TRAINING)
    modules["masknet"].load_state_dict(states[2])
    left = export_separator(folder / "hyperparams.yaml", modules, folder / "s")
    assert command("export", folder, tmp_path / "again") == 0
    for path in left.iterdir():
        if path.suffix in (".yaml", ".json", ".safetensors"):
            again = (tmp_path / "again" / path.name).read_bytes()
            assert again == path.read_bytes()
    mix = mixtures()
    assert torch.equal(
        loaded(tmp_path / "again").separate_batch(mix),
        loaded(left).separate_batch(mix),
    )


@pytest.mark.parametrize("by_name", [True, False])
def test_export_of_another_checkpoint(run, tmp_path, by_name):
    folder, states = run
    name = "CKPT+epoch3"
    checkpoint = name if by_name else folder / "save" / name
    out = tmp_path / "separator"
    assert command("export", folder, out, "--checkpoint", checkpoint) == 0
    card = check_state(out, states[3])
    assert card["Training"]["epoch"] == "3"
    # which is not what was tested
    assert "Measured on the test songs" not in card


def test_export_of_an_unfinished_epoch(run, tmp_path):
    folder, states = run
    out = tmp_path / "separator"
    options = ("--checkpoint", "CKPT+intra")
    assert command("export", folder, out, *options) == 0
    assert check_state(out, states[3])["Training"]["epoch"] == "unfinished"
    for epoch in SCORES:
        shutil.rmtree(folder / "save" / f"CKPT+epoch{epoch}")
    assert command("export", folder, out, *options) == 0
    assert command("export", folder, out) == 2


def test_no_test_results_of_a_training_that_went_on(run, tmp_path):
    folder, states = run
    results = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**results, "epochs": 2}))
    assert command("export", folder, tmp_path / "separator") == 0
    card = check_state(tmp_path / "separator", states[2])
    assert list(card) == ["Training"]


def test_export_before_a_test(run, tmp_path):
    folder, states = run
    (folder / "metrics.json").unlink()
    assert command("export", folder, tmp_path / "separator") == 0
    assert list(check_state(tmp_path / "separator", states[2])) == ["Training"]


def test_export_of_other_parts(tmp_path):
    states = make_run(tmp_path / "run", CONV_TASNET, {1: 0.5})
    out = tmp_path / "separator"
    assert command("export", tmp_path / "run", out) == 0
    check_state(out, states[1])
    assert not (out / "config.json").exists()


def test_export_runs_nothing_but_the_modules(run, tmp_path):
    folder, _ = run
    trace = tmp_path / "trace"
    with open(folder / "hyperparams.yaml", "a") as file:
        file.write(f'more: !apply:builtins.open ["{trace}", w]\n')
    assert command("export", folder, tmp_path / "separator") == 0
    assert not trace.exists()


def damage(folder):
    (folder / "save" / "CKPT+epoch2" / "masknet.ckpt").write_bytes(b"PK")


def lose(folder):
    (folder / "save" / "CKPT+epoch2" / "masknet.ckpt").unlink()


def resize(folder):
    path = folder / "hyperparams.yaml"
    path.write_text(path.read_text().replace("d_model: 16", "d_model: 32"))


def rename_argument(folder):
    path = folder / "hyperparams.yaml"
    path.write_text(path.read_text().replace("d_model: 16", "d_modle: 16"))


def repeat_key(folder):
    path = folder / "hyperparams.yaml"
    path.write_text(path.read_text() + "\nnum_spks: 3\n")


def no_keys(folder):
    (folder / "hyperparams.yaml").write_text("")


def cut_checkpoint(folder):
    (folder / "save" / "CKPT+epoch2" / "CKPT.yaml").write_text("{end")


def end_checkpoint(folder):
    path = folder / "save" / "CKPT+epoch2" / "CKPT.yaml"
    path.write_text("end-of-epoch: true\nepoch: 2\nscore: -1.0\n")


def empty_checkpoint(folder):
    (folder / "save" / "CKPT+epoch2" / "CKPT.yaml").write_text("")


def no_metrics(folder):
    (folder / "metrics.json").write_text("[]")


@pytest.mark.parametrize(
    "change, options, message",
    [
        (damage, (), "masknet.ckpt: no readable file of weights"),
        (lose, (), "epoch2: no weights of the masknet"),
        (resize, (), "does not fit PerformerMaskNet"),
        (rename_argument, (), "Invalid argument to class"),
        (repeat_key, (), "hyperparams.yaml: "),
        (no_keys, (), "hyperparams.yaml: no keys in it"),
        (cut_checkpoint, (), "save: a CKPT.yaml in it is damaged"),
        (empty_checkpoint, (), "save: a CKPT.yaml in it is damaged"),
        (end_checkpoint, (), "save: a CKPT.yaml in it is damaged"),
        (cut_checkpoint, ("--checkpoint", "CKPT+epoch1"), "is damaged"),
        (no_metrics, (), "metrics.json"),
        (lambda f: shutil.rmtree(f / "save"), (), "no checkpoint of a finish"),
        (
            lambda f: (f / "hyperparams.yaml").unlink(),
            (),
            "hyperparams.yaml not found: expected the folder of a training",
        ),
        (None, ("--checkpoint", "CKPT+x"), "CKPT+x: no checkpoint"),
        (None, ("--checkpoint", "."), ".: no checkpoint"),
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


def test_export_replaces_no_other_folder(run, tmp_path, capsys):
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "song.wav").write_bytes(b"precious")
    assert command("export", run[0], tmp_path / "music") == 2
    assert "holds song.wav" in capsys.readouterr().err
    assert (tmp_path / "music" / "song.wav").read_bytes() == b"precious"


def test_push(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "separator"
    with serving() as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        hub.token = "hf_right"
        assert command("export", run[0], out, "--push", "me/mine") == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("trackformer export: me/mine: not uploaded, ")
        assert "HF_TOKEN" in line
        # the folder is there all the same
        loaded(out)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        assert command("export", run[0], out, "--push", "me/mine") == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[-1].startswith(f"{hub.url}/me/mine/commit/")
        files = hub.repos["me/mine"]["main"]
        assert files == {path.name: path.read_bytes() for path in out.iterdir()}
        mix = mixtures()
        separator = PerformerSeparator.from_pretrained("me/mine")
        assert torch.equal(separator(mix), loaded(out).separate_batch(mix))


def test_push_to_no_name(run, tmp_path, capsys):
    out = tmp_path / "separator"
    assert command("export", run[0], out, "--push", "a/b/c") == 1
    assert "trackformer export: a/b/c: " in capsys.readouterr().err


# --- info --------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "separator"
    assert command("export", finished[0], out) == 0
    return out


def test_info(exported, capsys):
    options = ("--device", "cpu", "--seconds", "0.5")
    assert command("info", exported, *options) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = dict(
        line.split(maxsplit=1)
        for line in printed.out.splitlines()
        if " " in line
    )
    masknet = loaded(exported).mods.masknet
    count = sum(p.numel() for p in masknet.parameters())
    assert lines["model"] == f"{exported} (config.json)"
    assert lines["classes"] == "STFTEncoder, PerformerMaskNet, STFTDecoder"
    assert lines["outputs"] == "3"
    assert lines["rate"] == "8000 Hz"
    assert lines["parameters"].startswith(f"{count:,} (0.0 MB")
    assert lines["speed"].startswith("0.5 s in ")
    assert lines["memory"].endswith(" MB at most, the whole process")
    assert lines["epoch"] == "2"
    assert lines["si_snri"] == "4.57"


def test_info_as_json(exported, capsys):
    options = ("--device", "cpu", "--seconds", "0.25", "--json")
    assert command("info", exported, *options) == 0
    about = json.loads(capsys.readouterr().out)
    state = loaded(exported).mods.masknet.state_dict().values()
    size = sum(value.numel() * 4 for value in state)
    assert about["weights_mb"] == size / 1e6
    assert about["loaded_from"] == "config.json"
    assert (about["num_spks"], about["sample_rate"]) == (3, 8000)
    assert about["card"]["Training"]["segments"] == "3.0 s"
    assert about["seconds"] == 0.25
    assert about["real_time_factor"] > 0
    # python and torch alone take more than that
    assert 50 < about["peak_memory_mb"] < 100000


def test_real_time_factor(exported, monkeypatch):
    """The second of two runs, as a share of what was separated."""
    from trackformer_sb.inference import measure

    clock = iter([0.0, 9.0, 10.0, 10.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    about = describe_model(exported, seconds=0.25)
    assert about["real_time_factor"] == 2.0


def test_info_runs_no_code_where_there_is_a_config(exported, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "separator")
    trace = tmp_path / "trace"
    text = f'a: !apply:builtins.open ["{trace}", w]\n'
    (folder / "hyperparams.yaml").write_text(text)
    options = ("--device", "cpu", "--seconds", "0.1")
    assert command("info", folder, *options) == 0
    assert not trace.exists()
    # and does not fall back to the yaml if the rest is broken
    (folder / "model.safetensors").write_bytes(b"")
    assert command("info", folder, *options) == 2
    (folder / "model.safetensors").unlink()
    assert command("info", folder, *options) == 2
    assert not trace.exists()


@pytest.mark.parametrize("keep_config", [True, False])
def test_load_separator(exported, tmp_path, keep_config):
    folder = shutil.copytree(exported, tmp_path / "separator")
    (folder / "README.md").unlink()
    if not keep_config:
        (folder / "config.json").unlink()
    separator, loaded_from = load_separator(folder)
    assert loaded_from == ("config.json" if keep_config else "hyperparams.yaml")
    mix = mixtures()
    expected = loaded(exported).separate_batch(mix)
    assert torch.equal(separator.separate_batch(mix), expected)
    assert describe_model(folder, seconds=0.1)["card"] == {}


def test_a_yaml_of_the_hub_has_to_be_trusted(
    exported, tmp_path, monkeypatch, capsys
):
    """It can run code; that of a folder is loaded with a warning."""
    trace = tmp_path / "trace"
    text = (exported / "hyperparams.yaml").read_text()
    text += f'more: !apply:os.mkdir ["{trace}"]\n'
    options = ("--device", "cpu", "--seconds", "0.1")
    with serving() as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        hub.repos["me/mine"] = {
            "main": {
                "hyperparams.yaml": text.encode(),
                "masknet.ckpt": (exported / "masknet.ckpt").read_bytes(),
            }
        }
        assert command("info", "me/mine", *options) == 2
        assert "which can run any code" in capsys.readouterr().err
        assert not trace.exists()
        assert command("info", "me/mine", *options, "--trust_yaml") == 0
        assert trace.exists()


def test_a_yaml_of_a_folder_is_warned_of(exported, tmp_path, capsys, caplog):
    folder = shutil.copytree(exported, tmp_path / "separator")
    (folder / "config.json").unlink()
    options = ("--device", "cpu", "--seconds", "0.1")
    assert command("info", folder, *options) == 0
    assert "which can run any code" in caplog.text
    caplog.clear()
    assert command("info", folder, *options, "--trust_yaml") == 0
    assert command("info", tmp_path / "nosuch", *options) == 2
    assert "any code" not in caplog.text + capsys.readouterr().err


def test_a_config_of_another_library_is_left_to_the_yaml(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "separator")
    text = '{"speechbrain_interface": "SepformerSeparation"}'
    (folder / "config.json").write_text(text)
    assert load_separator(folder, "cpu")[1] == "hyperparams.yaml"
    (folder / "config.json").write_text(text[:9])
    with pytest.raises(ValueError, match="no readable JSON"):
        load_separator(folder, "cpu")


@pytest.mark.parametrize(
    "options, message",
    [
        (("nosuch",), "nosuch not found: expected a separator folder"),
        (("{tmp}",), "hyperparams.yaml not found"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("d_model:", "d_modle:"), "Invalid argument"),
        (lambda text: text.replace("n_fft: 256", "n_fft: many"), "no usable"),
        (lambda text: text + "  - [", "no usable yaml"),
        (lambda text: "", "no usable yaml"),
        (lambda text: "- one", "no usable yaml"),
    ],
)
def test_info_on_a_damaged_yaml(exported, tmp_path, capsys, change, message):
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / "config.json").unlink()
    path = folder / "hyperparams.yaml"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    assert command("info", folder) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("trackformer info: ")
    assert f"{path}: no usable yaml" in printed.err and message in printed.err


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys, argparse, trackformer_sb.cli_model as cli; "
        "commands = argparse.ArgumentParser().add_subparsers(); "
        "cli.add_export(commands); cli.add_info(commands); "
        "print(sys.modules.keys() & {'torch', 'speechbrain', 'yaml'})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()", result.stderr
