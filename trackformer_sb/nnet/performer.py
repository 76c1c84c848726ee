"""Performer: a pre-norm Transformer encoder with FAVOR+ attention."""

import math
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trackformer_sb.nnet import favor
from trackformer_sb.nnet.streaming import Memory, forgetting

ATTENTION_KINDS = ("favor", "softmax", "auto")

# Upper end of the learned temperature. The error of 256 features against exact
# attention is about 8 % at temperature 1, 30 % at 2 and 60 % at 4, where the
# plain mean of the values is off by 22, 50 and 85 %.
MAX_TEMPERATURE = 2.0


def check_choice(name, value, choices):
    """Refuses a value that an option does not have."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}, got {value!r}"
        )


def sinusoidal_positions(frames, d_model, device=None):
    """Sines and cosines of geometrically spaced wavelengths, for any length.

    Section 3.5 of "Attention Is All You Need" (arXiv 1706.03762). Gives
    [frames, d_model], float32.

    Example
    -------
    >>> sinusoidal_positions(2, 4)[0]
    tensor([0., 0., 1., 1.])
    """
    if d_model % 2:
        raise ValueError(f"d_model must be even, got {d_model}")
    position = torch.arange(frames, device=device)
    exponent = torch.arange(0, d_model, 2, device=device) / d_model
    angle = position.unsqueeze(1) * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def auto_max_exact_frames(n_features, causal=False):
    """Up to how many frames ``attention: auto`` is exact.

    Forward and backward of SelfAttention cost the same at 460 to 540 frames
    with 256 features and at 300 with 128, for 4 and for 8 heads of 64 (2 CPU
    cores, float32); causal ones at 2800 frames with 256, 1500 with 128 and 970
    with 64.

    Example
    -------
    >>> auto_max_exact_frames(256), auto_max_exact_frames(256, causal=True)
    (484, 2782)
    """
    if causal:
        return 350 + 19 * n_features // 2
    return 100 + 3 * n_features // 2


def _to_norm(x, norm):
    """Scales the last dimension to a norm; zeros stay zeros."""
    length = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, norm.dtype)
    )
    # one factor a vector: a division and a product would be two passes
    factor = norm / length.clamp(min=1e-12)
    # finite in half precision too, or zeros would become NaN
    return x * factor.clamp(max=torch.finfo(x.dtype).max).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention, FAVOR+ or exact, with the same weights.

    Queries and keys are projected on the unit sphere and scaled by the root
    of a learned temperature per head in (0, 2), as in QK-norm (arXiv
    2010.04245): with norms left free, the variance of FAVOR+ grows
    exponentially and 256 features estimate nothing. What is causal lets the
    past fade: quickly in the first head, slowly in the last. Arguments are
    those of ``PerformerEncoder``.
    """

    def __init__(
        self,
        d_model,
        nhead,
        n_features=256,
        attention="favor",
        causal=False,
        dropout=0.0,
    ):
        super().__init__()
        check_choice("attention", attention, ATTENTION_KINDS)
        if d_model % nhead:
            raise ValueError(
                f"nhead must divide d_model, got nhead={nhead} with "
                f"d_model={d_model}"
            )
        self.nhead = nhead
        self.attention = attention
        self.causal = causal
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        # sigmoid(0) * 2: a temperature of 1 to begin with
        self.temperature = nn.Parameter(torch.zeros(nhead))
        projection = favor.draw_projection(n_features, d_model // nhead)
        self.register_buffer("projection", projection)
        log_decay = forgetting(nhead).float() if causal else None
        self.register_buffer("log_decay", log_decay, persistent=False)

    def forward(self, x, key_padding_mask=None, memory=None):
        """[batch, frames, d_model] -> [batch, frames, d_model].

        With a `memory` "auto" is "favor": exact attention keeps all frames.
        """
        # three of [batch, heads, frames, head_dim]
        qkv = self.qkv(x).unflatten(-1, (3, self.nhead, -1))
        qkv = qkv.permute(2, 0, 3, 1, 4)
        scale = (MAX_TEMPERATURE * self.temperature.sigmoid()).sqrt()
        query, key = _to_norm(qkv[:2], scale[:, None, None])
        value = qkv[2]
        exact = self.attention == "softmax"
        if self.attention == "auto":
            longest = auto_max_exact_frames(len(self.projection), self.causal)
            exact = x.shape[1] <= longest
        if memory is None and exact:
            mixed = favor.softmax_attention(
                query, key, value, key_padding_mask, self.log_decay
            )
        elif self.causal:
            memory = Memory() if memory is None else memory
            sizes = *value.shape[:2], len(self.projection), value.shape[-1] + 1
            # float32, as the kernel
            state = memory.recall(self.log_decay, *sizes)
            mixed, state = favor.causal_favor_attention(
                *(query, key, value, self.projection, key_padding_mask, state),
                log_decay=self.log_decay,
            )
            memory.keep(state)
        else:
            mixed = favor.favor_attention(
                query, key, value, self.projection, key_padding_mask
            )
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))


class PerformerLayer(nn.Module):
    """LayerNorm, attention, residual; LayerNorm, feed-forward, residual.

    Arguments are those of ``PerformerEncoder``.
    """

    def __init__(self, d_model, d_ffn, dropout=0.0, **attention):
        super().__init__()
        self.norm_attention = nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model, dropout=dropout, **attention)
        self.norm_ffn = nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(
            nn.Linear(d_model, d_ffn),
            nn.GELU(),
            nn.Linear(d_ffn, d_model),
            nn.Dropout(dropout),
        )

    def forward(self, x, key_padding_mask=None, memory=None):
        """[batch, frames, d_model] -> [batch, frames, d_model]."""
        x = x + self.attention(self.norm_attention(x), key_padding_mask, memory)
        return x + self.ffn(self.norm_ffn(x))


class PerformerEncoder(nn.Module):
    """A stack of Performer layers, with sinusoidal positions unless causal.

    Arguments
    ---------
    d_model : int
        Number of channels, even.
    nhead : int
        Number of heads; divides ``d_model``.
    num_layers : int
        Number of layers; the paper has 12.
    d_ffn : int, optional
        Channels inside of the feed-forward blocks, ``4 * d_model`` if not
        given.
    n_features : int
        Random features per head; the paper has 256.
    dropout : float
        Share of channels dropped in training, in [0, 1).
    attention : str
        "favor", "softmax" (exact), or "auto": exact for short inputs.
    causal : bool
        Whether a frame may only attend to itself and the past, see
        ``SelfAttention``. There are no positions then, so that a stream may go
        on for any time.
    checkpointing : bool
        Whether training keeps the inputs of the layers only and computes each
        layer a second time in the backward pass ("Training Deep Nets with
        Sublinear Memory Cost", arXiv 1604.06174): less memory, a third more
        computing, the same gradients.
    """

    def __init__(
        self,
        d_model=256,
        nhead=4,
        num_layers=12,
        d_ffn=None,
        n_features=256,
        dropout=0.1,
        attention="favor",
        causal=False,
        checkpointing=False,
    ):
        super().__init__()
        self.d_model = d_model
        self.causal = causal
        self.checkpointing = checkpointing
        self.layers = nn.ModuleList(
            PerformerLayer(
                d_model,
                4 * d_model if d_ffn is None else d_ffn,
                dropout,
                nhead=nhead,
                n_features=n_features,
                attention=attention,
                causal=causal,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)

    def redraw_projections(self, generator=None):
        """Draws new random features for all layers, by a generator on the CPU.

        Ranks must be given equal ones.
        """
        for layer in self.layers:
            projection = layer.attention.projection
            drawn = favor.draw_projection(*projection.shape, generator)
            projection.copy_(drawn)

    def positions(self, frames, device=None):
        """The positional encodings of frames 0, 1, ...: [frames, d_model]."""
        return sinusoidal_positions(frames, self.d_model, device)

    def forward(self, x, key_padding_mask=None, positions=None, memory=None):
        """Encodes frames.

        Arguments
        ---------
        x : torch.Tensor
            [batch, frames, d_model].
        key_padding_mask : torch.Tensor, optional
            Boolean, [batch, frames], True for padding.
        positions : torch.Tensor, optional
            What to add to ``x``, broadcast to it; ``positions`` of frames
            0, 1, ... if not given, and nothing to what is causal.
        memory : streaming.Memory, optional
            Of the frames before, for what is causal.

        Returns
        -------
        torch.Tensor
            [batch, frames, d_model].
        """
        if positions is None and not self.causal:
            positions = self.positions(x.shape[1], x.device)
        if positions is not None:
            x = x + positions.to(x.dtype)
        recompute = (
            self.checkpointing and self.training and torch.is_grad_enabled()
        )
        for layer in self.layers:
            if recompute:
                layer = partial(checkpoint, layer, use_reentrant=False)
            x = layer(x, key_padding_mask, memory)
        return self.norm(x)
