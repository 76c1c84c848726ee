"""Learning rates, averages of weights, and an optimizer."""

import functools
import math

import torch

# Of the quintic iteration that takes singular values near 1 (Keller Jordan,
# "Muon: An optimizer for hidden layers in neural networks", 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
LEAST_SIDE = 32  # of a matrix for Muon
MUON_SCALE, MOMENTUM = 2.0, 0.95  # its learning rate, in those of AdamW


def cosine_schedule(optimizer, num_steps, lr_final, warmup_steps=0):
    """From the optimizer's learning rate to ``lr_final`` along a half cosine.

    Half a period of SGDR (arXiv 1608.03983, equation 5). Parameter groups may
    have ``lr_scale``, which multiplies their learning rate all along, and
    ``freeze_steps``, for which it is zero; see ``separate_layers``.

    Arguments
    ---------
    optimizer : torch.optim.Optimizer
        Its learning rate is the highest of the schedule.
    num_steps : int
        Number of steps until ``lr_final``, where it stays.
    lr_final : float
        Lowest learning rate.
    warmup_steps : int
        Steps over which the learning rate rises from zero at first.

    Returns
    -------
    torch.optim.lr_scheduler.LambdaLR
        To be stepped after each optimizer step.

    Raises
    ------
    ValueError
        If the optimizer's learning rate is zero, or below ``lr_final``.

    Example
    -------
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> schedule = cosine_schedule(optimizer, num_steps=2, lr_final=0.5)
    >>> rates = []
    >>> for _ in range(4):
    ...     rates.append(round(schedule.get_last_lr()[0], 3))
    ...     optimizer.step()
    ...     schedule.step()
    >>> rates
    [1.0, 0.75, 0.5, 0.5]
    """
    highest = optimizer.defaults["lr"]
    if not 0 <= lr_final <= highest or not highest:
        raise ValueError(
            f"expected lr above 0 and lr_final from 0 to lr, got {highest} "
            f"and {lr_final}"
        )
    lowest = lr_final / highest

    def factor(number, step):
        # read each time: a training that goes on has that of its checkpoint
        group = optimizer.param_groups[number]
        if step < group.get("freeze_steps", 0):
            return 0.0
        progress = min(1.0, step / max(1, num_steps))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        scale = rise * group.get("lr_scale", 1.0)
        return scale * (lowest + (1.0 - lowest) * cosine)

    for group in optimizer.param_groups:
        if 0 < group.get("freeze_steps", 0) < 1:
            group["freeze_steps"] *= num_steps

    numbers = range(len(optimizer.param_groups))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, [functools.partial(factor, number) for number in numbers]
    )


def separate_layers(
    optimizer, layers, lr_scale=1.0, freeze_steps=0, layer_decay=1.0
):
    """Gives the layers of a pre-trained encoder groups of their own.

    The learning rate of a layer is that of the one above it times
    ``layer_decay``, as in the fine-tuning of BEiT (arXiv 2106.08254) and MAE
    (arXiv 2111.06377): layers near the input, which any task can use, change
    less. The last layer stands one below the rest of the model.

    Frozen means a learning rate of zero, which AdamW applies to its weight
    decay as well: gradients are still computed, as DistributedDataParallel
    expects them.

    Arguments
    ---------
    optimizer : torch.optim.Optimizer
        Whose groups have the parameters; to be followed by
        ``cosine_schedule``.
    layers : list of lists of torch.nn.Parameter
        From the input up.
    lr_scale : float
        Learning rate of all layers as a share of that of the rest, from 0.
    freeze_steps : int or float
        Steps for which they do not change; below 1 a share of the steps of the
        schedule.
    layer_decay : float
        Above 0 and up to 1, where all layers are one group.

    Example
    -------
    >>> below, above, head = (torch.zeros(1) for _ in range(3))
    >>> optimizer = torch.optim.SGD([below, above, head], lr=1.0)
    >>> separate_layers(optimizer, [[below], [above]], layer_decay=0.5)
    >>> [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    [1.0, 0.5, 0.25]
    """
    if layer_decay == 1:
        layers = [[p for layer in layers for p in layer]]
    for below, layer in enumerate(reversed(layers), 1):
        chosen = {id(parameter) for parameter in layer}
        # there are two where vectors have no weight decay
        for group in list(optimizer.param_groups):
            apart = [p for p in group["params"] if id(p) in chosen]
            if not apart:
                continue
            rest = [p for p in group["params"] if id(p) not in chosen]
            group["params"] = rest
            optimizer.add_param_group(
                {
                    **group,
                    "params": apart,
                    "lr_scale": lr_scale * layer_decay**below,
                    "freeze_steps": freeze_steps,
                }
            )


def clip_all_groups(optimizer, max_norm):
    """Clips the gradients of all groups together before each step.

    Those of a group whose learning rate is zero do not count.
    """

    def clip(*_):
        parameters = [
            parameter
            for group in optimizer.param_groups
            if group["lr"] > 0
            for parameter in group["params"]
        ]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(clip)


def moving_average(decay):
    """Exponential moving average of weights that forgets where it began.

    `decay`, in [0, 1], is the share of the average that a step leaves; at first
    less, so that it reaches back over a tenth of the steps at most. Returns the
    ``multi_avg_fn`` of a ``torch.optim.swa_utils.AveragedModel``.
    """

    @torch.no_grad()
    def update(averages, weights, num_averaged):
        kept = min(decay, 1 - 10 / (10 + float(num_averaged)))
        torch._foreach_lerp_(averages, weights, 1 - kept)

    return update


def orthogonalise(matrix):
    """The nearest matrix with orthonormal rows or columns, roughly.

    Five Newton-Schulz steps leave singular values within about 0.7 to 1.2.
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
    both sides have at least 32 entries; so convolutions are. Its step is
    ``2 * lr * 0.2 * sqrt(longer side)`` times the orthogonalised Nesterov
    momentum: at the same scale as AdamW's (Liu et al., arXiv 2502.16982).
    Arguments are those of ``torch.optim.AdamW``.
    """

    def __init__(self, params, lr=8e-4, **options):
        groups = {True: [], False: []}
        for parameter in params:
            sides = parameter.flatten(1).shape if parameter.dim() > 1 else (1,)
            groups[min(sides) >= LEAST_SIDE].append(parameter)
        groups = [
            {"params": group, "muon": muon}
            for muon, group in groups.items()
            if group
        ]
        super().__init__(groups, lr=lr, **options)

    @torch.no_grad()
    def step(self):
        """Takes a step; matrices first, then AdamW on the others."""
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
        momentum.lerp_(gradient, 1 - MOMENTUM)
        update = gradient.lerp(momentum, MOMENTUM).flatten(1)
        update = orthogonalise(update)
        rate = group["lr"] * MUON_SCALE
        parameter.mul_(1 - rate * group["weight_decay"])
        step = rate * 0.2 * max(update.shape) ** 0.5
        parameter.add_(update.view_as(parameter), alpha=-step)
