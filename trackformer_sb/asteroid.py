"""The bridge to Asteroid (optional extra).

Asteroid puts the batch first in masks, SpeechBrain the sources.
"""

from asteroid.models import base_models, register_model
from torch import nn

from trackformer_sb.inference.separator import Separator


class AsteroidMaskNet(nn.Module):
    """An Asteroid masker as a SpeechBrain masknet.

    Arguments
    ---------
    masker : torch.nn.Module
        [batch, channels, frames] -> [batch, n_src, channels, frames], like
        ``asteroid.masknn.convolutional.TDConvNet``.
    """

    def __init__(self, masker):
        super().__init__()
        self.masker = masker

    def forward(self, mix_w):
        """[batch, channels, frames] -> [num_spks, batch, channels, frames]."""
        return self.masker(mix_w).transpose(0, 1)


class AsteroidMasker(nn.Module):
    """A SpeechBrain masknet, ours for one, in Asteroid's masker slot."""

    def __init__(self, masknet):
        super().__init__()
        self.masknet = masknet

    def forward(self, mix_w):
        """[batch, channels, frames] -> [batch, num_spks, channels, frames]."""
        return self.masknet(mix_w).transpose(0, 1)


class SeparatorModel(base_models.BaseModel):
    """A separator as a model of Asteroid.

    Arguments
    ---------
    sample_rate : int
        Rate of the waveforms in Hz.
    **config : dict
        Other arguments of ``Separator``.
    """

    def __init__(self, sample_rate, **config):
        super().__init__(sample_rate, in_channels=1)
        self.separator = Separator(sample_rate=sample_rate, **config)

    @classmethod
    def from_pretrained(cls, source, **hub):
        """Loads a folder, a hub id, or what ``serialize`` returned, strictly.

        No code of the hub is run; `hub` is as of ``Separator``. The model is in
        evaluation mode.
        """
        if isinstance(source, dict):
            return super().from_pretrained(source).eval()
        separator = Separator.from_pretrained(source, **hub)
        model = cls(**separator.config)
        model.separator = separator
        return model.eval()

    def forward(self, wav):
        """[time], [batch, time] or [batch, 1, time] -> [..., stems, time].

        Raises
        ------
        ValueError
            For an input of another shape.
        """
        mono = wav.ndim in (1, 2) or (wav.ndim == 3 and wav.shape[1] == 1)
        if not mono:
            raise ValueError(
                "expected wav [time], [batch, time] or [batch, 1, time], "
                f"got {list(wav.shape)}"
            )
        est_source = self.separator(wav.reshape(-1, wav.shape[-1]))
        return est_source.squeeze(0) if wav.ndim == 1 else est_source

    def get_model_args(self):
        """Arguments that make this class again."""
        return dict(self.separator.config)

    def serialize(self):
        """The model in a dict of tensors and plain values.

        Asteroid's own has versions that ``torch.load`` refuses.
        """
        conf = super().serialize()
        versions = conf["infos"]["software_versions"]
        conf["infos"]["software_versions"] = {
            name: str(version) for name, version in versions.items()
        }
        return conf


register_model(SeparatorModel)
