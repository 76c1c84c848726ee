"""How many instruments sound, and which classes do, from a separator's slots.

The counter hears what the masks let through, and is trained on a separator that
stays as it is (``recipes/count.py``).
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

BANDS = 24  # about evenly spaced in octaves
STEP_FRAMES = 8  # of a step of the result
HIDDEN = 64
FLOOR = 1e-4  # of the mean power, -40 dB: softer is silence
SILENCE = 1e-6  # power of a bin at an RMS of about -90 dB
LOUD_SHARE = 0.05  # of a song, in which a class is above its threshold


class Counter(nn.Module):
    """Counts instruments, and tells which classes sound, over time.

    Arguments
    ---------
    in_channels : int
        Bins of the spectrum, ``n_fft // 2 + 1``.
    num_spks : int
        Number of slots.
    num_classes : int
        Number of classes, in the order of the separator's.
    thresholds : list of float, optional
        Of each class: the probability above which a song has it; else 0.5.
    """

    def __init__(self, in_channels, num_spks, num_classes, thresholds=None):
        super().__init__()
        self.thresholds = thresholds or [0.5] * num_classes
        edges = np.geomspace(1, in_channels, BANDS + 1).round()
        # one bin at least
        edges = np.maximum(edges, np.arange(1, BANDS + 2))[:, None]
        bins = np.arange(in_channels)
        bands = (bins >= edges[:-1]) & (bins < edges[1:])
        bands = torch.from_numpy(bands).float()
        self.register_buffer("bands", bands, persistent=False)
        self.net = nn.Sequential(
            nn.Conv1d(num_spks * BANDS, HIDDEN, 1),
            nn.GELU(),
            nn.Conv1d(HIDDEN, HIDDEN, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(HIDDEN, 1 + num_classes, 5, padding=2),
        )

    def levels(self, mix_w, est_mask):
        """Level of each slot in tens of dB, [batch, num_spks, bands, steps].

        -4 in silence, 0 where all of a band has the mean power of a bin.
        """
        power = mix_w.abs().square()
        if power.dim() == 4:
            power = power.mean(1)
        mean = power.mean((-2, -1))[:, None, None, None] + SILENCE
        slots = est_mask.transpose(0, 1).to(power.dtype).square()
        bands = self.bands.to(power.dtype) @ (slots * power.unsqueeze(1))
        steps = F.avg_pool1d(bands.flatten(1, 2), STEP_FRAMES, ceil_mode=True)
        return (steps.unflatten(1, bands.shape[1:3]) / mean + FLOOR).log10()

    def of_levels(self, levels):
        """``forward`` from ``levels``."""
        weight = self.net[0].weight
        out = self.net(levels.flatten(1, 2).to(weight.dtype))
        # nothing sounds in silence
        heard = levels.amax((1, 2)) > math.log10(2 * FLOOR)
        return F.softplus(out[:, 0]) * heard, out[:, 1:]

    def forward(self, mix_w, est_mask):
        """Count [batch, steps] and logits of classes [batch, classes, steps].

        From complex spectra, [batch, freq, frames] or [batch, channels, freq,
        frames], and masks [num_spks, batch, freq, frames].
        """
        return self.of_levels(self.levels(mix_w, est_mask))

    def sounding(self, probability):
        """Whether a song has each class, from its probability [classes, time].

        Where it is above the threshold in the loudest 5 % of the song.
        """
        highest = probability.quantile(1 - LOUD_SHARE, dim=-1)
        return highest > highest.new_tensor(self.thresholds)
