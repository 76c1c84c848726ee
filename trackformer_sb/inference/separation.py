"""Encode, mask, decode: the one path from a mixture to its sources."""

import torch

from trackformer_sb.inference.spatial import (
    LFE,
    SURROUND,
    fold_down,
    share_lfe,
    wiener,
)
from trackformer_sb.nnet.stft import fit_length


def apply_masks(mix_w, est_mask):
    """Product of an encoded mixture and masks, each real or complex."""
    if not mix_w.is_complex() or est_mask.is_complex():
        return mix_w * est_mask
    # it would first make the masks complex, and so in the backward pass
    return torch.complex(mix_w.real * est_mask, mix_w.imag * est_mask)


def group_masks(est_mask, groups):
    """Masks of groups of sources, their sums; all masks without groups."""
    if groups is None:
        return est_mask
    return torch.stack([est_mask[list(x)].sum(0) for x in groups])


def time_averaged_masks(masks, power):
    """Masks that do not change in time: means over the frames by power.

    ``sum_t m P / sum_t P`` in every bin. What separation loses by it, it gains
    by following the music. Masks [..., freq, frames] and the mixture's power,
    [freq, frames], give masks [..., freq, frames], the same in all frames.

    Example
    -------
    >>> masks, power = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 3.0]])
    >>> time_averaged_masks(masks, power)
    tensor([[0.7500, 0.7500]])
    """
    power = power + 1e-20  # plain means where the mixture is silent
    mean = (masks * power).sum(-1, keepdim=True) / power.sum(-1, keepdim=True)
    return mean.expand_as(masks)


def distribute_residual(mix, est_source):
    """Adds what the sources [sources, ...] lack of the mixture evenly to them.

    Example
    -------
    >>> distribute_residual(torch.ones(2), torch.zeros(4, 2))[3]
    tensor([0.2500, 0.2500])
    """
    return est_source + (mix - est_source.sum(0)) / len(est_source)


def separate(
    mix,
    encoder,
    masknet,
    decoder,
    mixture_consistency=False,
    groups=None,
    lfe=None,
    spatial=False,
):
    """Separates mixtures with any three-module separator of SpeechBrain.

    The encoded mixture is multiplied by one mask per source and decoded, all
    sources in one pass. Channels share the masks, so that each source keeps its
    place between them; they are predicted from the mean of the channels, or
    from both of stereo by a masknet that says ``stereo = True``. Surround sound
    is folded down before.

    Arguments
    ---------
    mix : torch.Tensor
        [batch, time] or [batch, channels, time].
    encoder : callable
        [batch, time] -> [batch, channels, frames], real or complex.
    masknet : callable
        [batch, channels, frames] -> [num_spks, batch, channels, frames]; a
        stereo one takes [batch, 2, channels, frames] as well.
    decoder : callable
        [batch, channels, frames] -> [batch, time].
    mixture_consistency : bool
        Whether to distribute what the sources lack of the mixture evenly over
        them (arXiv 1811.08521, equation 3), so that they sum to it. Softmax
        masks on an STFT sum to it by themselves.
    groups : iterable of tuples of int, optional
        Sources to add up, which then are the sources; their masks are added, so
        that fewer have to be decoded.
    lfe : list of int, optional
        Outputs of the masknet that share the low-frequency channel of 5.1 and
        7.1; by default all.
    spatial : bool
        Whether channels are separated by ``spatial.wiener``, which needs an
        STFT and sources that have places: named stems.

    Returns
    -------
    est_source : torch.Tensor
        [batch, sources, time] or [batch, sources, channels, time].
    est_mask : torch.Tensor
        [sources, batch, channels, frames].

    Raises
    ------
    ValueError
        If ``mix`` has another number of dimensions.

    Example
    -------
    >>> from trackformer_sb.nnet.masknet import PerformerMaskNet
    >>> from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
    >>> masknet = PerformerMaskNet(513, 4, d_model=32, num_layers=1)
    >>> mix = torch.randn(2, 5000)
    >>> est_source, _ = separate(mix, STFTEncoder(), masknet, STFTDecoder())
    >>> torch.allclose(est_source.sum(1), mix, atol=1e-5)
    True
    """
    if mix.dim() not in (2, 3):
        raise ValueError(
            "expected mix [batch, time] or [batch, channels, time], got "
            f"{list(mix.shape)}"
        )
    # [batch, channels, time]
    sig = mix if mix.dim() == 3 else mix.unsqueeze(1)
    batch, num_channels, length = sig.shape
    mix_w = encoder(sig.flatten(0, 1)).unflatten(0, (batch, num_channels))
    heard = fold_down(sig)
    if num_channels == 1:
        all_masks = masknet(mix_w[:, 0])
    elif heard.shape[1] != 2 or not getattr(masknet, "stereo", False):
        all_masks = masknet(encoder(heard.mean(1)))
    elif num_channels == 2:
        all_masks = masknet(mix_w)
    else:
        heard = encoder(heard.flatten(0, 1)).unflatten(0, (batch, 2))
        all_masks = masknet(heard)
    est_mask = group_masks(all_masks, groups)
    # [sources, batch, audio channels, channels, frames]
    if spatial and num_channels > 1 and num_channels not in SURROUND:
        sep_w = wiener(est_mask, mix_w)
    else:
        sep_w = apply_masks(mix_w.unsqueeze(0), est_mask.unsqueeze(2))
    if num_channels in SURROUND:
        main = [k for k in range(num_channels) if k != LFE]
        if spatial:
            sep_w[:, :, main] = wiener(est_mask, mix_w[:, main])
        if lfe is not None:
            low = group_masks(share_lfe(all_masks, lfe), groups)
            sep_w[:, :, LFE] = apply_masks(mix_w[:, LFE], low)
    est_source = fit_length(decoder(sep_w.flatten(0, 2)), length)
    est_source = est_source.view(*sep_w.shape[:3], length)
    if mixture_consistency:
        est_source = distribute_residual(sig, est_source)
    est_source = est_source.transpose(0, 1)
    if mix.dim() == 2:
        est_source = est_source.squeeze(2)
    return est_source, est_mask


def separate_by_both(mix, encoder, masknet, decoder, mixture_consistency=False):
    """Sources by masks as they are, and by ``time_averaged_masks``.

    Each [sources, channels, time], of a mixture [channels, time]; the rest is
    as of ``separate``.
    """
    how = decoder, mixture_consistency
    est_source, masks = separate(mix[None], encoder, masknet, *how)
    power = encoder(mix).abs().square().mean(0)
    masks = time_averaged_masks(masks, power)
    averaged, _ = separate(mix[None], encoder, lambda mix_w: masks, *how)
    return est_source[0], averaged[0]
