"""Pre-trains the encoder of FusionMaskNet as a masked autoencoder.

    python benchmarks/fusion_mae.py --data_folder MUSIC \
        --mixtures_folder SONGS --steps 250 --out ENCODER
    python recipes/train.py hparams/separator.yaml --data_folder=MUSIC \
        --mixtures_folder=SONGS --pretrained_separator=ENCODER

30 % of the patches of an item are hidden, two patches of frequency by 8 frames
together. All levels on the way down and the Performer rebuild the normalised
log-magnitude of what is hidden (mean squared error) through one transposed
convolution and a linear head per kind of patch, which are thrown away.
Optimizer and items are those of hparams/separator.yaml, the items as plain
mixtures. ENCODER is a separator folder whose encoder has learnt; the rest is
random. With --valid_folder, songs that it never heard are rebuilt in the end;
--share takes a share of the songs, a quarter of every kind for 0.25.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

from trackformer_sb.data.music import Music
from trackformer_sb.data.remix import STEM_CLASSES, RemixedItems
from trackformer_sb.inference.separator import Separator
from trackformer_sb.nnet.fusion import (
    LOCAL_BINS,
    LOCAL_FRAMES,
    FusionMaskNet,
    fusion_features,
    local_mean,
)
from trackformer_sb.nnet.stft import STFTEncoder
from trackformer_sb.training.optimization import MuonAdamW

MASK_RATIO = 0.3
SPAN = 4  # patches of 2 frames hidden together
VALID_ITEMS = 100
WARMUP_STEPS, LR, WEIGHT_DECAY, MAX_GRAD_NORM = 50, 1.5e-3, 0.01, 1.0


class FusionMAE(nn.Module):
    """Masked autoencoder around the way down of a FusionMaskNet."""

    def __init__(self, masknet, channels):
        super().__init__()
        self.masknet = masknet
        fine, _, coarse = channels
        self.up = nn.ConvTranspose2d(coarse, fine, 4, 4)
        self.heads = nn.ModuleList(
            nn.Conv2d(fine, e.kernel_size[0] * e.kernel_size[1], 1)
            for e in masknet.embed
        )

    def bins(self, patches):
        """[batch, positions, time] of patches -> [batch, bins, frames]."""
        sizes = [e.kernel_size[0] for e in self.masknet.embed]
        parts = patches.split(self.masknet.patches, 1)
        x = [p.repeat_interleave(n, 1) for p, n in zip(parts, sizes)]
        x = torch.cat([*x, x[-1][:, -1:]], 1)
        return x.repeat_interleave(self.masknet.patch_frames, 2)

    def hide(self, batch, frames):
        """Draws what is hidden: Boolean [batch, bins, frames]."""
        patches = sum(self.masknet.patches)
        spans = -(-frames // (SPAN * self.masknet.patch_frames))
        hidden = torch.rand(batch, -(-patches // 2), spans) < MASK_RATIO
        hidden = hidden.repeat_interleave(2, 1)[:, :patches]
        return self.bins(hidden.repeat_interleave(SPAN, 2))[..., :frames]

    def forward(self, mix_w):
        """Loss, and the share of the variance of what is hidden it explains."""
        features = fusion_features(mix_w)
        level = features[:, 0]
        hidden = self.hide(len(level), level.shape[-1])
        seen = level.masked_fill(hidden, 0.0)
        local = [
            2 * (seen - local_mean(seen, LOCAL_FRAMES, -1)),
            2 * (seen - local_mean(seen, LOCAL_BINS, -2)),
        ]
        shown = torch.stack([seen, *local, *features[:, 3:].unbind(1)], 1)
        shown = shown.masked_fill(hidden[:, None], 0.0)
        x = self.up(self.masknet.encode(shown)[-1])
        parts = [
            head(part)
            .unflatten(1, (-1, self.masknet.patch_frames))
            .permute(0, 3, 1, 4, 2)
            .flatten(3)
            .flatten(1, 2)
            for head, part in zip(self.heads, x.split(self.masknet.patches, 2))
        ]
        guess = torch.cat([*parts, parts[-1][:, -1:]], 1)
        guess, true = guess[..., : level.shape[-1]][hidden], level[hidden]
        loss = F.mse_loss(guess, true)
        return loss, 1 - loss.detach() / true.var()


def spectra(songs, number, batch_size, seed):
    """Yields spectra [batch, 2, freq, frames] of so many mixtures."""
    items = RemixedItems(songs, num_items=number, seed=seed)
    encoder = STFTEncoder(2048, 1024)
    for batch in torch.utils.data.DataLoader(
        items, batch_size, num_workers=1, drop_last=True
    ):
        mixtures = batch[0].sum(1)
        yield encoder(mixtures.flatten(0, 1)).unflatten(0, (-1, 2))


def main():
    """Trains, prints a line every 50 steps, writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_folder", required=True)
    parser.add_argument("--mixtures_folder", required=True)
    parser.add_argument("--valid_folder")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    separator = Separator.from_pretrained("default").float()
    arguments = dict(separator.config["masknet"])
    del arguments["class"]
    masknet = FusionMaskNet(**arguments)
    model = FusionMAE(masknet, arguments["channels"])
    music = Music(args.data_folder, "midi", stem_groups=STEM_CLASSES)
    songs = music.songs(3.0) + Music(args.mixtures_folder).songs(3.0)
    songs = songs[:: round(1 / args.share)]
    number = args.steps * args.batch_size
    optimizer = MuonAdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    started, found = time.monotonic(), []
    # items of its own: those of a training have another seed
    batches = spectra(songs, number, args.batch_size, args.seed + 1)
    for step, mix_w in enumerate(batches, 1):
        loss, explained = model(mix_w)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, step / WARMUP_STEPS)
        optimizer.step()
        found.append((loss.item(), explained.item()))
        if step % 50 == 0:
            means = torch.tensor(found[-50:]).mean(0).tolist()
            seconds = (time.monotonic() - started) / step
            print(
                f"step {step}: loss {means[0]:.3f}, explained {means[1]:.3f}, "
                f"{seconds:.2f} s a step",
                flush=True,
            )
    if args.valid_folder:
        unheard = Music(args.valid_folder, "stems", stem_groups=STEM_CLASSES)
        batches = spectra(unheard.songs(3.0), VALID_ITEMS, 1, seed=0)
        with torch.no_grad():
            explained = [model.eval()(mix_w)[1].item() for mix_w in batches]
        mean = torch.tensor(explained).mean().item()
        print(f"{len(songs)} songs: explained {mean:.3f} of unheard ones")
    separator.masknet.load_state_dict(masknet.state_dict())
    separator.save_pretrained(args.out)


if __name__ == "__main__":
    main()
