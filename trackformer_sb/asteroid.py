"""The bridge to Asteroid (optional extra).

Asteroid puts the batch first in masks, SpeechBrain the sources.

``PerformerSeparatorModel`` is a trained separator as a model of Asteroid. The
first use of the name imports Asteroid and registers the class there, so that
``BaseModel.from_pretrained`` finds it: it loads ``pytorch_model.bin`` of a
separator's folder, and an id on the hub, of which it fetches this file.
"""

import os

from torch import nn

from trackformer_sb.inference.config import ASTEROID_MODEL, asteroid_conf

CONF_KEYS = ("model_name", "model_args", "state_dict")


def __getattr__(name):
    if name != ASTEROID_MODEL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _model_class()
    return globals()[name]


class AsteroidMaskNet(nn.Module):
    """An Asteroid masker as a SpeechBrain masknet.

    Arguments
    ---------
    masker : torch.nn.Module
        [batch, channels, frames] -> [batch, n_src, channels, frames], like
        ``asteroid.masknn.convolutional.TDConvNet``.

    Example
    -------
    >>> from torch import nn
    >>> class Halves(nn.Module):
    ...     def forward(self, mix_w):
    ...         return 0.5 * mix_w.new_ones(len(mix_w), 2, *mix_w.shape[1:])
    >>> import torch
    >>> AsteroidMaskNet(Halves())(torch.randn(3, 16, 10)).shape
    torch.Size([2, 3, 16, 10])
    """

    def __init__(self, masker):
        super().__init__()
        self.masker = masker

    def forward(self, mix_w):
        """[batch, channels, frames] -> [num_spks, batch, channels, frames]."""
        return self.masker(mix_w).transpose(0, 1)


class AsteroidMasker(nn.Module):
    """A SpeechBrain masknet, ours for one, in Asteroid's masker slot.

    Arguments
    ---------
    masknet : torch.nn.Module
        [batch, channels, frames] -> [num_spks, batch, channels, frames].

    Example
    -------
    >>> import torch
    >>> from trackformer_sb.nnet.masknet import PerformerMaskNet
    >>> masknet = PerformerMaskNet(16, 4, d_model=32, num_layers=1)
    >>> AsteroidMasker(masknet)(torch.randn(3, 16, 10)).shape
    torch.Size([3, 4, 16, 10])
    """

    def __init__(self, masknet):
        super().__init__()
        self.masknet = masknet

    def forward(self, mix_w):
        """[batch, channels, frames] -> [batch, num_spks, channels, frames]."""
        return self.masknet(mix_w).transpose(0, 1)


def _model_class():
    """Defines and registers what needs Asteroid to be defined."""
    from asteroid import __version__ as asteroid_version
    from asteroid.models import base_models, register_model

    from trackformer_sb.inference.pretrained import (
        PerformerSeparator,
        load_state,
    )
    from trackformer_sb.inference.separation import separate
    from trackformer_sb.nnet.transfer import read_state

    class PerformerSeparatorModel(base_models.BaseModel):
        """A Performer on an STFT as a model of Asteroid.

        Its state has the names of ``PerformerSeparator``.

        Arguments
        ---------
        sample_rate : int
            Rate of the waveforms in Hz.
        num_spks : int
            Number of outputs.
        **model_args : dict
            Other arguments of ``PerformerSeparator``.
        """

        def __init__(self, sample_rate, num_spks, **model_args):
            super().__init__(sample_rate, in_channels=1)
            separator = PerformerSeparator(sample_rate, num_spks, **model_args)
            self.model_args = {
                key: value
                for key, value in separator.config.items()
                if not key.startswith("library_")
            }
            self.encoder = separator.encoder
            self.masknet = separator.masknet
            self.decoder = separator.decoder

        def forward(self, wav):
            """Separates waveforms.

            Arguments
            ---------
            wav : torch.Tensor
                [time], [batch, time] or [batch, 1, time].

            Returns
            -------
            torch.Tensor
                [sources, time] or [batch, sources, time].

            Raises
            ------
            ValueError
                For an input of another shape.
            """
            mono = wav.dim() in (1, 2) or (wav.dim() == 3 and wav.shape[1] == 1)
            if not mono:
                raise ValueError(
                    "expected wav [time], [batch, time] or [batch, 1, time], "
                    f"got {list(wav.shape)}"
                )
            est_source, _ = separate(
                wav.reshape(-1, wav.shape[-1]),
                self.encoder,
                self.masknet,
                self.decoder,
                self.model_args["mixture_consistency"],
            )
            return est_source.squeeze(0) if wav.dim() == 1 else est_source

        def forward_wav(self, wav):
            """Separates with dropout off, for ``asteroid.separate``."""
            training = self.training
            self.eval()
            try:
                return self(wav)
            finally:
                self.train(training)

        def get_model_args(self):
            """Arguments that make this class again."""
            return dict(self.model_args)

        def serialize(self):
            """The model as tensors and plain values, see ``asteroid_conf``.

            ``torch.save`` makes a file of it that Asteroid loads.

            Returns
            -------
            dict
                ``model_name``, ``model_args``, ``state_dict`` and ``infos``.
            """
            conf = asteroid_conf(self.get_model_args(), self.get_state_dict())
            conf["model_name"] = type(self).__name__
            versions = conf["infos"]["software_versions"]
            versions["asteroid_version"] = str(asteroid_version)
            return conf

        @classmethod
        def from_pretrained(cls, source, **kwargs):
            """Loads a model; no code is run.

            Arguments
            ---------
            source : dict, str or Path
                What ``serialize`` returned, a file of it, the folder of an
                exported separator, or its id on the hub.
            **kwargs : dict
                ``device``, and ``revision``, ``token`` and so on for the hub,
                see ``PerformerSeparator.from_pretrained``.

            Returns
            -------
            PerformerSeparatorModel
                In evaluation mode.

            Raises
            ------
            FileNotFoundError
                If there is no such file, folder or model.
            ValueError
                If something else is in it, or the weights do not fit exactly.
            """
            device = kwargs.pop("device", "cpu")
            if not isinstance(source, dict) and not os.path.isfile(source):
                separator = PerformerSeparator.from_pretrained(source, **kwargs)
                model = _built(separator.config, source)
                state = separator.state_dict()
            else:
                conf, source = (
                    (source, "the conf")
                    if isinstance(source, dict)
                    else (read_state(source), source)
                )
                missing = [key for key in CONF_KEYS if key not in conf]
                if missing or conf["model_name"] != cls.__name__:
                    raise ValueError(
                        f"{source}: expected a serialized {cls.__name__} with "
                        f"{', '.join(CONF_KEYS)}, got "
                        f"{conf.get('model_name', list(conf)[:5])}"
                    )
                model = _built(conf["model_args"], source)
                state = conf["state_dict"]
            load_state(model, state, source)
            return model.to(device).eval()

    def _built(model_args, source):
        try:
            return PerformerSeparatorModel(
                **{
                    key: value
                    for key, value in model_args.items()
                    if not key.startswith("library_")
                }
            )
        except (TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{source}: model_args: {error}") from error

    PerformerSeparatorModel.__qualname__ = ASTEROID_MODEL
    register_model(PerformerSeparatorModel)
    return PerformerSeparatorModel
