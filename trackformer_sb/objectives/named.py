"""The loss of named stems: classes times slots.

Output ``class * slots + slot`` of a separator belongs to a class; a stem is the
sum of its class's slots, so that MixIT over all slots trains it too where a
song has no stems.
"""

import torch

# Of frequencies f the loss weighs 1 / (f + 300 Hz): octaves count, not bins.
PIVOT_HZ = 300.0
LINEAR_SHARE = 0.1


def class_masks(est_mask, num_classes):
    """Masks of the classes: those of their slots added up.

    Arguments
    ---------
    est_mask : torch.Tensor
        [classes * slots, batch, freq, frames].
    num_classes : int
        Number of classes.

    Returns
    -------
    torch.Tensor
        [classes, batch, freq, frames].
    """
    return est_mask.unflatten(0, (num_classes, -1)).sum(1)


def octave_weights(num_bins, sample_rate, device=None):
    """Weights of bins, 1 / (f + 300 Hz), 1 in the mean.

    Arguments
    ---------
    num_bins : int
        Bins from 0 to half the sample rate.
    sample_rate : int
        In Hz.
    device : torch.device, optional
        Where to make them.

    Returns
    -------
    torch.Tensor
        [freq, 1].
    """
    frequency = torch.linspace(0, sample_rate / 2, num_bins, device=device)
    weights = 1 / (frequency + PIVOT_HZ)
    return (weights / weights.mean()).unsqueeze(1)


def _distances(est_mask, mix_w, stems_w, sample_rate):
    """The distance of each class, [batch, classes], see ``named_loss``."""
    num_classes, bins = stems_w.shape[1], stems_w.shape[-2]
    masks = class_masks(est_mask, num_classes).transpose(0, 1)
    estimate = masks.unsqueeze(2) * mix_w.abs().unsqueeze(1)
    target = stems_w.abs()
    weights = octave_weights(bins, sample_rate, target.device)
    # finite slopes where nothing sounds
    distance = ((estimate + 1e-6).sqrt() - (target + 1e-6).sqrt()).abs()
    distance = 2 * distance + LINEAR_SHARE * (estimate - target).abs()
    # a product with the weights would be another pass over all of it
    per_bin = distance.mean((2, 4))
    return (per_bin * weights.squeeze(1)).mean(-1)


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
        [batch], lower is better.

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
