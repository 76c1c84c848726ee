"""A separator learns from a user's own songs, see ``trackformer adapt``."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import soundfile
import torch

import trackformer_sb
from trackformer_sb.audio import read_segment
from trackformer_sb.data.music import Music, split_songs
from trackformer_sb.inference.separator import (
    PARTS,
    Separator,
    load_separator,
)
from trackformer_sb.training import named
from trackformer_sb.training.experiment import load_experiment
from trackformer_sb.training.lock import locked
from trackformer_sb.training.self_training import (
    mixed_anew,
    stems_and_agreement,
)

# Gentler than a training from scratch, and with some validations on the way.
SETTINGS = {"lr": 0.0003, "ema_decay": 0.99}
SETTINGS |= {"epoch_items": 400, "log_steps": 25}

LEAST_SONGS = 4  # two to train on, two to measure on
SPLIT_RATIO = 80, 20
# What is measured where no song has stems: windows of so many seconds, in which
# the first model's stems are mixed anew, and how sure they have to be, in dB.
WINDOWS, SECONDS, SURE_DB = 24, 3.0, 9.0
GAIN_DB = 0.1  # from which on the adapted separator is kept
MEASURED, REMIXED = "stems", "remixed"  # names of the folders
RECORD = "adapt.json"  # of what is adapted to what


def recipe_yaml(name):
    """A yaml of hparams/, beside the package or, when installed, in it."""
    package = Path(trackformer_sb.__file__).parent
    folders = package.parent / "hparams", package / "hparams"
    return next(path / name for path in folders if (path / name).is_file())


def _link(songs, folder):
    """A folder with links to what songs are, under their names."""
    shutil.rmtree(folder, ignore_errors=True)
    for song in songs:
        path = folder / song.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.abspath(song.path))


def _claim(out, what):
    """Keeps a folder for one adaptation; refuses one of other things."""
    record = out / RECORD
    if record.is_file():
        begun = json.loads(record.read_text("utf-8"))
        if begun != what:
            raise ValueError(
                f"{out} is of another adaptation, {begun}: expected another "
                "folder to write"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: expected an empty folder, or none")
    else:
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(what), "utf-8")


def write_remixed(separator, songs, folder):
    """Windows of songs as songs with stems: the separator's, mixed anew.

    Stems on which two passes do not agree are left out. Raises a ValueError if
    they do nowhere.
    """
    rate, rng = separator.sample_rate, np.random.default_rng(0)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    sounds = []
    for number in range(WINDOWS):
        song = songs[number % len(songs)]
        start = (number // len(songs) + 0.5) / -(-WINDOWS // len(songs))
        start *= max(0.0, song.seconds - SECONDS)
        [path] = song.files
        sounds.append(read_segment(path, start, SECONDS, rate, channel="both"))
    # each with a window of another song, if there are others
    sounds = torch.stack(sounds)
    pairs = torch.stack([sounds, sounds.roll(1, 0)], 1)
    with torch.no_grad():
        for number, pair in enumerate(pairs.to(separator.device)):
            stems, agreement = stems_and_agreement(separator, pair)
            [mixed] = mixed_anew(stems[None], agreement[None], SURE_DB, rng)
            if mixed.flatten(1).any(1).sum() < 2:
                continue
            place = partial / str(number)
            place.mkdir(parents=True)
            for name, stem in zip(separator.groups, mixed.cpu().numpy()):
                path = place / f"{name}.wav"
                soundfile.write(path, stem.T, rate, subtype="FLOAT")
    if not partial.is_dir():
        raise ValueError(
            "in no window of the songs held out is the separator sure of two "
            "stems: expected music that it separates to some degree"
        )
    partial.rename(folder)


def _measured(run):
    """Column -> dB of the first and of the last row of the curve."""
    with open(run / "curve.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    groups = MEASURED, REMIXED
    return [
        {
            name.partition("_")[2]: float(value)
            for name, value in row.items()
            if name.startswith(groups) and value and "static" not in name
        }
        for row in (rows[0], rows[-1])
    ], rows


def adapt(folder, out, minutes=30.0, model="default", stems=None, device=None):
    """Trains a separator further on songs without stems.

    A fifth of the songs, by their names, is held out to measure on: how well
    the stems that the model finds there at first are found again when they are
    mixed anew. That is agreement and no quality: with songs that have `stems`
    these are measured instead. What gains less than 0.1 dB is not kept. The
    same call goes on after an interruption.

    Arguments
    ---------
    folder : str or Path
        Any tree of music files.
    out : str or Path
        Where ``separator/`` and the run that made it are left.
    minutes : float
        Of training.
    model : str or Path
        What to start from, with named stems: a folder or a hub id.
    stems : str or Path, optional
        Folder of songs with stems to measure on, which are not trained on.
    device : str, optional
        Where it is trained, see ``find_device``.

    Returns
    -------
    before, after : dict
        Stem -> SI-SNR improvement in dB, and their "mean".
    better : bool
        Whether the separator is the adapted one; otherwise it is `model`.

    Raises
    ------
    ValueError
        For fewer than four songs of 3 s, a model without named stems, songs in
        which no two classes sound at once, or an `out` that holds other things
        or is below `folder`.
    """
    out = Path(out)
    run, held_out = out / "run", out / (MEASURED if stems else REMIXED)
    separator = load_separator(model, device)
    if not separator.groups:
        raise ValueError(f"{model}: expected a separator with named stems")
    songs = Music(folder, "mixtures").songs(SECONDS)
    if len(songs) < LEAST_SONGS:
        raise ValueError(
            f"{folder}: expected {LEAST_SONGS} songs of {SECONDS:g} s or more, "
            f"got {len(songs)}"
        )
    if Path(folder).resolve() in out.resolve().parents:
        raise ValueError(f"{out}: expected a folder outside of {folder}")
    measured = stems and Music(stems, "stems").songs(SECONDS)
    what = {"folder": os.path.abspath(folder), "model": str(model)}
    _claim(out, what | {"stems": stems and os.path.abspath(stems)})
    with locked(out):
        spent = 0.0
        if (run / "curve.csv").is_file():
            _, rows = _measured(run)
            spent = 60 * float(rows[-1]["hours"])
        left = minutes - spent
        splits = split_songs(songs, SPLIT_RATIO, seed=0)
        train, valid = splits["train"], splits["valid"]
        print(
            f"{len(train)} songs to adapt to, {len(valid)} held out, "
            f"{max(left, 0):.3g} minutes",
            flush=True,
        )
        _link(train, out / "songs")
        if stems:
            _link(measured, held_out)
        elif not held_out.is_dir():
            write_remixed(separator, valid, held_out)
        if left > 0:
            settings = {
                **SETTINGS,
                # where the rate was, that falls to 0 in the end
                "lr": SETTINGS["lr"] * left / minutes,
                "data_folder": out / "songs",
                "dataset": "mixtures",
                "valid_folders": json.dumps([str(held_out)]),
                "pretrained_separator": model,
                "output_folder": run,
                "finish_minutes": left,
                "allow_changes": True,
                "sample_rate": separator.sample_rate,
                "num_spks": separator.num_spks,
                "classes": json.dumps(list(separator.groups)),
            }
            for name, key in PARTS.items():
                part = dict(separator.config[name])
                del part["class"]
                settings[key] = json.dumps(part)
            arguments = [f"--{key}={value}" for key, value in settings.items()]
            if device:
                arguments.append(f"--device={device}")
            yaml = str(recipe_yaml("separator_self.yaml"))
            with load_experiment([yaml, *arguments], ("loss",)) as experiment:
                named.train(experiment)
        (before, after), _ = _measured(run)
        better = after["mean"] - before["mean"] >= GAIN_DB
        if better:
            # what the model has beside them, a counter, stays
            adapted = Separator.from_pretrained(run / "separator")
            separator.load_state_dict(adapted.state_dict(), strict=False)
        separator.cpu().bfloat16().export(out / "separator")
    return before, after, better
