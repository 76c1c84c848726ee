"""Models in folders and on the hub: plain values, weights, and a card.

``config.json`` holds the arguments of a class, ``model.safetensors`` its
weights, README.md says what it is. No code is run and no pickle is read.
"""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from trackformer_sb.paths import expanded

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Folders of the models in the package
PACKAGED = {"default": "pretrained", "live": "pretrained_live"}

# What a config may name. Of these classes no argument runs code.
KNOWN_CLASSES = {
    "trackformer_sb.nnet.stft.STFTEncoder",
    "trackformer_sb.nnet.stft.STFTDecoder",
    "trackformer_sb.nnet.masknet.PerformerMaskNet",
    "trackformer_sb.nnet.fusion.FusionMaskNet",
    "trackformer_sb.nnet.counting.Counter",
    "trackformer_sb.asteroid.AsteroidMaskNet",
    "asteroid.masknn.convolutional.TDConvNet",
    "speechbrain.lobes.models.dual_path.Encoder",
    "speechbrain.lobes.models.dual_path.Decoder",
    "speechbrain.lobes.models.conv_tasnet.MaskNet",
}

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

    Of the folder of a run it is ``separator`` or ``encoder`` in there.
    ``hub`` goes to ``huggingface_hub.hf_hub_download``. A FileNotFoundError
    says why it cannot be had.
    """
    if source in PACKAGED:
        return Path(__file__).parents[1] / PACKAGED[source]
    source = expanded(source)
    folder = Path(source)
    if folder.is_dir():
        inner = (folder / "separator", folder / "encoder")
        there = (x for x in (folder, *inner) if (x / CONFIG_FILE).is_file())
        return next(there, folder)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise FileNotFoundError(
            f"{source} not found: expected a folder, or the owner/name of a "
            "model on the hub"
        )
    try:
        hf_hub_download(source, CONFIG_FILE, **hub)
        path = hf_hub_download(source, WEIGHTS_FILE, **hub)
    except (HTTPError, OSError) as error:
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


def is_part(value):
    """Whether a value describes an object, by its "class" and arguments."""
    return isinstance(value, dict) and "class" in value


def _check_known(value):
    """Refuses what might run code; that of a recipe is the user's own."""
    if not is_part(value):
        return
    if value["class"] not in KNOWN_CLASSES:
        raise ValueError(
            f"{value['class']} is not among the classes that are known to run "
            "no code; PerformerSeparation.from_hparams loads the yaml of a "
            "folder that you trust"
        )
    for inner in value.values():
        _check_known(inner)


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
    def from_pretrained(cls, source="default", **hub):
        """Loads a model strictly; no code is run and no pickle is read.

        Arguments
        ---------
        source : str or Path
            Folder of a model or of a run that made it; id on the hub; or
            "default" or "live": the separators in the package.
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
            If it cannot be had: there is no such folder, model or file, or the
            hub refuses or cannot be reached.
        ValueError
            If config or weights are damaged or do not fit.
        """
        folder = model_folder(source, **hub)
        try:
            config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
            for value in config.values():
                _check_known(value)
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

        ``metadata`` are sections of the card: title -> text, or a dict as a
        table. Returns the folder [Path].
        """
        folder = Path(expanded(folder))
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
