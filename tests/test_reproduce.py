"""The grid of the paper's experiment, with a stand-in for its runs."""

import csv
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
from matplotlib.image import imread

from trackformer_sb.training import grid, grid_tables

ROOT = pathlib.Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks" / "results" / "grid"

# Stands in for train.py and pretrain.py: writes what they write, and ends as
# behaviour.json beside it tells it to.
STUB = """
import json, os, pathlib, sys, time

here = pathlib.Path(__file__).parent
keys = dict(w[2:].split("=", 1) for w in sys.argv[2:] if "=" in w)
debug = "--debug" in sys.argv
out = pathlib.Path(keys["output_folder"])
pretraining = pathlib.Path(__file__).stem == "pretrain"
name = "pretrain" if pretraining else "/".join(out.parts[-3:])
behaviour = json.loads((here / "behaviour.json").read_text())
how = behaviour.get(name, behaviour.get("all"))

def note(event):
    found = {"event": event, "name": name, "debug": debug, "pid": os.getpid()}
    found |= {"yaml": pathlib.Path(sys.argv[1]).name, "keys": keys}
    found |= {"time": time.time(), "threads": os.environ.get("OMP_NUM_THREADS")}
    with open(here / "calls.jsonl", "a") as file:
        file.write(json.dumps(found) + "\\n")

note("start")
if how == "allocate":
    hog = bytearray(3 * 2**30)
if how == "fail":
    sys.exit("ValueError: this went wrong")
if how == "hang":
    time.sleep(60)
if how == "slow":
    time.sleep(0.8)
length = float(keys.get("segment_seconds", 3))
cost = 4.0 if "convtasnet" in sys.argv[1] else 0.5
metrics = {
    "mixture_si_snr": length + cost, "si_snri": length / 10, "sdr": None,
    "train_mixture_si_snr": 5.0, "valid_mixture_si_snr": 4.0,
    "mask_overlap": 0.5, "effective_mask_count": 6.0,
    "test_items": 12, "epochs": 2, "batches": 7, "steps": 14,
    "step_seconds": cost, "epoch_seconds": 3.0 * cost,
    "peak_memory_mb": 1234.5, "device": keys["device"],
    "test_songs_pretrained_on": behaviour.get("heard"),
}
out = out / "debug" if debug else out
out.mkdir(parents=True, exist_ok=True)
(out / "metrics.json").write_text(json.dumps(metrics))
note("end")
"""
KEYS = "sample_rate segment_seconds lr grad_accumulation_factor num_workers"
SEPARATION = f"{KEYS} lambda_diversity num_spks"
YAMLS = {
    "performer_mixit.yaml": f"{SEPARATION} d_model",
    "performer_mixit_mae.yaml": f"{SEPARATION} d_model",
    "convtasnet_mixit.yaml": f"{SEPARATION} num_channels",
    "audio_mae_blocks.yaml": f"{KEYS} d_model mask_ratio",
}
ONE_LENGTH = ("--lengths", "3", "--losses", "mixit")


@pytest.fixture
def repository(tmp_path):
    """Recipes and yamls like ours, with the stand-in."""
    root = tmp_path / "repository"
    for name in ("recipes", "hparams", "music"):
        (root / name).mkdir(parents=True)
    shutil.copy(ROOT / "recipes" / "reproduce.py", root / "recipes")
    for name in ("train", "pretrain"):
        (root / "recipes" / f"{name}.py").write_text(STUB)
    for name, keys in YAMLS.items():
        text = "".join(f"{key}: 1\n" for key in keys.split())
        (root / "hparams" / name).write_text(text)
    behave(root)
    return root


def behave(root, **behaviour):
    """How the stand-ins end from now on, by cell or for all."""
    path = root / "recipes" / "behaviour.json"
    path.write_text(json.dumps(behaviour))
    (root / "recipes" / "calls.jsonl").write_text("")


def calls(root, event="start"):
    lines = (root / "recipes" / "calls.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if x["event"] == event]


def names(root):
    return [call["name"] for call in calls(root)]


def arguments(root, more):
    return [
        *(f"--data_folder={root / 'music'}", "--dataset=mixtures"),
        *(f"--output_folder={root / 'out'}", "--devices", "cpu"),
        *("--models", "performer", "convtasnet", "--lengths", "3", "30"),
        *more,
    ]


def run(root, *more):
    """Runs the recipe in this process; returns its exit status."""
    path = root / "recipes" / "reproduce.py"
    spec = importlib.util.spec_from_file_location("recipe_reproduce", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as context:
        # they take longer than all the rest
        context.setattr(grid, "write_figures", lambda folder: None)
        return module.main(arguments(root, more))


def start(root, *more):
    """Runs the recipe as a user does."""
    script = root / "recipes" / "reproduce.py"
    return subprocess.Popen(
        [sys.executable, str(script), *arguments(root, more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def record(root, name):
    path = root / "out" / name / "cell.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- commands ----------------------------------------------------------------


def test_cells_run_in_order_with_their_own_keys(repository):
    more = ("--seed=7", "--lambda_diversity=0.3", "--convtasnet.lr=2")
    assert run(repository, *more) == 0
    assert names(repository) == [
        f"{model}/{length}s/{loss}"
        for length in (3, 30)
        for loss in ("mixit", "mixit_div_sp")
        for model in ("performer", "convtasnet")
    ]
    for call in calls(repository):
        model, length, loss = call["name"].split("/")
        assert call["yaml"] == f"{model}_mixit.yaml"
        weight = "0" if loss == "mixit" else "0.3"
        expected = {
            "data_folder": str(repository / "music"),
            "dataset": "mixtures",
            "seed": "7",
            "device": "cpu",
            "segment_seconds": length[:-1],
            "number_of_epochs": "100",
            "lambda_diversity": weight,
            "lr": "2" if model == "convtasnet" else None,
        }
        assert {key: call["keys"].get(key) for key in expected} == expected


def test_pretraining_has_the_keys_that_the_encoder_shares(repository):
    models = ("--models", "performer_mae", "performer", "convtasnet")
    own = ("--performer.d_model=32", "--mae.mask_ratio=0.5", "--num_spks=4")
    more = (*models, *own, "--sample_rate=8000", "--precision=bf16")
    assert run(repository, *ONE_LENGTH, *more, "--pretrain_steps=5") == 0
    first, with_encoder, *others = calls(repository)
    assert first["yaml"] == "audio_mae_blocks.yaml"
    expected = {"d_model": "32", "mask_ratio": "0.5", "precision": "bf16"}
    expected |= {"sample_rate": "8000", "optimizer_step_limit": "5"}
    assert expected.items() <= first["keys"].items()
    assert "num_spks" not in first["keys"]
    encoder = str(repository / "out" / "pretrain" / "encoder")
    assert with_encoder["keys"]["pretrained_encoder"] == encoder
    assert [call["keys"].get("d_model") for call in others] == ["32", None]
    assert all("pretrained_encoder" not in call["keys"] for call in others)


@pytest.mark.parametrize(
    ("more", "message"),
    (
        (["--d_model=8"], r"hparams/convtasnet_mixit.*--performer\.d_model"),
        (["--segment_seconds=8"], "an option of its own.*--segment_seconds"),
        (["--perfomer.lr=8"], r"unknown argument '--perfomer\.lr=8'.*mae"),
        (["--learning"], "unknown argument '--learning'.*--key=value"),
        (["--test_folder=/no/such"], "--test_folder: no folder /no/such"),
    ),
)
def test_bad_input_is_named_before_anything_runs(more, message, repository):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(repository, *more)
    assert not (repository / "out").exists()


# --- budget ------------------------------------------------------------------


def test_minutes_become_steps_measured_once_for_each_network(repository):
    models = ("--models", "performer_mae", "performer", "convtasnet")
    more = ("--minutes=1", "--convtasnet.grad_accumulation_factor=2")
    assert run(repository, "--lengths", "3", *models, *more) == 0
    probes = [call["name"] for call in calls(repository) if call["debug"]]
    assert len(probes) == 3
    for call in calls(repository):
        if not call["debug"]:
            # 0.5 s a batch, 4 s of ConvTasNet
            steps = "7" if "convtasnet" in call["name"] else "120"
            assert call["keys"]["optimizer_step_limit"] == steps
    assert list((repository / "out").glob("**/probe")) == []


def test_epoch_of_a_budget_in_steps(repository):
    run(repository, "--steps=3", *ONE_LENGTH)
    assert calls(repository)[0]["keys"]["optimizer_step_limit"] == "3"
    # whole epochs of 7 batches of 0.5 s and 4 s, of which 3 steps are a part
    rows = rows_of(repository / "out" / "cells.csv")
    assert [row["epoch_seconds"] for row in rows] == ["3.5", "28"]
    assert [row["steps"] for row in rows] == ["3", "3"]


# --- what goes wrong ---------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said", "status"),
    (
        (0, "out of memory", "done"),
        (1, "torch.OutOfMemoryError: CUDA out of memory.", "oom"),
        (1, "DefaultCPUAllocator: can't allocate memory: 9 bytes", "oom"),
        (1, "MemoryError", "oom"),
        (-9, "", "oom"),
        (137, "epoch 3", "oom"),
        (1, "ValueError: lr", "failed"),
        (-11, "Segmentation fault", "failed"),
    ),
)
def test_outcome_of_a_process(code, said, status):
    assert grid.outcome(code, [said])[0] == status


def test_out_of_memory_is_a_result(repository):
    behave(repository, **{"convtasnet/3s/mixit": "allocate"})
    assert run(repository, *ONE_LENGTH, "--memory_gb=0.5") == 0
    found = record(repository, "convtasnet/3s/mixit")
    assert (found["status"], found["memory_gb"]) == ("oom", 0.5)
    assert record(repository, "performer/3s/mixit")["status"] == "done"
    (row, *_) = rows_of(repository / "out" / "table1.csv")
    assert row["ConvTasNet (dB)"] == "OOM"
    # a rerun leaves it, unless asked for
    behave(repository)
    assert run(repository, *ONE_LENGTH) == 0
    assert names(repository) == []
    assert run(repository, *ONE_LENGTH, "--retry_oom") == 0
    assert names(repository) == ["convtasnet/3s/mixit"]


def test_failed_cell_is_reported_and_may_be_mended(repository):
    behave(repository, **{"convtasnet/3s/mixit": "fail"})
    process = start(repository, *ONE_LENGTH, "--convtasnet.lr=abc")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors == "failed: convtasnet/3s/mixit\n"
    assert "(ValueError: this went wrong), see" in output
    behave(repository)
    assert run(repository, *ONE_LENGTH, "--convtasnet.lr=1") == 0
    assert names(repository) == ["convtasnet/3s/mixit"]


def test_failed_pretraining_stops_what_needs_it_only(repository):
    behave(repository, pretrain="fail")
    more = (*ONE_LENGTH, "--models", "performer_mae", "performer")
    assert run(repository, *more) == 1
    assert names(repository) == ["pretrain", "performer/3s/mixit"]
    found = record(repository, "performer_mae/3s/mixit")
    assert found["reason"] == "no encoder: pretrain is failed"
    behave(repository)
    assert run(repository, *more) == 0
    assert names(repository) == ["pretrain", "performer_mae/3s/mixit"]


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_stopped_grid_ends_its_processes_and_goes_on(number, repository):
    hang = ("performer/30s/mixit", "convtasnet/30s/mixit")
    behave(repository, **dict.fromkeys(hang, "hang"))
    more = ("--losses", "mixit", "--devices", "cpu", "cpu")
    process = start(repository, *more)
    wait_for(lambda: {*hang} <= {*names(repository)})
    # nobody else may write to the folder
    with pytest.raises(ValueError, match="another process runs the grid"):
        run(repository, *more)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == "stopped; the same command goes on from here\n"
    for call in calls(repository):
        with pytest.raises(ProcessLookupError):
            os.kill(call["pid"], 0)
    behave(repository)
    assert run(repository, *more) == 0
    assert {*names(repository)} == {*hang}


@pytest.mark.parametrize(
    ("more", "message"),
    (
        ("--seed=2", "Data: expected .*--seed=1234.*, got .*--seed=2"),
        ("--epochs=7", "Budget of a cell: expected 100 epochs.*, got 7"),
        ("--performer.lr=7", "Overrides of performer: expected , got .*lr=7"),
    ),
)
def test_other_settings_are_refused(more, message, repository):
    run(repository, *ONE_LENGTH)
    behave(repository)
    with pytest.raises(ValueError, match=message):
        run(repository, more)
    # of no concern to what was run
    assert run(repository, *ONE_LENGTH, "--models", "convtasnet") == 0
    assert names(repository) == []


def test_several_devices_run_cells_at_once(repository):
    behave(repository, all="slow")
    assert run(repository, *ONE_LENGTH, "--devices", "cpu", "cuda:0") == 0
    started, ended = calls(repository), calls(repository, "end")
    assert max(x["time"] for x in started) < min(x["time"] for x in ended)
    assert {x["keys"]["device"] for x in started} == {"cpu", "cuda:0"}
    behave(repository)
    run(repository, "--losses", "mixit_div_sp", "--devices", "cpu", "cpu")
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    assert {call["threads"] for call in calls(repository)} == {threads}


# --- dry run -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "minutes"),
    (
        # 0.5 s and 4 s a batch, 7 batches an epoch, at 30 s ten times as long
        ("--epochs=4", ("0.23", "1.87", "0.23", "1.87", "4.20")),
        ("--steps=60", ("0.50", "4.00", "5.00", "40.00", "49.50")),
        ("--minutes=1", ("1.00", "1.00", "1.00", "0.67", "3.67")),
    ),
)
def test_dry_run_estimates_and_leaves_nothing(
    budget, minutes, repository, capsys
):
    more = ("--dry-run", "--losses", "mixit", "--models")
    assert run(repository, *more, "performer", "convtasnet", budget) == 0
    assert not (repository / "out").exists()
    # once for each model, at the shortest segments
    seconds = [call["keys"]["segment_seconds"] for call in calls(repository)]
    assert seconds == ["3", "3"]
    rows = re.findall(r"\| (\S+) \|\n", capsys.readouterr().out)
    assert tuple(rows[1:]) == minutes


def test_dry_run_needs_no_encoder_and_shows_failures(repository, capsys):
    behave(repository, all="fail")
    more = ("--models", "performer_mae", *ONE_LENGTH, "--dry-run")
    assert run(repository, *more) == 1
    _, call = calls(repository)
    assert call["keys"]["pretrained_encoder"] == "null"
    text = capsys.readouterr().out
    assert "| pretrain | 100 epochs | failed | - |" in text
    assert "pretrain: ValueError: this went wrong" in text


# --- tables ------------------------------------------------------------------


def test_recorded_cells_give_the_recorded_tables(tmp_path):
    def value(text):
        try:
            return int(text) if text.isdecimal() else float(text)
        except ValueError:
            return text or None

    cells = {}
    for row in rows_of(RECORDED / "cells.csv"):
        cell = {name: value(text) for name, text in row.items()}
        cell["length"] = float(cell["length"])
        cells[cell["length"], cell["loss"], cell["model"]] = cell
    text = (RECORDED / "tables.md").read_text()
    tables = grid_tables.paper_tables(cells) + grid_tables.our_tables(cells)
    assert len(tables) == 5 + 2
    for table in tables:
        path = tmp_path / f"{table.file}.csv"
        grid_tables.write_csv(path, table.columns, table.rows)
        assert path.read_bytes() == (RECORDED / path.name).read_bytes()
        rows = grid_tables.markdown(table.columns, table.rows)
        assert f"## {table.title}\n\n{rows}\n\n{table.notes}" in text


def test_results_are_what_the_readme_says(repository):
    behave(repository, heard=2)
    more = (f"--test_folder={repository / 'music'}", "--performer.lr=2")
    models = ("--models", "performer_mae", "performer", "convtasnet")
    assert run(repository, *more, *models) == 0
    out = repository / "out"
    text = (out / "tables.md").read_text()
    for words in (
        "Budget of a cell: 100 epochs",
        "--dataset=mixtures --seed=1234 --test_folder=music",
        "Overrides of performer: `--lr=2`",
        "Device: cpu",
        "Test items: 3 s: 12, 30 s: 12",
        "Cells: 12 done",
        "pre-training heard: 2 at 3 s",
        "| 30 | mixit | convtasnet | 5.00 | 4.00 | 34.00 | 1.00 |",
    ):
        assert words in text, words
    paths = sorted(out.glob("*.csv"))
    assert [path.stem for path in paths] == [
        *("cells", "costs", "measures", "over_fitting"),
        *(f"table{number}" for number in range(1, 6)),
    ]
    for path in (out / "tables.md", *paths):
        assert str(repository) not in path.read_text()
    rows = rows_of(out / "cells.csv")
    assert len(rows) == 12
    assert tuple(rows[0]) == grid_tables.CELL_COLUMNS
    grid_tables.write_figures(out)
    for name in ("epoch_seconds", "masks", "peak_memory", "si_snr"):
        image = imread(out / "figures" / f"{name}.png")
        assert min(image.shape[:2]) > 400


# --- the real recipe ---------------------------------------------------------

TINY = """
    --sample_rate=8000 --num_workers=0 --batch_size=2 --num_spks=3
    --performer.n_fft=128 --performer.hop_length=32 --performer.num_layers=1
    --performer.d_model=16 --performer.nhead=2 --performer.n_features=16
    --performer.dropout=0 --convtasnet.num_channels=16
    --convtasnet.kernel_size=4 --mae.segment_seconds=0.3
"""


@pytest.mark.slow
def test_real_models_train_on_the_same_songs(tmp_path):
    music, out = tmp_path / "music", tmp_path / "out"
    rng = np.random.default_rng(0)
    for number in range(7):
        folder = music / f"song {number}"
        folder.mkdir(parents=True)
        for name in ("one", "two"):
            sig = 0.1 * rng.standard_normal(9600)
            soundfile.write(folder / f"{name}.wav", sig, 8000)
    command = [
        *(sys.executable, str(ROOT / "recipes" / "reproduce.py")),
        *(f"--data_folder={music}", "--dataset=stems", "--lengths", "0.3"),
        *("--models", "performer_mae", "convtasnet", "--devices", "cpu"),
        *("--losses", "mixit_div_sp", "--steps=2"),
        *(f"--output_folder={out}", *TINY.split()),
    ]
    dry = subprocess.run(
        [*command, "--dry-run"], capture_output=True, text=True
    )
    assert dry.returncode == 0, dry.stdout + dry.stderr
    minutes = re.findall(r"\| ([\d.]+) \|\n", dry.stdout)
    assert len(minutes) == 4 and not out.exists()
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    tests = set()
    for model in ("performer_mae", "convtasnet"):
        folder = out / model / "0.3s" / "mixit_div_sp"
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["history"][-1]["step"] == 2
        tests.add((folder / "manifests" / "test.jsonl").read_text())
    assert len(tests) == 1
    first, *_ = rows_of(out / "cells.csv")
    assert first["model"] == "performer_mae"
    assert first["test_songs_pretrained_on"] == "0"
    seconds = float(first["step_seconds"]) * float(first["batches"])
    assert float(first["epoch_seconds"]) == pytest.approx(seconds, rel=1e-6)
