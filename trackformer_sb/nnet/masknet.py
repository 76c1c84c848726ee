"""The Performer as a SpeechBrain masknet."""

import torch
from torch import nn

from trackformer_sb.nnet.features import SpectrogramEncoder
from trackformer_sb.nnet.performer import check_choice
from trackformer_sb.nnet.streaming import StreamingMasks

MASK_ACTIVATIONS = ("softmax", "sigmoid", "relu")


class PerformerMaskNet(StreamingMasks, SpectrogramEncoder):
    """Predicts one mask per source with a Performer.

    Has the calling convention of ``speechbrain.lobes.models.conv_tasnet
    .MaskNet`` and takes its place in a separation recipe, on a complex STFT
    as well as on a learned encoder. From a complex input it sees the
    normalised log-magnitude.

    Arguments
    ---------
    num_spks : int
        Number of sources to output.
    mask_activation : str
        "softmax" over sources (masks sum to one), "sigmoid" or "relu".
    lookahead_frames : int
        Frames after its own that a mask of a causal net depends on.

    The others are those of ``SpectrogramEncoder`` and ``PerformerEncoder``.

    Raises
    ------
    ValueError
        For an unknown option, or an input with another number of channels.

    Example
    -------
    >>> masknet = PerformerMaskNet(
    ...     in_channels=65, num_spks=4, d_model=32, nhead=2, num_layers=1
    ... )
    >>> mix_w = torch.randn(2, 65, 50, dtype=torch.complex64)
    >>> masks = masknet(mix_w)
    >>> torch.allclose(masks.sum(0), torch.ones(2, 65, 50))
    True
    """

    def __init__(
        self,
        in_channels,
        num_spks,
        d_model=256,
        nhead=4,
        num_layers=12,
        d_ffn=None,
        n_features=256,
        dropout=0.1,
        attention="favor",
        causal=False,
        spec_norm="zscore",
        mask_activation="softmax",
        checkpointing=False,
        lookahead_frames=0,
    ):
        super().__init__(
            in_channels,
            d_model,
            spec_norm,
            nhead=nhead,
            num_layers=num_layers,
            d_ffn=d_ffn,
            n_features=n_features,
            dropout=dropout,
            attention=attention,
            causal=causal,
            checkpointing=checkpointing,
        )
        check_choice("mask_activation", mask_activation, MASK_ACTIVATIONS)
        self.num_spks = num_spks
        self.set_causal(causal, lookahead_frames, attention)
        self.mask_activation = mask_activation
        self.head = nn.Linear(d_model, num_spks * in_channels)

    def _masks(self, mix_w, key_padding_mask, memory=None):
        x = self.encode(mix_w, key_padding_mask, memory)
        batch, frames, _ = x.shape
        # sources outermost in memory, so that sources and batch, and likewise
        # frames and channels, can be flattened by a view
        x = torch.baddbmm(
            self.head.bias.view(self.num_spks, 1, -1),
            x.flatten(0, 1).expand(self.num_spks, -1, -1),
            self.head.weight.unflatten(0, (self.num_spks, -1)).mT,
        ).unflatten(1, (batch, frames))
        if self.mask_activation == "softmax":
            # in bfloat16 the masks would sum to one within 0.4 % only
            dtype = torch.promote_types(x.dtype, torch.float32)
            masks = x.softmax(dim=0, dtype=dtype)
        elif self.mask_activation == "sigmoid":
            masks = x.sigmoid()
        else:
            masks = x.relu()
        return masks.transpose(2, 3)
