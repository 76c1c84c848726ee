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
    num_classes, bins = stems_w.shape[1], stems_w.shape[-2]
    masks = class_masks(est_mask, num_classes).transpose(0, 1)
    estimate = masks.unsqueeze(2) * mix_w.abs().unsqueeze(1)
    target = stems_w.abs()
    weights = octave_weights(bins, sample_rate, target.device)
    # finite slopes where nothing sounds
    distance = ((estimate + 1e-6).sqrt() - (target + 1e-6).sqrt()).abs()
    distance = 2 * distance + LINEAR_SHARE * (estimate - target).abs()
    # a product with the weights would be another pass over all of it
    per_bin = distance.mean((1, 2, 4))
    return (per_bin * weights.squeeze(1)).mean(-1)
