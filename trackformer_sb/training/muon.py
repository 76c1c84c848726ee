"""Muon for matrices and convolutions, AdamW for the rest, in one optimizer."""

import torch

# Of the quintic iteration that takes singular values near 1 (Keller Jordan,
# "Muon: An optimizer for hidden layers in neural networks", 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrix):
    """The nearest matrix with orthonormal rows or columns, roughly.

    Five Newton-Schulz steps leave singular values within about 0.7 to 1.2.

    Arguments
    ---------
    matrix : torch.Tensor
        [rows, columns].

    Returns
    -------
    torch.Tensor
        [rows, columns].

    Example
    -------
    >>> values = torch.linalg.svdvals(orthogonalise(torch.randn(8, 32)))
    >>> bool((values > 0.5).all() and (values < 1.4).all())
    True
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    # x <- p(x x') x five times, the polynomials in the Gram matrix alone: of a
    # wide matrix two large products are left of fifteen. Not in bfloat16, where
    # errors of the Gram matrix grow.
    gram = x @ x.mT
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = identity
    for _ in range(ITERATIONS):
        step = a * identity + b * gram + c * (gram @ gram)
        product, gram = step @ product, step @ gram @ step
    x = product @ x
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose matrices take orthogonalised momentum steps (Muon).

    A parameter is a matrix if, with all dimensions after the first flattened,
    both sides have at least `least_side` entries; so convolutions are. Its step
    is ``lr * muon_scale * 0.2 * sqrt(longer side)`` times the orthogonalised
    Nesterov momentum: at the same scale as AdamW's (Liu et al., arXiv
    2502.16982).

    Arguments
    ---------
    params : iterable of torch.nn.Parameter
        What to train.
    lr : float
        Learning rate of AdamW.
    muon_scale : float
        That of Muon in multiples of `lr`.
    momentum : float
        Of Muon.
    least_side : int
        See above.
    **options : dict
        Others of ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params,
        lr=8e-4,
        muon_scale=2.0,
        momentum=0.95,
        least_side=32,
        **options,
    ):
        groups = {True: [], False: []}
        for parameter in params:
            sides = (
                (parameter.shape[0], parameter[0].numel())
                if parameter.dim() > 1
                else (1, 1)
            )
            groups[min(sides) >= least_side].append(parameter)
        groups = [
            {"params": group, "muon": muon}
            for muon, group in groups.items()
            if group
        ]
        super().__init__(groups, lr=lr, **options)
        for group in self.param_groups:
            group.setdefault("muon_scale", muon_scale)
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes a step; matrices first, then AdamW on the others."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        held = []
        for group in self.param_groups:
            if not group["muon"]:
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._muon_step(parameter, group)
                    held.append((parameter, parameter.grad))
                    parameter.grad = None  # AdamW passes over it
        super().step()
        for parameter, gradient in held:
            parameter.grad = gradient

    def _muon_step(self, parameter, group):
        state = self.state[parameter]
        if "muon_momentum" not in state:
            state["muon_momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.tensor(0.0)  # AdamW looks for it
        momentum, gradient = state["muon_momentum"], parameter.grad
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]).flatten(1)
        update = orthogonalise(update)
        rate = group["lr"] * group["muon_scale"]
        parameter.mul_(1 - rate * group["weight_decay"])
        step = rate * 0.2 * max(update.shape) ** 0.5
        parameter.add_(update.view_as(parameter), alpha=-step)
