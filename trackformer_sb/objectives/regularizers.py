"""Losses on masks and sources that accompany MixIT."""

import torch

# Energies per sample are at least this: -120 dB of full scale.
SILENCE = 1e-12


def mask_gram(masks):
    """Inner products of all pairs of masks, without a copy of the masks.

    Arguments
    ---------
    masks : torch.Tensor
        [batch, N, ...], contiguous or the transposed view that a masknet
        leaves.

    Returns
    -------
    torch.Tensor
        [batch, N, N], at least float32.
    """
    with torch.autocast(masks.device.type, enabled=False):
        if masks.dtype.itemsize < 4:
            masks = masks.float()
        if masks.dim() == 4 and masks.stride(3) != 1:
            # frames before freq in memory: this way flattening is a view
            masks = masks.transpose(2, 3)
        masks = masks.flatten(2)
        return masks @ masks.transpose(1, 2)


def mask_cosines(masks):
    """Cosine similarity of all pairs of masks.

    Arguments
    ---------
    masks : torch.Tensor
        [batch, N, ...].

    Returns
    -------
    torch.Tensor
        [batch, N, N], in [-1, 1]. A mask of zeros is orthogonal to all.
    """
    gram = mask_gram(masks)
    energy = gram.diagonal(dim1=1, dim2=2)
    # a small share of the total, so that a mask near zero has no steep slope
    floor = 1e-8 * energy.sum(1, keepdim=True) + torch.finfo(gram.dtype).tiny
    norm = (energy + floor).sqrt()
    return gram / (norm.unsqueeze(1) * norm.unsqueeze(2))


def diversity_loss(masks):
    """Mean absolute cosine similarity over the pairs of different masks.

    ``mean over i != j of |<m_i, m_j>| / (|m_i| |m_j|)``: 0 for masks that do
    not overlap, 1 for masks that are multiples of one another.

    Arguments
    ---------
    masks : torch.Tensor
        [batch, N, ...] with N at least 2.

    Returns
    -------
    torch.Tensor
        [batch], in [0, 1].

    Raises
    ------
    ValueError
        If there is only one mask.

    Example
    -------
    >>> diversity_loss(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    tensor([0.])
    """
    num = masks.shape[1]
    if num < 2:
        raise ValueError(
            f"expected at least 2 masks [batch, N, ...], got {num}"
        )
    cosines = mask_cosines(masks).abs()
    off_diagonal = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return off_diagonal / (num * (num - 1))


def sparsity_loss(est_source, mix=None):
    """Sum of the levels of the sources relative to the level of the mixture.

    ``(1 / r_mix) sum_i r_i`` with ``r = sqrt(mean_t s^2 + eps)``. Sources
    that sum to the mixture without overlapping score least when few of them
    carry all of the energy: 1 for a single one, up to ``sqrt(N)`` for N
    uncorrelated ones of equal level.

    Arguments
    ---------
    est_source : torch.Tensor
        Separated sources, [batch, N, time].
    mix : torch.Tensor, optional
        The mixture, [batch, time]; the sum of the sources if not given.

    Returns
    -------
    torch.Tensor
        [batch], at least 0.

    Example
    -------
    >>> sources = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])
    >>> sparsity_loss(sources)
    tensor([1.0000])
    """
    mix = est_source.sum(1) if mix is None else mix
    level = _level(est_source).sum(1)
    return level / _level(mix)


def effective_number(energy):
    """Exponential of the entropy of shares: of how many equal parts they are.

    Arguments
    ---------
    energy : torch.Tensor
        [batch, N], at least 0.

    Returns
    -------
    torch.Tensor
        [batch], from 1 (one has all) to N; 1 where all are zero.

    Example
    -------
    >>> effective_number(torch.tensor([[3.0, 3.0, 0.0]]))
    tensor([2.])
    """
    tiny = torch.finfo(energy.dtype).tiny
    share = energy / energy.sum(1, keepdim=True).clamp(min=tiny)
    return torch.special.entr(share).sum(1).exp()


def mask_count_loss(masks):
    """How many masks are in use, ``exp(H(p))`` with p the shares of energy.

    H is the entropy. ``sparsity_loss`` is least for one source that is the
    mixture, and for N that are each an Nth of it: it does not tell how many
    there are. Not of the Trackformer paper.

    Arguments
    ---------
    masks : torch.Tensor
        [batch, N, ...].

    Returns
    -------
    torch.Tensor
        [batch], from 1 (one mask has all the energy) to N.

    Example
    -------
    >>> masks = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]])
    >>> mask_count_loss(masks)
    tensor([2.0000])
    """
    norm = torch.linalg.vector_norm(
        masks, dim=tuple(range(2, masks.dim())), dtype=_accumulate(masks)
    )
    energy = norm.square()
    # the slope of the entropy has no end where a mask is zero
    floor = 1e-8 * energy.sum(1, keepdim=True) + torch.finfo(energy.dtype).tiny
    return effective_number(energy + floor)


def _level(sig):
    """Root mean square over time, [..., time] -> [...]."""
    norm = torch.linalg.vector_norm(sig, dim=-1, dtype=_accumulate(sig))
    return (norm.square() / sig.shape[-1] + SILENCE).sqrt()


def _accumulate(sig):
    """The type to sum up in."""
    return torch.float32 if sig.dtype.itemsize < 4 else sig.dtype
