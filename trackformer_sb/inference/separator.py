"""Separators of named stems: config, weights and card in one folder."""

import json
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors.torch import save_file

import trackformer_sb
from trackformer_sb.inference.card import named_card, named_title
from trackformer_sb.inference.config import ABOUT, LIBRARY
from trackformer_sb.inference.download import model_file
from trackformer_sb.inference.folder import CONFIG_FILE, SAFETENSORS_FILE
from trackformer_sb.inference.interfaces import PerformerSeparation
from trackformer_sb.inference.separation import separate
from trackformer_sb.inference.weights import load_state, read_safetensors
from trackformer_sb.nnet.fusion import FusionMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder

DEFAULT = "default"
YAML_FILE = "hyperparams.yaml"

# For SpeechBrain, whose interfaces load yamls. JSON is yaml.
YAML = """\
# {title}
# Written by trackformer_sb {version}. To use it:
#   trackformer separate song.wav --model <this folder>
sample_rate: {sample_rate}
num_spks: {num_stems}
groups: {groups}

Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder {stft}
MaskNet: !new:trackformer_sb.inference.separator.StemMaskNet {masknet}
Decoder: !new:trackformer_sb.nnet.stft.STFTDecoder {stft}

modules:
  encoder: !ref <Encoder>
  masknet: !ref <MaskNet>
  decoder: !ref <Decoder>

audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
  sample_rate: !ref <sample_rate>
  mix: keep

pretrainer: !new:trackformer_sb.inference.weights.SafetensorsPretrainer
  loadables:
    masknet: !ref <MaskNet>
"""


def default_folder():
    """The folder of the separator that the package brings.

    Raises
    ------
    FileNotFoundError
        If it was installed without one.
    """
    folder = Path(str(resources.files("trackformer_sb") / "pretrained"))
    if not folder.is_dir():
        raise FileNotFoundError(
            "this package brings no separator of its own: expected a model, "
            "as a folder that training leaves or an id on the hub"
        )
    return folder


def resolved(source):
    """The folder that "default" means; any other source as it is."""
    return default_folder() if source == DEFAULT else source


class StemMaskNet(FusionMaskNet):
    """A ``FusionMaskNet`` with one mask per stem, the sum of its slots.

    Arguments
    ---------
    num_stems : int
        Number of stems, each of as many slots, which follow each other.
    in_channels, num_spks
        Of ``FusionMaskNet``; ``num_spks`` counts slots.
    **masknet : dict
        Its other arguments.

    Example
    -------
    >>> masknet = StemMaskNet(3, 257, 6, channels=(8, 8, 8), d_model=16)
    >>> masknet(torch.randn(1, 257, 9, dtype=torch.cfloat)).shape
    torch.Size([3, 1, 257, 9])
    """

    def __init__(self, num_stems, in_channels, num_spks, **masknet):
        super().__init__(in_channels, num_spks, **masknet)
        self.num_stems = num_stems

    def forward(self, mix_w):
        """Predicts masks [num_stems, batch, freq, frames]."""
        return super().forward(mix_w).unflatten(0, (self.num_stems, -1)).sum(1)


class Separator(torch.nn.Module, PyTorchModelHubMixin):
    """A song goes in, stems come out by name.

    Arguments
    ---------
    classes : list of str
        Names of the stems.
    sample_rate : int
        Rate of the waveforms in Hz.
    n_fft, hop_length : int
        Of the STFT, in samples.
    masknet : dict, optional
        Arguments of ``FusionMaskNet`` but ``in_channels``; ``num_spks`` is a
        multiple of the number of classes.

    Raises
    ------
    ValueError
        For a number of outputs that the classes do not divide.

    Example
    -------
    >>> separator = Separator(
    ...     ["vocals", "rest"],
    ...     n_fft=512,
    ...     hop_length=256,
    ...     masknet={"num_spks": 4, "channels": [8, 8, 8], "d_model": 16},
    ... )
    >>> song = torch.randn(2, 5000)
    >>> stems = separator.separate(song)
    >>> {name: stem.shape for name, stem in stems.items()}
    {'vocals': torch.Size([2, 5000]), 'rest': torch.Size([2, 5000])}
    >>> torch.allclose(stems["vocals"] + stems["rest"], song, atol=1e-4)
    True
    """

    def __init__(
        self,
        classes,
        sample_rate=44100,
        n_fft=2048,
        hop_length=1024,
        masknet=None,
    ):
        super().__init__()
        masknet = {"num_spks": 2 * len(classes), **(masknet or {})}
        if masknet["num_spks"] % len(classes):
            raise ValueError(
                f"num_spks: expected a multiple of {len(classes)}, the number "
                f"of classes, got {masknet['num_spks']}"
            )
        self.config = {
            "library_name": LIBRARY,
            "library_version": trackformer_sb.__version__,
            "classes": list(classes),
            "sample_rate": sample_rate,
            "n_fft": n_fft,
            "hop_length": hop_length,
            "masknet": masknet,
        }
        self.encoder = STFTEncoder(n_fft, hop_length)
        self.masknet = FusionMaskNet(n_fft // 2 + 1, **masknet)
        self.decoder = STFTDecoder(n_fft, hop_length)

    @classmethod
    def of_masknet(cls, masknet, **config):
        """A separator of a trained ``FusionMaskNet``.

        Arguments
        ---------
        masknet : FusionMaskNet
            Its weights are copied.
        **config : dict
            The other arguments of the class.

        Returns
        -------
        Separator
            In evaluation mode.
        """
        separator = cls(masknet=masknet.arguments, **config)
        separator.masknet.load_state_dict(masknet.state_dict())
        return separator.eval()

    @property
    def groups(self):
        """Outputs of the masknet by class: {"drums": (0, 1), ...}."""
        classes = self.config["classes"]
        slots = self.masknet.num_spks // len(classes)
        return {
            name: tuple(range(k * slots, (k + 1) * slots))
            for k, name in enumerate(classes)
        }

    @torch.no_grad()
    def separate(self, waveform):
        """Separates a waveform at the rate of the model.

        Arguments
        ---------
        waveform : torch.Tensor
            [channels, time]. For files, and for songs of any length, see
            ``separate_file``.

        Returns
        -------
        dict
            Name -> [channels, time]; the stems sum to the waveform.

        Raises
        ------
        ValueError
            For an input of another shape.
        """
        if waveform.dim() != 2:
            raise ValueError(
                "expected a waveform [channels, time], got "
                f"{list(waveform.shape)}"
            )
        est_source, _ = separate(
            waveform.unsqueeze(0),
            self.encoder,
            self.masknet,
            self.decoder,
            groups=self.groups.values(),
        )
        return dict(zip(self.groups, est_source[0]))

    def forward(self, waveform):
        """Separates a waveform, see ``separate``."""
        return self.separate(waveform)

    def interface(self, run_opts=None, **kwargs):
        """The same separator as the command line uses it.

        Arguments
        ---------
        run_opts, **kwargs
            Of ``PerformerSeparation``.

        Returns
        -------
        PerformerSeparation
            It shares the modules.
        """
        return PerformerSeparation(
            modules=dict(self.named_children()),
            hparams={
                **self.config,
                "groups": self.groups,
                "num_spks": self.masknet.num_spks,
            },
            run_opts=run_opts,
            **kwargs,
        )

    def separate_file(self, path, out_folder=None, **options):
        """Separates a file of any length at its own rate and channels.

        Arguments
        ---------
        path, out_folder, **options
            As of ``PerformerSeparation.separate_file``.

        Returns
        -------
        torch.Tensor or list of Path
            [stems, channels, time], or the written files:
            ``<out_folder>/<song>_drums.wav`` and so on.
        """
        device = str(next(self.parameters()).device)
        interface = self.interface({"device": device}, freeze_params=False)
        return interface.separate_file(path, out_folder, **options)

    def _save_pretrained(self, save_directory):
        """Writes config, weights, those in bfloat16, and a yaml for both."""
        folder = Path(save_directory)
        text = json.dumps(self.config, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        state = {
            name: value.to("cpu", torch.bfloat16).contiguous()
            for name, value in self.state_dict().items()
        }
        save_file(state, folder / SAFETENSORS_FILE, metadata={"format": "pt"})
        classes = self.config["classes"]
        stft = {key: self.config[key] for key in ("n_fft", "hop_length")}
        masknet = {
            "num_stems": len(classes),
            "in_channels": self.masknet.in_channels,
            **self.config["masknet"],
        }
        text = YAML.format(
            title=named_title(classes, self.config["sample_rate"]),
            version=trackformer_sb.__version__,
            sample_rate=self.config["sample_rate"],
            num_stems=len(classes),
            groups=json.dumps({name: [k] for k, name in enumerate(classes)}),
            stft=json.dumps(stft),
            masknet=json.dumps(masknet),
        )
        (folder / YAML_FILE).write_text(text, encoding="utf-8")

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
            named_card(
                self.config["classes"], self.config["sample_rate"], metadata
            )
        )

    @classmethod
    def from_pretrained(cls, source=DEFAULT, **hub):
        """Loads a separator; no code is run and no pickle is read.

        Arguments
        ---------
        source : str or Path
            Folder, id on the hub, or "default": the one in the package.
        **hub : dict
            ``revision``, ``token``, ``cache_dir``, ``local_files_only``,
            ``force_download``.

        Returns
        -------
        Separator
            In evaluation mode.

        Raises
        ------
        FileNotFoundError
            If there is no such folder, model or file.
        OSError
            If the hub cannot be reached or refuses.
        ValueError
            If config or weights are damaged or do not fit.
        """
        source = resolved(source)
        path = model_file(source, CONFIG_FILE, **hub)
        try:
            config = json.loads(Path(path).read_text("utf-8"))
            separator = cls(**{k: config[k] for k in config if k not in ABOUT})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        path = model_file(source, SAFETENSORS_FILE, **hub)
        load_state(separator, read_safetensors(path), path)
        return separator.eval()
