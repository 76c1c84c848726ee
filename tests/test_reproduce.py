"""The grid of the paper's experiment, with a stand-in for its runs."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
from recipe_runs import ROOT, write_songs

from trackformer_sb.training import grid_tables

RECORDED = ROOT / "benchmarks" / "results" / "grid"

# Stands in for train.py and pretrain.py: writes what they write, and ends as
# behaviour.json beside it tells it to.
STUB = """
import json, os, pathlib, sys

here = pathlib.Path(__file__).parent
keys = dict(w[2:].split("=", 1) for w in sys.argv[2:] if "=" in w)
debug = "debug" in keys
out = pathlib.Path(keys["output_folder"])
pretraining = pathlib.Path(__file__).stem == "pretrain"
name = "pretrain" if pretraining else "/".join(out.parts[-3:])
behaviour = json.loads((here / "behaviour.json").read_text())
how = behaviour.get(name, behaviour.get("all"))
found = {"name": name, "debug": debug, "keys": keys}
found["yaml"] = pathlib.Path(sys.argv[1]).name
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps(found) + "\\n")
if how == "allocate":
    hog = bytearray(3 * 2**30)
if how == "kill":
    os.kill(os.getpid(), 9)
if how == "fail":
    sys.exit("ValueError: this went wrong")
length = float(keys.get("segment_seconds", 3))
cost = 4.0 if "convtasnet" in sys.argv[1] else 0.5
metrics = {
    "mixture_si_snr": length + cost, "si_snri": length / 10, "sdr": None,
    "train_mixture_si_snr": 5.0, "valid_mixture_si_snr": 4.0,
    "mask_overlap": 0.5, "effective_mask_count": 6.0, "test_items": 12,
    "epochs": 2, "batches": 7, "steps": 14, "step_seconds": cost,
    "total_seconds": 9.0, "peak_memory_mb": 1234.5, "device": "cpu",
    "test_songs_pretrained_on": 2, "history": [],
}
out = out / "debug" if debug else out
out.mkdir(parents=True, exist_ok=True)
(out / "metrics.json").write_text(json.dumps(metrics))
"""
ONE_LENGTH = ("--lengths", "3", "--losses", "mixit")


@pytest.fixture
def repository(tmp_path):
    """Our yamls, with the stand-in."""
    root = tmp_path / "repository"
    for name in ("recipes", "music"):
        (root / name).mkdir(parents=True)
    shutil.copytree(ROOT / "hparams", root / "hparams")
    shutil.copy(ROOT / "recipes" / "reproduce.py", root / "recipes")
    for name in ("train", "pretrain"):
        (root / "recipes" / f"{name}.py").write_text(STUB)
    behave(root)
    return root


def behave(root, **behaviour):
    """How the stand-ins end from now on, by cell or for all."""
    path = root / "recipes" / "behaviour.json"
    path.write_text(json.dumps(behaviour))
    (root / "recipes" / "calls.jsonl").write_text("")


def calls(root):
    lines = (root / "recipes" / "calls.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def names(root):
    return [call["name"] for call in calls(root)]


def run(root, *more):
    """Runs the recipe in this process; returns its exit status."""
    path = root / "recipes" / "reproduce.py"
    spec = importlib.util.spec_from_file_location("recipe_reproduce", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = [f"--data_folder={root / 'music'}", "--dataset=mixtures"]
    words += [f"--output_folder={root / 'out'}", "--lengths", "3", "30"]
    return module.main([*words, "--models", "performer", "convtasnet", *more])


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
        expected = {
            "data_folder": str(repository / "music"),
            "dataset": "mixtures",
            "seed": "7",
            "segment_seconds": length[:-1],
            "number_of_epochs": "100",
            "lambda_diversity": "0" if loss == "mixit" else "0.3",
            "lr": "2" if model == "convtasnet" else None,
        }
        assert {key: call["keys"].get(key) for key in expected} == expected


def test_pretraining_has_the_keys_that_the_encoder_shares(repository):
    models = ("--models", "performer_mae", "performer", "convtasnet")
    own = ("--performer.d_model=32", "--mae.lr=0.5", "--num_spks=4")
    more = (*models, *own, "--sample_rate=8000", "--precision=bf16")
    assert run(repository, *ONE_LENGTH, *more, "--pretrain_steps=5") == 0
    first, with_encoder, *others = calls(repository)
    assert first["yaml"] == "audio_mae_blocks.yaml"
    expected = {"d_model": "32", "lr": "0.5", "precision": "bf16"}
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
        (["--d_model=8"], r"unknown key 'd_model' .*hparams/convtasnet_mixit"),
        (["--segment_seconds=8"], "--segment_seconds: expected --lengths"),
        (["--perfomer.lr=8"], r"unknown argument '--perfomer\.lr=8'.*mae"),
    ),
)
def test_bad_input_is_named_before_anything_runs(more, message, repository):
    with pytest.raises(ValueError, match=message):
        run(repository, *more)
    assert not (repository / "out").exists()


def test_minutes_become_steps_measured_once_for_each_network(repository):
    models = ("--models", "performer_mae", "performer", "convtasnet")
    more = ("--minutes=1", "--convtasnet.grad_accumulation_factor=2")
    assert run(repository, "--lengths", "3", *models, *more) == 0
    assert sum(call["debug"] for call in calls(repository)) == 3
    for call in calls(repository):
        if not call["debug"]:
            # 0.5 s a batch, 4 s of ConvTasNet
            steps = "7" if "convtasnet" in call["name"] else "120"
            assert call["keys"]["optimizer_step_limit"] == steps


# --- what goes wrong ---------------------------------------------------------


@pytest.mark.parametrize("how", ("allocate", "kill"))
def test_out_of_memory_is_a_result(how, repository):
    behave(repository, **{"convtasnet/3s/mixit": how})
    assert run(repository, *ONE_LENGTH, "--memory_gb=0.5") == 0
    text = (repository / "out" / "tables.md").read_text()
    assert "\n| 3 | -9.11 | OOM | 1.66 | not run |\n" in text
    # a rerun leaves it, until its mark is removed
    behave(repository)
    assert run(repository, *ONE_LENGTH) == 0
    assert names(repository) == []
    (repository / "out" / "convtasnet" / "3s" / "mixit" / "oom.txt").unlink()
    assert run(repository, *ONE_LENGTH) == 0
    assert names(repository) == ["convtasnet/3s/mixit"]


def test_failed_cell_is_reported_and_may_be_mended(repository, capsys):
    behave(repository, **{"convtasnet/3s/mixit": "fail"})
    assert run(repository, *ONE_LENGTH, "--convtasnet.lr=abc") == 1
    output, errors = capsys.readouterr()
    assert errors == "failed: convtasnet/3s/mixit\n"
    assert "failed (ValueError: this went wrong), see" in output
    behave(repository)
    assert run(repository, *ONE_LENGTH, "--convtasnet.lr=1") == 0
    assert names(repository) == ["convtasnet/3s/mixit"]


def test_other_settings_are_refused(repository):
    run(repository, *ONE_LENGTH)
    behave(repository)
    for word in ("--seed=2", "--epochs=7", "--performer.lr=7"):
        setting = word.replace("performer.", "")
        with pytest.raises(ValueError, match=f"other settings.*{setting}"):
            run(repository, word)
    # of no concern to what was run
    more = ("--models", "convtasnet", "--performer.lr=7")
    assert run(repository, *ONE_LENGTH, *more) == 0
    assert names(repository) == []


# --- dry run -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "minutes"),
    (
        # 0.5 s and 4 s a batch of 0.5 s, 7 batches an epoch
        ("--epochs=4", ("0.23", "1.87", "0.23", "1.87", "4.20")),
        ("--steps=60", ("3.00", "24.00", "30.00", "240.00", "297.00")),
        ("--minutes=1", ("1.00", "1.00", "1.00", "1.00", "4.00")),
    ),
)
def test_dry_run_estimates_and_leaves_nothing(
    budget, minutes, repository, capsys
):
    more = ("--dry-run", "--losses", "mixit")
    assert run(repository, *more, budget) == 0
    assert not (repository / "out").exists()
    # once for each model
    seconds = [call["keys"]["segment_seconds"] for call in calls(repository)]
    assert seconds == ["0.5", "0.5"]
    rows = re.findall(r"\| (\S+) \|\n", capsys.readouterr().out)
    assert tuple(rows[1:]) == minutes


def test_dry_run_needs_no_encoder_and_shows_failures(repository, capsys):
    behave(repository, all="fail")
    more = ("--models", "performer_mae", *ONE_LENGTH, "--dry-run")
    assert run(repository, *more) == 1
    assert calls(repository)[1]["keys"]["pretrained_encoder"] == "null"
    text = capsys.readouterr().out
    assert "| pretrain | 100 epochs | failed | - |" in text
    assert "pretrain: ValueError: this went wrong" in text


# --- tables ------------------------------------------------------------------


def test_recorded_cells_give_the_recorded_tables():
    def value(text):
        try:
            return int(text) if text.isdecimal() else float(text)
        except ValueError:
            return text or None

    cells = {}
    for row in rows_of(RECORDED / "cells.csv"):
        cell = {name: value(text) for name, text in row.items()}
        cells[float(row["length"]), row["loss"], row["model"]] = cell
    text = (RECORDED / "tables.md").read_text()
    assert text.endswith(grid_tables.tables(cells))


def test_results_are_those_of_the_runs(repository):
    assert run(repository, "--performer.lr=2", "--convtasnet.lr=3") == 0
    text = (repository / "out" / "tables.md").read_text()
    assert len(re.findall("^## Table [1-5]: ", text, re.M)) == 5
    for words in (
        "| 30 | OOM | 34.00 | 3.52 | not run |",
        "| 30 | OOM | 0.47 | 46.33 | not run |",
        "| 30 | - | 30.50 | - | 0.50 | - | 6.00 |",
        "| 3 | mixit | convtasnet | 7.00 | 5.00 | 4.00 | 0.30 | - | - | 0.50 |",
    ):
        assert words in text, words
    assert len(rows_of(repository / "out" / "cells.csv")) == 8


# --- the real recipe ---------------------------------------------------------

TINY = """
    --sample_rate=8000 --num_workers=0 --batch_size=2
    --performer.n_fft=128 --performer.hop_length=32 --performer.num_layers=1
    --performer.d_model=16 --performer.nhead=2 --performer.n_features=16
    --performer.dropout=0 --convtasnet.num_channels=16 --num_spks=3
    --convtasnet.kernel_size=4 --mae.segment_seconds=0.3 --device=cpu
"""


@pytest.mark.slow
def test_real_models_train_on_the_same_songs(tmp_path):
    music = write_songs(tmp_path / "music")
    out = tmp_path / "out"
    command = [
        *(sys.executable, str(ROOT / "recipes" / "reproduce.py")),
        *(f"--data_folder={music}", "--dataset=stems", "--lengths", "0.3"),
        *("--models", "performer_mae", "convtasnet"),
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
