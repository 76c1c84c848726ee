"""Losses on masks and sources that accompany MixIT."""

import torch

# Energies per sample are at least this: -120 dB of full scale.
SILENCE = 1e-12


def mask_gram(masks):
    """Inner products [batch, N, N] of all pairs of masks [batch, N, ...].

    At least in float32; without a copy of masks that are contiguous, or the
    transposed view that a masknet leaves.
    """
    with torch.autocast(masks.device.type, enabled=False):
        masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
        if masks.dim() == 4 and masks.stride(3) != 1:
            # frames before freq in memory: this way flattening is a view
            masks = masks.transpose(2, 3)
        masks = masks.flatten(2)
        return masks @ masks.transpose(1, 2)


def mask_cosines(masks):
    """Cosine similarity [batch, N, N] of all pairs of masks [batch, N, ...].

    A mask of zeros is orthogonal to all.
    """
    gram = mask_gram(masks)
    energy = gram.diagonal(dim1=1, dim2=2)
    # a small share of the total, so that a mask near zero has no steep slope
    floor = 1e-8 * energy.sum(1, keepdim=True) + torch.finfo(gram.dtype).tiny
    norm = (energy + floor).sqrt()
    return gram / (norm.unsqueeze(1) * norm.unsqueeze(2))


def mean_of_pairs(cosines):
    """Mean over the pairs of different masks, [batch, N, N] -> [batch]."""
    num = cosines.shape[1]
    if num < 2:
        raise ValueError(
            f"expected at least 2 masks [batch, N, ...], got {num}"
        )
    off_diagonal = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return off_diagonal / (num * (num - 1))


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
    return mean_of_pairs(mask_cosines(masks).abs())


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

    Of energies [batch, N] from 1 (one has all) to N; 1 where all are zero.

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
    energy = _energy(masks, tuple(range(2, masks.dim())))
    # the slope of the entropy has no end where a mask is zero
    floor = 1e-8 * energy.sum(1, keepdim=True) + torch.finfo(energy.dtype).tiny
    return effective_number(energy + floor)


def _level(sig):
    """Root mean square over time, [..., time] -> [...]."""
    return (_energy(sig, -1) / sig.shape[-1] + SILENCE).sqrt()


def _energy(x, dim):
    """Sum of squares, at least in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=dim, dtype=dtype).square()


class RegularizedLoss:
    """A loss of a SpeechBrain recipe plus diversity and sparsity losses.

    For recipes that call ``loss(targets, predictions)``: the masks, which the
    diversity loss needs, do not leave the forward pass there. The loss is
    ``loss + lambda_diversity * diversity + lambda_sparsity * sparsity
    + lambda_mask_count * mask_count``. Whenever the masknet is called in
    training mode its masks are kept for the loss of that step. In evaluation
    mode the loss is the recipe's own, so that it can be compared between
    experiments.

    Arguments
    ---------
    loss : callable
        (targets [batch, time, targets], predictions [batch, time, sources])
        -> [batch], such as ``get_mixit`` or SpeechBrain's
        ``get_si_snr_with_pitwrapper``.
    masknet : torch.nn.Module
        The one that the recipe calls; it returns [sources, batch, ...].
    lambda_diversity : float
        Weight of ``diversity_loss`` of the masks.
    lambda_sparsity : float
        Weight of ``sparsity_loss`` of the predictions, relative to the sum of
        the targets.
    lambda_mask_count : float
        Weight of ``mask_count_loss`` of the masks.

    Raises
    ------
    RuntimeError
        At call, if the masknet is in training mode and was not called since
        the last loss: the recipe then trains another one.

    Example
    -------
    >>> masknet = torch.nn.Identity()
    >>> masks = masknet(torch.ones(2, 1, 65, 50))  # both let all pass
    >>> mix = torch.randn(1, 100, 1)
    >>> loss = RegularizedLoss(
    ...     lambda targets, predictions: torch.zeros(len(targets)), masknet
    ... )
    >>> masks = masknet(masks)
    >>> loss(mix, torch.cat((mix, mix), dim=2))
    tensor([0.3000])
    """

    def __init__(
        self,
        loss,
        masknet,
        lambda_diversity=0.1,
        lambda_sparsity=0.1,
        lambda_mask_count=0.0,
    ):
        self.loss = loss
        self.masknet = masknet
        self.lambda_diversity = lambda_diversity
        self.lambda_sparsity = lambda_sparsity
        self.lambda_mask_count = lambda_mask_count
        self._masks = None
        masknet.register_forward_hook(self._keep)

    def _keep(self, masknet, inputs, masks):
        self._masks = masks if masknet.training else None

    def __call__(self, targets, predictions):
        """[batch], lower is better, see the arguments of ``loss``."""
        loss = self.loss(targets, predictions)
        if not self.masknet.training:
            return loss
        if self._masks is None:
            raise RuntimeError(
                "masknet: expected the one that the recipe calls, got one "
                "that was not called since the last loss"
            )
        # not kept: the graph of a step ends with the step
        masks, self._masks = self._masks, None
        masks = masks.transpose(0, 1)
        if self.lambda_diversity:
            loss = loss + self.lambda_diversity * diversity_loss(masks)
        if self.lambda_sparsity:
            est_source, mix = predictions.transpose(1, 2), targets.sum(-1)
            loss = loss + self.lambda_sparsity * sparsity_loss(est_source, mix)
        if self.lambda_mask_count:
            loss = loss + self.lambda_mask_count * mask_count_loss(masks)
        return loss
