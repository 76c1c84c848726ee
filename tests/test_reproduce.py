"""The grid of the paper's experiment, with a stand-in for the trainings."""

import csv
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure
from matplotlib.image import imread

from trackformer_sb.data.catalogue import DATASETS
from trackformer_sb.training import (
    grid,
    grid_processes,
    grid_report,
    grid_run,
    grid_tables,
)
from trackformer_sb.training.dataio import DATA_KEYS

ROOT = pathlib.Path(__file__).parents[1]

# Stands in for train.py and pretrain.py: writes what they write, and fails as
# behaviour.json beside it tells it to.
STUB = """
import json, os, pathlib, signal, sys, time

here = pathlib.Path(__file__).parent
keys = dict(w[2:].split("=", 1) for w in sys.argv[2:] if "=" in w)
debug = "--debug" in sys.argv
out = pathlib.Path(keys["output_folder"])
pretraining = pathlib.Path(__file__).stem == "pretrain"
name = "pretrain" if pretraining else "/".join(out.parts[-4:-1])
behaviour = json.loads((here / "behaviour.json").read_text())
how = behaviour.get(name, behaviour.get("all", "ok"))

def note(**more):
    with open(here / "calls.jsonl", "a") as file:
        more |= {"name": name, "debug": debug, "argv": sys.argv[1:]}
        more |= {"pid": os.getpid(), "time": time.time()}
        more["threads"] = os.environ.get("OMP_NUM_THREADS")
        file.write(json.dumps(more) + "\\n")

note(event="start")
out.mkdir(parents=True, exist_ok=True)
(out / "marker").write_text("x")
if how == "fails late":
    (out / "save" / "CKPT+1").mkdir(parents=True, exist_ok=True)
    sys.exit("ValueError: the loss is not finite")
if how == "oom at the end":
    (out / "metrics.json").write_text('{"si_snri": 1.')
if how.startswith("oom"):
    sys.exit("RuntimeError: CUDA out of memory. Tried to allocate 9 GiB")
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "allocate":
    hog = bytearray(3 * 2**30)
if how == "fail":
    sys.exit("ValueError: this went wrong")
if how == "hang" and not debug:
    def end(*_):
        note(event="terminated")
        sys.exit(1)
    signal.signal(signal.SIGTERM, end)
    note(event="hangs")
    time.sleep(60)
if how == "slow":
    time.sleep(0.8)
# no two measurements are alike
noise = 1 + behaviour.get("noise", 0) * int(time.time() * 1000 % 97)
length = float(keys.get("segment_seconds", 3))
yaml = pathlib.Path(sys.argv[1]).name
model = 4.0 if "convtasnet" in yaml else 0.5
model /= 2 if "asteroid" in yaml else 1
weight = 0.25 if keys.get("lambda_diversity") == "0" else 0.0
metrics = {
    "mixture_si_snr": length + model + weight,
    "train_mixture_si_snr": 5.0, "valid_mixture_si_snr": 4.0,
    "si_snr": 1.0, "si_snri": length / 10 + weight, "si_snri_grouped": 5.0,
    "sdr": None, "mask_overlap": 0.5, "effective_mask_count": 6.0 - weight,
    "test_items": 12, "epochs": 2, "batches": 7, "steps": 14,
    "step_seconds": behaviour.get("step_seconds", 0.5) * model * noise,
    "epoch_seconds": 3.0 * model, "total_seconds": 100.0,
    "peak_memory_mb": 1234.5, "device": keys["device"], "num_parameters": 9,
}
folder = out / "debug" if debug else out
(folder / "manifests").mkdir(parents=True, exist_ok=True)
for split in ("train", "valid", "test"):
    song = behaviour.get(f"{name} {split}", f"{split} song")
    line = {"song": song, "tracks": {"mixture": f"/m/{song}.wav"}}
    path = folder / "manifests" / f"{split}.jsonl"
    path.write_text(json.dumps(line) + "\\n")
if pretraining:
    (folder / "encoder").mkdir(exist_ok=True)
(folder / "metrics.json").write_text(json.dumps(metrics))
note(event="end")
"""
KEYS = """
seed: 1
output_folder: results
data_folder: null
dataset: demo
test_folder: null
test_dataset: stems
sample_rate: 8000  # Hz
matmul_precision: high
segment_seconds: 3.0
number_of_epochs: 100
early_stop_epochs: 10
grad_accumulation_factor: 1
lr: 0.1
"""
SEPARATION_KEYS = """
lambda_diversity: 0.1
lambda_sparsity: 0.1
lambda_mask_count: 0.0
num_spks: 8
"""
PERFORMER_KEYS = "d_model: 16\npretrained_encoder: null\n"


def make_repository(root):
    """Recipes and yamls like ours, with the stand-in."""
    (root / "recipes").mkdir(parents=True)
    (root / "hparams").mkdir()
    shutil.copy(ROOT / "recipes" / "reproduce.py", root / "recipes")
    for name in ("train", "pretrain"):
        (root / "recipes" / f"{name}.py").write_text(STUB)
    texts = {
        "performer_mixit.yaml": KEYS + SEPARATION_KEYS + PERFORMER_KEYS,
        "performer_mixit_mae.yaml": KEYS + SEPARATION_KEYS + PERFORMER_KEYS,
        **dict.fromkeys(
            ("convtasnet_mixit.yaml", "asteroid_convtasnet_mixit.yaml"),
            KEYS + SEPARATION_KEYS + "num_channels: 8\n",
        ),
        grid.PRETRAIN_YAML: KEYS + "d_model: 16\nmask_ratio: 0.75\n",
        "other_mae.yaml": KEYS + "d_model: 16\nmask_ratio: 0.3\n",
    }
    for name, text in texts.items():
        (root / "hparams" / name).write_text(text)
    (root / "music").mkdir()
    behave(root)
    return root


@pytest.fixture
def repository(tmp_path):
    """Recipes and yamls like ours, with the stand-in."""
    return make_repository(tmp_path / "repository")


def behave(root, **behaviour):
    """What the stand-ins do from now on, by cell or for all."""
    path = root / "recipes" / "behaviour.json"
    path.write_text(json.dumps(behaviour))
    (root / "recipes" / "calls.jsonl").write_text("")


def calls(root, event="start"):
    lines = (root / "recipes" / "calls.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if x["event"] == event]


def names(root):
    return [call["name"] for call in calls(root)]


def keys_of(call):
    words = [word for word in call["argv"][1:] if "=" in word]
    return dict(word[2:].split("=", 1) for word in words)


def arguments(root, *more, devices="cpu"):
    return [
        f"--data_folder={root / 'music'}",
        "--dataset=mixtures",
        f"--output_folder={root / 'out'}",
        *(("--devices", devices) if devices else ()),
        "--models",
        "performer",
        "convtasnet",
        "--lengths",
        "3",
        "30",
        *more,
    ]


def run(root, *more, figures=False, devices="cpu"):
    """Runs the recipe in this process; returns its exit status."""
    path = root / "recipes" / "reproduce.py"
    spec = importlib.util.spec_from_file_location("recipe_reproduce", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as context:
        if not figures:
            # they take longer than all the rest
            context.setattr(grid_report, "write_figures", lambda folder: None)
        return module.main(arguments(root, *more, devices=devices))


def start(root, *more):
    """Runs the recipe as a user does."""
    script = root / "recipes" / "reproduce.py"
    return subprocess.Popen(
        [sys.executable, str(script), *arguments(root, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = pathlib.Path(f"/proc/{pid}/stat")
    # a zombie has ended, whoever should have asked for its status
    return not status.exists() or status.read_text().split()[2] != "Z"


def record(root, name):
    return json.loads((root / "out" / name / "cell.json").read_text())


def read_csv(root, name):
    with open(root / "out" / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def snapshot(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- commands ----------------------------------------------------------------


def test_cells_run_in_order_with_their_own_keys(repository):
    assert run(repository, "--seed=7", "--test_dataset=stems") == 0
    assert names(repository) == [
        "performer/3s/mixit",
        "convtasnet/3s/mixit",
        "performer/3s/mixit_div_sp",
        "convtasnet/3s/mixit_div_sp",
        "performer/30s/mixit",
        "convtasnet/30s/mixit",
        "performer/30s/mixit_div_sp",
        "convtasnet/30s/mixit_div_sp",
    ]
    for call in calls(repository):
        model, length, loss = call["name"].split("/")
        keys = keys_of(call)
        assert pathlib.Path(call["argv"][0]).name == f"{model}_mixit.yaml"
        assert keys["segment_seconds"] == length[:-1]
        lambdas = {k: v for k, v in keys.items() if k.startswith("lambda")}
        if loss == "mixit":
            assert lambdas == dict.fromkeys(
                ("lambda_diversity", "lambda_sparsity", "lambda_mask_count"),
                "0",
            )
        else:
            # the yaml decides
            assert lambdas == {}
        assert keys["data_folder"] == str(repository / "music")
        assert keys["dataset"] == "mixtures"
        assert keys["test_dataset"] == "stems"
        assert keys["seed"] == "7" and keys["device"] == "cpu"
        assert keys["number_of_epochs"] == "100"
        assert keys.keys().isdisjoint(
            {"early_stop_epochs", "optimizer_step_limit", "test_folder"}
        )
        found = record(repository, call["name"])
        assert found["status"] == "done" and found["seconds"] > 0
        assert found["step_seconds"] > 0
        for word in call["argv"]:
            assert word in found["command"]


def test_overrides_reach_the_right_trainings(repository):
    run(
        repository,
        *("--models", "performer_mae", "performer", "convtasnet"),
        *("--lengths", "3", "--losses", "mixit"),
        *("--lr=0.5", "--performer.d_model=32", "--performer.num_spks=4"),
        *("--convtasnet.num_channels=4", "--mae.mask_ratio=0.5"),
        *("--precision=bf16", "--compile=True", "--matmul_precision=medium"),
        "--convtasnet.eval_precision=fp16",
    )
    keys = {call["name"]: keys_of(call) for call in calls(repository)}
    pretrain = keys.pop("pretrain")
    # what the encoder and the separator have in common, and no more
    assert pretrain["d_model"] == "32" and pretrain["mask_ratio"] == "0.5"
    assert pretrain.keys().isdisjoint({"lr", "num_spks", "eval_precision"})
    # how all of them run
    assert pretrain["precision"] == "bf16" and pretrain["compile"] == "True"
    assert [k["lr"] for k in keys.values()] == ["0.5"] * 3
    assert [k["precision"] for k in keys.values()] == ["bf16"] * 3
    products = [pretrain, *keys.values()]
    assert all(k["matmul_precision"] == "medium" for k in products)
    assert [k.get("d_model") for k in keys.values()] == ["32", "32", None]
    assert [k.get("num_spks") for k in keys.values()] == ["4", "4", None]
    assert [k.get("num_channels") for k in keys.values()] == [None, None, "4"]
    assert all("mask_ratio" not in k for k in keys.values())


def test_auxiliary_weights_given_by_the_user_stay_out_of_mixit(repository):
    run(repository, "--lambda_diversity=0.3", "--lengths", "3")
    for call in calls(repository):
        # given twice, the last one counts
        expected = "0.3" if "div_sp" in call["name"] else "0"
        assert keys_of(call)["lambda_diversity"] == expected


@pytest.mark.parametrize(
    ("more", "message"),
    (
        (["--d_model=8"], r"'d_model' for hparams/convtasnet.*--performer\.d_"),
        (["--performer.num_channels=8"], r"'num_channels'.*performer_mixit"),
        (["--perfomer.lr=8"], "unknown group 'perfomer'.*performer"),
        (["--learning"], "unknown argument '--learning'.*--key=value"),
        (["--seed=1", "lr=1"], "unknown argument 'lr=1'"),
        (["--segment_seconds=8"], "segment_seconds is set.*--lengths"),
        (["--optimizer_step_limit=8"], "unknown key 'optimizer_step_limit'"),
        (["--steps=1", "--early_stop_epochs=2"], "early_stop_epochs is set"),
        (["--no-probe"], "--no-probe.*--dry-run"),
        (
            ["--models", "performer_mae", "--pretrain_yaml=nothing.yaml"],
            r"--pretrain_yaml: .*other_mae\.yaml.*got 'nothing\.yaml'",
        ),
        (
            ["--models", "performer_mae", "--pretrain_yaml=demo.yaml"],
            r"--pretrain_yaml: expected a pre-training.*got 'demo\.yaml'",
        ),
        (["--dataset=demo", "--lengths", "31"], "31 s.*demo band.*30 s"),
        (["--test_folder=/no/such"], "--test_folder: no folder /no/such"),
        (["--data_folder=/no/such"], "--data_folder: no folder /no/such"),
        (
            ["--pretrained_encoder=/no/such"],
            "--pretrained_encoder: no folder /no/such",
        ),
    ),
)
def test_bad_input_is_named_before_anything_runs(more, message, repository):
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        run(repository, *more)
    assert not (repository / "out").exists()


def test_negative_seed_is_refused(repository, capsys):
    with pytest.raises(SystemExit):
        run(repository, "--seed=-1")
    assert "--seed: must be 0 or more, got -1" in capsys.readouterr().err


def test_music_other_than_the_band_needs_a_folder(repository):
    data = dict.fromkeys(("data_folder", "test_folder", "test_dataset"))
    for dataset in ("stems", "mixtures"):
        with pytest.raises(ValueError, match=f"--data_folder.*{dataset}"):
            grid.Grid(
                repository / "out",
                repository / "recipes",
                {**data, "dataset": dataset},
            )


def test_peer_of_asteroid_where_asked_for(repository):
    models = ("--models", "performer", "convtasnet", "asteroid_convtasnet")
    own = "--asteroid_convtasnet.num_channels=4"
    run(repository, "--lengths", "3", "--losses", "mixit", *models, own)
    keys = {call["name"]: keys_of(call) for call in calls(repository)}
    assert keys["convtasnet/3s/mixit"].get("num_channels") is None
    assert keys["asteroid_convtasnet/3s/mixit"]["num_channels"] == "4"
    text = (repository / "out" / "tables.md").read_text()
    # beside the paper, whose ConvTasNet is the other one
    by_key = {tuple(row[:3]): row[3:] for row in rows_of(text, "Time and")}
    assert by_key["3", "mixit", "asteroid_convtasnet"][1] == "6.00"
    assert rows_of(text, "Table 2")[2][2] == "0.20"


def test_missing_yaml_is_named(repository):
    (repository / "hparams" / "convtasnet_mixit.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"hparams/convtasnet_mixit"):
        run(repository)


def test_datasets_and_models_are_those_of_the_package():
    assert grid.DATASETS == DATASETS
    assert tuple(grid.YAMLS) == grid_tables.MODELS
    assert grid.GROUPS[1:-1] == tuple(
        dict.fromkeys(group for _, group in grid.YAMLS.values())
    )
    assert tuple(grid.LOSS_KEYS) == grid_tables.LOSSES
    for name in ("performer_mixit.yaml", "convtasnet_mixit.yaml"):
        values = grid.yaml_values(ROOT / "hparams" / name)
        assert values["segment_seconds"] == "3.0"
        assert values["batch_size"] == "4"


# --- budget ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "expected"),
    (
        ("--epochs=3", {"number_of_epochs": "3"}),
        (
            "--steps=20",
            {
                "number_of_epochs": "1000000",
                "early_stop_epochs": "1000000",
                "optimizer_step_limit": "20",
            },
        ),
    ),
)
def test_budget_in_epochs_or_steps(more, expected, repository):
    run(repository, more)
    names = ("number_of_epochs", "early_stop_epochs", "optimizer_step_limit")
    for call in calls(repository):
        keys = keys_of(call)
        assert {k: keys[k] for k in names if k in keys} == expected
        assert not call["debug"]


def test_minutes_become_steps_by_a_probe(repository):
    # 0.25 s and 2 s a batch, 2 batches a step for ConvTasNet
    run(
        repository,
        *("--minutes=1", "--lengths", "3", "--losses", "mixit"),
        "--convtasnet.grad_accumulation_factor=2",
    )
    probes = [call for call in calls(repository) if call["debug"]]
    runs = [call for call in calls(repository) if not call["debug"]]
    assert len(probes) == len(runs) == 2
    for call in probes:
        assert "--debug_batches=8" in call["argv"]
        assert "--debug_epochs=1" in call["argv"]
    limits = [keys_of(call)["optimizer_step_limit"] for call in runs]
    assert limits == ["240", "15"]
    assert record(repository, "convtasnet/3s/mixit")["steps"] == 15
    assert record(repository, "convtasnet/3s/mixit")["step_seconds"] == 2.0
    assert list((repository / "out").glob("**/probe")) == []


def test_minutes_are_at_least_one_step(repository):
    behave(repository, step_seconds=1000.0)
    run(repository, "--minutes=0.1", "--lengths", "3", "--losses", "mixit")
    assert record(repository, "performer/3s/mixit")["steps"] == 1


def test_resumed_cell_keeps_the_steps_of_its_probe(repository):
    more = ("--minutes=1", "--lengths", "3", "--losses", "mixit")
    run(repository, *more)
    path = repository / "out/performer/3s/mixit/cell.json"
    found = json.loads(path.read_text()) | {"status": "running"}
    path.write_text(json.dumps(found))
    behave(repository, step_seconds=50.0)
    run(repository, *more)
    (call,) = calls(repository)
    assert call["name"] == "performer/3s/mixit" and not call["debug"]
    assert keys_of(call)["optimizer_step_limit"] == "240"


@pytest.mark.parametrize(
    ("budget", "steps"), (("--minutes=6", "1440"), ("--epochs=5", None))
)
def test_a_cell_stopped_early_takes_another_budget(budget, steps, repository):
    more = ("--lengths", "3", "--losses", "mixit", "--models", "performer")
    run(repository, *more, "--minutes=1")
    path = repository / "out/performer/3s/mixit/cell.json"
    found = json.loads(path.read_text()) | {"status": "running"}
    path.write_text(json.dumps(found))
    behave(repository, step_seconds=50.0)
    run(repository, *more, budget)
    limit = keys_of(calls(repository)[-1]).get("optimizer_step_limit")
    assert limit == steps
    assert record(repository, "performer/3s/mixit").get("steps") == (
        steps and int(steps)
    )


def test_failed_cell_of_another_network_is_probed_again(repository):
    more = ("--minutes=1", "--lengths", "3", "--losses", "mixit")
    more = (*more, "--models", "performer")
    run(repository, *more)
    path = repository / "out/performer/3s/mixit/cell.json"
    found = json.loads(path.read_text()) | {"status": "failed"}
    path.write_text(json.dumps(found))
    behave(repository, step_seconds=2.0)
    run(repository, *more, "--performer.d_model=32")
    assert [call["debug"] for call in calls(repository)] == [True, False]
    found = record(repository, "performer/3s/mixit")
    # of the network that the probe had before it was 240
    assert found["steps"] == 60
    assert found["probe"]["step_seconds"] == 1.0


ALL_MODELS = ("--models", "performer_mae", "performer", "convtasnet")


def test_identical_networks_get_the_same_steps(repository):
    behave(repository, noise=0.01)
    run(repository, "--minutes=1", "--lengths", "3", *ALL_MODELS)
    probed = [call["name"] for call in calls(repository) if call["debug"]]
    # one for each network, whoever needed it first
    kinds = sorted(name.split("/")[0].split("_")[0] for name in probed)
    assert kinds == ["convtasnet", "performer", "pretrain"]
    for models in (("performer", "performer_mae"), ("convtasnet",)):
        found = [
            record(repository, f"{model}/3s/{loss}")
            for model in models
            for loss in grid.LOSSES
        ]
        assert len({cell["steps"] for cell in found}) == 1
        assert len({cell["probe"]["step_seconds"] for cell in found}) == 1
    assert list((repository / "out").glob("**/probe")) == []


def test_network_is_probed_once_by_two_devices(repository):
    behave(repository, all="slow", noise=0.01)
    more = ("--minutes=1", "--lengths", "3", "--models", "performer")
    run(repository, *more, "--devices", "cpu", "cpu")
    probed = [call for call in calls(repository) if call["debug"]]
    assert len(probed) == 1 and len(calls(repository)) == 3
    one, other = (
        record(repository, f"performer/3s/{loss}") for loss in grid.LOSSES
    )
    assert one["steps"] == other["steps"] and one["probe"] == other["probe"]


def test_resumed_and_grown_grids_share_probes_of_before(repository):
    behave(repository, noise=0.01)
    more = ("--minutes=1", "--losses", "mixit", "--models")
    run(repository, *more, "performer", "--performer.d_model=32")
    more = (*more, "performer_mae", "--performer.d_model=32")
    more = (*more, "--losses", *grid.LOSSES)
    behave(repository, noise=0.01)
    run(repository, *more, "--lengths", "3", "5", "30")
    probed = [call for call in calls(repository) if call["debug"]]
    # the pre-training, and a length that is new
    assert len(probed) == 2
    steps = {
        (length, record(repository, f"{model}/{length}s/{loss}")["steps"])
        for model in ("performer", "performer_mae")
        for length in (3, 30)
        for loss in ("mixit", "mixit_div_sp")
        if (model, loss) != ("performer", "mixit_div_sp")
    }
    assert len(steps) == 2


def test_only_equal_networks_share_a_probe(repository):
    def network(overrides=None, number=0, **settings):
        data = dict.fromkeys(("data_folder", "test_folder", "test_dataset"))
        cells = grid.Grid(
            repository / "out",
            repository / "recipes",
            data | {"dataset": "demo"},
            overrides={group: {} for group in grid.GROUPS} | (overrides or {}),
            **settings,
        )
        return cells.jobs[number].network

    one = network(models=("performer",))
    assert one == network(models=("performer",), losses=("mixit_div_sp",))
    assert one == network(models=("performer_mae",), number=1)
    assert one == network({"mae": {"lr": "1"}}, models=("performer",))
    others = [
        network(models=("performer_mae",)),  # the pre-training
        network(models=("convtasnet",)),
        network(models=("performer",), lengths=(5.0,)),
        network({"": {"lr": "1"}}, models=("performer",)),
        network({"performer": {"d_model": "8"}}, models=("performer",)),
    ]
    assert len({one, *others}) == 6


def test_a_gpu_does_not_get_the_steps_of_a_cpu(repository):
    behave(repository, all="slow")
    run(
        repository,
        *("--minutes=1", "--lengths", "3", "--models", "performer"),
        *("--devices", "cpu", "cuda:0"),
    )
    devices = [keys_of(c)["device"] for c in calls(repository) if c["debug"]]
    assert sorted(devices) == ["cpu", "cuda:0"]


def test_failed_probe_is_not_shared(repository):
    behave(repository, **{"performer/3s/mixit": "oom"})
    more = ("--minutes=1", "--lengths", "3", "--models", "performer")
    assert run(repository, *more) == 0
    for loss, status in zip(grid.LOSSES, ("oom", "done")):
        found = record(repository, f"performer/3s/{loss}")
        assert found["status"] == status


def test_probe_out_of_memory(repository):
    behave(repository, **{"convtasnet/3s/mixit": "oom"})
    more = ("--minutes=1", "--lengths", "3", "--losses", "mixit")
    assert run(repository, *more) == 0
    found = record(repository, "convtasnet/3s/mixit")
    assert found["status"] == "oom" and "9 GiB" in found["reason"]


# --- pre-training ------------------------------------------------------------


def test_pretraining_comes_first_and_its_encoder_is_used(repository):
    (repository / "songs").mkdir()
    run(
        repository,
        *("--models", "convtasnet", "performer_mae", "performer"),
        *("--lengths", "3", "--pretrain_steps=5", "--epochs=2"),
        f"--test_folder={repository / 'songs'}",
    )
    first, *others = calls(repository)
    out = repository / "out"
    assert first["name"] == "pretrain"
    assert pathlib.Path(first["argv"][0]).name == grid.PRETRAIN_YAML
    keys = keys_of(first)
    assert keys["optimizer_step_limit"] == "5"
    assert keys["output_folder"] == str(out / "pretrain")
    assert "segment_seconds" not in keys
    for call in others:
        for key in ("data_folder", "dataset", "test_folder", "seed"):
            assert keys_of(call)[key] == keys[key]
        expected = None
        if call["name"].startswith("performer_mae"):
            expected = str(out / "pretrain" / "encoder")
            assert pathlib.Path(expected).is_dir()
            assert call["argv"][0].endswith("performer_mixit_mae.yaml")
        assert keys_of(call).get("pretrained_encoder") == expected
    assert "Pre-training: 5 optimizer steps" in (out / "tables.md").read_text()


def test_another_pretraining_in_the_same_folder_is_refused(repository):
    more = ("--models", "performer_mae", "--lengths", "3", "--losses", "mixit")
    run(repository, *more, "--pretrain_yaml=other_mae.yaml")
    (first, _) = calls(repository)
    assert pathlib.Path(first["argv"][0]).name == "other_mae.yaml"
    message = "pretrain_yaml: expected other_mae.yaml, got audio_mae"
    with pytest.raises(ValueError, match=message):
        run(repository, *more)
    # nor by what was begun before the yaml had a name of its own
    path = repository / "out" / "grid.json"
    config = json.loads(path.read_text())
    assert config.pop("pretrain_yaml") == "other_mae.yaml"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        run(repository, *more)
    behave(repository)
    assert run(repository, *more, "--pretrain_yaml=other_mae.yaml") == 0
    # of no concern without one
    assert run(repository, "--models", "performer", "--lengths", "3") == 0
    assert len(names(repository)) == 2


def write_encoder(folder, d_model=16):
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text(
        f"sample_rate: 8000\nd_model: {d_model}\nspec_norm: zscore\n"
    )
    (folder / "encoder.ckpt").touch()


def test_pretraining_holds_back_the_songs_of_the_separators(tmp_path):
    set_by_grid = {"data_folder", "dataset", "test_folder", "test_dataset"}
    lengths = {"segment_seconds", "segment_hop_seconds"}
    for key in {*DATA_KEYS} - set_by_grid - lengths - {"seed"}:
        whole = grid.Grid(
            tmp_path / "out",
            ROOT / "recipes",
            dict.fromkeys(set_by_grid) | {"dataset": "demo"},
            overrides={**{name: {} for name in grid.GROUPS}, "": {key: "7"}},
        )
        for job in whole.jobs:
            assert f"--{key}=7" in job.command(), (key, job.name)


def test_given_encoder_takes_the_place_of_pretraining(repository):
    write_encoder(repository / "enc")
    run(
        repository,
        *("--models", "performer_mae", "--lengths", "3", "--losses", "mixit"),
        f"--pretrained_encoder={repository / 'enc'}",
    )
    (call,) = calls(repository)
    keys = keys_of(call)
    assert keys["pretrained_encoder"] == str(repository / "enc")


@pytest.mark.parametrize(
    "missing, message",
    (
        ("encoder.ckpt", "--pretrained_encoder: no encoder.ckpt in .*enc"),
        ("hyperparams.yaml", "encoder: no hyperparams.yaml in .*enc"),
        (None, "enc does not fit: d_model is 32, of the separators 16"),
    ),
)
def test_given_encoder_is_checked_before_anything_runs(
    missing, message, repository
):
    write_encoder(repository / "enc", d_model=32)
    if missing:
        (repository / "enc" / missing).unlink()
    given = f"--pretrained_encoder={repository / 'enc'}"
    models = ("--models", "performer_mae", "performer")
    for more in ((), ("--dry-run",)):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(repository, *models, given, *more)
    assert names(repository) == []
    assert not (repository / "out").exists()
    # of no concern to others
    assert run(repository, "--models", "performer", given) == 0


def test_failed_pretraining_stops_what_needs_it_only(repository):
    behave(repository, pretrain="fail")
    more = ("--models", "performer_mae", "performer")
    assert run(repository, *more) == 1
    assert not any("performer_mae" in name for name in names(repository))
    assert record(repository, "performer/30s/mixit")["status"] == "done"
    found = record(repository, "performer_mae/30s/mixit")
    assert found["status"] == "failed"
    assert "no encoder: pretrain is failed" in found["reason"]
    behave(repository)
    assert run(repository, *more) == 0
    assert len(names(repository)) == 5


def test_others_run_beside_the_pretraining(repository):
    behave(repository, pretrain="slow")
    run(
        repository,
        *("--models", "performer_mae", "performer", "--losses", "mixit"),
        *("--lengths", "3", "--devices", "cpu", "cpu"),
    )
    ended = {call["name"]: call["time"] for call in calls(repository, "end")}
    started = {call["name"]: call["time"] for call in calls(repository)}
    assert started["performer/3s/mixit"] < ended["pretrain"]
    assert started["performer_mae/3s/mixit"] > ended["pretrain"]


def test_test_songs_that_the_encoder_heard_are_reported(repository):
    behave(repository, **{"performer_mae/30s/mixit test": "train song"})
    run(repository, "--models", "performer_mae", "--losses", "mixit")
    heard = {
        float(row["length"]): row["test_songs_pretrained_on"]
        for row in read_csv(repository, "cells.csv")
    }
    assert heard == {3.0: "0", 30.0: "1"}
    text = (repository / "out" / "tables.md").read_text()
    assert "its pre-training heard: 1 at 30 s (mixit)" in text


# --- the demo band -----------------------------------------------------------


def test_all_cells_share_one_demo_band(repository, monkeypatch):
    monkeypatch.setattr(grid_run, "DEMO_SONGS", 2)
    monkeypatch.setattr(grid_run, "DEMO_SECONDS", 0.2)
    whole = grid.Grid(
        repository / "out",
        repository / "recipes",
        dict.fromkeys(("data_folder", "test_folder", "test_dataset"))
        | {"dataset": "demo"},
        models=("performer", "convtasnet"),
        lengths=(3.0,),
        losses=("mixit",),
    )
    assert grid_run.Runner(whole).run() == []
    band = repository / "out" / "demo_band"
    settings = json.loads((band / "band.json").read_text())
    assert settings["seconds"] == 0.2 and settings["sample_rate"] == 8000
    for call in calls(repository):
        assert keys_of(call)["data_folder"] == str(band)
        assert keys_of(call)["dataset"] == "stems"
    assert "Data: demo" in (repository / "out" / "tables.md").read_text()


@pytest.mark.parametrize("code", ("raise MemoryError", "exit('no')"))
@pytest.mark.parametrize("more", ((), ("--dry-run",)))
def test_no_band_stops_the_grid(code, more, repository, monkeypatch):
    monkeypatch.setattr(grid_run, "MAKE_BAND", code)
    (repository / "band").mkdir()
    band = ("--dataset=demo", f"--data_folder={repository / 'band'}")
    message = r"no demo band in .*, (oom: MemoryError|failed: no)$"
    with pytest.raises(ValueError, match=message):
        run(repository, *band, *more)
    assert names(repository) == []


# --- what goes wrong ---------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "lines", "status"),
    (
        (0, ["out of memory"], "done"),
        (1, ["torch.OutOfMemoryError: CUDA out of memory."], "oom"),
        (1, ["RuntimeError: CUDA error: out of memory"], "oom"),
        (1, ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling it"], "oom"),
        (1, ["cuDNN error: CUDNN_STATUS_ALLOC_FAILED"], "oom"),
        (1, ["cuFFT error: CUFFT_ALLOC_FAILED"], "oom"),
        (1, ["CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when"], "oom"),
        (1, ["unable to find an engine to execute this computation"], "oom"),
        (1, ["Failed to CUDA calloc async 608 bytes"], "oom"),
        (1, ["cuFFT error: CUFFT_INVALID_SIZE"], "failed"),
        (1, ["CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"], "failed"),
        (1, ["DefaultCPUAllocator: can't allocate memory: 9 bytes"], "oom"),
        (1, ["OSError: [Errno 12] Cannot allocate memory"], "oom"),
        (1, ["MemoryError", "", "in a line before the last"], "oom"),
        (-6, ["terminate called", "what():  std::bad_alloc"], "oom"),
        (1, ["DataLoader worker is killed by signal: Killed."], "oom"),
        (-9, [], "oom"),
        (137, ["epoch 3"], "oom"),
        (1, ["ValueError: memory"], "failed"),
        (-15, [], "failed"),
        (-11, ["Segmentation fault"], "failed"),
    ),
)
def test_what_a_process_died_of(code, lines, status):
    found, reason = grid_processes.outcome(code, lines)
    assert found == status
    assert (reason is None) == (status == "done")


@pytest.mark.parametrize("how", ("oom", "oom at the end", "killed"))
def test_out_of_memory_is_a_result(how, repository):
    behave(repository, **{"convtasnet/30s/mixit": how})
    assert run(repository) == 0
    assert len(names(repository)) == 8
    assert record(repository, "convtasnet/30s/mixit")["status"] == "oom"
    for name in ("table1", "table2", "measures", "costs", "over_fitting"):
        rows = read_csv(repository, f"{name}.csv")
        long = [row for row in rows if row["length (s)"] == "30"]
        assert sum("OOM" in row.values() for row in long) == 1, name
    # a rerun leaves it, unless asked for
    behave(repository)
    assert run(repository) == 0
    assert names(repository) == []
    assert run(repository, "--retry_oom", "--memory_gb=9") == 0
    assert names(repository) == ["convtasnet/30s/mixit"]
    assert record(repository, "convtasnet/30s/mixit")["status"] == "done"
    assert record(repository, "convtasnet/30s/mixit")["memory_gb"] == 9
    assert record(repository, "performer/30s/mixit")["memory_gb"] != 9


def test_memory_limit_ends_the_cell_alone(repository):
    behave(repository, **{"performer/3s/mixit": "allocate"})
    more = ("--lengths", "3", "--losses", "mixit", "--memory_gb=0.5")
    assert run(repository, *more) == 0
    found = record(repository, "performer/3s/mixit")
    assert found["status"] == "oom" and "MemoryError" in found["reason"]
    assert record(repository, "convtasnet/3s/mixit")["status"] == "done"


def test_default_memory_limit(monkeypatch):
    monkeypatch.setattr(grid_processes, "available_memory", lambda: 20.0)
    devices = ("cpu", "cpu", "cuda:0")
    processes = grid_processes.Processes(devices)
    assert processes.limit_gb("cpu") == pytest.approx(9.0)
    assert processes.limit_gb("cuda:0") is None
    assert grid_processes.Processes(devices, 3.0).limit_gb("cpu") == 3.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_available_memory_is_that_of_the_machine():
    assert 0.05 < grid_processes.available_memory() < 100_000


def test_failed_cell_is_reported_and_others_run(repository):
    behave(repository, **{"performer/3s/mixit": "fail"})
    process = start(repository)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "failed: performer/3s/mixit, see" in errors
    assert "ValueError: this went wrong" in output
    assert len(names(repository)) == 8
    log = repository / "out" / "performer" / "3s" / "mixit" / "log.txt"
    assert "ValueError: this went wrong" in log.read_text()
    (row,) = [
        row
        for row in read_csv(repository, "cells.csv")
        if row["status"] == "failed"
    ]
    assert row["model"] == "performer" and row["si_snri"] == ""
    behave(repository)
    assert run(repository) == 0
    assert names(repository) == ["performer/3s/mixit"]


def test_training_that_leaves_no_figures_has_failed(repository):
    train = repository / "recipes" / "train.py"
    train.write_text("print('nothing done')")
    more = ("--lengths", "3", "--losses", "mixit")
    assert run(repository, *more, figures=True) == 1
    found = record(repository, "performer/3s/mixit")
    assert found["status"] == "failed" and "metrics.json" in found["reason"]
    # nothing to draw but axes
    assert len(list((repository / "out" / "figures").glob("*.png"))) == 4


def test_error_exits_with_one_line(repository):
    process = start(repository, "--nothing=1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("ValueError: unknown key 'nothing'")
    assert len(errors.splitlines()) == 1


# --- going on ----------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_killed_grid_goes_on_at_the_cell_it_was_at(repository):
    behave(repository, **{"performer/3s/mixit_div_sp": "hang"})
    process = start(repository, "--lengths", "3")
    wait_for(lambda: len(names(repository)) == 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # no orphan trains on in a folder that a new process will use
    wait_for(lambda: not is_alive(calls(repository)[2]["pid"]))
    assert record(repository, "performer/3s/mixit_div_sp")["status"] == (
        "running"
    )
    command = record(repository, "performer/3s/mixit_div_sp")["command"]
    behave(repository)
    assert run(repository, "--lengths", "3") == 0
    assert names(repository) == [
        "performer/3s/mixit_div_sp",
        "convtasnet/3s/mixit_div_sp",
    ]
    found = record(repository, "performer/3s/mixit_div_sp")
    assert found["status"] == "done" and found["command"] == command
    # what the first attempt left is there
    assert (repository / "out/performer/3s/mixit_div_sp/run/marker").exists()


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_stopped_grid_ends_its_processes(number, repository):
    hang = ("performer/3s/mixit", "convtasnet/3s/mixit")
    behave(repository, **dict.fromkeys(hang, "hang"))
    process = start(repository, "--devices", "cpu", "cpu")
    wait_for(lambda: len(calls(repository, "hangs")) == 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "stopped; the same command goes on" in errors
    assert "Traceback" not in errors
    assert sorted(names(repository)) == sorted(hang)
    # asked to end before they would be killed
    assert len(calls(repository, "terminated")) == 2
    for call in calls(repository):
        assert not is_alive(call["pid"])
        assert record(repository, call["name"])["status"] == "running"
    behave(repository)
    assert run(repository) == 0
    assert len(names(repository)) == 8


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_stopped_grid_draws_what_is_done(number, repository):
    behave(repository, **{"convtasnet/3s/mixit": "hang"})
    process = start(repository)
    wait_for(lambda: calls(repository, "hangs"))
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 1
    paths = sorted((repository / "out" / "figures").iterdir())
    assert [path.name for path in paths] == [
        f"{name}.png" for name in sorted(grid_report.FIGURES)
    ]
    for path in paths:
        assert min(imread(path).shape[:2]) > 400


def test_figures_that_fail_do_not_fail_the_stop(repository):
    behave(repository, **{"convtasnet/3s/mixit": "hang"})
    process = start(repository)
    wait_for(lambda: calls(repository, "hangs"))
    # no folder can take its place
    (repository / "out" / "figures").write_text("")
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == "stopped; the same command goes on from here\n"
    assert "no figures: FileExistsError" in output


def test_second_process_is_refused(repository):
    behave(repository, **{"performer/3s/mixit": "hang"})
    process = start(repository)
    wait_for(lambda: names(repository))
    try:
        with pytest.raises(ValueError, match="another process runs the grid"):
            run(repository)
        assert len(names(repository)) == 1
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("more", "message"),
    (
        (["--seed=2"], "seed: expected 1234, got 2"),
        (["--epochs=7"], r"budget: expected \['epochs', 100\].*'epochs', 7"),
        (["--lr=7"], r"overrides: expected {}, got {'lr': '7'}"),
        (["--performer.lr=7"], r"overrides of performer: expected {}"),
        (["--memory_gb=7"], "memory_gb: expected None, got 7"),
        (["--dataset=stems"], "dataset: expected mixtures, got stems"),
    ),
)
def test_other_configuration_is_refused(more, message, repository):
    run(repository, "--lengths", "3")
    before = snapshot(repository / "out")
    behave(repository)
    with pytest.raises(ValueError, match=message):
        run(repository, *more)
    assert names(repository) == []
    assert snapshot(repository / "out") == before


def test_overrides_of_what_failed_may_be_mended(repository):
    behave(repository, pretrain="fail")
    models = "--models", "performer_mae", "convtasnet", "--lengths", "3"
    assert run(repository, *models, "--mae.mask_ratio=1.2") == 1
    behave(repository)
    assert run(repository, *models, "--mae.mask_ratio=0.5") == 0
    # of convtasnet all was done
    assert names(repository) == [
        "pretrain",
        "performer_mae/3s/mixit",
        "performer_mae/3s/mixit_div_sp",
    ]
    with pytest.raises(ValueError, match="overrides of mae: expected"):
        run(repository, *models, "--mae.mask_ratio=0.7")


def test_encoder_that_is_there_keeps_what_it_was_made_with(repository):
    behave(repository, **{"performer_mae/3s/mixit": "fail"})
    command = ["--models", "performer_mae", "--lengths", "3"]
    command += ["--losses", "mixit"]
    assert run(repository, *command, "--performer.d_model=32") == 1
    message = "overrides of performer: expected .*32.*, got .*16"
    with pytest.raises(ValueError, match=message):
        run(repository, *command, "--performer.d_model=16")
    behave(repository)
    # of no concern to the encoder
    more = "--performer.d_model=32", "--performer.lr=1"
    assert run(repository, *command, *more) == 0
    assert names(repository) == ["performer_mae/3s/mixit"]
    assert keys_of(calls(repository)[0])["lr"] == "1"


@pytest.mark.parametrize(
    "wrong",
    (
        ["--lr=abc"],
        ["--seed=7"],
        ["--dataset=stems"],
        ["--epochs=7"],
        ["--performer.lr=7"],
    ),
)
def test_where_nothing_is_done_all_may_be_mended(wrong, repository):
    behave(repository, all="fail")
    assert run(repository, "--lengths", "3", *wrong) == 1
    behave(repository)
    assert run(repository, "--lengths", "3", "--lr=0.2") == 0
    assert len(names(repository)) == 4
    config = json.loads((repository / "out" / "grid.json").read_text())
    assert config["overrides"] == {"lr": "0.2"}
    assert config["seed"] == 1234 and config["dataset"] == "mixtures"


def test_what_can_go_on_keeps_its_settings(repository):
    behave(repository, **{"performer/3s/mixit": "hang"})
    process = start(repository)
    wait_for(lambda: calls(repository, "hangs"))
    process.terminate()
    process.communicate(timeout=30)
    saved = repository / "out/performer/3s/mixit/run/save/CKPT+1"
    saved.mkdir(parents=True)
    with pytest.raises(ValueError, match="overrides of performer: expected"):
        run(repository, "--performer.lr=7")
    # without a checkpoint there is nothing to lose
    saved.rmdir()
    behave(repository)
    assert run(repository, "--performer.lr=7") == 0


@pytest.mark.parametrize("name", ("pretrain", "performer_mae/3s/mixit"))
def test_mended_training_does_not_go_on_with_old_checkpoints(name, repository):
    behave(repository, **{name: "fails late"})
    command = ["--models", "performer_mae", "--lengths", "3"]
    command += ["--losses", "mixit"]
    group = "mae" if name == "pretrain" else "performer"
    for yaml in (repository / "hparams").glob("*.yaml"):
        yaml.write_text(yaml.read_text() + "num_workers: 2\n")
    assert run(repository, *command, f"--{group}.lr=9") == 1
    folder = repository / "out" / name
    run_folder = folder if name == "pretrain" else folder / "run"
    aside = run_folder.with_name(f"{run_folder.name}_1")
    # the same goes on, also with what makes no difference
    again = f"--{group}.lr=9", f"--{group}.num_workers=1"
    assert run(repository, *command, *again) == 1
    assert not aside.exists()
    behave(repository)
    assert run(repository, *command, f"--{group}.lr=8") == 0
    assert list((aside / "save").iterdir())
    assert not (run_folder / "save").exists()
    assert record(repository, name)["status"] == "done"
    assert len(read_csv(repository, "cells.csv")) == 1


def test_record_that_was_cut_is_named(repository):
    run(repository, "--lengths", "3")
    path = repository / "out" / "performer/3s/mixit/cell.json"
    path.write_text('{"status": "do')
    with pytest.raises(
        ValueError, match=r"performer.3s.mixit.cell\.json.*JSON"
    ):
        run(repository, "--lengths", "3")


def test_an_encoder_of_other_sizes_is_refused_before_it_is_made(repository):
    message = "does not fit: d_model is 32, of the separators 16"
    models = "--models", "performer_mae", "performer"
    for more in ((), ("--dry-run",)):
        with pytest.raises(ValueError, match=message):
            run(repository, *models, "--mae.d_model=32", *more)
    assert names(repository) == []
    assert not (repository / "out").exists()


def test_changed_yaml_is_refused(repository):
    run(repository, "--lengths", "3")
    path = repository / "hparams" / "convtasnet_mixit.yaml"
    path.write_text(path.read_text() + "more: 1\n")
    with pytest.raises(ValueError, match=r"hparams/convtasnet_mixit\.yaml"):
        run(repository, "--lengths", "3")
    # of no concern to the other model
    assert run(repository, "--models", "performer", "--lengths", "3") == 0


def test_grid_grows(repository):
    run(repository, "--models", "performer", "--lengths", "3")
    behave(repository)
    # another model may bring its own overrides
    assert run(repository, "--lengths", "3", "--convtasnet.lr=3") == 0
    assert names(repository) == [
        "convtasnet/3s/mixit",
        "convtasnet/3s/mixit_div_sp",
    ]
    behave(repository)
    run(repository, "--models", "performer", "--lengths", "5", "3")
    assert len(names(repository)) == 2
    # the tables show what earlier calls ran
    assert len(read_csv(repository, "cells.csv")) == 6
    with pytest.raises(ValueError, match="overrides of convtasnet"):
        run(repository, "--lengths", "3")


def test_folder_with_other_things_is_left_alone(repository):
    (repository / "out").mkdir()
    (repository / "out" / "thesis.tex").write_text("all my work")
    with pytest.raises(ValueError, match=r"--output_folder.*thesis\.tex"):
        run(repository)
    assert list(snapshot(repository / "out")) == ["thesis.tex"]


# --- devices -----------------------------------------------------------------


def test_two_devices_run_two_cells_at_once(repository, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    behave(repository, all="slow")
    more = ("--lengths", "3", "--losses", "mixit", "--devices")
    assert run(repository, *more, "cpu", "cpu") == 0
    started = [call["time"] for call in calls(repository)]
    ended = [call["time"] for call in calls(repository, "end")]
    assert len(ended) == 2 and max(started) < min(ended)
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    assert [call["threads"] for call in calls(repository)] == [threads] * 2


def test_one_device_runs_one_cell_at_a_time(repository, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    behave(repository, all="slow")
    run(repository, "--lengths", "3", "--losses", "mixit")
    assert calls(repository)[1]["time"] > calls(repository, "end")[0]["time"]
    assert calls(repository)[0]["threads"] is None


def fake_nvidia_smi(folder, gpus):
    """One that lists so many GPUs; with -1 it fails."""
    lines = [
        f"echo 'GPU {number}: NVIDIA H200 (UUID: GPU-uuid-{number})'"
        for number in range(gpus)
    ] or ["echo 'No devices found.'"]
    if gpus < 0:
        lines = ["echo 'GPU 0: has failed'", "exit 9"]
    program = folder / "nvidia-smi"
    program.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("gpus", "chosen", "expected"),
    (
        (2, None, ("cuda:0", "cuda:1")),
        (0, None, ("cpu",)),
        (None, None, ("cpu",)),  # no nvidia-smi
        (-1, None, ("cpu",)),  # no driver
        (3, "1,2", ("cuda:0", "cuda:1")),
        (3, " 1", ("cuda:0",)),
        (3, "", ("cpu",)),
        (3, "-1", ("cpu",)),
        (3, "0,7,1", ("cuda:0",)),
        (3, "GPU-uuid-2,GPU-uuid-0", ("cuda:0", "cuda:1")),
        (3, "GPU-other", ("cpu",)),
        (0, "0", ("cpu",)),
    ),
)
def test_devices_are_all_gpus(gpus, chosen, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    monkeypatch.setenv("PATH", str(tmp_path))
    if gpus is not None:
        fake_nvidia_smi(tmp_path, gpus)
    assert grid_processes.visible_devices() == expected


def test_default_devices_are_the_visible_ones(repository, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake_nvidia_smi(repository, 2)
    monkeypatch.setenv("PATH", str(repository), prepend=os.pathsep)
    behave(repository, all="slow")
    assert run(repository, "--lengths", "3", devices=None) == 0
    devices = {keys_of(call)["device"] for call in calls(repository)}
    assert devices == {"cuda:0", "cuda:1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    behave(repository)
    assert run(repository, "--lengths", "5", devices=None) == 0
    assert {keys_of(call)["device"] for call in calls(repository)} == {"cpu"}


def test_every_cell_has_its_device(repository):
    behave(repository, all="slow")
    run(repository, "--lengths", "3", "--devices", "cuda:0", "cuda:1")
    devices = [keys_of(call)["device"] for call in calls(repository)]
    assert set(devices) == {"cuda:0", "cuda:1"}
    assert record(repository, names(repository)[0])["memory_gb"] is None


# --- dry run -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "expected"),
    (
        # 0.25 s and 2 s a batch, 7 batches an epoch
        ("--epochs=4", [("4 epochs", "0.12"), ("4 epochs", "0.93")]),
        ("--steps=60", [("60 steps", "0.25"), ("60 steps", "2.00")]),
        ("--minutes=1", [("240 steps", "1.00"), ("30 steps", "1.00")]),
    ),
)
def test_dry_run_estimates_and_leaves_nothing(
    budget, expected, repository, capsys
):
    assert run(repository, "--dry-run", budget, "--losses", "mixit") == 0
    text = capsys.readouterr().out
    assert not (repository / "out").exists()
    assert all(call["debug"] for call in calls(repository))
    assert len(calls(repository)) == 4
    folder = keys_of(calls(repository)[0])["output_folder"]
    assert not pathlib.Path(folder).exists()
    for model, (words, minutes) in zip(("performer", "convtasnet"), expected):
        row = re.search(rf"\| {model}/3s/mixit \|(.*)\|", text)[1]
        cells = [cell.strip() for cell in row.split("|")]
        assert (cells[0], cells[2]) == (words, minutes)
        assert cells[3] == "1234" or cells[3] == "1235"
    total = sum(float(minutes) for _, minutes in expected) * 2
    row = re.search(r"\| 4 trainings \|(.*)\|", text)[1]
    assert float(row.split("|")[2]) == pytest.approx(total, abs=0.03)
    assert "--segment_seconds=30" in text


def test_dry_run_shows_out_of_memory_and_failures(repository, capsys):
    behave(
        repository,
        **{"performer/3s/mixit": "oom", "convtasnet/3s/mixit": "fail"},
    )
    train = repository / "recipes" / "train.py"
    # the probe's folder does not end in run
    train.write_text(train.read_text().replace("[-4:-1]", "[-3:]"))
    more = ("--dry-run", "--losses", "mixit")
    assert run(repository, *more) == 1
    text = capsys.readouterr().out
    assert re.search(r"\| performer/3s/mixit \| 100 epochs \| OOM", text)
    assert re.search(r"\| convtasnet/3s/mixit \| 100 epochs \| failed", text)
    assert "failed: ValueError: this went wrong" in text


def test_dry_run_without_probe_runs_nothing(repository, capsys):
    assert run(repository, "--dry-run", "--no-probe", "--minutes=3") == 0
    text = capsys.readouterr().out
    assert calls(repository) == [] and not (repository / "out").exists()
    assert text.count("recipes/train.py") == 8
    assert "| performer/30s/mixit | 3 minutes |" in text


def test_dry_run_tells_of_another_configuration(repository):
    run(repository, "--lengths", "3")
    before = snapshot(repository / "out")
    with pytest.raises(ValueError, match="seed: expected 1234, got 2"):
        run(repository, "--dry-run", "--seed=2")
    assert snapshot(repository / "out") == before


def test_dry_run_tries_performers_with_an_encoder_of_its_own(repository):
    more = ("--models", "performer_mae", "--lengths", "3", "--dry-run")
    assert run(repository, *more) == 0
    first, *others = calls(repository)
    folder = pathlib.Path(keys_of(first)["output_folder"])
    for call in others:
        encoder = pathlib.Path(keys_of(call)["pretrained_encoder"])
        assert encoder == folder / "debug" / "encoder"


# --- tables and figures ------------------------------------------------------


def rows_of(text, title):
    """Rows of a table in tables.md, as lists of cells."""
    part = text.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A grid of all models with a cell out of memory."""
    repository = make_repository(tmp_path_factory.mktemp("finished"))
    behave(repository, **{"convtasnet/30s/mixit_div_sp": "oom"})
    models = ("performer_mae", "performer", "convtasnet")
    more = ("--models", *models, "--performer.lr=2")
    assert run(repository, *more, figures=True) == 0
    return repository


# Rows of the paper's tables (section 5) by number.
PAPER = {
    1: """3 -9.11 1.66
          5 -8.52 2.00
          10 -9.73 2.33
          30 OOM 3.52""",
    2: """3 17.05 12.57 0.74
          5 20.33 16.04 0.79
          10 43.25 35.42 0.82
          30 OOM 46.33 -""",
    3: """3 1.66 2.60
          5 2.00 3.16
          10 2.33 3.52
          30 3.52 OOM""",
    4: """3 2.60 0.59 6.36
          5 3.16 0.61 5.93
          10 3.87 0.52 6.29
          30 - - -""",
    5: """3 2.56 0.49 5.60
          5 3.32 0.35 4.48
          10 2.26 0.44 5.45
          30 - - -""",
}
# Ours at 3 and 30 s, with the stand-in.
OURS = {
    1: ("7.25 3.75", "34.25 30.75"),
    2: ("0.20 0.025 0.12", "0.20 0.025 0.12"),
    3: ("3.75 3.75", "30.75 30.75"),
    4: ("3.75 0.50 5.75", "30.75 0.50 5.75"),
    5: ("3.50 0.50 6.00", "30.50 0.50 6.00"),
}


@pytest.mark.parametrize("number", PAPER)
def test_tables_have_the_papers_values_and_ours(number, finished):
    text = (finished / "out" / "tables.md").read_text()
    head, _, *rows = rows_of(text, f"Table {number}:")
    assert [x.removeprefix("paper: ") for x in head[1::2]] == head[2::2]
    paper = [line.split() for line in PAPER[number].splitlines()]
    assert [row[:1] + row[1::2] for row in rows] == paper
    ours = {row[0]: row[2::2] for row in rows}
    short, long = OURS[number]
    assert (ours["3"], ours["30"]) == (short.split(), long.split())
    # lengths that were not run show what the paper has
    for length in ours.keys() - {"3", "30"}:
        assert set(ours[length]) <= {"not run", "-"}


def test_what_the_paper_has_not_stands_after_its_tables(finished):
    text = (finished / "out" / "tables.md").read_text()
    assert text.index("## Table 5") < text.index("# Beside the paper")
    text = text.split("# Beside the paper")[1]
    key = ["30", "mixit_div_sp", "convtasnet"]
    for title, row in (
        ("Separation", [*["OOM"] * 7]),
        ("Over-fitting", [*["OOM"] * 3, "-"]),
    ):
        assert [*key, *row] in rows_of(text, title)
    key = ["3", "mixit", "performer"]
    for title, row in (
        # SI-SNR, si_snri, grouped, sdr (null), masks, items
        ("Separation", "3.75 0.55 5.00 - 0.50 5.75 12"),
        # training, validation, test, gap
        ("Over-fitting", "5.00 4.00 3.75 1.00"),
    ):
        assert [*key, *row.split()] in rows_of(text, title)
    (row,) = [x for x in rows_of(text, "Time and") if x[:3] == key]
    assert row[3:6] == ["0.25", "1.50", "100.00"]
    assert row[6] in ("1234", "1235")


def test_tables_say_how_they_came_about(finished):
    text = (finished / "out" / "tables.md").read_text()
    head = text.split("## Table 1")[0]
    for words in (
        "Budget of a cell: 100 epochs",
        "Data: mixtures in music",
        "Seed: 1234",
        "Device: cpu",
        "Overrides of performer: `--lr=2`",
        "Test items: 3 s: 12, 30 s: 12",
        "11 done",
        "1 OOM",
        "Written: 2",
    ):
        assert words in head, words


def test_no_path_of_the_machine_is_in_the_results(repository):
    run(
        repository,
        f"--performer.pretrained_encoder={repository / 'enc'}",
        f"--test_folder={repository / 'music'}",
    )
    paths = [repository / "out" / "tables.md"]
    paths += (repository / "out").glob("*.csv")
    assert len(paths) == 10
    for path in paths:
        text = path.read_text()
        assert str(repository) not in text and "/tmp/" not in text
    assert "--pretrained_encoder=enc" in paths[0].read_text()


def test_csvs_have_the_figures(finished):
    cells = read_csv(finished, "cells.csv")
    assert len(cells) == 12
    assert list(cells[0]) == list(grid_tables.CELL_COLUMNS)
    for row in cells:
        if row["status"] == "oom":
            assert row["mixture_si_snr"] == row["peak_memory_mb"] == ""
            continue
        model = 4.0 if row["model"] == "convtasnet" else 0.5
        assert float(row["step_seconds"]) == 0.5 * model
        assert float(row["epoch_seconds"]) == 3.0 * model
        assert float(row["peak_memory_mb"]) == 1234.5
        assert float(row["total_seconds"]) == 100.0
        assert int(row["steps"]) == 14 and int(row["epochs"]) == 2
        assert row["sdr"] == ""
    for name in [f"table{number}" for number in PAPER]:
        rows = read_csv(finished, f"{name}.csv")
        assert [float(row["length (s)"]) for row in rows] == [3, 5, 10, 30]
    for name in ("measures", "costs", "over_fitting"):
        assert len(read_csv(finished, f"{name}.csv")) == 12


def test_epoch_seconds_of_a_budget_in_steps(repository):
    run(repository, "--steps=3", "--lengths", "3", "--losses", "mixit")
    seconds = {
        row["model"]: (float(row["epoch_seconds"]), int(row["steps"]))
        for row in read_csv(repository, "cells.csv")
    }
    # 7 batches of 0.25 s and 2 s: whole epochs, of which 3 steps are a part
    assert seconds == {"performer": (1.75, 3), "convtasnet": (14.0, 3)}
    text = (repository / "out" / "tables.md").read_text()
    assert "median time of a batch, times the batches of an epoch" in text
    assert "Budget of a cell: 3 optimizer steps" in text


def test_tables_are_there_after_the_first_cell(repository):
    behave(repository, **{"convtasnet/3s/mixit": "hang"})
    process = start(repository)
    try:
        wait_for(lambda: len(names(repository)) == 2)
        assert [row["status"] for row in read_csv(repository, "cells.csv")] == [
            "done"
        ]
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_figures_show_the_cells(finished):
    paths = sorted((finished / "out" / "figures").glob("*.png"))
    assert [path.stem for path in paths] == [
        *("epoch_seconds", "masks", "peak_memory", "si_snr")
    ]
    for path in paths:
        image = imread(path)
        assert min(image.shape[:2]) > 400
        # more than axes on white
        colours = np.unique(
            (image[..., :3] * 7).astype(int).reshape(-1, 3), axis=0
        )
        assert len(colours) > 10, path.name


def test_figure_has_all_lines_and_marks_out_of_memory(finished):
    cells = grid_tables.load_cells(finished / "out")
    axis = Figure().subplots()
    grid_report.draw(axis, cells, "mixture_si_snr")
    _, labels = axis.get_legend_handles_labels()
    assert len(labels) == 6 + 3
    assert "paper: performer_mae" in labels
    (line,) = [
        line
        for line in axis.lines
        if line.get_label() == "performer, mixit_div_sp"
    ]
    assert line.get_xydata().tolist() == [[3.0, 3.5], [30.0, 30.5]]
    assert [text.get_text() for text in axis.texts] == [
        *("OOM convtasnet, mixit_div_sp", "OOM paper: convtasnet"),
        "OOM paper: performer",
    ]
    assert "(s)" in axis.get_xlabel()


# --- the parent --------------------------------------------------------------


def test_parent_loads_no_torch(repository):
    code = f"""
import runpy, sys
sys.argv = ["reproduce.py", *{arguments(repository, "--dry-run")!r}]
try:
    runpy.run_path({str(repository / "recipes" / "reproduce.py")!r},
                   run_name="__main__")
except SystemExit as error:
    assert not error.code, error.code
heavy = {{"torch", "speechbrain", "matplotlib", "numpy"}}
print("loaded", *sorted(heavy & sys.modules.keys()))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "loaded", result.stderr
    assert len(calls(repository)) == 8


# --- the real recipe ---------------------------------------------------------


TINY = {
    "sample_rate": 8000,
    "num_workers": 0,
    "batch_size": 2,
    "num_spks": 3,
    "performer.n_fft": 128,
    "performer.hop_length": 32,
    "performer.num_layers": 1,
    "performer.d_model": 16,
    "performer.nhead": 2,
    "performer.n_features": 16,
    "performer.dropout": 0,
    "convtasnet.num_channels": 16,
    "convtasnet.kernel_size": 4,
    "mae.batch_size": 2,
    "mae.num_workers": 0,
    "mae.segment_seconds": 0.3,
}


def run_real(tmp_path, *more):
    """Trains tiny models by the recipes themselves."""
    music = tmp_path / "music"
    rng = np.random.default_rng(0)
    for number in range(7):
        folder = music / f"song {number}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("one", "two"):
            sig = 0.1 * rng.standard_normal(9600)
            soundfile.write(folder / f"{name}.wav", sig, 8000)
    command = [
        *(sys.executable, str(ROOT / "recipes" / "reproduce.py")),
        *(f"--data_folder={music}", "--dataset=stems", "--lengths", "0.3"),
        *("--devices", "cpu"),
        f"--output_folder={tmp_path / 'out'}",
        *(f"--{key}={value}" for key, value in TINY.items()),
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_real_training(tmp_path):
    more = ("--models", "performer", "--losses", "mixit", "--minutes=0.002")
    text = run_real(tmp_path, *more, "--dry-run")
    row = re.search(r"\| performer/0\.3s/mixit \|(.*)\|", text)[1]
    assert all(float(cell.split()[0]) > 0 for cell in row.split("|"))
    assert not (tmp_path / "out").exists()
    run_real(tmp_path, *more)
    cell = tmp_path / "out" / "performer" / "0.3s" / "mixit"
    found = json.loads((cell / "cell.json").read_text())
    metrics = json.loads((cell / "run" / "metrics.json").read_text())
    assert found["status"] == "done"
    assert metrics["history"][-1]["step"] == found["steps"] >= 1
    with open(tmp_path / "out" / "cells.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    for name in ("mixture_si_snr", "train_mixture_si_snr", "si_snri", "sdr"):
        assert float(row[name]) == pytest.approx(metrics[name], rel=1e-6)
    assert float(row["epoch_seconds"]) == pytest.approx(
        metrics["step_seconds"] * metrics["batches"], rel=1e-6
    )


@pytest.mark.slow
def test_real_models_train_on_the_same_songs(tmp_path):
    run_real(tmp_path, "--steps=2", "--losses", "mixit_div_sp")
    out = tmp_path / "out"
    assert (out / "pretrain" / "encoder" / "encoder.ckpt").is_file()
    tests = set()
    for model in grid_tables.PAPER_MODELS:
        run = out / model / "0.3s" / "mixit_div_sp" / "run"
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["history"][-1]["step"] == 2
        tests.add((run / "manifests" / "test.jsonl").read_text())
    assert len(tests) == 1
    with open(out / "cells.csv", encoding="utf-8") as file:
        first, *_ = csv.DictReader(file)
    assert first["model"] == "performer_mae"
    assert first["test_songs_pretrained_on"] == "0"
