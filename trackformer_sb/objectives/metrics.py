"""Measures of separation: with stems, with two mixtures, and of the masks."""

import importlib.util
import warnings

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchaudio.functional import resample

from trackformer_sb.objectives.mixit import mixit_loss
from trackformer_sb.objectives.regularizers import (
    effective_number,
    mask_cosines,
    mask_gram,
    mean_of_pairs,
)

# Signals below this energy per sample (-80 dB of full scale) about their mean
# count as silent, and so do stems this far below the loudest (-40 dB): where a
# stem is alone, the mixture scores higher than any estimate.
SILENT_ENERGY = 1e-8
RELATIVE_SILENCE = 1e-4

# Sources that si_snri_grouped takes: it tries all 3^12 splits of subsets.
MAX_GROUPED = 12

# Signal-to-noise ratios are kept within +- this many dB.
LIMIT_DB = 120.0

# Whether PESQ can be measured: the package has C code to be compiled.
HAS_PESQ = importlib.util.find_spec("pesq") is not None
NO_PESQ = "no PESQ of vocals: expected the extra pesq of trackformer_sb"
PESQ_RATE = 16000  # in Hz, of its wide band


def si_snr(estimate, target):
    """Scale-invariant signal-to-noise ratio of signals without their means.

    "SDR - half-baked or well done?" (arXiv 1811.02508, equation 3).

    Arguments
    ---------
    estimate, target : torch.Tensor
        [..., time], broadcast to each other.

    Returns
    -------
    torch.Tensor
        [...], in dB, within +-120; -120 if either is silent.

    Example
    -------
    >>> target = torch.tensor([1.0, -1.0, 1.0, -1.0])
    >>> noise = torch.tensor([0.1, 0.1, -0.1, -0.1])
    >>> round(si_snr(3 * (target + noise), target).item(), 3)
    20.0
    """
    estimate = estimate - estimate.mean(-1, keepdim=True)
    target = target - target.mean(-1, keepdim=True)
    tiny = torch.finfo(target.dtype).tiny
    energy = target.square().sum(-1).clamp(min=tiny)
    scale = (estimate * target).sum(-1) / energy
    projected = scale.unsqueeze(-1) * target
    noise = (estimate - projected).square().sum(-1)
    signal = projected.square().sum(-1)
    ratio = signal / noise.clamp(min=tiny)
    limit = 10 ** (LIMIT_DB / 10)
    return 10 * ratio.clamp(1 / limit, limit).log10()


def _energy(sig, name):
    """Mean energy without means, which SI-SNR does not count."""
    energy = sig.double().var(-1, correction=0)
    if not energy.isfinite().all():
        raise ValueError(f"expected finite {name}, got NaN or infinite samples")
    return energy


def _active(stems):
    """The stems that sound, of [stems, time]."""
    energy = _energy(stems, "stems")
    loudest = max(energy.tolist(), default=0.0)
    return stems[energy > max(RELATIVE_SILENCE * loudest, SILENT_ENERGY)]


def _sounding(est_source):
    """Leaves out sources of silence, however quiet the others are."""
    return est_source[_energy(est_source, "sources") > 1e-20]


def _pairs(est_source, stems):
    """Sources and stems that sound, paired for the highest sum of SI-SNR."""
    est_source, stems = _sounding(est_source).double(), _active(stems).double()
    if not len(est_source) or not len(stems):
        return est_source[:0], stems[:0]
    table = torch.stack([si_snr(est_source, stem) for stem in stems])
    stem, source = linear_sum_assignment(table.detach().cpu(), maximize=True)
    return est_source[source], stems[stem]


def _check_item(est_source, stems, mix):
    shapes = [list(x.shape) for x in (est_source, stems, mix)]
    if [*map(len, shapes)] != [2, 2, 1] or len({x[-1] for x in shapes}) > 1:
        raise ValueError(
            "expected est_source [sources, time], stems [stems, time] and mix "
            "[time], got {}, {} and {}".format(*shapes)
        )


def si_snri(est_source, stems, mix):
    """SI-SNR improvement under the best one-to-one choice of sources.

    Every active stem gets another source, so that the mean SI-SNR is highest;
    the SI-SNR of the mixture against the stem is subtracted. A silent source
    counts as none. Stems for which there is no source improve by 0 dB.

    Arguments
    ---------
    est_source : torch.Tensor
        Separated sources, [sources, time].
    stems : torch.Tensor
        References, [stems, time]; silent ones are left out.
    mix : torch.Tensor
        What was separated, [time].

    Returns
    -------
    improvement : float
        Mean over the active stems, in dB; None with fewer than two of them.
    num_silent : int
        Number of stems left out.

    Raises
    ------
    ValueError
        If the shapes do not fit, or for samples that are not finite.

    Example
    -------
    >>> stems = torch.eye(3)[:2] - 1 / 3
    >>> improvement, num_silent = si_snri(stems.flip(0), stems, stems.sum(0))
    >>> improvement > 100, num_silent
    (True, 0)
    """
    _check_item(est_source, stems, mix)
    active = _active(stems)
    num_silent = len(stems) - len(active)
    if len(active) < 2:
        return None, num_silent
    source, stem = _pairs(est_source, active)
    gain = si_snr(source, stem) - si_snr(mix.double(), stem)
    return float(gain.sum()) / len(active), num_silent


def stem_si_snr(est_source, stems):
    """SI-SNR of the sources that ``si_snri`` chooses for the stems.

    The mean over the active stems with a source, in dB; None without any.

    Example
    -------
    >>> stems = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
    >>> stem_si_snr(stems.flip(0), stems) > 100
    True
    """
    source, stem = _pairs(est_source, stems)
    return float(si_snr(source, stem).mean()) if len(stem) else None


def si_snri_grouped(est_source, stems, mix):
    """SI-SNR improvement when each source is added to one stem.

    The oracle for over-separation: of all ways to give the sources to active
    stems, that with the highest mean SI-SNR, by dynamic programming over
    subsets. Arguments, results and errors are those of ``si_snri``, and more
    than 12 sources are refused.

    Example
    -------
    >>> sources = torch.randn(3, 100)
    >>> stems = torch.stack([sources[0] + sources[2], sources[1]])
    >>> improvement, _ = si_snri_grouped(sources, stems, stems.sum(0))
    >>> improvement > 50
    True
    """
    _check_item(est_source, stems, mix)
    if len(est_source) > MAX_GROUPED:
        raise ValueError(
            f"expected at most {MAX_GROUPED} sources, got {len(est_source)}"
        )
    active = _active(stems)
    num_silent = len(stems) - len(active)
    if len(active) < 2:
        return None, num_silent
    est_source = _sounding(est_source)
    table = _improvement_of_subsets(est_source, active, mix)
    # a stem without source: not an option while there are enough of them
    spare = len(active) > len(est_source)
    table[:, 0] = 0.0 if spare else -np.inf
    # each subset with each of its own subsets: the others are the rest
    number = np.arange(2 ** len(est_source), dtype=np.int16)
    union, part = np.nonzero((number & ~number[:, None]) == 0)
    rest = union - part
    best = np.full(2 ** len(est_source), -np.inf)
    best[0] = 0.0
    for row in table:
        # best[union] over all splits of a subset in (this stem, earlier ones)
        candidates = row[part] + best[rest]
        best = np.full_like(best, -np.inf)
        np.maximum.at(best, union, candidates)
    return float(best[-1]) / len(active), num_silent


def _improvement_of_subsets(est_source, stems, mix):
    """[stems, 2^sources] in dB, from inner products in double precision."""
    est_source, stems, mix = (
        (x - x.mean(-1, keepdim=True)).detach().cpu().numpy()
        for x in (est_source.double(), stems.double(), mix.double())
    )
    number = np.arange(2 ** len(est_source))[:, None]
    subsets = (number >> np.arange(len(est_source)) & 1).astype(float)
    energy = np.sum(subsets @ (est_source @ est_source.T) * subsets, axis=1)
    product = stems @ est_source.T @ subsets.T
    signal = product**2 / np.sum(stems**2, axis=1, keepdims=True)
    # rounding leaves this much of noise to a perfect estimate
    noise = np.maximum(energy - signal, 1e-15 * energy)
    ratio = signal / np.maximum(noise, np.finfo(np.float64).tiny)
    limit = 10 ** (LIMIT_DB / 10)
    value = 10 * np.log10(np.clip(ratio, 1 / limit, limit))
    before = si_snr(torch.from_numpy(mix), torch.from_numpy(stems))
    return value - before.numpy()[:, None]


def _of_pairs(measure, est_source, stems, **options):
    """Mean of a measure of torchmetrics over ``_pairs``; None without any."""
    # torchmetrics takes a second to import, and some of its versions warn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.functional import audio

    # pair by pair because batched linear solvers fail in some builds of torch
    ratio = [
        getattr(audio, measure)(*pair, **options)
        for pair in zip(*_pairs(est_source, stems))
    ]
    if not ratio:
        return None
    return float(torch.stack(ratio).clamp(-LIMIT_DB, LIMIT_DB).mean())


def sdr(est_source, stems):
    """Signal-to-distortion ratio (BSS-eval, 512 taps) of the best choice.

    By torchmetrics, of the pairs that ``si_snri`` chooses: the mean over the
    active stems with a source, in dB; None without any.
    """
    # the projection on 512 shifts is singular for band-limited stems
    options = {"load_diag": 1e-8}
    return _of_pairs("signal_distortion_ratio", est_source, stems, **options)


def si_sdr(est_source, stems):
    """Scale-invariant SDR, of the same pairs as ``sdr``."""
    name = "scale_invariant_signal_distortion_ratio"
    return _of_pairs(name, est_source, stems)


def pesq(est_source, vocals, sample_rate):
    """PESQ of the source nearest to the vocals, a measure of speech.

    ITU-T P.862.2, wideband at 16 kHz, by the package of that name: from 1.04
    to 4.64, higher is better; of sources [sources, time] and vocals [time].
    None if either is silent or no utterance is found in them.
    """
    from pesq import PesqError
    from pesq import pesq as perceived

    source, stem = _pairs(est_source, vocals.unsqueeze(0))
    if not len(stem):
        return None
    heard = torch.cat([stem, source]).cpu()
    heard = resample(heard, sample_rate, PESQ_RATE).numpy()
    options = {"mode": "wb", "on_error": PesqError.RETURN_VALUES}
    score = perceived(PESQ_RATE, *heard, **options)
    return score if score > 0 else None  # below are errors


def mixture_si_snr(est_source, mixtures):
    """SI-SNR of the best remix against the mixtures: the paper's figure.

    Arguments
    ---------
    est_source : torch.Tensor
        Sources separated from the sum of the mixtures, [batch, sources,
        time].
    mixtures : torch.Tensor
        The mixtures, [batch, mixtures, time].

    Returns
    -------
    torch.Tensor
        [batch], in dB, mean over the mixtures that sound; NaN without any.

    Example
    -------
    >>> mixtures = torch.randn(1, 2, 1000)
    >>> float(mixture_si_snr(mixtures, mixtures)) > 60
    True
    """
    _, assignment = mixit_loss(est_source, mixtures, "si_snr")
    # in double precision, which autocast and TF32 leave alone
    remix = torch.matmul(assignment.double(), est_source.double())
    value = si_snr(remix, mixtures.double()).to(est_source.dtype)
    active = mixtures.double().var(-1, correction=0) > SILENT_ENERGY
    return (value * active).sum(1) / active.sum(1)


def mask_overlap(masks):
    """Mean cosine similarity over all pairs of different masks.

    Of [batch, N, ...], [batch]: 0 for masks that do not overlap, 1 for equal
    ones; a ValueError for a single one.

    Example
    -------
    >>> mask_overlap(torch.ones(1, 4, 10, 20))
    tensor([1.])
    """
    return mean_of_pairs(mask_cosines(masks))


def effective_mask_count(masks):
    """How many masks are in use: ``exp(H(p))`` of their shares p of energy.

    Of [batch, N, ...], [batch]: from 1 (one mask has all the energy) to N.

    Example
    -------
    >>> effective_mask_count(torch.ones(1, 4, 10, 20))
    tensor([4.])
    """
    return effective_number(mask_gram(masks).diagonal(dim1=1, dim2=2))
