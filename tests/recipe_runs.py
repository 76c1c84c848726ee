"""The recipes at tiny size, as the tests of each of them run them."""

import contextlib
import csv
import importlib.util
import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from speechbrain.utils.run_opts import RunOptions

from trackformer_sb import plots

ROOT = pathlib.Path(__file__).parents[1]
RATE = 8000


def load_recipe(name):
    """A recipe as a module."""
    path = ROOT / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_pictures(monkeypatch, *brains):
    """Leaves out pictures and the list of packages, most of a tiny run."""

    def nothing(*args, **kwargs):
        return None

    names = ("training_curves", "reconstruction_figure", "item_figure")
    for name in (*names, "save_figure"):
        monkeypatch.setattr(plots, name, nothing)
    for brain in brains:
        monkeypatch.setattr(brain, "log_picture", nothing)
    monkeypatch.setattr(sb.utils.logger, "get_environment_description", str)


@contextlib.contextmanager
def apart():
    """What tests share is trained in here: it leaves no trace behind."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    # what runs after it in this process is not to be in its log
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, logging.FileHandler):
            logging.getLogger().removeHandler(handler)
            handler.close()


def write_songs(folder, num_songs=7, seconds=1.2, stems=True):
    """Tones and noise: songs with two stems, or finished mixtures."""
    rng = np.random.default_rng(0)
    time = np.arange(int(seconds * RATE)) / RATE
    for number in range(num_songs):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 60 * number) * time)
        noise = 0.1 * rng.standard_normal(len(time))
        if stems:
            song = folder / f"song {number}"
            song.mkdir(parents=True)
            soundfile.write(song / "tone.wav", tone, RATE)
            soundfile.write(song / "noise.wav", noise, RATE)
        else:
            folder.mkdir(exist_ok=True)
            soundfile.write(folder / f"{number}.wav", tone + noise, RATE)
    return folder


def tiny(yaml_name, data_folder, output_folder, **more):
    """A command line that trains a tiny model on short segments."""
    keys = {
        "data_folder": data_folder,
        "dataset": "stems",
        "output_folder": output_folder,
        "sample_rate": RATE,
        "segment_seconds": 0.3,
        "num_workers": 0,
        "batch_size": 2,
        "number_of_epochs": 1,
        "device": "cpu",
        "noprogressbar": True,
    }
    if yaml_name == "audio_mae.yaml":
        keys |= {"AudioMAE": "{d_decoder: 16, decoder_nhead: 2}"}
    else:
        keys |= {"num_spks": 3}
    if "convtasnet" in yaml_name:
        # large all the same: two steps an epoch
        keys |= {"num_channels": 16, "kernel_size": 32, "epoch_segments": 4}
    else:
        keys |= {"n_fft": 128, "hop_length": 32, "num_layers": 1}
        keys |= {"d_model": 16, "nhead": 2, "n_features": 16}
    if yaml_name == "performer_mixit_mae.yaml":
        # see test_pretrain.py for a run that has one
        keys |= {"pretrained_encoder": "null"}
    keys |= more
    return [
        str(ROOT / "hparams" / yaml_name),
        *(f"--{key}={value}" for key, value in keys.items()),
    ]


def read_results(folder):
    """Rows and last row of test_results.csv, and metrics.json."""
    with open(folder / "test_results.csv", encoding="utf-8") as file:
        *rows, average = csv.DictReader(file)
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    return rows, average, metrics


def unused_keys(yaml_name, recipe_path):
    """Top-level keys that neither the yaml nor its recipe reads."""
    text = (ROOT / "hparams" / yaml_name).read_text("utf-8")
    shared = ("brain", "dataio", "experiment")
    paths = [f"trackformer_sb/training/{name}.py" for name in shared]
    paths = [ROOT / path for path in (recipe_path, *paths)]
    source = "".join(path.read_text("utf-8") for path in paths)
    keys = re.findall(r"^(\w+):", text, re.M)
    assert len(keys) == len(set(keys)) > 30
    used_elsewhere = {"mixture_consistency", *RunOptions().as_dict()}
    return [
        key
        for key in keys
        if not any(x in source for x in (f'"{key}"', f"hparams.{key}"))
        and f"<{key}>" not in text
        and key not in used_elsewhere
        and not key.startswith("__")
    ]


class Killed(BaseException):
    """Stands in for a signal: nothing catches it."""


def interrupted(main, brain_class, argv, monkeypatch, stop_at):
    """Runs a recipe until a given optimizer step."""
    step = brain_class.on_fit_batch_end

    def stop(self, *args):
        step(self, *args)
        if self.optimizer_step == stop_at:
            raise Killed

    with monkeypatch.context() as context:
        context.setattr(brain_class, "on_fit_batch_end", stop)
        with pytest.raises(Killed):
            main(argv)


def torchrun(script, *arguments):
    """Two processes on CPU."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc_per_node=2", "--standalone", str(script)]
    result = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
