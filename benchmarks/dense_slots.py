"""MixIT with 16 slots against 8 on dense music, at equal items.

Two windows of 3 s of rendered pieces are a mixture of mixtures; in each six
instruments or more play, 12 in all. The same small FusionMaskNet learns from
the same items, with 8 slots and an exhaustive search and with 16 slots and that
by least squares (arXiv 2106.00847). Measured on windows of pieces that were not
trained on, in dB: SI-SNR of the best remix of the outputs against the two
mixtures, that the oracle grouping of the outputs into stems gains over the
mixture of one window, and how many masks are in use.
"""

import json
import pathlib

import numpy as np
import torch
from common import Record, new_parser, parse_args, say, table

from trackformer_sb.audio import read_segment
from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import STEM_CLASSES
from trackformer_sb.inference.separation import separate
from trackformer_sb.nnet.fusion import FusionMaskNet
from trackformer_sb.nnet.stft import STFTDecoder, STFTEncoder
from trackformer_sb.objectives import mixit
from trackformer_sb.objectives.metrics import (
    MAX_GROUPED,
    effective_mask_count,
    mixture_si_snr,
    si_snri_grouped,
)
from trackformer_sb.training.optimization import MuonAdamW

RATE, SECONDS = 44100, 3.0
COUNT_RATE = 10  # of counts.json
DENSE = 6  # instruments, in the mean of a window
SIZES = {"channels": (16, 24, 48), "d_model": 64, "num_layers": 2}


def dense_windows(folder):
    """Song and start of the windows in which enough instruments play."""
    windows = []
    for song in Music(folder, "stems", stem_groups=STEM_CLASSES).songs():
        text = pathlib.Path(song.path, "counts.json").read_text("utf-8")
        counts = np.sum(list(json.loads(text).values()), axis=0)
        step = int(SECONDS * COUNT_RATE)
        for k in range(int(song.seconds // SECONDS)):
            if counts[k * step :][:step].mean() >= DENSE:
                windows.append((song, k * SECONDS))
    return windows


def stems_of(song, start):
    """The stems of a window in mono, [stems, time], at an RMS of 0.1."""
    what = start, SECONDS, RATE
    sigs = [read_segment(x[0], *what) for x in song.tracks.values()]
    stems = torch.stack([sig.reshape(-1) for sig in sigs])
    return 0.1 * stems / stems.sum(0).square().mean().sqrt().clamp(min=1e-4)


def pair(windows, rng):
    """Stems of two windows of different songs."""
    first, second = rng.integers(len(windows), size=2)
    while windows[first][0] == windows[second][0]:
        second = rng.integers(len(windows))
    return stems_of(*windows[first]), stems_of(*windows[second])


def train(num_spks, windows, args):
    """A masknet that has seen the items of the seed."""
    torch.manual_seed(args.seed)
    # what 8 slots search exhaustively, 16 do not
    mixit.MAX_EXHAUSTIVE = 2**8
    encoder, decoder = STFTEncoder(2048, 1024), STFTDecoder(2048, 1024)
    masknet = FusionMaskNet(1025, num_spks, **SIZES)
    optimizer = MuonAdamW(masknet.parameters(), lr=1.5e-3)
    rng = np.random.default_rng(args.seed)
    for step in range(args.items // args.batch_size):
        items = [pair(windows, rng) for _ in range(args.batch_size)]
        mixtures = torch.stack(
            [torch.stack([a.sum(0), b.sum(0)]) for a, b in items]
        )
        sources, _ = separate(mixtures.sum(1), encoder, masknet, decoder)
        loss, _ = mixit.mixit_loss(sources, mixtures)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(masknet.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            say(f"{num_spks} slots, step {step}: {loss.mean():.2f} dB")
    return encoder, masknet.eval(), decoder


@torch.no_grad()
def measure(model, windows, number):
    """Means over so many held-out items, and over both of their windows."""
    encoder, masknet, decoder = model
    rng, found = np.random.default_rng(1), []
    for _ in range(number):
        a, b = pair(windows, rng)
        mixtures = torch.stack([a.sum(0), b.sum(0)])
        mix = mixtures.sum(0, keepdim=True)
        sources, masks = separate(mix, encoder, masknet, decoder)
        alone, _ = separate(mixtures[:1], encoder, masknet, decoder)
        # more have too many groupings
        order = alone[0].square().sum(-1).argsort(descending=True)
        rest = alone[0, order[MAX_GROUPED - 1 :]].sum(0, keepdim=True)
        few = torch.cat([alone[0, order[: MAX_GROUPED - 1]], rest])
        improvement, _ = si_snri_grouped(few, a, a.sum(0))
        found.append(
            [
                float(mixture_si_snr(sources, mixtures[None])),
                np.nan if improvement is None else improvement,
                float(effective_mask_count(masks.transpose(0, 1))),
            ]
        )
    return np.nanmean(found, axis=0)


def main():
    """Trains both, measures, and writes the record."""
    parser = new_parser(__doc__, "dense_slots")
    parser.add_argument("music", help="pieces by make-music")
    parser.add_argument("test_music", help="others, not trained on")
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--test_items", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parse_args(parser)
    record = Record("Dense music", __doc__, args.output, args.device)
    train_windows = dense_windows(args.music)
    test_windows = dense_windows(args.test_music)
    rows = []
    for num_spks, search in ((8, "exhaustive"), (16, "least squares")):
        model = train(num_spks, train_windows, args)
        figures = measure(model, test_windows, args.test_items)
        rows.append([num_spks, search, *(f"{x:.2f}" for x in figures)])
    header = ["slots", "search", "mixture SI-SNR", "grouped SI-SNRi", "masks"]
    record.write(
        f"{args.items} items of {len(train_windows)} windows; tested on "
        f"{args.test_items} pairs of {len(test_windows)} windows.",
        table(header, rows),
    )


if __name__ == "__main__":
    main()
