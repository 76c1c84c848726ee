"""What a grid refuses before it runs anything."""

import json

from trackformer_sb.nnet.encoder_files import (
    ENCODER_FILE,
    SETTINGS,
    SETTINGS_FILE,
)
from trackformer_sb.training.grid import YAMLS, yaml_values
from trackformer_sb.training.grid_tables import read_json
from trackformer_sb.training.keys import MAY_CHANGE, SHARED_KEYS


def _values(job):
    return {**yaml_values(job.yaml), **job.overrides}


def check_encoder(grid):
    """Refuses an encoder, given or to be made, that separators cannot take.

    Raises
    ------
    FileNotFoundError
        If the given one has not all of its files.
    ValueError
        Naming the keys that differ, with both values.
    """
    takers = [job for job in grid.cells if job.name.startswith("performer_mae")]
    if not takers:
        return
    given = grid.pretrained_encoder
    if given:
        for name in (SETTINGS_FILE, ENCODER_FILE):
            if not (given / name).is_file():
                raise FileNotFoundError(
                    f"--pretrained_encoder: no {name} in {given}"
                )
        encoder = yaml_values(given / SETTINGS_FILE)
    else:
        encoder = _values(grid.pretrain)
    separator = _values(takers[0])
    differ = [
        f"{key} is {encoder[key]}, of the separators {separator[key]}"
        for key in SETTINGS
        if key in encoder
        and key in separator
        and str(encoder[key]) != str(separator[key])
        # an expression is not computed here
        and not str(separator[key]).startswith("!")
    ]
    if differ:
        raise ValueError(
            (
                f"--pretrained_encoder: the encoder in {given}"
                if given
                else "the encoder that the pre-training would make"
            )
            + f" does not fit: {'; '.join(differ)}"
        )


def _models_in_use(folder):
    """Models of which a training came to its end, or can go on."""
    cells = [folder / "pretrain" / "cell.json", *folder.glob("*/*/*/cell.json")]
    models = set()
    for path in cells:
        status = read_json(path).get("status")
        saved = (
            file
            for pattern in ("save/CKPT*", "run/save/CKPT*")
            for file in path.parent.glob(pattern)
        )
        if status in ("done", "oom") or (status == "running" and any(saved)):
            models.add(path.relative_to(folder).parts[0])
    return models


def _mended(name, begun, asked, models):
    """Overrides of a group as its folder should have been begun with."""
    if any(
        name == f"overrides of {YAMLS[x][1]}" for x in models & YAMLS.keys()
    ):
        return begun
    if "pretrain" in models:
        if name == "overrides of mae":
            return begun
        if name == "overrides of performer":
            # the encoder is there, made with some of them
            fixed = {*SHARED_KEYS} - {*MAY_CHANGE}
            others = {k: v for k, v in asked.items() if k not in fixed}
            return {k: v for k, v in begun.items() if k in fixed} | others
    return asked


def check_configuration(grid, retry_oom=False):
    """Compares a grid with what its folder was begun with.

    What failed with wrong values may be run with others: overrides of models of
    which no cell is done, and all settings where no cell is.

    Arguments
    ---------
    grid : Grid
        The grid to run.
    retry_oom : bool
        Whether the memory limit may be another one.

    Returns
    -------
    dict
        The configuration of all models so far.

    Raises
    ------
    ValueError
        If they differ, or the folder holds something else.
    """
    path, config = grid.folder / "grid.json", grid.configuration()
    if not path.is_file():
        names = sorted(grid.folder.glob("[!.]*"))
        if names:
            raise ValueError(
                f"--output_folder: expected a new folder or one with a "
                f"grid.json, got {grid.folder} with {names[0].name!r}"
            )
        return config
    begun = read_json(path)
    yamls = {f"hparams/{yaml}" for yaml, _ in YAMLS.values()}
    for name in begun.keys() - yamls:
        if name.startswith("hparams/"):
            # of a grid that was begun before this had a name of its own
            begun.setdefault("pretrain_yaml", name.removeprefix("hparams/"))
    config = json.loads(json.dumps(config))
    models = _models_in_use(grid.folder)
    if not models:
        return config
    for name in begun.keys() & config.keys():
        if name.startswith("overrides of "):
            begun[name] = _mended(name, begun[name], config[name], models)
    differ = [
        f"{name}: expected {begun[name]}, got {config[name]}"
        for name in config
        if begun.get(name, config[name]) != config[name]
        and not (retry_oom and name == "memory_gb")
    ]
    if differ:
        raise ValueError(
            f"{grid.folder} was begun with other settings; choose another "
            f"--output_folder, or those. {'; '.join(differ)}"
        )
    return begun | config
