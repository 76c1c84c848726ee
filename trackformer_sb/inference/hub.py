"""Models in folders and on the hub: plain values, weights, and a card.

``config.json`` holds the arguments of a class, ``model.safetensors`` its
weights, README.md says what it is. No code is run and no pickle is read.
"""

import json
import os
import re
from pathlib import Path

import yaml
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
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
    """The local folder of a model; that of one on the hub is in the cache.

    ``hub`` goes to ``huggingface_hub.hf_hub_download``. A FileNotFoundError
    says why it cannot be had.
    """
    folder = Path(source)
    if folder.is_dir():
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


class _PlainLoader(yaml.SafeLoader):
    """Reads HyperPyYAML without building anything."""


def _described(loader, name, node):
    if isinstance(node, yaml.SequenceNode):
        return None  # arguments without names
    if isinstance(node, yaml.ScalarNode):
        return {"class": name}
    return {"class": name, **loader.construct_mapping(node, deep=True)}


def _untagged(loader, name, node):
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return name


_PlainLoader.add_multi_constructor("!new:", _described)
_PlainLoader.add_multi_constructor("!", _untagged)
# a number in HyperPyYAML, as 1e-4 is, and not in PyYAML
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def plain_values(text):
    """What a HyperPyYAML text says in plain values; nothing is executed.

    Of a ``!new:`` node its arguments, given by name, and its "class"; of other
    tags what is below them.

    Example
    -------
    >>> plain_values("lr: 1e-4\\nnet: !new:torch.nn.PReLU\\n  init: 0")
    {'lr': 0.0001, 'net': {'class': 'torch.nn.PReLU', 'init': 0}}
    """
    return yaml.load(text, _PlainLoader)


class HubModel(
    nn.Module,
    PyTorchModelHubMixin,
    model_card_template=CARD,
    library_name="trackformer_sb",
    license="apache-2.0",
):
    """A model that is made of plain values.

    Classes of it take nothing but plain values, which they keep as ``config``,
    and have a ``title`` and a ``text`` for their card.
    """

    @classmethod
    def check_config(cls, config):
        """Refuses a ``config.json`` that is not to be built."""

    @classmethod
    def from_pretrained(cls, source, **hub):
        """Loads a model strictly, in evaluation mode.

        No code is run and no pickle is read. A FileNotFoundError says why the
        model cannot be had, a ValueError what does not fit or is damaged.
        """
        folder = model_folder(source, **hub)
        try:
            config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
            cls.check_config(config)
            model = cls(**config)
            load_weights(model, folder / WEIGHTS_FILE)
        except (
            *(ValueError, TypeError, LookupError, AttributeError),
            *(RuntimeError, SafetensorError),
        ) as error:
            raise ValueError(
                f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} make no "
                f"{cls.__name__} ({error})"
            ) from error
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
        """The card that is written where there is none, see ``export``."""
        return super().generate_model_card(
            title=self.title, text=self.text, metadata=metadata or {}
        )


def load_weights(module, path, prefix=""):
    """Loads the weights of a file whose keys begin with a prefix, strictly."""
    state = {
        key.removeprefix(prefix): value
        for key, value in load_file(path).items()
        if key.startswith(prefix)
    }
    module.load_state_dict(state)
