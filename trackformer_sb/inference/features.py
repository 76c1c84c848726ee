"""Pre-trained encoders as feature extractors for other recipes."""

import torch
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

import trackformer_sb
from trackformer_sb.inference.card import card_sections
from trackformer_sb.inference.folder import read_model, write_model
from trackformer_sb.inference.hub import StrictPretrained, fetched_file
from trackformer_sb.nnet.encoder_files import (
    ENCODER_FILE,
    SETTINGS,
    SETTINGS_FILE,
)
from trackformer_sb.nnet.features import SpectrogramEncoder

NODES = {"stft": "Encoder", "encoder": "Features"}

HEADER = """\
# {title}
# Written by trackformer_sb {version}. As the start of a separator:
#   python recipes/train.py hparams/performer_mixit_mae.yaml \\
#       --pretrained_encoder=<this folder>
# As features for other recipes:
#   from trackformer_sb.inference.features import PerformerFeatures
#   features = PerformerFeatures.from_hparams(source="<this folder>")
"""

CARD = """\
---
library_name: speechbrain
pipeline_tag: feature-extraction
license: apache-2.0
tags:
- speechbrain
- audio
- music
- masked-autoencoder
- self-supervised
---

# {title}

A Performer pre-trained as a masked autoencoder on unlabelled music. It turns
waveforms at {sample_rate} Hz into {d_model} features per frame of {hop_length}
samples.

## How to use

```python
from trackformer_sb.inference.features import PerformerFeatures

features = PerformerFeatures.from_hparams(source="path/to/this/folder")
x = features.encode_batch(wavs)  # [batch, time] -> [batch, frames, d_model]
```

To start a separator from it:

```shell
python recipes/train.py hparams/performer_mixit_mae.yaml \\
    --pretrained_encoder=path/to/this/folder
```
{sections}"""


class PerformerFeatures(StrictPretrained):
    """A pre-trained encoder: waveforms to [batch, frames, d_model] features.

    Its weights are frozen unless ``freeze_params=False`` is given; it can be a
    module of another recipe.

    Arguments
    ---------
    modules : dict
        ``stft``, an encoder of waveforms, and ``encoder``, a
        ``SpectrogramEncoder``.
    hparams : dict
        ``sample_rate`` in Hz.
    **kwargs : dict
        ``run_opts`` and ``freeze_params`` of ``Pretrained``.

    Example
    -------
    >>> from trackformer_sb.nnet.features import SpectrogramEncoder
    >>> from trackformer_sb.nnet.stft import STFTEncoder
    >>> features = PerformerFeatures(
    ...     modules={
    ...         "stft": STFTEncoder(n_fft=128, hop_length=32),
    ...         "encoder": SpectrogramEncoder(65, d_model=32, num_layers=1),
    ...     },
    ...     hparams={"sample_rate": 44100},
    ...     run_opts={"device": "cpu"},
    ... )
    >>> features.encode_batch(torch.randn(2, 320)).shape
    torch.Size([2, 10, 32])
    """

    what = "encoder"
    MODULES_NEEDED = ("stft", "encoder")
    HPARAMS_NEEDED = ("sample_rate",)

    def __init__(
        self, modules=None, hparams=None, run_opts=None, freeze_params=True
    ):
        encoder = (modules or {}).get("encoder")
        if not isinstance(encoder, (SpectrogramEncoder, type(None))):
            raise ValueError(
                "encoder: expected a SpectrogramEncoder, as in the encoder/ "
                f"folder of a pre-training, got {type(encoder).__name__}"
            )
        super().__init__(modules, hparams, run_opts, freeze_params)
        self.frozen = freeze_params

    def train(self, mode=True):
        """As of any module, but frozen features keep their dropout off."""
        return super().train(mode and not self.frozen)

    def encode_batch(self, wavs, wav_lens=None):
        """Features of a batch of waveforms at the rate of the model.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, time].
        wav_lens : torch.Tensor, optional
            [batch], lengths relative to the longest; what is beyond does not
            influence the features.

        Returns
        -------
        torch.Tensor
            [batch, frames, d_model], a frame every ``hop_length`` samples.

        Raises
        ------
        ValueError
            For an input of another shape, or lengths out of range.
        """
        if wavs.dim() != 2:
            raise ValueError(
                f"expected waveforms [batch, time], got {list(wavs.shape)}"
            )
        # not self.device: as a part of a recipe it moves with the recipe
        device = next(self.mods.encoder.parameters()).device
        wavs, padding = wavs.to(device), None
        if wav_lens is not None:
            if not ((wav_lens > 0) & (wav_lens <= 1)).all():
                raise ValueError(
                    "expected wav_lens as shares in (0, 1], got "
                    f"{wav_lens.tolist()}"
                )
            samples = (wav_lens.to(device) * wavs.shape[1]).round().clamp(1)
            place = torch.arange(wavs.shape[1], device=device)
            # windows of the last frames reach beyond the end
            beyond = place >= samples.unsqueeze(1)
            wavs = wavs.masked_fill(beyond, 0.0)
            # a frame counts if its first sample does
            padding = beyond[:, :: self.mods.stft.hop_length]
        return self.mods.encoder(self.mods.stft(wavs), padding)

    def forward(self, wavs, wav_lens=None):
        """Features of a batch, see ``encode_batch``."""
        return self.encode_batch(wavs, wav_lens)


def export_encoder(hparams_file, modules, folder, metadata=None, songs=()):
    """Writes the folder of a pre-trained encoder.

    It loads in ``PerformerFeatures`` and initialises masknets, see
    ``trackformer_sb.nnet.transfer``. On the main process only.

    Arguments
    ---------
    hparams_file : str or Path
        The yaml of the pre-training with its references resolved, with
        ``Encoder`` and ``Features`` as ``!new:`` nodes and all ``SETTINGS``.
    modules : dict
        The trained ``stft`` and ``encoder``.
    folder : str or Path
        Where to write. An encoder that is there is replaced.
    metadata : dict, optional
        Sections of the model card: title -> text, or a dict as a table.
    songs : sequence of str
        Names of what it was trained on, so that nobody tests on it.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If keys or modules are missing, or the yaml does not build modules
        that fit the trained ones.
    FileExistsError
        If the folder holds other files than those of an encoder.
    """
    hparams = read_model(hparams_file, modules, SETTINGS, NODES)
    settings = {key: hparams[key] for key in SETTINGS}
    # quoted: a song may be called "No" or "1:30"
    settings["songs"] = [DoubleQuotedScalarString(song) for song in songs]
    title = (
        f"Performer encoder of music: {settings['num_layers']} layers at "
        f"{settings['sample_rate']} Hz"
    )
    sections = card_sections(metadata or {})
    return write_model(
        folder,
        hparams,
        modules,
        NODES,
        settings,
        HEADER.format(title=title, version=trackformer_sb.__version__),
        CARD.format(title=title, sections=sections, **settings),
        "encoder",
    )


def encoder_folder(source):
    """The local folder of an encoder that is in a folder or on the hub.

    Arguments
    ---------
    source : str or Path
        Folder, or id on the hub.

    Returns
    -------
    Path
        Folder with its yaml and its weights.

    Raises
    ------
    FileNotFoundError
        If there is no such encoder.
    """
    fetched_file(source, ENCODER_FILE, "encoder")
    return fetched_file(source, SETTINGS_FILE, "encoder").parent
