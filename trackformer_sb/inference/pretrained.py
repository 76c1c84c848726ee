"""Trained separators from plain values and safetensors: no code is run.

``PerformerSeparator`` reads ``config.json`` and ``model.safetensors`` of an
exported separator and nothing else; a yaml or a pickle beside them stays
unread.
"""

import json
import os

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from ruamel.yaml import YAML

import trackformer_sb
from trackformer_sb.inference.card import separator_card, separator_title
from trackformer_sb.inference.config import (
    masknet_arguments,
    plain_config,
    read_config,
)
from trackformer_sb.inference.download import model_file
from trackformer_sb.inference.folder import (
    CONFIG_FILE,
    SAFETENSORS_FILE,
    write_files,
)
from trackformer_sb.inference.separation import separate
from trackformer_sb.inference.weights import load_state, read_safetensors
from trackformer_sb.nnet.masknet import PerformerMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder

NODES = {"encoder": "Encoder", "masknet": "MaskNet", "decoder": "Decoder"}
SETTINGS = ("sample_rate", "num_spks")

HEADER = """\
# {title}
# Written by trackformer_sb {version}. To use it:
#   trackformer separate song.wav --model <this folder> --out sources
# or in Python:
#   from trackformer_sb.inference.interfaces import PerformerSeparation
#   separator = PerformerSeparation.from_hparams(source="<this folder>")
"""

# As yaml, for the interfaces that load it. JSON is yaml.
YAML_NODES = """\
Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder {stft}
MaskNet: !new:trackformer_sb.nnet.masknet.PerformerMaskNet {masknet}
Decoder: !new:trackformer_sb.nnet.stft.STFTDecoder {stft}
"""

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def _weights_file(source, **hub):
    """The local path of the weights; pickles are no substitute."""
    try:
        return model_file(source, SAFETENSORS_FILE, **hub)
    except FileNotFoundError as error:
        names = os.listdir(source) if os.path.isdir(source) else []
        pickles = [name for name in sorted(names) if name.endswith(PICKLES)]
        if not pickles:
            raise
        raise FileNotFoundError(
            f"{os.path.join(source, SAFETENSORS_FILE)} not found: "
            f"{', '.join(pickles)} could run code and is not loaded; export "
            "the separator again to get the weights as safetensors"
        ) from error


class PerformerSeparator(torch.nn.Module, ModelHubMixin):
    """A Performer on an STFT that loads without running any code.

    Arguments
    ---------
    sample_rate : int
        Rate of the waveforms in Hz.
    num_spks : int
        Number of outputs.
    n_fft, hop_length : int
        Of the STFT, in samples.
    mixture_consistency : bool, optional
        Whether what the outputs lack of the mixture is distributed evenly
        over them. By default, unless the masks are a softmax: those sum to it
        by themselves.
    **masknet : dict
        Arguments of ``PerformerMaskNet`` but ``in_channels``.

    Example
    -------
    >>> import tempfile
    >>> separator = PerformerSeparator(
    ...     44100, num_spks=4, d_model=32, nhead=2, num_layers=1
    ... ).eval()
    >>> mix = torch.randn(2, 5000)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = separator.save_pretrained(folder)
    ...     again = PerformerSeparator.from_pretrained(folder)
    >>> again(mix).shape
    torch.Size([2, 5000, 4])
    >>> torch.equal(again(mix), separator(mix))
    True
    """

    def __init__(
        self,
        sample_rate,
        num_spks,
        n_fft=1024,
        hop_length=256,
        mixture_consistency=None,
        **masknet,
    ):
        super().__init__()
        masknet = {**masknet_arguments(), **masknet}
        if mixture_consistency is None:
            mixture_consistency = masknet["mask_activation"] != "softmax"
        self.config = plain_config(
            {
                "sample_rate": sample_rate,
                "num_spks": num_spks,
                "mixture_consistency": mixture_consistency,
                "n_fft": n_fft,
                "hop_length": hop_length,
                **masknet,
            }
        )
        self.encoder = STFTEncoder(n_fft, hop_length)
        self.masknet = PerformerMaskNet(n_fft // 2 + 1, num_spks, **masknet)
        self.decoder = STFTDecoder(n_fft, hop_length)

    def forward(self, mix):
        """Separates a batch of mixtures at the rate of the model.

        Arguments
        ---------
        mix : torch.Tensor
            [batch, time].

        Returns
        -------
        torch.Tensor
            [batch, time, sources], as of
            ``PerformerSeparation.separate_batch``.

        Raises
        ------
        ValueError
            For an input of another shape.
        """
        if mix.dim() != 2:
            raise ValueError(
                f"expected mix [batch, time], got {list(mix.shape)}"
            )
        est_source, _ = separate(
            mix,
            self.encoder,
            self.masknet,
            self.decoder,
            self.config["mixture_consistency"],
        )
        return est_source.transpose(1, 2)

    @classmethod
    def from_pretrained(
        cls,
        source,
        *,
        revision=None,
        token=None,
        cache_dir=None,
        local_files_only=False,
        force_download=False,
        device="cpu",
    ):
        """Loads a separator; no code is run, no pickle or yaml is read.

        Arguments
        ---------
        source : str or Path
            Folder as training writes it, or an id on the hub.
        revision : str, optional
            Branch, tag or commit on the hub.
        token : str or bool, optional
            Of an account on the hub; by default the one that is logged in,
            with False none.
        cache_dir : str or Path, optional
            Where files of the hub are kept; by default the user's cache.
        local_files_only : bool
            Whether to use what is in the cache and no network.
        force_download : bool
            Whether to download what is in the cache again.
        device : str or torch.device
            Where to put the separator.

        Returns
        -------
        PerformerSeparator
            In evaluation mode.

        Raises
        ------
        FileNotFoundError
            If there is no such folder, model, revision or file.
        OSError
            If the hub cannot be reached or refuses, or a download is broken.
        ValueError
            If the config has unknown, missing or wrong values, or the weights
            are damaged or do not fit exactly.
        """
        source = os.fspath(source)
        hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        config_path = model_file(source, CONFIG_FILE, **hub)
        path = _weights_file(source, **hub)
        config = read_config(config_path)
        try:
            separator = cls(**config)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{config_path}: {error}") from error
        load_state(separator, read_safetensors(path), path)
        return separator.to(device).eval()

    def _save_pretrained(self, save_directory):
        """Writes config, weights, and the files of the other interfaces."""
        stft = {key: self.config[key] for key in ("n_fft", "hop_length")}
        masknet = {
            "in_channels": self.masknet.in_channels,
            "num_spks": self.config["num_spks"],
            **{key: self.config[key] for key in masknet_arguments()},
        }
        nodes = YAML_NODES.format(
            stft=json.dumps(stft), masknet=json.dumps(masknet)
        )
        header = HEADER.format(
            title=self._title(), version=trackformer_sb.__version__
        )
        write_files(
            save_directory,
            YAML().load(nodes),
            {name: getattr(self, name) for name in NODES},
            NODES,
            {
                key: self.config[key]
                for key in (*SETTINGS, "mixture_consistency")
            },
            header,
            self.config,
        )

    def _title(self):
        return separator_title(
            type(self.masknet).__name__,
            self.config["num_spks"],
            self.config["sample_rate"],
        )

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
        return ModelCard(
            separator_card(
                self._title(),
                self.config["num_spks"],
                self.config["sample_rate"],
                metadata,
            )
        )
