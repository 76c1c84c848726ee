"""What the networks see of a mixture, and the encoder they share.

``SpectrogramEncoder`` is the part of a masknet that pre-training provides:
masked autoencoders and masknets are made of the same class, so that every
weight carries over.
"""

import torch
from torch import nn

from trackformer_sb.nnet.performer import PerformerEncoder, check_choice
from trackformer_sb.nnet.streaming import Memory, running_means, running_zscore

SPEC_NORMS = ("zscore", "minmax", "band_zscore", "none")

# Bins this far below the mean magnitude of an item (-60 dB) count as silent.
# Without a floor the empty top of a lossy file rules the statistics.
LOG_FLOOR = 1e-3

# Keeps the logarithm of silence, and its gradient, finite.
SILENT_MAGNITUDE = 1e-10


def _mean(x, dims, key_padding_mask):
    """Mean over some of [batch, channels, frames], without padding."""
    if key_padding_mask is None:
        return x.mean(dims, True)
    padding = key_padding_mask.unsqueeze(1)
    count = (~padding).expand_as(x).sum(dims, True).clamp(min=1)
    return x.masked_fill(padding, 0.0).sum(dims, True) / count


def log_magnitude(spectrum, key_padding_mask=None, reference=None):
    """Log-magnitude with a floor relative to the item's mean magnitude.

    ``log(|X| + 1e-3 mean|X|)``: a gain on the input becomes an offset, which
    the normalisation that follows takes out. Of a complex `spectrum`
    [batch, freq, frames]; finite on silence. The mean is that of a `reference`
    like it if there is one, without the frames of `key_padding_mask`.
    """
    magnitude = spectrum.abs()
    level = magnitude if reference is None else reference.abs()
    mean = _mean(level, (-2, -1), key_padding_mask)
    return (magnitude + LOG_FLOOR * mean + SILENT_MAGNITUDE).log()


def normalise_spectrogram(x, spec_norm, key_padding_mask=None, reference=None):
    """Normalises each item [channels, frames] of a batch by itself.

    Frames of `key_padding_mask` do not count; the statistics are those of a
    `reference` like `x` if there is one. A constant item becomes zero, but for
    rounding.

    Example
    -------
    >>> normalise_spectrogram(torch.tensor([[[1.0, 3.0]]]), "zscore")
    tensor([[[-1.,  1.]]])
    """
    if spec_norm == "none":
        return x
    if x.dtype in (torch.float16, torch.bfloat16):
        # squares of small values would be 0 and of large ones infinite
        reference = None if reference is None else reference.float()
        norm = spec_norm, key_padding_mask, reference
        return normalise_spectrogram(x.float(), *norm).to(x.dtype)
    dims = -1 if spec_norm == "band_zscore" else (-2, -1)
    ref = x if reference is None else reference
    mean = _mean(ref, dims, key_padding_mask)
    if spec_norm == "minmax":
        if key_padding_mask is not None:
            # the mean is neither lowest nor highest
            ref = ref.where(~key_padding_mask.unsqueeze(1), mean)
        low, high = ref.amin(dims, True), ref.amax(dims, True)
        return (x - low) / (high - low).clamp(min=1e-5)
    variance = _mean((ref - mean).square(), dims, key_padding_mask)
    # clamped before the root, whose slope at zero is infinite; what is steady
    # is left so, rather than its rounding blown up to noise
    least = 1e-2 if spec_norm == "band_zscore" else 1e-6
    return (x - mean) / variance.clamp(min=least).sqrt()


def running_level(magnitude, memory):
    """Log-magnitude normalised by what was heard so far, for what is causal.

    As ``log_magnitude`` and its z-score, of [batch, freq, frames]; and the
    running mean magnitude, [batch, 1, frames].
    """
    mean = running_means(magnitude.mean(1, keepdim=True), magnitude, memory)
    level = (magnitude + LOG_FLOOR * mean).clamp(min=SILENT_MAGNITUDE).log()
    return running_zscore(level, magnitude, memory), mean


class SpectrogramEncoder(nn.Module):
    """Embeds the frames of an encoded mixture and encodes them.

    From a complex STFT it sees the normalised log-magnitude.

    Arguments
    ---------
    in_channels : int
        Channels of the encoded mixture: ``n_fft // 2 + 1`` for an STFT.
    d_model : int
        Number of channels of the Performer, even.
    spec_norm : str
        How the spectrogram is normalised per item. "zscore": zero mean, unit
        variance; "minmax": to [0, 1]; "none"; "band_zscore": zero mean and unit
        variance of each channel over time, which takes out the colour of a
        recording and leaves what changes. What is causal has "zscore", by what
        was heard so far.
    **performer : dict
        Other arguments of ``PerformerEncoder``.

    Raises
    ------
    ValueError
        For an unknown option, or an input with another number of channels.
    """

    def __init__(
        self,
        in_channels,
        d_model=256,
        spec_norm="zscore",
        **performer,
    ):
        super().__init__()
        check_choice("spec_norm", spec_norm, SPEC_NORMS)
        if performer.get("causal") and spec_norm != "zscore":
            raise ValueError(
                f"spec_norm: expected zscore for a causal net, got {spec_norm}"
            )
        self.in_channels = in_channels
        self.spec_norm = spec_norm
        self.embedding = nn.Linear(in_channels, d_model)
        self.encoder = PerformerEncoder(d_model, **performer)

    def redraw_projections(self, generator=None):
        """Draws new random features, see ``PerformerEncoder``."""
        self.encoder.redraw_projections(generator)

    def check(self, mix_w):
        """Refuses what is no encoded mixture [batch, channels, frames]."""
        if mix_w.dim() != 3 or mix_w.shape[1] != self.in_channels:
            raise ValueError(
                f"expected an encoded mixture [batch, {self.in_channels}, "
                f"frames], got {list(mix_w.shape)}"
            )

    def spectrogram(self, mix_w, key_padding_mask=None, reference=None):
        """What the network sees of an encoded mixture, see ``encode``.

        Real, [batch, frames, channels], normalised: by the statistics of a
        `reference` like `mix_w` if there is one.
        """
        self.check(mix_w)
        x, ref = mix_w, reference
        if x.is_complex():
            x = log_magnitude(x, key_padding_mask, reference)
            if reference is not None:
                ref = log_magnitude(reference, key_padding_mask)
        x = normalise_spectrogram(x, self.spec_norm, key_padding_mask, ref)
        return x.transpose(1, 2)

    def encode(self, mix_w, key_padding_mask=None, memory=None):
        """Features [batch, frames, d_model], arguments as ``spectrogram``.

        What is causal sees the spectrogram by what was heard so far, and goes
        on with the `memory` of the frames before.
        """
        if not self.encoder.causal:
            x = self.spectrogram(mix_w, key_padding_mask)
        else:
            self.check(mix_w)
            memory = Memory() if memory is None else memory
            if mix_w.is_complex():
                x, _ = running_level(mix_w.abs(), memory)
            else:
                x = running_zscore(mix_w, mix_w.abs(), memory)
            x = x.transpose(1, 2)
        x = self.embedding(x.to(self.embedding.weight.dtype))
        return self.encoder(x, key_padding_mask, memory=memory)

    def forward(self, mix_w, key_padding_mask=None):
        """Features of an encoded mixture, see ``encode``."""
        return self.encode(mix_w, key_padding_mask)
