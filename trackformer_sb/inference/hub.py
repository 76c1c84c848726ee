"""Models in folders and on the hub: plain values, weights, and a card.

``config.json`` holds the arguments of a class, ``model.safetensors`` its
weights, README.md says what it is. No code is run and no pickle is read.
"""

import json
import os
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# Jinja, as huggingface_hub's model cards are.
CARD = """\
---
{{ card_data }}
---

# {{ title }}

{{ text }}
{% for name, content in metadata.items() %}
## {{ name }}
{% if content is string %}
{{ content }}
{% else %}
| | |
|---|---|
{% for key, value in content.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}{% endif %}{% endfor %}"""


def model_folder(source, **hub):
    """The local folder of a model.

    Arguments
    ---------
    source : str or Path
        Folder, or id on the hub.
    **hub : dict
        Of ``huggingface_hub.hf_hub_download``: ``revision``, ``token``,
        ``cache_dir``, ``local_files_only``, ``force_download``.

    Returns
    -------
    Path
        Folder with config and weights; that of a model on the hub is in the
        cache.

    Raises
    ------
    FileNotFoundError
        If it cannot be had: there is no such folder, model or file, or the hub
        refuses or cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                inner = next(folder.glob(f"*/{name}"), None)
                hint = f"; did you mean {inner.parent}?" if inner else ""
                raise FileNotFoundError(f"{folder / name} not found{hint}")
        return folder
    source = os.fspath(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise FileNotFoundError(
            f"{source} not found: expected a folder, or the owner/name of a "
            "model on the hub"
        )
    try:
        hf_hub_download(source, CONFIG_FILE, **hub)
        path = hf_hub_download(source, WEIGHTS_FILE, **hub)
    except (HTTPError, HFValidationError, OSError) as error:
        reason = error
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
            reason = error.__cause__  # it would blame the connection
        raise FileNotFoundError(
            f"{source} is no folder, nor can it be had from the hub: {reason}"
        ) from error
    return Path(path).parent


class _RecipeLoader(yaml.SafeLoader):
    """Reads a HyperPyYAML file without building anything."""


def _described(loader, name, node):
    if isinstance(node, yaml.SequenceNode):
        return None  # arguments without names
    if isinstance(node, yaml.ScalarNode):
        return {"class": name}
    return {"class": name, **loader.construct_mapping(node, deep=True)}


_RecipeLoader.add_multi_constructor("!new:", _described)
_RecipeLoader.add_multi_constructor("!", lambda loader, name, node: None)


def read_recipe(path):
    """The yaml of a training in plain values; nothing in it is executed.

    Arguments
    ---------
    path : str or Path
        The yaml with its references resolved, as
        ``create_experiment_directory`` leaves it.

    Returns
    -------
    dict
        The keys; of a ``!new:`` node its arguments, given by name, and its
        "class".

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is none.

    Example
    -------
    >>> path = getfixture("tmpdir") / "hyperparams.yaml"
    >>> path.write_text(
    ...     "lr: 0.1\\nnet: !new:torch.nn.PReLU\\n  init: 0", "utf-8"
    ... )
    >>> read_recipe(path)
    {'lr': 0.1, 'net': {'class': 'torch.nn.PReLU', 'init': 0}}
    """
    try:
        hparams = yaml.load(Path(path).read_text("utf-8"), _RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no readable yaml ({error})") from error
    if not isinstance(hparams, dict):
        raise ValueError(f"{path}: no keys in it")
    return hparams


class HubModel(nn.Module, PyTorchModelHubMixin):
    """A model that is made of plain values.

    Classes of it take nothing but plain values, which they keep as ``config``,
    and have a ``title`` and a ``text`` for their card.
    """

    @classmethod
    def check_config(cls, config):
        """Refuses a ``config.json`` that is not to be built."""

    @classmethod
    def from_pretrained(cls, source, **hub):
        """Loads a model strictly; no code is run and no pickle is read.

        Arguments
        ---------
        source : str or Path
            Folder as training leaves it, or id on the hub.
        **hub : dict
            ``revision``, ``token``, ``cache_dir``, ``local_files_only``,
            ``force_download``.

        Returns
        -------
        HubModel
            On the CPU, in evaluation mode.

        Raises
        ------
        FileNotFoundError
            If it cannot be had, see ``model_folder``.
        ValueError
            If config or weights are damaged or do not fit.
        """
        folder = model_folder(source, **hub)
        path = folder / CONFIG_FILE
        try:
            config = json.loads(path.read_text("utf-8"))
            cls.check_config(config)
            model = cls(**config)
        except (
            *(ValueError, TypeError, RuntimeError),
            *(KeyError, AttributeError),
        ) as error:
            raise ValueError(
                f"{path}: no usable config of a {cls.__name__} ({error})"
            ) from error
        load_weights(model, folder / WEIGHTS_FILE)
        return model.eval()

    def _save_pretrained(self, save_directory):
        """Writes config and weights, the latter as they are."""
        folder = Path(save_directory)
        text = json.dumps(self.config, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, "utf-8")
        state = {
            key: value.detach().cpu().contiguous()
            for key, value in self.state_dict().items()
        }
        # earlier weights stay until these are whole
        partial = folder / f"{WEIGHTS_FILE}.partial"
        partial.write_bytes(save(state, {"format": "pt"}))
        partial.replace(folder / WEIGHTS_FILE)

    def export(self, folder, metadata=None):
        """``save_pretrained`` with a new card in place of an earlier one.

        Arguments
        ---------
        folder : str or Path
            Where to; a model that is there is replaced.
        metadata : dict, optional
            Sections of the card: title -> text, or a dict as a table.

        Returns
        -------
        Path
            The folder.
        """
        folder = Path(folder)
        (folder / "README.md").unlink(missing_ok=True)
        self.save_pretrained(folder, model_card_kwargs={"metadata": metadata})
        return folder

    def generate_model_card(self, metadata=None):
        """The card that ``save_pretrained`` and ``push_to_hub`` write.

        Arguments
        ---------
        metadata : dict, optional
            Sections: title -> text, or a dict as a table.

        Returns
        -------
        huggingface_hub.ModelCard
            It is written where there is no card yet.
        """
        return ModelCard.from_template(
            self._hub_mixin_info.model_card_data,
            template_str=CARD,
            title=self.title,
            text=self.text,
            metadata=metadata or {},
        )


def load_weights(module, path, prefix=""):
    """Loads weights that fit a module exactly.

    Arguments
    ---------
    module : torch.nn.Module
        Where the weights belong.
    path : str or Path
        A .safetensors file.
    prefix : str
        What the keys begin with; others are left out.

    Raises
    ------
    ValueError
        If the file is damaged, or naming all missing, unexpected and misshapen
        keys.
    """
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: no readable file of weights ({error})"
        ) from error
    state = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error
