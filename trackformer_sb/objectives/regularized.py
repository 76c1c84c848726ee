"""Diversity and sparsity losses for recipes that know sources only.

SpeechBrain's separation recipes call ``loss(targets, predictions)``. The masks,
which the diversity loss needs, do not leave the forward pass there.
"""

from trackformer_sb.objectives.regularizers import (
    diversity_loss,
    mask_count_loss,
    sparsity_loss,
)


class RegularizedLoss:
    """A loss of a SpeechBrain recipe plus diversity and sparsity losses.

    ``loss + lambda_diversity * diversity + lambda_sparsity * sparsity
    + lambda_mask_count * mask_count``, in the signature of the recipe. Whenever
    the masknet is called in training mode its masks are kept for the loss of
    that step. In evaluation mode the loss is the recipe's own, so that it can
    be compared between experiments.

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
    >>> import torch
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
        """The loss of a batch.

        Arguments
        ---------
        targets : torch.Tensor
            [batch, time, targets].
        predictions : torch.Tensor
            [batch, time, sources].

        Returns
        -------
        torch.Tensor
            [batch], lower is better.
        """
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
