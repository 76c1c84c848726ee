"""Mixture invariant training (MixIT), exact and without waveform loops.

"Unsupervised Sound Separation Using Mixture Invariant Training" (arXiv
2006.12701): a separator hears a sum of mixtures; each of its outputs is given
to the one mixture so that the remixed outputs explain the mixtures best
(equation 3). The error of a remix is a quadratic form in the assignment,

    |x - a S|^2 = |x|^2 - 2 a . (S x) + a (S S^T) a,

so that all assignments are searched on inner products, and only the best one
is computed on waveforms.
"""

import math

import torch

OBJECTIVES = ("snr", "si_snr", "mse")

# Assignments tried one by one; 8 sources in 2 mixtures are 256, 16 are 65 536.
MAX_EXHAUSTIVE = 2**17

# Energies per sample below this count as silence (-120 dB of full scale).
SILENCE = 1e-12


def _check(est_source, mixtures, *objectives):
    for objective in objectives:
        if objective not in OBJECTIVES:
            raise ValueError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got "
                f"{objective!r}"
            )
    if (
        est_source.dim() != 3
        or mixtures.dim() != 3
        or est_source.shape[::2] != mixtures.shape[::2]
    ):
        raise ValueError(
            "expected est_source [batch, sources, time] and mixtures [batch, "
            f"mixtures, time], got {list(est_source.shape)} and "
            f"{list(mixtures.shape)}"
        )


def _same_type(est_source, mixtures):
    """Both in the wider of their types, at least float32."""
    dtype = torch.promote_types(est_source.dtype, mixtures.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return est_source.to(dtype), mixtures.to(dtype)


def _decibel(ratio):
    return 10.0 / math.log(10.0) * ratio.log()


def _loss(objective, error, target_energy, parts, snr_max):
    """The objective from energies per sample, [batch, mixtures, ...].

    ``parts``, for "si_snr" alone, are the energies of an estimate along its
    mixture and beside it, of signals without mean; without energy it scores
    +120 dB, so that no mixture is left without a source because all of them fit
    it badly. A mixture is silent 80 dB below the sum of all mixtures of the
    item, or at 0. It takes the energy of all for a reference (as arXiv
    2106.00847, equation 4, does) and, as it has no direction to project on, the
    loss of "snr" in place of "si_snr".
    """
    if objective == "mse":
        return error
    total = target_energy.sum(1, keepdim=True)
    silent = target_energy < 1e-8 * total + SILENCE
    reference = torch.where(silent, total, target_energy) + SILENCE
    tau = 10 ** (-snr_max / 10)
    loss = _decibel(error + tau * reference) - _decibel(reference)
    if objective == "snr":
        return loss
    along, beside = parts
    si_loss = _decibel(beside + SILENCE) - _decibel(along + SILENCE**2)
    return torch.where(silent, loss, si_loss)


def _waveform_loss(objective, estimate, target, snr_max):
    """The objective on waveforms [batch, mixtures, time] -> [batch]."""
    if objective == "si_snr":
        estimate = estimate - estimate.mean(-1, keepdim=True)
        target = target - target.mean(-1, keepdim=True)
    error = (estimate - target).square().mean(-1)
    energy, parts = target.square().mean(-1), None
    if objective == "si_snr":
        scale = (estimate * target).mean(-1) / (energy + SILENCE)
        along = scale.unsqueeze(-1) * target
        parts = (x.square().mean(-1) for x in (along, estimate - along))
    return _loss(objective, error, energy, parts, snr_max).mean(1)


def _inner_products(est_source, mixtures, without_mean):
    """Gram matrix, cross products and energies per sample, in float64.

    Returns [batch, sources, sources], [batch, mixtures, sources] and [batch,
    mixtures]. Only their sums and differences over assignments are taken in
    float64; the products have the precision of the signals' matmul.
    """
    time = est_source.shape[-1]
    gram = torch.matmul(est_source, est_source.transpose(1, 2)) / time
    cross = torch.matmul(mixtures, est_source.transpose(1, 2)) / time
    energy = torch.linalg.vector_norm(mixtures, dim=-1).square() / time
    gram, cross, energy = gram.double(), cross.double(), energy.double()
    if without_mean:
        source_mean = est_source.mean(-1).double()
        target_mean = mixtures.mean(-1).double()
        gram = gram - source_mean.unsqueeze(2) * source_mean.unsqueeze(1)
        cross = cross - target_mean.unsqueeze(2) * source_mean.unsqueeze(1)
        energy = (energy - target_mean.square()).clamp(min=0.0)
    return gram, cross, energy


def _search_exhaustive(objective, gram, cross, energy, snr_max):
    """The best of all assignments, [batch, sources] numbers of mixtures."""
    num_mixtures, num_sources = cross.shape[1:]
    device = gram.device
    bits = 2 ** torch.arange(num_sources, device=device)
    # subsets of the sources by their number, as rows of zeros and ones: of two
    # sources [[0, 0], [1, 0], [0, 1], [1, 1]]
    number = torch.arange(2**num_sources, device=device).unsqueeze(1)
    subsets = (number & bits).ne(0).double()
    # [batch, 1, subsets]: energy of the sum of the sources in each subset
    summed = ((subsets @ gram) * subsets).sum(-1).unsqueeze(1)
    # [batch, mixtures, subsets]
    energy, product = energy.unsqueeze(-1), cross @ subsets.T
    error = (energy - 2 * product + summed).clamp(min=0.0)
    parts = None
    if objective == "si_snr":
        along = product.square() / (energy + SILENCE)
        parts = along, (summed - along).clamp(min=0.0)
    table = _loss(objective, error, energy, parts, snr_max)
    # assignment number in base num_mixtures: digit i is the mixture of source
    # i. Two mixtures, two sources: (0, 0), (1, 0), (0, 1), (1, 1)
    digits = torch.arange(num_mixtures**num_sources, device=device)
    powers = num_mixtures ** torch.arange(num_sources, device=device)
    digits = digits.unsqueeze(1) // powers % num_mixtures
    total = 0.0
    for mixture in range(num_mixtures):
        subset = ((digits == mixture) * bits).sum(1)
        total = total + table[:, mixture, subset]
    return digits[total.argmin(1)]


def _search_least_squares(gram, cross):
    """Assignment by unconstrained mixing, projected to one mixture a source.

    Section 3.2 of arXiv 2106.00847: the mixing matrix that explains the
    mixtures best in the least-squares sense, then its largest entry for each
    source.
    """
    ridge = 1e-8 * gram.diagonal(dim1=1, dim2=2).mean(1) + SILENCE
    ridge = ridge[:, None, None] * torch.eye(
        gram.shape[-1], dtype=gram.dtype, device=gram.device
    )
    mixing = torch.linalg.solve(gram + ridge, cross.transpose(1, 2))
    return mixing.argmax(-1)


@torch.no_grad()
def mixit_assignment(est_source, mixtures, objective="snr", snr_max=30.0):
    """Searches which mixture each source belongs to.

    All assignments are compared exactly, up to 131 072 of them; with more
    sources the search is by least squares. Arguments and errors are those of
    ``mixit_loss``; gives [batch, mixtures, sources] of zeros and ones, one 1
    per source.

    Example
    -------
    >>> sources = torch.eye(3).unsqueeze(0)
    >>> mixtures = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    >>> mixit_assignment(sources, mixtures)
    tensor([[[1., 0., 1.],
             [0., 1., 0.]]])
    """
    _check(est_source, mixtures, objective)
    num_mixtures, num_sources = mixtures.shape[1], est_source.shape[1]
    with torch.autocast(est_source.device.type, enabled=False):
        gram, cross, energy = _inner_products(
            *_same_type(est_source, mixtures),
            without_mean=objective == "si_snr",
        )
        if num_mixtures**num_sources <= MAX_EXHAUSTIVE:
            owner = _search_exhaustive(objective, gram, cross, energy, snr_max)
        else:
            owner = _search_least_squares(gram, cross)
    mixture = torch.arange(num_mixtures, device=owner.device)
    assignment = owner.unsqueeze(1) == mixture.unsqueeze(-1)
    return assignment.to(mixtures.dtype)


def mixit_loss(
    est_source, mixtures, objective="snr", snr_max=30.0, assign_by=None
):
    """MixIT loss, equation 3 of arXiv 2006.12701.

    With x a mixture and y the sum of the sources assigned to it, the mean
    over the mixtures of

    - "snr": ``10 log10(|x - y|^2 + tau |x|^2) - 10 log10 |x|^2``, tau =
      ``10^(-snr_max / 10)`` (equation 2), in dB;
    - "si_snr": the negative scale-invariant SNR of the signals without their
      means, in dB; +120 for y of silence;
    - "mse": the mean squared error.

    Arguments
    ---------
    est_source : torch.Tensor
        Separated sources, [batch, sources, time].
    mixtures : torch.Tensor
        Reference mixtures, [batch, mixtures, time]. Silent ones are allowed.
    objective : str
        What is minimised.
    snr_max : float
        Threshold of "snr", in dB: there is little to gain beyond.
    assign_by : str, optional
        Objective by which the assignment is searched, the one minimised if
        not given. (The Trackformer paper: "si_snr" with "mse".)

    Returns
    -------
    loss : torch.Tensor
        [batch], lower is better. The gradient goes through the best
        assignment only.
    assignment : torch.Tensor
        [batch, mixtures, sources] of zeros and ones.

    Raises
    ------
    ValueError
        For an unknown objective or shapes that do not fit.

    Example
    -------
    >>> sources = torch.randn(4, 8, 1000)
    >>> parts = sources[:, :3].sum(1), sources[:, 3:].sum(1)
    >>> mixtures = torch.stack(parts, dim=1)
    >>> loss, assignment = mixit_loss(sources, mixtures)
    >>> round(loss.mean().item(), 2)
    -30.0
    >>> assignment[0, 0]
    tensor([1., 1., 1., 0., 0., 0., 0., 0.])
    """
    assign_by = objective if assign_by is None else assign_by
    _check(est_source, mixtures, objective, assign_by)
    assignment = mixit_assignment(est_source, mixtures, assign_by, snr_max)
    with torch.autocast(est_source.device.type, enabled=False):
        est_source, mixtures = _same_type(est_source, mixtures)
        remix = torch.matmul(assignment.to(est_source.dtype), est_source)
        return _waveform_loss(objective, remix, mixtures, snr_max), assignment


def get_mixit(targets, predictions, objective="snr", snr_max=30.0):
    """MixIT loss in the signature of SpeechBrain's separation recipes.

    For use in their yaml as
    ``loss: !name:trackformer_sb.objectives.mixit.get_mixit``.

    Arguments
    ---------
    targets : torch.Tensor
        Mixtures, [batch, time, mixtures].
    predictions : torch.Tensor
        Separated sources, [batch, time, sources].
    objective, snr_max
        As for ``mixit_loss``.

    Returns
    -------
    torch.Tensor
        [batch], lower is better.
    """
    loss, _ = mixit_loss(
        predictions.transpose(1, 2),
        targets.transpose(1, 2),
        objective,
        snr_max,
    )
    return loss
