"""A masknet of several scales: patches of bins, convolutions, a Performer.

The future work of "Music Separation Using Self-Supervised Learning"
(Trackformer, section 6.2: multi-scale fusion, transposed convolutions). Time
and frequency are halved twice by 2-D convolutions; at a quarter of the frame
rate a Performer attends along time; transposed convolutions lead back up, where
the finer levels are added.
"""

import torch
from torch import nn
from torch.nn import functional as F

from trackformer_sb.nnet.features import (
    log_magnitude,
    normalise_spectrogram,
    running_level,
)
from trackformer_sb.nnet.performer import PerformerEncoder, check_choice
from trackformer_sb.nnet.stft import fit_length
from trackformer_sb.nnet.streaming import StreamingMasks, with_past

NUM_FEATURES = 5
LOCAL_FRAMES = LOCAL_BINS = 17  # of the means that features are compared with
# bins of a patch, and the share of the bins up to where they are of that size:
# fine where bass and voices lie, coarse where cymbals do
PATCHES = ((4, 1 / 16), (8, 1 / 4), (16, 1 / 2), (64, 1))
UPSAMPLINGS = ("transposed", "nearest")


def local_mean(x, size, dim):
    """Mean over an odd window that is cut at the edges.

    Of [batch, freq, frames], along one of the last two.

    Example
    -------
    >>> local_mean(torch.tensor([[[1.0, 2.0, 6.0]]]), 3, -1)
    tensor([[[1.5000, 3.0000, 4.0000]]])
    """
    # along the last dimension it is three times as fast as along the others
    x = F.avg_pool1d(
        x.transpose(dim, -1), size, 1, size // 2, count_include_pad=False
    )
    return x.transpose(-1, dim)


def fusion_features(mix_w, memory=None):
    """What the network sees of a spectrum, [batch, 5, freq, frames].

    The log-magnitude of all channels, normalised per item; twice its difference
    to its mean over 17 frames, where hits stand out, and over 17 bins, where
    partials do; of stereo, how different the channels are (0 to 1) and where a
    bin is (-1 right to 1 left), zeros of mono. All is independent of the level,
    and finite on silence. With the `memory` of the frames before, each frame is
    compared with what was heard so far and with the 16 frames before.
    """
    magnitude = mix_w.abs()
    power = magnitude.square().mean(1)
    if memory is None:
        level = normalise_spectrogram(log_magnitude(power.sqrt()), "zscore")
        around = local_mean(level, LOCAL_FRAMES, -1)
        usual = magnitude.sum(1).mean((-2, -1), keepdim=True)
    else:
        level, mean = running_level(power.sqrt(), memory)
        around = with_past(level, LOCAL_FRAMES - 1, memory)
        around = F.avg_pool1d(around, LOCAL_FRAMES, 1)
        usual = 2 * mean
    features = [
        level,
        2 * (level - around),
        2 * (level - local_mean(level, LOCAL_BINS, -2)),
    ]
    if mix_w.shape[1] == 2:
        left, right = magnitude.unbind(1)
        both = left + right
        # where next to nothing sounds there is no place
        both = (both + 1e-3 * usual).clamp(min=1e-10)
        side = (mix_w[:, :1] - mix_w[:, 1:]).abs().squeeze(1)
        features.append(side / both)
        features.append((left - right) / both)
    else:
        features += [torch.zeros_like(level)] * 2
    return torch.stack(features, 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over channels: [batch, channels, positions, frames]."""

    def forward(self, x):
        """Of the shape of `x`; in channels-last memory no copy is made."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Convolution(nn.Conv2d):
    """3x3 convolution; a causal one sees two frames of before, none ahead."""

    def __init__(self, channels, causal):
        padding = 1, 0 if causal else 1
        super().__init__(channels, channels, 3, padding=padding)

    def forward(self, x, memory=None):
        """[batch, channels, positions, frames], likewise out."""
        if memory is not None:
            x = with_past(x, 2, memory)
            if not torch.is_grad_enabled():
                # of a frame at a time it takes half as long so
                x = x.contiguous(memory_format=torch.channels_last)
        return super().forward(x)


class ResidualBlock(nn.Module):
    """Norm, 3x3 convolution, GELU, 3x3 convolution, residual."""

    def __init__(self, channels, causal):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv_in = Convolution(channels, causal)
        self.conv_out = Convolution(channels, causal)

    def forward(self, x, memory=None):
        """[batch, channels, positions, frames], likewise out."""
        hidden = F.gelu(self.conv_in(self.norm(x), memory))
        return x + self.conv_out(hidden, memory)


class Upsampling(nn.Module):
    """Doubles positions and, by `pace`, frames, by one of ``UPSAMPLINGS``."""

    def __init__(self, in_channels, out_channels, kind, pace):
        super().__init__()
        self.kind, self.factor = kind, (2, pace)
        if kind == "transposed":
            self.conv = nn.ConvTranspose2d(
                in_channels, out_channels, self.factor, self.factor
            )
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        """[batch, in, p, t] -> [batch, out, 2 p, pace * t]."""
        x = self.conv(x)
        if self.kind == "nearest":
            x = F.interpolate(x, scale_factor=self.factor)
        return x


class FusionMaskNet(StreamingMasks, nn.Module):
    """Predicts one mask per source from mono or stereo spectra.

    The spectrum is cut in patches of some frames and of 4 bins at its low end,
    up to 64 at its high end; the highest bin copies its neighbour's mask. Each
    patch has a learned position. See the module's docstring for the rest.

    Arguments
    ---------
    in_channels : int
        Bins of the spectrum, ``n_fft // 2 + 1`` with an ``n_fft`` that 512
        divides.
    num_spks : int
        Number of sources to output.
    channels : sequence of int
        Channels of the three levels, finest first.
    patch_frames : int
        Frames of a patch.
    d_model, nhead, num_layers, d_ffn, n_features, dropout, attention
        Sizes of the Performer, see ``PerformerEncoder``; no layers, no
        Performer.
    skips : bool
        Whether the finer levels are added on the way up.
    upsampling : str
        "transposed" convolutions, or "nearest" neighbours after 1x1 ones.
    causal : bool
        Whether masks depend on what was heard so far only, for streams: all
        levels then have the frame rate of the spectrum, with patches of one
        frame.
    lookahead_frames : int
        Frames after its own that a mask of a causal net depends on.
    steady_share : float
        Share of the mask's logarithm that is its mean over time, weighted by
        the mixture's power, in [0, 1): instruments keep their bins, and what
        single frames get wrong averages out. 0 for a causal net.

    Raises
    ------
    ValueError
        For sizes that do not fit or an unknown option, and at call for an input
        of another shape.

    Example
    -------
    >>> masknet = FusionMaskNet(
    ...     in_channels=257, num_spks=4, channels=(8, 8, 8), d_model=16
    ... )
    >>> mix_w = torch.randn(3, 2, 257, 50, dtype=torch.complex64)
    >>> masks = masknet(mix_w)
    >>> torch.allclose(masks.sum(0), torch.ones(3, 257, 50))
    True
    """

    # ``separate`` gives it both channels of stereo
    stereo = True

    def __init__(
        self,
        in_channels,
        num_spks,
        channels=(64, 96, 192),
        patch_frames=2,
        d_model=192,
        nhead=4,
        num_layers=3,
        d_ffn=None,
        n_features=256,
        dropout=0.0,
        attention="auto",
        skips=True,
        upsampling="transposed",
        causal=False,
        lookahead_frames=0,
        steady_share=0.0,
    ):
        super().__init__()
        if in_channels % 256 != 1 or in_channels == 1:
            raise ValueError(
                "in_channels: expected n_fft // 2 + 1 with an n_fft that 512 "
                f"divides, got {in_channels}"
            )
        check_choice("upsampling", upsampling, UPSAMPLINGS)
        if causal and (patch_frames, steady_share) != (1, 0):
            raise ValueError(
                "expected patch_frames 1 and steady_share 0 for a causal net, "
                f"got {patch_frames} and {steady_share}"
            )
        self.steady_share = steady_share
        self.in_channels, self.num_spks = in_channels, num_spks
        self.skips, self.patch_frames = skips, patch_frames
        self.set_causal(causal, lookahead_frames, attention)
        # from level to level in time; fewer frames would be late ones
        self.pace = pace = 1 if causal else 2
        fine, middle, coarse = channels
        self.embed, self.heads = nn.ModuleList(), nn.ModuleList()
        self.edges, self.patches = [0], []
        for bins, share in PATCHES:
            self.edges.append(int(share * (in_channels - 1)))
            self.patches.append((self.edges[-1] - self.edges[-2]) // bins)
            size = bins, patch_frames
            self.embed.append(nn.Conv2d(NUM_FEATURES, fine, size, size))
            outputs = num_spks * bins * patch_frames
            self.heads.append(nn.Conv2d(fine, outputs, 1))
        positions = sum(self.patches)
        self.position = nn.Parameter(torch.zeros(1, fine, positions, 1))
        self.bin_bias = nn.Parameter(torch.zeros(num_spks, in_channels, 1))
        self.down_fine = ResidualBlock(fine, causal)
        self.to_middle = nn.Conv2d(fine, middle, (2, pace), (2, pace))
        self.down_middle = nn.ModuleList(
            ResidualBlock(middle, causal) for _ in range(2)
        )
        self.to_coarse = nn.Conv2d(middle, coarse, (2, pace), (2, pace))
        self.down_coarse = nn.ModuleList(
            ResidualBlock(coarse, causal) for _ in range(2)
        )
        self.performer = None
        if num_layers:
            tokens = coarse * positions // 4
            self.to_tokens = nn.Linear(tokens, d_model)
            self.performer = PerformerEncoder(
                d_model,
                nhead,
                num_layers,
                2 * d_model if d_ffn is None else d_ffn,
                n_features,
                dropout,
                attention,
                causal,
            )
            self.from_tokens = nn.Linear(d_model, tokens)
        self.up_coarse = ResidualBlock(coarse, causal)
        self.from_coarse = Upsampling(coarse, middle, upsampling, pace)
        self.up_middle = ResidualBlock(middle, causal)
        self.from_middle = Upsampling(middle, fine, upsampling, pace)
        self.up_fine = ResidualBlock(fine, causal)

    def redraw_projections(self, generator=None):
        """Draws new random features, see ``PerformerEncoder``."""
        if self.performer is not None:
            self.performer.redraw_projections(generator)

    def _masks(self, mix_w, key_padding_mask, memory=None):
        if mix_w.dim() == 3:
            mix_w = mix_w.unsqueeze(1)
        if (
            mix_w.dim() != 4
            or mix_w.shape[1] not in (1, 2)
            or mix_w.shape[2] != self.in_channels
            or not mix_w.is_complex()
        ):
            raise ValueError(
                f"expected a complex spectrum [batch, {self.in_channels}, "
                f"frames] or [batch, 1 or 2, {self.in_channels}, frames], got "
                f"{mix_w.dtype} {list(mix_w.shape)}"
            )
        with torch.no_grad(), torch.autocast(mix_w.device.type, enabled=False):
            features = fusion_features(mix_w, memory)
        fine, middle, coarse = self.encode(features, memory)
        x = self.from_coarse(self.up_coarse(coarse, memory))
        x = self.up_middle(x + middle if self.skips else x, memory)
        x = self.from_middle(x)
        x = self.up_fine(x + fine if self.skips else x, memory)
        logits = [
            head(part)
            .unflatten(1, (self.num_spks, -1, self.patch_frames))
            # [batch, sources, bins, frames of a patch, patches, time]
            .permute(0, 1, 4, 2, 5, 3)
            .flatten(4)
            .flatten(2, 3)
            for head, part in zip(self.heads, x.split(self.patches, 2))
        ]
        logits = torch.cat([*logits, logits[-1][:, :, -1:]], 2)
        logits = fit_length(logits, features.shape[-1])
        # in bfloat16 the masks would sum to one within 0.4 % only
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(dtype) + self.bin_bias
        if self.steady_share:
            # plain means where the mixture is silent
            power = mix_w.abs().square().mean(1) + 1e-20
            weights = (power / power.sum(-1, keepdim=True)).to(dtype)
            mean = torch.einsum("bsft,bft->bsf", logits, weights)
            logits = logits.lerp(mean.unsqueeze(-1), self.steady_share)
        return logits.softmax(1).transpose(0, 1)

    def encode(self, features, memory=None):
        """Three levels [batch, channels, positions, frames], finest first.

        Of ``fusion_features``, whose frames are padded to whole patches.
        """
        x = features.to(self.position.dtype)  # of a module in half precision
        x = F.pad(x, (0, -x.shape[-1] % (self.pace**2 * self.patch_frames)))
        device = x.device.type
        quick = device == "cuda" or torch.is_autocast_enabled(device)
        if quick or not torch.is_grad_enabled():
            # in float32 on a CPU the backward pass would take twice the time
            x = x.contiguous(memory_format=torch.channels_last)
        fine = torch.cat(
            [
                embed(x[:, :, start:end])
                for embed, start, end in zip(
                    self.embed, self.edges, self.edges[1:]
                )
            ],
            2,
        )
        fine = self.down_fine(fine + self.position, memory)
        middle = self.to_middle(fine)
        for block in self.down_middle:
            middle = block(middle, memory)
        coarse = self.to_coarse(middle)
        for block in self.down_coarse:
            coarse = block(coarse, memory)
        if self.performer is not None:
            coarse = coarse + self.attend(coarse, memory)
        return fine, middle, coarse

    def attend(self, x, memory=None):
        """All positions of a frame as one token; the Performer along time."""
        batch, channels, positions, frames = x.shape
        tokens = x.permute(0, 3, 2, 1).reshape(batch, frames, -1)
        # no positions: what was learnt on 3 s holds for chunks of any length
        tokens = self.performer(
            self.to_tokens(tokens),
            positions=tokens.new_zeros(1),
            memory=memory,
        )
        tokens = self.from_tokens(tokens)
        tokens = tokens.view(batch, frames, positions, channels)
        return tokens.permute(0, 3, 2, 1)
