"""Which outputs of a separator sound in a song, and how many instruments."""

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components

from trackformer_sb.inference.remix import REMIX
from trackformer_sb.nnet.stft import STFTEncoder

# Outputs without names are silent below this share of the energy, -30 dB.
SILENT_SHARE = 1e-3

# Cosine of the magnitudes of two outputs over time and frequency from which on
# they are one instrument.
ALIKE = 0.8


class SongCount:
    """What a ``Counter`` says of a song, second by second.

    A forward hook of the masknet, with arguments of ``separate_stream``.
    """

    def __init__(self, counter, seconds, chunk_seconds, overlap):
        self.counter, self.chunks = counter, 0
        self.chunk = min(chunk_seconds, seconds)
        self.hop, self.last = (1 - overlap) * self.chunk, seconds - self.chunk
        self.sums = np.zeros((2 + len(counter.thresholds), int(seconds) + 1))

    def __call__(self, masknet, inputs, est_mask):
        """Takes in the spectra and the masks of some chunks."""
        count, logits = self.counter(inputs[0], est_mask)
        values = torch.cat([count.unsqueeze(1), logits.sigmoid()], 1)
        for part in values.float().cpu().numpy():
            steps = part.shape[1]
            start = min(self.chunks * self.hop, self.last)
            time = start + (np.arange(steps) + 0.5) * self.chunk / steps
            part = np.vstack([part, np.ones(steps)])
            np.add.at(self.sums.T, time.astype(int), part.T)
            self.chunks += 1

    def means(self):
        """Count and probability of each class, [1 + classes, seconds]."""
        *sums, number = self.sums[:, self.sums[-1] > 0]
        return np.stack(sums) / number

    def record(self):
        """The mean number of instruments, and that of each second."""
        curve = self.means()[0]
        mean = round(float(curve.mean()), 2)
        return {"mean": mean, "curve": curve.round(1).tolist()}

    def outputs(self, levels):
        """Whether each class sounds, and that none is one with another."""
        means = torch.from_numpy(self.means()[1:])
        sounding = self.counter.sounding(means).numpy()
        return sounding, np.arange(len(levels))


class Likeness:
    """How alike outputs without names are: products of their magnitudes."""

    def __init__(self):
        self.products = 0.0

    def watch(self, blocks):
        """The blocks [sources, channels, time] of a song as they pass."""
        encoder = STFTEncoder(2048, 1024)
        for block in blocks:
            magnitude = encoder(block.flatten(0, 1)).abs()
            magnitude = magnitude.unflatten(0, block.shape[:2]).flatten(1)
            self.products += (magnitude @ magnitude.T).double().numpy()
            yield block

    def outputs(self, levels):
        """Whether each sounds by its level, and the first that it is one with.

        The first of those that are one has the level of all.
        """
        norm = np.sqrt(self.products.diagonal()) + 1e-20
        alike = self.products > ALIKE * norm * norm[:, None]
        _, labels = connected_components(alike)
        first = np.array([labels.tolist().index(label) for label in labels])
        levels = np.bincount(first, levels, len(levels))
        return levels > SILENT_SHARE * levels.sum(), first


def sounding_mixes(names, gains, heard, energies):
    """Names and gains of the outputs that sound, of ``mix_gains``.

    ``other``, if it sounds, or the loudest takes in what the silent ones hold,
    so that the sum stays, and a remix, the last, is as it was. ``heard`` is a
    ``SongCount`` or ``Likeness`` and ``energies`` [sources] are those of the
    sources in the song.
    """
    count = len(names) - (REMIX in names)
    levels = np.square(gains[:count]) @ energies
    sounding, target = heard.outputs(levels)
    levels = np.bincount(target, levels, count)
    rest = max(
        range(count),
        key=lambda k: (sounding[k], names[k] == "other", levels[k]),
    )
    target = np.where(sounding[target], target, rest)
    mixed = gains.copy()
    mixed[:count] = 0
    np.add.at(mixed, target, gains[:count])
    kept = [*np.unique(target), *range(count, len(names))]
    return [names[k] for k in kept], mixed[kept]
