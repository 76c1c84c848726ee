"""Pre-trained encoders as feature extractors for other recipes."""

from pathlib import Path

import torch
from torch import nn

from trackformer_sb.inference.hub import HubModel, plain_values
from trackformer_sb.nnet.features import SpectrogramEncoder
from trackformer_sb.nnet.stft import STFTEncoder

TEXT = """\
A Performer pre-trained as a masked autoencoder on unlabelled music. It turns
waveforms at {sample_rate} Hz into {d_model} features per frame of {hop_length}
samples.

## How to use

```python
from trackformer_sb.inference.features import PerformerFeatures

features = PerformerFeatures.from_pretrained("path/to/this/folder")
x = features.encode_batch(wavs)  # [batch, time] -> [batch, frames, d_model]
```

To start a separator from it:

```shell
python recipes/train.py hparams/performer_mixit_mae.yaml \\
    --pretrained_encoder=path/to/this/folder
```
"""


class PerformerFeatures(
    HubModel,
    pipeline_tag="feature-extraction",
    tags=["speechbrain", "music", "masked-autoencoder", "self-supervised"],
):
    """A pre-trained encoder: waveforms to [batch, frames, d_model] features.

    It can be a module of another recipe.

    Arguments
    ---------
    sample_rate : int
        Rate of the waveforms in Hz.
    n_fft, hop_length : int
        Of the STFT, in samples.
    songs : sequence of str
        Names of what it was trained on, so that nobody tests on it.
    **encoder : dict
        Arguments of ``SpectrogramEncoder`` but ``in_channels``.
    """

    def __init__(
        self, sample_rate, n_fft=1024, hop_length=256, songs=(), **encoder
    ):
        super().__init__()
        self.stft = STFTEncoder(n_fft, hop_length)
        self.encoder = SpectrogramEncoder(n_fft // 2 + 1, **encoder)
        self.frozen = False
        self.config = {
            "sample_rate": sample_rate,
            "n_fft": n_fft,
            "hop_length": hop_length,
            **encoder,
            "songs": list(songs),
        }

    @property
    def title(self):
        """The first line of the card."""
        return f"Performer encoder of music at {self.config['sample_rate']} Hz"

    @property
    def text(self):
        """What the card says of all encoders."""
        d_model = self.encoder.embedding.out_features
        return TEXT.format(**{**self.config, "d_model": d_model})

    @classmethod
    def from_pretrained(cls, source, freeze_params=True, **hub):
        """Loads an encoder, see ``HubModel``.

        With ``freeze_params`` its weights stay as they are, and its dropout
        off, in the training of a recipe.
        """
        features = super().from_pretrained(source, **hub)
        features.frozen = freeze_params
        return features.requires_grad_(not freeze_params)

    @classmethod
    def of_recipe(cls, hparams_file, encoder, songs=()):
        """A copy of the encoder that a pre-training has as ``Features``."""
        hparams = plain_values(Path(hparams_file).read_text("utf-8"))
        sizes = {
            name: value
            for name, value in hparams["Features"].items()
            if name not in ("class", "in_channels", "checkpointing")
        }
        keys = ("sample_rate", "n_fft", "hop_length")
        # without touching the random state of a training
        with torch.random.fork_rng(devices=[]):
            features = cls(
                **{key: hparams[key] for key in keys}, songs=songs, **sizes
            )
        features.encoder.load_state_dict(encoder.state_dict())
        return features.eval()

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
            [batch], lengths relative to the longest, in (0, 1]; what is beyond
            does not influence the features.

        Returns
        -------
        torch.Tensor
            [batch, frames, d_model], a frame every ``hop_length`` samples.
        """
        device = next(self.parameters()).device
        wavs, padding = wavs.to(device), None
        if wav_lens is not None:
            samples = (wav_lens.to(device) * wavs.shape[1]).round().clamp(1)
            place = torch.arange(wavs.shape[1], device=device)
            # windows of the last frames reach beyond the end
            beyond = place >= samples.unsqueeze(1)
            wavs = wavs.masked_fill(beyond, 0.0)
            # a frame counts if its first sample does
            padding = beyond[:, :: self.stft.hop_length]
        return self.encoder(self.stft(wavs), padding)

    def forward(self, wavs, wav_lens=None):
        """Features of a batch, see ``encode_batch``."""
        return self.encode_batch(wavs, wav_lens)


def encoder_of(masknet):
    """The part of a masknet that pre-training provides, by its own names."""
    return nn.ModuleDict(
        {"embedding": masknet.embedding, "encoder": masknet.encoder}
    )


def load_pretrained_encoder(masknet, source, settings=None):
    """Initialises a masknet's embedding and encoder in place, strictly.

    Those ``settings`` of the separator that the encoder has as well, such as
    ``sample_rate`` and ``nhead``, must be equal; ``dropout`` may differ.
    Returns the PerformerFeatures. Raises as ``from_pretrained`` does,
    ValueError for settings and RuntimeError for weights that do not fit, all
    of them named.
    """
    # without touching the random state of a training
    with torch.random.fork_rng(devices=[]):
        features = PerformerFeatures.from_pretrained(source)
    settings = {**(settings or {}), "spec_norm": masknet.spec_norm}
    settings["dropout"] = None
    different = [
        f"{key} is {value}, the separator has {settings[key]}"
        for key, value in features.config.items()
        if settings.get(key) not in (None, value)
    ]
    if different:
        raise ValueError(
            f"pretrained_encoder: the encoder in {source} does not fit: "
            + "; ".join(different)
        )
    encoder_of(masknet).load_state_dict(features.encoder.state_dict())
    return features


def encoder_layers(masknet):
    """Lists of the parameters that an encoder initialises, layer by layer."""
    encoder = masknet.encoder
    layers = [masknet.embedding, *encoder.layers]
    parameters = [list(layer.parameters()) for layer in layers]
    parameters[-1] += encoder.norm.parameters()
    return parameters
