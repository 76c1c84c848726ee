"""A torch and a torchaudio that do not load side by side are named."""

import os
import pathlib
import subprocess
import sys

import pytest

from trackformer_sb import torch_pair

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("torch", "torchaudio", "expected"),
    [
        ("2.8.0", "2.8.0", True),
        ("2.8.0", "2.9.0", False),
        ("2.9.1", "2.9.0", True),
        ("2.10.0", "2.9.1", False),
        ("2.10.0", "2.11.0", False),
        ("2.11.0", "2.10.0", False),
        ("2.11.0", "2.11.0", True),
        ("2.11.0", "2.11.1", False),
        ("2.11.0+cpu", "2.11.0+cpu", True),
        ("2.11.0+cpu", "2.11.0", False),
        ("2.11.0+cu128", "2.11.0", False),
        ("2.11.0+cu130", "2.11.0", True),
        ("2.11.0a0+gitabc", "2.11.0", True),
        ("2.12.1", "2.11.0", True),
        ("2.12.1", "2.11.1", False),
        ("2.13.0", "2.11.1", True),
        ("2.13.0+cpu", "2.11.1", False),
        ("2.14.1", "2.11.0", True),
        ("2.14.1", "2.11.1", True),
        ("2.15.0", "2.11.0", False),
        ("2.15.0", "2.11.1", True),
        ("2.15.0.dev20261101", "2.11.1", True),
    ],
)
def test_pairs_are_those_that_were_tried(torch, torchaudio, expected):
    assert torch_pair.fits(torch, torchaudio) is expected


def test_the_pair_that_mends_is_the_one_that_is_locked():
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    for name in ("torch", "torchaudio"):
        assert f"{name}=={torch_pair.TESTED}" in lock
    assert torch_pair.fits(torch_pair.TESTED, torch_pair.TESTED)


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "trackformer_sb.cli", "info", "separator"),
        ("recipes/train.py", "hparams/demo.yaml"),
        ("recipes/pretrain.py", "hparams/audio_mae.yaml"),
        ("recipes/reproduce.py", "--dry-run"),
        ("-m", "pytest", "-q", "tests/test_stft.py"),
    ],
    ids=" ".join,
)
def test_commands_say_it_in_one_line(tmp_path, command):
    for name, version in (("torch", "2.11.0"), ("torchaudio", "2.11.1")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert "torch 2.11.0 and torchaudio 2.11.1 do not load" in line
    assert "--force-reinstall torch==2.11.0 torchaudio==2.11.0" in line
