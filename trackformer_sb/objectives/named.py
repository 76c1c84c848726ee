"""Named stems: classes times slots, their loss and their measures.

Output ``class * slots + slot`` of a separator belongs to a class; a stem is the
sum of its class's slots, so that MixIT over all slots trains it too where a
song has no stems. Unlike those of ``metrics``, the measures choose nothing: the
output for drums is compared with the drums, whether or not another is closer.
"""

import torch

from trackformer_sb.objectives.metrics import LIMIT_DB, SILENT_ENERGY, si_snr

# Of frequencies f the loss weighs 1 / (f + 300 Hz): octaves count, not bins.
PIVOT_HZ = 300.0
LINEAR_SHARE = 0.1

# A stem counts where its share of the mixture's energy is between these: where
# it is all but silent, or all but alone, an improvement means little.
SMALLEST_SHARE = 1e-3
LARGEST_SHARE = 0.98

# Below this share (-60 dB) a stem is silent, and its output is leakage.
SILENT_SHARE = 1e-6


def _distances(est_mask, mix_w, stems_w, sample_rate):
    """The distance of each class, [batch, classes], see ``named_loss``."""
    masks = est_mask.unflatten(0, (stems_w.shape[1], -1)).sum(1).transpose(0, 1)
    estimate = masks.unsqueeze(2) * mix_w.abs().unsqueeze(1)
    target = stems_w.abs()
    # finite slopes where nothing sounds
    distance = ((estimate + 1e-6).sqrt() - (target + 1e-6).sqrt()).abs()
    distance = 2 * distance + LINEAR_SHARE * (estimate - target).abs()
    # a product with the weights would be another pass over all of it
    per_bin = distance.mean((2, 4))
    bins, device = per_bin.shape[-1], per_bin.device
    hertz = torch.linspace(0, sample_rate / 2, bins, device=device)
    weights = 1 / (hertz + PIVOT_HZ)
    return (per_bin * (weights / weights.mean())).mean(-1)


def named_loss(est_mask, mix_w, stems_w, sample_rate):
    """Distance of the named stems' spectra, in compressed magnitudes.

    Mean L1 distance of square-rooted magnitudes, times 2, plus a tenth of that
    of magnitudes, over classes, channels, frames and bins weighted by octaves.
    Thresholded SNR per class collapses to silence where a class is rare; this
    does not.

    Arguments
    ---------
    est_mask : torch.Tensor
        [classes * slots, batch, freq, frames], at least 0.
    mix_w : torch.Tensor
        Complex spectra of the mixtures, [batch, channels, freq, frames], at a
        level of about 0.1 RMS: compression is not indifferent to it.
    stems_w : torch.Tensor
        Those of the true stems, [batch, classes, channels, freq, frames].
    sample_rate : int
        In Hz.

    Returns
    -------
    torch.Tensor
        [batch], lower is better.
    """
    return _distances(est_mask, mix_w, stems_w, sample_rate).mean(1)


def absent_loss(est_mask, mix_w, absent, sample_rate):
    """``named_loss`` where all that is known is that classes are absent.

    These are compared with silence, the others count as perfect. That a class
    is absent from one song of a mixture of two is not used: it would restrict
    MixIT's assignment.

    Arguments
    ---------
    est_mask, mix_w, sample_rate
        As for ``named_loss``.
    absent : torch.Tensor
        bool, [batch, classes].

    Returns
    -------
    torch.Tensor
        [batch], 0 where nothing is known to be absent.

    Example
    -------
    >>> mix_w = torch.ones(1, 1, 33, 10, dtype=torch.complex64)
    >>> drums, vocals = torch.tensor([[True, False], [False, True]])
    >>> masks = torch.stack([torch.ones(1, 33, 10), torch.zeros(1, 33, 10)])
    >>> [
    ...     round(absent_loss(masks, mix_w, one[None], 44100).item(), 2)
    ...     for one in (drums, vocals)
    ... ]
    [1.05, 0.0]
    """
    silence = torch.zeros_like(mix_w).unsqueeze(1)
    silence = silence.expand(-1, absent.shape[1], -1, -1, -1)
    distances = _distances(est_mask, mix_w, silence, sample_rate)
    return (distances * absent).mean(1)


def _share(stems, mix):
    """Share of the mixture's energy, [..., time] -> [...]; NaN in silence."""
    energy = mix.square().mean(-1)
    energy = torch.where(energy > SILENT_ENERGY, energy, torch.nan)
    return stems.square().mean(-1) / energy


def named_si_snri(est_stems, stems, mix):
    """SI-SNR improvement over the mixture of each named stem.

    Arguments
    ---------
    est_stems : torch.Tensor
        Separated stems, [classes, time].
    stems : torch.Tensor
        The true ones in the same order, [classes, time].
    mix : torch.Tensor
        What was separated, [time].

    Returns
    -------
    torch.Tensor
        [classes], in dB; NaN for a stem with less than 0.1 % or more than 98 %
        of the mixture's energy.

    Example
    -------
    >>> stems = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [0, 0, 0, 0]])
    >>> mix = stems.sum(0)
    >>> named_si_snri(mix.expand(3, -1), stems, mix)
    tensor([0., 0., nan])
    """
    share = _share(stems, mix)
    counted = (share > SMALLEST_SHARE) & (share < LARGEST_SHARE)
    improvement = si_snr(est_stems, stems) - si_snr(mix, stems)
    return torch.where(counted, improvement, torch.nan)


def leakage(est_stems, stems, mix):
    """How far the outputs for silent stems are below the mixture.

    Arguments are those of ``named_si_snri``, the result is [classes] in dB, at
    most 120; higher is better. NaN for a stem that sounds, above -60 dB of the
    mixture.

    Example
    -------
    >>> mix = torch.tensor([1.0, -1.0, 1.0, -1.0])
    >>> stems = torch.stack([mix, torch.zeros(4)])
    >>> leakage(torch.stack([0.9 * mix, 0.1 * mix]), stems, mix)
    tensor([nan, 20.])
    """
    silent = _share(stems, mix) < SILENT_SHARE
    share = _share(est_stems, mix).clamp(min=10 ** (-LIMIT_DB / 10))
    return torch.where(silent, -10 * share.log10(), torch.nan)


def pair_by_class(slots, slot_classes, stems):
    """Adds the slots of each class, beside the true stem of that class.

    A song without a stem for the bass has it in the stem "other", with which
    bass and other of the outputs are compared together.

    Arguments
    ---------
    slots : torch.Tensor
        Outputs, [slots, channels, time].
    slot_classes : list of str
        Class of each slot.
    stems : dict
        Class -> true stem, [channels, time].

    Returns
    -------
    names : list of str
        Classes of the outputs.
    est_stems, stems : torch.Tensor
        [classes, channels, time]; zeros for a class that the song lacks.

    Example
    -------
    >>> stems = {"drums": torch.ones(1, 1), "other": torch.ones(1, 1)}
    >>> slots = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    >>> names, est_stems, _ = pair_by_class(
    ...     slots, ["drums", "bass", "other"], stems
    ... )
    >>> names, est_stems.flatten().tolist()
    (['drums', 'other'], [1.0, 6.0])
    """
    if "bass" not in stems and "other" in stems:
        slot_classes = [
            "other" if name == "bass" else name for name in slot_classes
        ]
    names = list(dict.fromkeys(slot_classes))
    silence = torch.zeros_like(slots[0])
    est_stems = [
        sum(slot for slot, one in zip(slots, slot_classes) if one == name)
        for name in names
    ]
    true = [stems.get(name, silence) for name in names]
    return names, torch.stack(est_stems), torch.stack(true)
