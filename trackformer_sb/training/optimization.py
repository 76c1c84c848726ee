"""Learning rates and averages of weights."""

import math
from numbers import Real

import torch


def cosine_schedule(optimizer, num_steps, lr_final, warmup_steps=0):
    """From the optimizer's learning rate to ``lr_final`` along a half cosine.

    Half a period of SGDR (arXiv 1608.03983, equation 5). Parameter groups may
    have ``lr_scale``, which multiplies their learning rate all along, and
    ``freeze_steps``, for which it is zero; see ``separate_group``.

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

    def factor(step):
        progress = min(1.0, step / max(1, num_steps))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        return rise * (lowest + (1.0 - lowest) * cosine)

    for group in optimizer.param_groups:
        if 0 < group.get("freeze_steps", 0) < 1:
            group["freeze_steps"] *= num_steps

    def of_group(number):
        def scaled(step):
            # read each time: a training that goes on has that of its checkpoint
            group = optimizer.param_groups[number]
            if step < group.get("freeze_steps", 0):
                return 0.0
            return group.get("lr_scale", 1.0) * factor(step)

        return scaled

    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, [of_group(i) for i in range(len(optimizer.param_groups))]
    )


def check_groups(lr_scale, freeze_steps, layer_decay=1.0):
    """Raises ValueError for settings that groups cannot have."""
    numbers = lr_scale, freeze_steps
    if not all(isinstance(x, Real) and x >= 0 for x in numbers):
        raise ValueError(
            "expected lr_scale and freeze_steps from 0, "
            f"got {lr_scale} and {freeze_steps}"
        )
    if not (isinstance(layer_decay, Real) and 0 < layer_decay <= 1):
        raise ValueError(
            f"expected layer_decay above 0 and up to 1, got {layer_decay}"
        )


def separate_group(optimizer, parameters, lr_scale=1.0, freeze_steps=0):
    """Gives parameters a group of their own, for ``cosine_schedule``.

    Frozen means a learning rate of zero, which AdamW applies to its weight
    decay as well: gradients are still computed, as DistributedDataParallel
    expects them.

    Arguments
    ---------
    optimizer : torch.optim.Optimizer
        Whose groups have the parameters.
    parameters : iterable of torch.nn.Parameter
        What to separate.
    lr_scale : float
        Their learning rate as a share of that of the others.
    freeze_steps : int or float
        Steps for which they do not change; below 1 a share of the steps of the
        schedule.

    Raises
    ------
    ValueError
        If a number is negative.
    """
    check_groups(lr_scale, freeze_steps)
    chosen = {id(parameter) for parameter in parameters}
    # there are two where vectors have no weight decay
    for group in list(optimizer.param_groups):
        apart = [p for p in group["params"] if id(p) in chosen]
        if not apart:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        optimizer.add_param_group(
            {
                **group,
                "params": apart,
                "lr_scale": lr_scale,
                "freeze_steps": freeze_steps,
            }
        )


def separate_layers(
    optimizer, layers, lr_scale=1.0, freeze_steps=0, layer_decay=1.0
):
    """Gives the layers of a pre-trained encoder groups of their own.

    The learning rate of a layer is that of the one above it times
    ``layer_decay``, as in the fine-tuning of BEiT (arXiv 2106.08254) and MAE
    (arXiv 2111.06377): layers near the input, which any task can use, change
    less. The last layer stands one below the rest of the model.

    Arguments
    ---------
    optimizer : torch.optim.Optimizer
        Whose groups have the parameters.
    layers : list of lists of torch.nn.Parameter
        From the input up.
    lr_scale, freeze_steps
        As in ``separate_group``, of all layers.
    layer_decay : float
        Above 0 and up to 1, where all layers are one group.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """
    check_groups(lr_scale, freeze_steps, layer_decay)
    if layer_decay == 1:
        layers = [[p for layer in layers for p in layer]]
    for below, layer in enumerate(reversed(layers), 1):
        scale = lr_scale * layer_decay**below
        separate_group(optimizer, layer, scale, freeze_steps)


def frozen_epochs(optimizer, num_steps, epoch_steps):
    """Epochs that begin while a group is frozen.

    Arguments
    ---------
    optimizer : torch.optim.Optimizer
        See ``separate_group``.
    num_steps, epoch_steps : int
        Of the training, and of an epoch.

    Returns
    -------
    int

    Example
    -------
    >>> optimizer = torch.optim.SGD([torch.zeros(1), torch.zeros(1)], lr=1.0)
    >>> parameters = optimizer.param_groups[0]["params"]
    >>> separate_group(optimizer, parameters[:1], freeze_steps=0.25)
    >>> frozen_epochs(optimizer, num_steps=100, epoch_steps=10)
    3
    """
    steps = max(x.get("freeze_steps", 0) for x in optimizer.param_groups)
    steps *= num_steps if steps < 1 else 1
    return math.ceil(steps / epoch_steps)


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

    Arguments
    ---------
    decay : float
        Share of the average that a step leaves, in [0, 1]; at first less, so
        that it reaches back over a tenth of the steps at most.

    Returns
    -------
    callable
        ``multi_avg_fn`` of ``torch.optim.swa_utils.AveragedModel``.
    """

    @torch.no_grad()
    def update(averages, weights, num_averaged):
        kept = min(decay, 1 - 10 / (10 + float(num_averaged)))
        torch._foreach_lerp_(averages, weights, 1 - kept)

    return update
