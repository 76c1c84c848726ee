"""Separation of a stream, sample by sample as it comes."""

import logging
import warnings

import numpy as np
import torch
from torch import nn

from trackformer_sb.inference.remix import check_outputs
from trackformer_sb.inference.separation import (
    apply_masks,
    distribute_residual,
    group_masks,
)
from trackformer_sb.inference.separator import load_separator
from trackformer_sb.nnet.stft import STFTEncoder, edges, overlap_add

LOUDEST = 100.0  # 40 dB above full scale, from where on samples are damage


class MaskStep(nn.Module):
    """A causal masknet from frame to frame, with its state in and out."""

    def __init__(self, separator):
        super().__init__()
        self.masknet = separator.masknet
        self.groups = separator.groups and tuple(separator.groups.values())
        self.mixture_consistency = separator.mixture_consistency

    def forward(self, real, imag, state=None):
        """Masks [stems, batch, freq, frames] and the state that follows."""
        # not all that it is exported to takes complex numbers
        masks, state = self.masknet.stream(torch.complex(real, imag), state)
        masks = group_masks(masks, self.groups)
        if self.mixture_consistency:
            # as ``separate`` does it to waveforms
            masks = distribute_residual(1, masks)
        return masks, state


def _traced(step, *inputs):
    """A step of one frame without Python, which takes half of its time."""
    with warnings.catch_warnings(), torch.no_grad():
        # of sizes that do not change, and of torch.compile, its successor
        warnings.simplefilter("ignore")
        step = torch.jit.trace(step, inputs, check_trace=False)
        step = torch.jit.freeze(step)
        for _ in range(3):  # it is optimised as it runs
            step(*inputs)
    return step


class StreamingSeparator:
    """Stems of a stream, block by block, with a memory of constant size.

    All that ``process`` and, in the end, ``flush`` return is what the masks of
    the separator make of the whole stream, whatever the sizes of the blocks.
    Samples that are NaN or beyond 100 count as silence, and their blocks in
    ``damaged_blocks``.

    Arguments
    ---------
    separator : Separator or str
        With a causal masknet on an STFT; a folder or a hub id, "live" for the
        one in the package.

    Raises
    ------
    ValueError
        If the separator is not causal.

    Example
    -------
    >>> streaming = StreamingSeparator("live")
    >>> streaming.names
    ['drums', 'bass', 'vocals', 'other']
    >>> streaming.process(torch.zeros(2, 4410)).shape
    torch.Size([4, 2, 3840])
    >>> streaming.flush().shape
    torch.Size([4, 2, 570])
    """

    def __init__(self, separator="live"):
        if not isinstance(separator, nn.Module):
            separator = load_separator(separator, "cpu")
        masknet, encoder = separator.masknet, separator.encoder
        on_stft = isinstance(encoder, STFTEncoder)
        if not on_stft or not getattr(masknet, "causal", False):
            raise ValueError(
                "expected a causal separator, as hparams/separator_live.yaml "
                f"trains, got one of {type(encoder).__name__} and "
                f"{type(masknet).__name__}"
            )
        self.names = list(check_outputs(separator.groups, separator.num_spks))
        self.sample_rate = separator.sample_rate
        self.n_fft, self.hop_length = encoder.n_fft, encoder.hop_length
        self.lookahead_frames = masknet.lookahead_frames
        self.stereo = getattr(masknet, "stereo", False)
        self.window = torch.hann_window(self.n_fft, device=separator.device)
        # memory in which convolutions of so little are quickest
        masknet.to(memory_format=torch.channels_last)
        self.step = MaskStep(separator).eval()
        self._quick_steps = {}  # traced, by number of channels
        self.reset()

    @property
    def latency_samples(self):
        """How many samples a block's stems come after it, at most."""
        return self.n_fft + self.lookahead_frames * self.hop_length

    def reset(self):
        """Forgets the stream; the next block begins another."""
        self.damaged_blocks = self._received = 0
        self._waiting = None  # samples [channels, time], not yet in a frame

    def prepare(self, channels):
        """Begins a stream, as ``process`` does, which takes a second."""
        new, freq = self.window.new_zeros, self.n_fft // 2 + 1
        before, _ = edges(self.n_fft, self.hop_length)
        self._waiting = new(channels, before)
        # spectra that wait for their masks, the first of which belong to none
        self._late = new(channels, freq, 0, dtype=torch.complex64)
        # sums that wait for more frames: of stems, and of squared windows
        sizes = len(self.names) * channels + 1, self.n_fft - self.hop_length
        self._sums = new(sizes)
        self._start = -before  # of the sums, in samples of the stream
        frame = self.heard(new(channels, freq, 1, dtype=torch.complex64))
        with torch.no_grad():
            _, state = self.step(*frame)
        self.state = [torch.zeros_like(tensor) for tensor in state]
        if channels not in self._quick_steps:
            quick = _traced(self.step, *frame, self.state)
            self._quick_steps[channels] = quick

    @torch.inference_mode()
    def process(self, block):
        """Takes samples and returns stems.

        Arguments
        ---------
        block : torch.Tensor or numpy.ndarray
            [channels, time], any number of samples, at ``sample_rate``; mono
            or stereo, as all blocks of the stream.

        Returns
        -------
        torch.Tensor or numpy.ndarray
            The next samples [stems, channels, time] in the order of ``names``,
            as the block is.

        Raises
        ------
        ValueError
            For another shape or another number of channels.
        """
        if isinstance(block, np.ndarray):
            return self.process(torch.from_numpy(block)).cpu().numpy()
        if block.dim() != 2 or len(block) not in (1, 2):
            raise ValueError(
                "expected a block [channels, time] of 1 or 2 channels, got "
                f"{list(block.shape)}"
            )
        if not block.is_floating_point():
            raise TypeError(
                f"expected floating-point samples in [-1, 1], got {block.dtype}"
            )
        if self._waiting is None:
            self.prepare(len(block))
        if len(block) != len(self._waiting):
            raise ValueError(
                f"expected {len(self._waiting)} channels as before, got "
                f"{len(block)}"
            )
        self._received += block.shape[-1]
        block = block.to(self._waiting)
        damaged = ~(block.abs() < LOUDEST)
        if damaged.any():
            self.damaged_blocks += 1
            block = block.masked_fill(damaged, 0.0)
        return self._separated(block)

    @torch.inference_mode()
    def flush(self):
        """The rest [stems, channels, time] of the stream, which ends."""
        if self._waiting is None:
            return torch.zeros(len(self.names), 1, 0)
        left = self._received - max(0, self._start)
        _, after = edges(self.n_fft, self.hop_length)
        after += -self._received % self.hop_length
        zeros = self._waiting.new_zeros(len(self._waiting), after)
        parts = [self._separated(zeros)]
        if self.lookahead_frames and self._received:
            # no more of them: frames of silence for the last masks
            sizes = *self._late.shape[:2], self.lookahead_frames
            silence = self._late.new_zeros(sizes)
            parts.append(self._separated_frames(silence))
        parts.append(self._stems(self._sums))
        self.reset()
        return torch.cat(parts, -1)[..., :left]

    def _separated(self, block):
        """Stems that some samples complete."""
        self._waiting = torch.cat([self._waiting, block], -1)
        if self._waiting.shape[-1] < self.n_fft:
            return self._stems(self._sums[:, :0])
        frames = self._waiting.unfold(-1, self.n_fft, self.hop_length)
        self._waiting = self._waiting[:, frames.shape[1] * self.hop_length :]
        spectra = torch.fft.rfft(frames * self.window).transpose(1, 2)
        return self._separated_frames(spectra)

    def _separated_frames(self, spectra):
        """Stems that some spectra [channels, freq, frames] complete."""
        step = self.step
        if spectra.shape[-1] == 1:
            step = self._quick_steps[len(spectra)]
        # of all channels [stems, 1, freq, frames], the last ones of spectra
        # that have their masks by now
        masks, self.state = step(*self.heard(spectra), self.state)
        spectra = torch.cat([self._late, spectra], -1)
        frames = max(0, spectra.shape[-1] - self.lookahead_frames)
        self._late = spectra[..., frames:]
        if not frames:
            return self._stems(self._sums[:, :0])
        sep_w = apply_masks(spectra[..., :frames], masks[..., -frames:])
        blocks = torch.fft.irfft(sep_w.transpose(-1, -2), n=self.n_fft)
        windows = self.window.expand(1, frames, -1)
        blocks = torch.cat([blocks.flatten(0, 1), windows])
        sums = overlap_add(blocks, self.window, self.hop_length)
        sums[:, : self._sums.shape[1]] += self._sums
        done = frames * self.hop_length
        self._sums = sums[:, done:]
        stems = self._stems(sums[:, :done])
        self._start += done
        return stems

    def _stems(self, sums):
        """Stems of sums to which no frame will add, from sample 0 on."""
        stems = (sums[:-1] / sums[-1])[:, max(0, -self._start) :]
        return stems.unflatten(0, (len(self.names), -1))

    def heard(self, spectra):
        """What masks are predicted from: real and imaginary part."""
        x = spectra.unsqueeze(0)
        if len(spectra) != 2 or not self.stereo:
            x = x.mean(1)
        return x.real.contiguous(), x.imag.contiguous()


def export_onnx(separator, path):
    """Writes the network of a causal separator for ONNX, frame by frame.

    Of the real and the imaginary part of a frame [1, 2, freq, 1] and the state
    (state0 and so on, zeros at first) it makes masks [stems, 1, freq, 1] and
    the next state (next0 and so on); the metadata has what else a program
    needs. A masknet that is not stereo takes [1, freq, 1], the mean of the
    channels. `separator` is as of ``StreamingSeparator``. Raises an ImportError
    without onnx and onnxscript.
    """
    import onnx

    # which tells about torchvision, of which there is nothing here
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    streaming = StreamingSeparator(separator)
    streaming.prepare(channels=2)
    spectrum = torch.zeros(2, streaming.n_fft // 2 + 1, 1) * 1j
    numbers = range(len(streaming.state))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts of torch about others
        program = torch.onnx.export(
            streaming.step,
            (*streaming.heard(spectrum), streaming.state),
            input_names=["real", "imag", *(f"state{k}" for k in numbers)],
            output_names=["masks", *(f"next{k}" for k in numbers)],
            dynamo=True,
            verbose=False,
        )
    facts = ("n_fft", "hop_length", "sample_rate", "lookahead_frames")
    facts = {name: str(getattr(streaming, name)) for name in facts}
    facts["names"] = ",".join(streaming.names)
    model = program.model_proto
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, path)
