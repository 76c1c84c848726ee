"""Audio-MAE: an encoder learns music by filling in what is hidden from it.

Masked autoencoders (arXiv 2111.06377) on spectrograms (Audio-MAE, arXiv
2207.06405), with frames of an STFT as tokens in place of patches.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from trackformer_sb.nnet.performer import PerformerEncoder, check_choice

MASK_MODES = ("zero", "noise", "drop", "mix")


class Reconstruction(NamedTuple):
    """What an AudioMAE makes of a batch.

    loss : [batch], mean squared error over what was hidden or, with a
        visible_weight, over all.
    prediction, target : [batch, frames, channels], normalised.
    hidden : Boolean, [batch, frames, channels].
    """

    loss: torch.Tensor
    prediction: torch.Tensor
    target: torch.Tensor
    hidden: torch.Tensor


def draw_hidden_frames(
    batch, frames, mask_ratio, mask_span=1, generator=None, device=None
):
    """Draws which frames to hide: spans at random places, in each item anew.

    Every item hides the same number, ``mask_ratio * frames`` rounded, at least
    one frame and not all of them. One span may be cut short for that. Gives
    Boolean [batch, frames], True where hidden.

    Example
    -------
    >>> hidden = draw_hidden_frames(4, 20, mask_ratio=0.3, mask_span=2)
    >>> hidden.sum(1)
    tensor([6, 6, 6, 6])
    """
    if frames < max(2, mask_span):
        raise ValueError(
            f"mask_span: expected segments of at least {max(2, mask_span)} "
            f"frames, got {frames}: lengthen the segments or shorten the spans"
        )
    count = min(max(round(mask_ratio * frames), 1), frames - 1)
    blocks = -(-frames // mask_span) + 1
    order = torch.rand(batch, blocks, generator=generator, device=device)
    start = torch.randint(
        mask_span, (batch, 1), generator=generator, device=device
    )
    place = torch.arange(frames, device=device) + start
    # frames of one block stay in order, so that a cut span has no holes
    ranks = order.gather(1, place // mask_span).argsort(dim=1, stable=True)
    hidden = torch.zeros(batch, frames, dtype=torch.bool, device=device)
    return hidden.scatter_(1, ranks[:, :count], True)


class AudioMAE(nn.Module):
    """Masked autoencoder around the encoder of a masknet.

    Arguments
    ---------
    features : SpectrogramEncoder
        What is pre-trained, of the same sizes as the masknet's.
    mask_ratio : float
        Share of what is hidden, in (0, 1); the paper has 0.3.
    mask_mode : str
        "zero": hidden frames are zero, the mean of a zscore; "noise": they
        are Gaussian noise of unit variance; "drop": the encoder
        sees the other frames only, with their positions, so that time and
        memory fall with the ratio, and the decoder gets a learned token; "mix":
        other music is added to them, and what was there is to be told apart
        from it by what is around, as in separation.
    mask_span : int
        Frames hidden together. Single frames of 5.8 ms can be interpolated from
        their neighbours.
    mask_bands : int
        Number of frequency bands that are masked each by itself; above 1
        blocks of time and frequency are hidden, not with "drop".
    visible_weight : float
        Weight in the loss of what is not hidden, from 0 (the paper's: none) to
        1 (as much as what is). A masknet hides nothing: without any weight its
        encoder was never asked to reproduce what it sees.
    decoder_layers : int
        Performer layers of the decoder; 0 for one without
        attention, not with "drop".
    d_decoder, decoder_nhead : int
        Sizes of the decoder.

    Raises
    ------
    ValueError
        For an unknown mode, numbers out of range, or "drop" with bands or
        with a linear decoder.

    Example
    -------
    >>> from trackformer_sb.nnet.features import SpectrogramEncoder
    >>> features = SpectrogramEncoder(65, d_model=32, nhead=2, num_layers=1)
    >>> mae = AudioMAE(features, mask_ratio=0.5, mask_mode="drop")
    >>> result = mae(torch.randn(2, 65, 50, dtype=torch.complex64))
    >>> result.loss.shape, result.hidden[:, :, 0].sum(1)
    (torch.Size([2]), tensor([25, 25]))
    """

    def __init__(
        self,
        features,
        mask_ratio=0.3,
        mask_mode="noise",
        mask_span=1,
        mask_bands=1,
        visible_weight=0.0,
        decoder_layers=1,
        d_decoder=128,
        decoder_nhead=4,
    ):
        super().__init__()
        check_choice("mask_mode", mask_mode, MASK_MODES)
        if not 0 < mask_ratio < 1:
            raise ValueError(f"expected mask_ratio in (0, 1), got {mask_ratio}")
        if not (isinstance(mask_span, int) and mask_span >= 1):
            raise ValueError(
                f"expected a whole mask_span from 1, got {mask_span!r}"
            )
        if not 1 <= mask_bands <= features.in_channels:
            raise ValueError(
                f"expected mask_bands from 1 to {features.in_channels}, the "
                f"number of channels, got {mask_bands!r}"
            )
        if not 0 <= visible_weight <= 1:
            raise ValueError(
                f"expected visible_weight in [0, 1], got {visible_weight}"
            )
        if mask_mode == "drop" and mask_bands > 1:
            raise ValueError(
                "mask_mode drop leaves out whole frames, expected mask_bands 1,"
                f" got {mask_bands}"
            )
        least = 1 if mask_mode == "drop" else 0
        if decoder_layers < least:
            # without attention a mask token learns nothing of the encoder
            raise ValueError(
                f"expected decoder_layers from {least} with mask_mode "
                f"{mask_mode}, got {decoder_layers}"
            )
        if d_decoder % decoder_nhead:
            raise ValueError(
                "decoder_nhead must divide d_decoder, got decoder_nhead="
                f"{decoder_nhead} with d_decoder={d_decoder}"
            )
        self.features = features
        self.mask_ratio = mask_ratio
        self.mask_mode = mask_mode
        self.mask_span = mask_span
        self.mask_bands = mask_bands
        self.visible_weight = visible_weight
        self.to_decoder = nn.Linear(features.encoder.d_model, d_decoder)
        if mask_mode == "drop":
            self.mask_token = nn.Parameter(0.02 * torch.randn(d_decoder))
        first = features.encoder.layers[0].attention
        self.decoder = PerformerEncoder(
            d_decoder,
            decoder_nhead,
            decoder_layers,
            n_features=first.projection.shape[0],
            dropout=0.0,
            attention=first.attention,
            checkpointing=features.encoder.checkpointing,
        )
        self.head = nn.Linear(d_decoder, features.in_channels)

    def redraw_projections(self, generator=None):
        """Draws new random features, see ``PerformerEncoder``."""
        self.features.redraw_projections(generator)
        self.decoder.redraw_projections(generator)

    def draw_hidden(self, batch, frames, generator=None, device=None):
        """``draw_hidden_frames`` of each band: [batch, frames, mask_bands]."""
        hidden = draw_hidden_frames(
            batch * self.mask_bands,
            frames,
            self.mask_ratio,
            self.mask_span,
            generator,
            device,
        )
        return hidden.unflatten(0, (batch, self.mask_bands)).transpose(1, 2)

    def _encode_visible(self, spectrogram, hidden):
        """Decoder tokens of all frames, the encoder seeing the visible ones."""
        batch, frames, _ = spectrogram.shape
        # the same number in each item: [batch, visible, 1]
        visible = (~hidden).nonzero()[:, 1].view(batch, -1, 1)
        x = spectrogram.gather(1, visible.expand(-1, -1, spectrogram.shape[-1]))
        positions = self.features.encoder.positions(frames, x.device)
        x = self.features.encoder(
            self.features.embedding(x), positions=positions[visible[..., 0]]
        )
        x = self.to_decoder(x)
        tokens = self.mask_token.to(x.dtype).expand(batch, frames, -1)
        return tokens.scatter(1, visible.expand(-1, -1, x.shape[-1]), x)

    def forward(self, mix_w, generator=None, cover=None):
        """Hides a part, rebuilds it, and compares.

        Arguments
        ---------
        mix_w : torch.Tensor
            Encoded music, real or complex, [batch, channels, frames].
        generator : torch.Generator, optional
            Source of randomness, on the device of ``mix_w``; the default one
            if not given.
        cover : torch.Tensor, optional
            Like ``mix_w``, other music to hide it with: for mask_mode "mix".

        Returns
        -------
        Reconstruction
            Loss, prediction, target and what was hidden.

        Raises
        ------
        ValueError
            If the input has other channels, or fewer frames than a span, or
            with a cover where there must be none.
        """
        if (cover is not None) != (self.mask_mode == "mix"):
            raise ValueError(
                "expected a cover with mask_mode mix, and none with others, "
                f"got mask_mode {self.mask_mode} and "
                f"{'none' if cover is None else 'a cover'}"
            )
        self.features.check(mix_w)
        batch, channels, frames = mix_w.shape
        bands = self.draw_hidden(batch, frames, generator, mix_w.device)
        band = torch.arange(channels, device=bands.device) * self.mask_bands
        # [batch, frames, channels]; a view where there is one band
        hidden = (
            bands[..., band // channels]
            if self.mask_bands > 1
            else bands.expand(-1, -1, channels)
        )
        if self.mask_mode == "mix":
            covered = mix_w + cover * hidden.transpose(1, 2)
            target = self.features.spectrogram(mix_w, reference=covered)
            seen = self.features.spectrogram(covered)
        else:
            target = seen = self.features.spectrogram(mix_w)
            if self.mask_mode == "zero":
                seen = target.masked_fill(hidden, 0.0)
            elif self.mask_mode == "noise":
                noise = target.new_empty(target.shape)
                noise.normal_(generator=generator)
                seen = torch.where(hidden, noise, target)
        if self.mask_mode == "drop":
            tokens = self._encode_visible(target, bands[..., 0])
        else:
            x = self.features.embedding(seen)
            tokens = self.to_decoder(self.features.encoder(x))
        prediction = self.head(self.decoder(tokens))
        error = F.mse_loss(prediction.float(), target, reduction="none")
        weights = hidden.float().clamp(min=self.visible_weight)
        # as much is hidden in each item
        loss = (error * weights).sum((1, 2)) / weights[0].sum()
        return Reconstruction(loss, prediction, target, hidden)
