"""Encode, mask, decode: the one path from a mixture to its sources."""

import torch

from trackformer_sb.nnet.stft import fit_length


def apply_masks(mix_w, est_mask):
    """Product of an encoded mixture and masks, each real or complex."""
    if not mix_w.is_complex() or est_mask.is_complex():
        return mix_w * est_mask
    # it would first make the masks complex, and so in the backward pass
    return torch.complex(mix_w.real * est_mask, mix_w.imag * est_mask)


def separate(
    mix, encoder, masknet, decoder, mixture_consistency=False, groups=None
):
    """Separates mixtures with any three-module separator of SpeechBrain.

    The encoded mixture is multiplied by one mask per source and decoded, all
    sources in one pass. Channels share the masks, so that each source keeps its
    place between them; they are predicted from the mean of the channels, or
    from both of stereo by a masknet that says ``stereo = True``.

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
    >>> import torch
    >>> from trackformer_sb.nnet.masknet import PerformerMaskNet
    >>> from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
    >>> masknet = PerformerMaskNet(513, 4, d_model=32, num_layers=1)
    >>> mix = torch.randn(2, 5000)
    >>> est_source, _ = separate(mix, STFTEncoder(), masknet, STFTDecoder())
    >>> est_source.shape
    torch.Size([2, 4, 5000])
    >>> torch.allclose(est_source.sum(1), mix, atol=1e-5)
    True
    """
    if mix.dim() not in (2, 3):
        raise ValueError(
            "expected mix [batch, time] or [batch, channels, time], got "
            f"{list(mix.shape)}"
        )
    length = mix.shape[-1]

    def predict(mix_w):
        est_mask = masknet(mix_w)
        if groups is not None:
            est_mask = torch.stack([est_mask[list(x)].sum(0) for x in groups])
        return est_mask

    if mix.dim() == 2:
        mix_w = encoder(mix)
        est_mask = predict(mix_w)
        # [sources, batch, channels, frames]
        sep_w = apply_masks(mix_w.unsqueeze(0), est_mask)
    else:
        batch, num_channels, _ = mix.shape
        mix_w = encoder(mix.flatten(0, 1)).unflatten(0, (batch, num_channels))
        if num_channels == 2 and getattr(masknet, "stereo", False):
            est_mask = predict(mix_w)
        else:
            est_mask = predict(encoder(mix.mean(1)))
        # [sources, batch * audio channels, channels, frames]
        sep_w = apply_masks(mix_w.unsqueeze(0), est_mask.unsqueeze(2))
        sep_w = sep_w.flatten(1, 2)
    est_source = decoder(sep_w.flatten(0, 1))
    est_source = fit_length(est_source.view(*sep_w.shape[:2], -1), length)
    est_source = est_source.transpose(0, 1)
    if mix.dim() == 3:
        est_source = est_source.unflatten(0, (batch, num_channels))
        est_source = est_source.transpose(1, 2)
    if mixture_consistency:
        missing = mix - est_source.sum(1)
        est_source = est_source + missing.unsqueeze(1) / est_source.shape[1]
    return est_source, est_mask
