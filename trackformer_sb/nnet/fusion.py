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

from trackformer_sb.nnet.features import log_magnitude, normalise_spectrogram
from trackformer_sb.nnet.performer import PerformerEncoder
from trackformer_sb.nnet.stft import fit_length

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
    x = F.avg_pool2d(
        x.movedim(dim, -1),
        (1, size),
        stride=1,
        padding=(0, size // 2),
        count_include_pad=False,
    )
    return x.movedim(-1, dim)


def fusion_features(mix_w):
    """What the network sees of a spectrum, [batch, 5, freq, frames].

    The log-magnitude of all channels, normalised per item; twice its difference
    to its mean over 17 frames, where hits stand out, and over 17 bins, where
    partials do; of stereo, how different the channels are (0 to 1) and where a
    bin is (-1 right to 1 left), zeros of mono. All is independent of the level,
    and finite on silence.
    """
    magnitude = mix_w.abs()
    power = magnitude.square().mean(1)
    level = normalise_spectrogram(log_magnitude(power.sqrt()), "zscore")
    features = [
        level,
        2 * (level - local_mean(level, LOCAL_FRAMES, -1)),
        2 * (level - local_mean(level, LOCAL_BINS, -2)),
    ]
    if mix_w.shape[1] == 2:
        left, right = magnitude.unbind(1)
        both = left + right
        # where next to nothing sounds there is no place
        both = both + 1e-3 * both.mean((-2, -1), keepdim=True) + 1e-10
        features.append((mix_w[:, 0] - mix_w[:, 1]).abs() / both)
        features.append((left - right) / both)
    else:
        features += [torch.zeros_like(level)] * 2
    return torch.stack(features, 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place: [batch, channels, ...]."""

    def forward(self, x):
        """Of the shape of `x`; in channels-last memory no copy is made."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Norm, 3x3 convolution, GELU, 3x3 convolution, residual."""

    def __init__(self, channels):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        """[batch, channels, positions, frames], likewise out."""
        return x + self.conv_out(F.gelu(self.conv_in(self.norm(x))))


class Upsampling(nn.Module):
    """Doubles positions and frames, by one of ``UPSAMPLINGS``."""

    def __init__(self, in_channels, out_channels, kind):
        super().__init__()
        self.kind = kind
        if kind == "transposed":
            self.conv = nn.ConvTranspose2d(in_channels, out_channels, 2, 2)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        """[batch, in, p, t] -> [batch, out, 2 p, 2 t]."""
        x = self.conv(x)
        if self.kind == "nearest":
            x = F.interpolate(x, scale_factor=2)
        return x


class FusionMaskNet(nn.Module):
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
    >>> masks.shape
    torch.Size([4, 3, 257, 50])
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
    ):
        super().__init__()
        if in_channels % 256 != 1 or in_channels == 1:
            raise ValueError(
                "in_channels: expected n_fft // 2 + 1 with an n_fft that 512 "
                f"divides, got {in_channels}"
            )
        if upsampling not in UPSAMPLINGS:
            raise ValueError(
                f"upsampling must be one of {', '.join(UPSAMPLINGS)}, got "
                f"{upsampling!r}"
            )
        self.in_channels, self.num_spks = in_channels, num_spks
        self.skips, self.patch_frames = skips, patch_frames
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
        self.down_fine = ResidualBlock(fine)
        self.to_middle = nn.Conv2d(fine, middle, 2, 2)
        self.down_middle = nn.Sequential(
            ResidualBlock(middle), ResidualBlock(middle)
        )
        self.to_coarse = nn.Conv2d(middle, coarse, 2, 2)
        self.down_coarse = nn.Sequential(
            ResidualBlock(coarse), ResidualBlock(coarse)
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
            )
            self.from_tokens = nn.Linear(d_model, tokens)
        self.up_coarse = ResidualBlock(coarse)
        self.from_coarse = Upsampling(coarse, middle, upsampling)
        self.up_middle = ResidualBlock(middle)
        self.from_middle = Upsampling(middle, fine, upsampling)
        self.up_fine = ResidualBlock(fine)

    def redraw_projections(self, generator=None):
        """Draws new random features, see ``PerformerEncoder``."""
        if self.performer is not None:
            self.performer.redraw_projections(generator)

    def forward(self, mix_w):
        """Predicts masks.

        Arguments
        ---------
        mix_w : torch.Tensor
            Complex, [batch, freq, frames] or [batch, channels, freq, frames]
            of one or two channels, which share the masks.

        Returns
        -------
        torch.Tensor
            [num_spks, batch, freq, frames], in [0, 1], 1 in sum over sources.
        """
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
            features = fusion_features(mix_w)
        return self.masks(features)

    def masks(self, features):
        """Masks from ``fusion_features``, see ``forward``."""
        fine, middle, coarse = self.encode(features)
        x = self.from_coarse(self.up_coarse(coarse))
        x = self.up_middle(x + middle if self.skips else x)
        x = self.from_middle(x)
        x = self.up_fine(x + fine if self.skips else x)
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
        return logits.softmax(1).transpose(0, 1)

    def encode(self, features):
        """Three levels [batch, channels, positions, frames], finest first.

        Of ``fusion_features``, whose frames are padded to whole patches.
        """
        x = features.to(self.position.dtype)  # of a module in half precision
        x = F.pad(x, (0, -x.shape[-1] % (4 * self.patch_frames)))
        device = x.device.type
        if device == "cuda" or torch.is_autocast_enabled(device):
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
        fine = self.down_fine(fine + self.position)
        middle = self.down_middle(self.to_middle(fine))
        coarse = self.down_coarse(self.to_coarse(middle))
        if self.performer is not None:
            coarse = coarse + self.attend(coarse)
        return fine, middle, coarse

    def attend(self, x):
        """All positions of a frame as one token; the Performer along time."""
        batch, channels, positions, frames = x.shape
        tokens = x.permute(0, 3, 2, 1).reshape(batch, frames, -1)
        # no positions: what was learnt on 3 s holds for chunks of any length
        tokens = self.performer(
            self.to_tokens(tokens), positions=tokens.new_zeros(1)
        )
        tokens = self.from_tokens(tokens)
        tokens = tokens.view(batch, frames, positions, channels)
        return tokens.permute(0, 3, 2, 1)
