"""The paper's experiment as a grid of trainings: what there is to run.

A cell of the grid is a model, a segment length and a loss; ``grid_run`` trains
each in a process of its own. Nothing here imports torch, so that the memory of
the machine is the cells'.
"""

import hashlib
import pathlib
import re
import sys
from typing import NamedTuple

from trackformer_sb.training.grid_tables import LOSSES, PAPER_MODELS
from trackformer_sb.training.keys import RUN_OPTIONS, SHARED_KEYS

# of each model its yaml, and the overrides it takes beside the plain ones
YAMLS = {
    "performer_mae": ("performer_mixit_mae.yaml", "performer"),
    "performer": ("performer_mixit.yaml", "performer"),
    "convtasnet": ("convtasnet_mixit.yaml", "convtasnet"),
    "asteroid_convtasnet": (
        "asteroid_convtasnet_mixit.yaml",
        "asteroid_convtasnet",
    ),
}
PRETRAIN_YAML = "audio_mae_blocks.yaml"
# whom overrides are for; "": all cells
GROUPS = ("", "performer", "convtasnet", "asteroid_convtasnet", "mae")
LENGTHS = (3.0, 5.0, 10.0, 30.0)  # seconds
# with the auxiliary losses the weights are those of the yaml
LOSS_KEYS = {
    "mixit": dict.fromkeys(
        ("lambda_diversity", "lambda_sparsity", "lambda_mask_count"), 0
    ),
    "mixit_div_sp": {},
}
DATASETS = (
    *("demo", "stems", "mixtures"),
    *("moisesdb", "musdb18hq", "slakh2100"),
)
DEMO_SECONDS = 30.0  # a song of the band holds the paper's longest segment

# Which option of the grid stands for a key that the grid sets itself.
OPTIONS = {
    "segment_seconds": "--lengths",
    "number_of_epochs": "--epochs or --pretrain_epochs",
    "optimizer_step_limit": "--steps or --pretrain_steps",
    "early_stop_epochs": "--epochs, with --steps and --minutes it is off",
    "device": "--devices",
}
ENDLESS = 1_000_000  # epochs, where steps are the budget


class Job(NamedTuple):
    """One training: a cell, or the pre-training before them.

    Example
    -------
    >>> job = Job(
    ...     *("performer/3s/mixit", "train.py", "my.yaml"),
    ...     *(pathlib.Path("out"), pathlib.Path("out/run")),
    ...     overrides={"lr": "1e-3"},
    ...     keys={"seed": 1, "output_folder": "out/run"},
    ...     budget=("steps", 9),
    ... )
    >>> job.command(output_folder="probe")[3:]
    ['--noprogressbar', '--lr=1e-3', '--seed=1', '--output_folder=probe']
    """

    name: str
    script: pathlib.Path
    yaml: pathlib.Path
    folder: pathlib.Path  # of cell.json
    output_folder: pathlib.Path
    overrides: dict  # the user's
    keys: dict  # the grid's own, which count more
    budget: tuple  # epochs, steps or minutes, and how many

    @property
    def network(self):
        """What its cost goes by, alike for all cells of one network."""
        _, group = YAMLS.get(self.name.split("/")[0], (None, "mae"))
        keys = {key: self.overrides[key] for key in sorted(self.overrides)}
        length = self.keys.get("segment_seconds")
        keys |= {"segment_seconds": length} if length else {}
        return " ".join([group, *(f"--{key}={keys[key]}" for key in keys)])

    @property
    def log(self):
        """File with all that the process says."""
        # in its own output folder a recipe writes another log.txt
        own = self.folder == self.output_folder
        return self.folder / ("console.txt" if own else "log.txt")

    def command(self, **more):
        """The command line; more keys count instead of the job's."""
        keys = {**self.overrides, **self.keys, **more}
        words = [sys.executable, self.script, self.yaml, "--noprogressbar"]
        words += [f"--{key}={value}" for key, value in keys.items()]
        return [str(word) for word in words]

    def budget_keys(self, steps=None):
        """Keys that end a training after its budget.

        Arguments
        ---------
        steps : int, optional
            What a budget of minutes comes to in optimizer steps.
        """
        unit, number = self.budget
        if unit == "epochs":
            return {"number_of_epochs": number}
        steps = number if unit == "steps" else steps or "STEPS"
        keys = {"number_of_epochs": ENDLESS, "early_stop_epochs": ENDLESS}
        known = yaml_values(self.yaml)
        keys = {key: value for key, value in keys.items() if key in known}
        return {**keys, "optimizer_step_limit": steps}

    def batches_per_step(self):
        """How many batches an optimizer step takes."""
        key = "grad_accumulation_factor"
        value = self.overrides.get(key, yaml_values(self.yaml).get(key, 1))
        return int(value)


def yaml_values(path):
    """Top-level keys of a yaml and the text of their values.

    Read as text, for loading it would make the models.

    Arguments
    ---------
    path : pathlib.Path
        The yaml file.

    Returns
    -------
    dict
        Key -> text, without comments.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no hyperparameter file {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [
        line.split(":", 1)
        for line in lines
        if line[:1].isalpha() and ":" in line
    ]
    return {key: re.sub(r"\s#.*", "", text).strip() for key, text in pairs}


class Grid:
    """All cells of the experiment, and where they go.

    Arguments
    ---------
    folder : pathlib.Path
        Where everything goes.
    recipes : pathlib.Path
        Folder of train.py and pretrain.py; their yamls are in hparams beside.
    data : dict
        dataset, data_folder, test_folder, test_dataset.
    models, lengths, losses : sequence
        What the cells are made of; lengths in seconds.
    budget, pretrain_budget : tuple
        epochs, steps or minutes, and how many of them.
    seed : int
        Of all trainings.
    overrides : dict
        Group of GROUPS -> key -> value.
    pretrained_encoder : pathlib.Path or None
        Encoder for ``performer_mae``; with None the grid pre-trains its own.
    memory_gb : float or None
        Memory limit that the user set.
    pretrain_yaml : str
        The pre-training's file in hparams/.

    Raises
    ------
    ValueError
        For settings that do not go together, keys that a yaml has not, or
        another yaml than a pre-training's.
    FileNotFoundError
        For a folder or a yaml that is not there.
    """

    def __init__(
        self,
        folder,
        recipes,
        data,
        models=PAPER_MODELS,
        lengths=LENGTHS,
        losses=LOSSES,
        budget=("epochs", 100),
        pretrain_budget=None,
        seed=1234,
        overrides=None,
        pretrained_encoder=None,
        memory_gb=None,
        pretrain_yaml=PRETRAIN_YAML,
    ):
        self.folder, self.data, self.seed = folder, data, seed
        self.recipes, self.hparams = recipes, recipes.parent / "hparams"
        self.overrides = overrides or {group: {} for group in GROUPS}
        self.models, self.budget = models, budget
        self.pretrain_budget = pretrain_budget or budget
        self.pretrained_encoder = pretrained_encoder
        self.memory_gb = memory_gb
        self.pretrain_yaml = pretrain_yaml
        self._check_data(lengths)
        own = "performer_mae" in models and pretrained_encoder is None
        if own:
            self._check_pretrain_yaml()
        self.pretrain = self._pretrain() if own else None
        self.cells = [
            self._cell(model, length, loss)
            for length in lengths
            for loss in losses
            for model in models
        ]
        self.jobs = [*([self.pretrain] if own else []), *self.cells]
        for job in self.jobs:
            self._check_overrides(job)

    @property
    def band(self):
        """Where the demo band is; None with other music."""
        if self.data["dataset"] != "demo":
            return None
        return self.data["data_folder"] or self.folder / "demo_band"

    def band_sample_rate(self):
        """Rate at which the demo band is made, in Hz."""
        values = {**yaml_values(self.cells[0].yaml), **self.overrides[""]}
        return int(values["sample_rate"])

    def _data_keys(self):
        keys = {key: value for key, value in self.data.items() if value}
        if self.band:
            # one band for all, made before with longer songs than by default
            keys |= {"dataset": "stems", "data_folder": self.band}
        return {**keys, "seed": self.seed}

    def _cell(self, model, length, loss):
        name = f"{model}/{length:g}s/{loss}"
        yaml, group = YAMLS[model]
        run = self.folder / name / "run"
        keys = {"output_folder": run, **self._data_keys()}
        keys |= {"segment_seconds": f"{length:g}", **LOSS_KEYS[loss]}
        if model == "performer_mae":
            own = self.folder / "pretrain" / "encoder"
            keys["pretrained_encoder"] = self.pretrained_encoder or own
        return Job(
            name,
            self.recipes / "train.py",
            self.hparams / yaml,
            run.parent,
            run,
            {**self.overrides[""], **self.overrides[group]},
            keys,
            self.budget,
        )

    def _pretrain(self):
        folder = self.folder / "pretrain"
        yaml = self.hparams / self.pretrain_yaml
        plain = self.overrides[""]
        # the encoder must fit the separators
        both = {**plain, **self.overrides["performer"]}
        known = yaml_values(yaml)
        shared = {
            key: both[key]
            for key in both
            if key in SHARED_KEYS and key in known
        }
        shared |= {key: plain[key] for key in plain if key in RUN_OPTIONS}
        return Job(
            "pretrain",
            self.recipes / "pretrain.py",
            yaml,
            folder,
            folder,
            {**shared, **self.overrides["mae"]},
            {"output_folder": folder, **self._data_keys()},
            self.pretrain_budget,
        )

    def _check_pretrain_yaml(self):
        names = [
            path.name
            for path in sorted(self.hparams.glob("*.yaml"))
            if "mask_ratio" in yaml_values(path)
        ]
        if self.pretrain_yaml not in names:
            raise ValueError(
                "--pretrain_yaml: expected a pre-training in hparams/ ("
                f"{', '.join(names)}), got {self.pretrain_yaml!r}"
            )

    def _check_data(self, lengths):
        data = self.data
        if data["dataset"] != "demo" and not data["data_folder"]:
            raise ValueError(
                f"--data_folder: expected a folder of music with --dataset="
                f"{data['dataset']}, got none"
            )
        folders = {
            "--data_folder": None if self.band else data["data_folder"],
            "--test_folder": data["test_folder"],
            "--pretrained_encoder": self.pretrained_encoder,
        }
        for option, folder in folders.items():
            if folder and not folder.is_dir():
                raise FileNotFoundError(f"{option}: no folder {folder}")
        if self.band and max(lengths) > DEMO_SECONDS:
            raise ValueError(
                f"--lengths: {max(lengths):g} s is more than a song of the "
                f"demo band has, {DEMO_SECONDS:g} s; train on other music"
            )

    def _check_overrides(self, job):
        known = {*yaml_values(job.yaml), *RUN_OPTIONS}
        own = {*job.keys, *job.budget_keys(), "device"}
        # a cell without the auxiliary losses is one whatever their weights
        own -= LOSS_KEYS["mixit"].keys()
        for key in job.overrides:
            if key in own:
                option = OPTIONS.get(key, f"--{key}")
                raise ValueError(
                    f"{key} is set by the grid, got --{key}="
                    f"{job.overrides[key]} for {job.name}: use {option}"
                )
            if key not in known:
                raise ValueError(
                    f"unknown key {key!r} for hparams/{job.yaml.name}; its "
                    f"keys are {', '.join(sorted(known))}. A key of some "
                    f"models only: --performer.{key} or --convtasnet.{key}, "
                    f"--asteroid_convtasnet.{key}"
                )

    def configuration(self):
        """What may not change while a grid grows.

        Returns
        -------
        dict
            Name -> plain values. A name that only one of two configurations
            has is of a model that only one of them has.
        """
        config = {
            key: str(value) if value else None
            for key, value in self.data.items()
        }
        config |= {"seed": self.seed, "memory_gb": self.memory_gb}
        config["budget"] = list(self.budget)
        config["overrides"] = self.overrides[""]
        used = [YAMLS[model] for model in self.models]
        if "performer_mae" in self.models:
            encoder = self.pretrained_encoder
            config["pretrained_encoder"] = str(encoder) if encoder else None
        if self.pretrain:
            config["pretrain_budget"] = list(self.pretrain_budget)
            config["pretrain_yaml"] = self.pretrain_yaml
            used.append((self.pretrain_yaml, "mae"))
        for yaml, group in used:
            text = (self.hparams / yaml).read_bytes()
            config[f"hparams/{yaml}"] = hashlib.sha256(text).hexdigest()[:16]
            config[f"overrides of {group}"] = self.overrides[group]
        return config
