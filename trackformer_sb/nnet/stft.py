"""Short-time Fourier transform and its inverse as SpeechBrain modules.

The pair takes the places of ``Encoder`` and ``Decoder`` in SpeechBrain's
separation recipes: decoding an encoded signal gives the signal back.
"""

import torch
from torch import nn
from torch.nn import functional as F


class _STFT(nn.Module):
    """Sizes of a transform, whose windows have to tile the signal."""

    def __init__(self, n_fft=1024, hop_length=256):
        super().__init__()
        if n_fft < 2 or n_fft % 2:
            raise ValueError(f"n_fft must be even and at least 2, got {n_fft}")
        if hop_length < 1 or n_fft % hop_length or hop_length > n_fft // 2:
            raise ValueError(
                "hop_length must divide n_fft at least twice, got "
                f"hop_length={hop_length} with n_fft={n_fft}"
            )
        self.n_fft = n_fft
        self.hop_length = hop_length


def edges(n_fft, hop_length):
    """Zeros before and after the signal; an odd number is not halved."""
    before = (n_fft - hop_length + 1) // 2
    return before, n_fft - hop_length - before


def overlap_add(blocks, window, hop_length):
    """Sum of windowed blocks, each ``hop_length`` after the one before.

    [..., frames, n_fft] -> [..., (frames - 1) * hop_length + n_fft].
    """
    frames, n_fft = blocks.shape[-2:]
    overlap = n_fft // hop_length
    blocks = blocks.unflatten(-1, (overlap, hop_length))
    total = blocks.new_zeros(
        *blocks.shape[:-3], frames + overlap - 1, hop_length
    )
    for k, part in enumerate(window.view(overlap, hop_length)):
        total.narrow(-2, k, frames).addcmul_(blocks[..., k, :], part)
    return total.flatten(-2)


class _OverlapAdd(torch.autograd.Function):
    """``overlap_add`` whose gradient is taken in one pass.

    Autograd by itself makes a gradient as large as all blocks for each of those
    that overlap. The window gets none.

    Example
    -------
    >>> _OverlapAdd.apply(torch.ones(3, 4), torch.ones(4), 2)
    tensor([1., 1., 2., 2., 2., 2., 1., 1.])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(blocks, window, hop_length):
        """See ``overlap_add``."""
        return overlap_add(blocks, window, hop_length)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the window."""
        _, window, ctx.hop_length = inputs
        ctx.save_for_backward(window)

    @staticmethod
    def backward(ctx, grad_output):
        """Frames of the gradient, windowed."""
        (window,) = ctx.saved_tensors
        frames = grad_output.unfold(-1, window.shape[0], ctx.hop_length)
        return frames * window, None, None


def fit_length(sig, length):
    """Cuts or zero-pads the last dimension."""
    # torch.export would let a view be one of some lengths only
    if sig.shape[-1] < length or torch.compiler.is_exporting():
        return F.pad(sig, (0, length - sig.shape[-1]))
    return sig[..., :length]


class STFTEncoder(_STFT):
    """Short-time Fourier transform with a periodic Hann window.

    Frame ``k`` is centred on sample ``(k + 1/2) * hop_length``, rounded down;
    outside of the signal there are zeros. There are ``ceil(time / hop_length)``
    frames, so 3, 10 and 30 s at 44.1 kHz with hop 256 give 517, 1723 and 5168.

    Arguments
    ---------
    n_fft : int
        Length of window and transform, in samples, even.
    hop_length : int
        Distance of the frames, in samples; divides ``n_fft`` at least twice.

    Raises
    ------
    ValueError
        If the sizes do not tile the signal, or at call if the input is not
        [batch, time] with at least one sample.

    Example
    -------
    >>> encoder = STFTEncoder(n_fft=1024, hop_length=256)
    >>> tone = torch.sin(torch.arange(44100) * 2 * torch.pi * 100 / 1024)
    >>> spectrum = encoder(tone.unsqueeze(0))
    >>> spectrum.shape
    torch.Size([1, 513, 173])
    >>> int(spectrum[0, :, 80].abs().argmax())
    100
    """

    def forward(self, sig):
        """Transforms waveforms.

        Arguments
        ---------
        sig : torch.Tensor
            Waveforms, [batch, time].

        Returns
        -------
        torch.Tensor
            Complex spectra, [batch, n_fft // 2 + 1, frames].
        """
        if sig.dim() != 2 or sig.shape[1] == 0:
            raise ValueError(
                "expected waveforms [batch, time] of at least one sample, got "
                f"{list(sig.shape)}"
            )
        before, after = edges(self.n_fft, self.hop_length)
        fill = -sig.shape[1] % self.hop_length
        padded = F.pad(sig.float(), (before, after + fill))
        return torch.stft(
            padded,
            self.n_fft,
            self.hop_length,
            window=torch.hann_window(self.n_fft, device=sig.device),
            center=False,
            return_complex=True,
        )


class STFTDecoder(_STFT):
    """Inverse short-time Fourier transform, the left inverse of the encoder.

    Windowed frames are overlap-added and divided by the sum of the squared
    windows: the least-squares inverse of Griffin and Lim (1984, equation 6).
    Arguments and errors are those of ``STFTEncoder``.

    Example
    -------
    >>> encoder, decoder = STFTEncoder(), STFTDecoder()
    >>> sig = torch.randn(2, 1000)
    >>> decoded = decoder(encoder(sig))
    >>> decoded.shape
    torch.Size([2, 1024])
    >>> torch.allclose(decoded[:, :1000], sig, atol=1e-5)
    True
    """

    def forward(self, spectrum, length=None):
        """Transforms spectra back.

        Arguments
        ---------
        spectrum : torch.Tensor
            Complex spectra, [..., n_fft // 2 + 1, frames].
        length : int, optional
            Samples to return, at most ``frames * hop_length``, which is the
            default and at least the length of the encoded signal.

        Returns
        -------
        torch.Tensor
            Waveforms, [..., time].
        """
        if spectrum.shape[-2] != self.n_fft // 2 + 1:
            raise ValueError(
                f"expected spectra of {self.n_fft // 2 + 1} bins, [..., "
                f"{self.n_fft // 2 + 1}, frames], got {list(spectrum.shape)}"
            )
        frames = spectrum.shape[-1]
        blocks = torch.fft.irfft(spectrum.transpose(-1, -2), n=self.n_fft)
        window = torch.hann_window(self.n_fft, device=blocks.device)
        window = window.to(blocks.dtype)
        tracing = torch.jit.is_tracing() or torch.compiler.is_exporting()
        add = overlap_add if tracing else _OverlapAdd.apply
        sig = add(blocks, window, self.hop_length)
        squares = window.expand(frames, -1)
        squares = overlap_add(squares, window, self.hop_length)
        before, _ = edges(self.n_fft, self.hop_length)
        inside = slice(before, before + frames * self.hop_length)
        sig = sig[..., inside] / squares[inside]
        return sig if length is None else sig[..., :length]
