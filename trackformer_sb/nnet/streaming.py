"""What causal networks carry from the frames of a stream to those that follow.

A network that is given a ``Memory`` asks it for what it kept of the frames
before, in the order in which its layers run, and leaves there what the next
frames will need. All of it is zeros at the start of a stream, and its size does
not depend on how much was heard.
"""

import torch
from torch.nn import functional as F

# Frames over which what was heard fades from the statistics, silence not
# counted: about that of the items that networks are trained on.
NORM_FRAMES = 256
# Frames after which the heads of causal attention have forgotten all but 1/e,
# from the first head to the last.
MEMORY_FRAMES = 16, 512
SILENT_LEVEL = 1e-6  # mean magnitudes below count as silence
MAX_LEVEL = 6.0  # standard deviations
CHUNK_FRAMES = 512  # of which statistics are computed at once


class Memory:
    """What the layers of a network remember, in the order they run.

    From the `tensors` of the memory after the frames before, if there are any.
    """

    def __init__(self, tensors=None):
        self._before = None if tensors is None else iter(tensors)
        self.tensors = []

    def recall(self, like, *shape):
        """What the layer kept; at the start zeros of a tensor's kind."""
        if self._before is None:
            return like.new_zeros(shape)
        return next(self._before)

    def keep(self, tensor):
        """Keeps a tensor for the frames that follow."""
        self.tensors.append(tensor)


def with_past(x, frames, memory):
    """Some frames of before in front of [..., frames].

    Example
    -------
    >>> with_past(torch.ones(1, 2), 1, Memory())
    tensor([[0., 1., 1.]])
    """
    x = torch.cat([memory.recall(x, *x.shape[:-1], frames), x], -1)
    memory.keep(x[..., x.shape[-1] - frames :])
    return x


def running_means(x, magnitude, memory):
    """Means of what was heard so far, which slowly fades.

    Of [batch, values, frames], zeros before anything sounded. Frames whose
    `magnitude`, [batch, freq, frames], is silence do not count: after
    ``NORM_FRAMES`` of the others one weighs 1/e of the present one.

    Example
    -------
    >>> x = torch.tensor([[[2.0, 4.0, 0.0]]])
    >>> running_means(x, x, Memory())
    tensor([[[2.0000, 3.0020, 3.0020]]])
    """
    sounding = (magnitude.mean(1) > SILENT_LEVEL).to(x.dtype)
    x = F.pad(x, (0, 0, 0, 1), value=1.0)  # sums up the weights on the way
    sums, found = memory.recall(x, *x.shape[:2]), []
    for part, counts in zip(
        x.split(CHUNK_FRAMES, -1), sounding.split(CHUNK_FRAMES, -1)
    ):
        heard = counts.cumsum(-1)
        age = heard.unsqueeze(-2) - heard.unsqueeze(-1)  # [batch, of, at]
        weights = (-age / NORM_FRAMES).exp().triu() * counts.unsqueeze(-1)
        before = (-heard / NORM_FRAMES).exp().unsqueeze(1)
        found.append(part @ weights + sums.unsqueeze(-1) * before)
        sums = found[-1][..., -1]
    memory.keep(sums)
    found = torch.cat(found, -1)
    return found[:, :-1] / found[:, -1:].clamp(min=1.0)


def running_zscore(x, magnitude, memory):
    """[batch, freq, frames] normalised by what was heard so far."""
    moments = torch.stack([x.mean(1), x.square().mean(1)], 1)
    moments = running_means(moments, magnitude, memory)
    mean, square = moments.split(1, 1)
    std = (square - mean.square()).clamp(min=1e-2).sqrt()
    return ((x - mean) / std).clamp(-MAX_LEVEL, MAX_LEVEL)


def forgetting(nhead):
    """Logarithms of what causal attention forgets a frame, [nhead].

    Example
    -------
    >>> [round(-1 / x) for x in forgetting(2).tolist()]
    [16, 512]
    """
    shortest, longest = torch.tensor(MEMORY_FRAMES).double().log()
    return -(-torch.linspace(shortest, longest, nhead)).exp()


class StreamingMasks:
    """What masknets share that may be causal, for streams.

    They have ``_masks``, with a memory of the frames before.
    """

    def set_causal(self, causal, lookahead_frames, attention):
        """Keeps these arguments; exact attention would keep all frames."""
        if causal and attention == "softmax":
            raise ValueError(
                "attention: expected favor or auto for a causal masknet, got "
                "softmax, which keeps all frames"
            )
        self.causal, self.lookahead_frames = causal, lookahead_frames

    def forward(self, mix_w, key_padding_mask=None):
        """Predicts masks.

        Arguments
        ---------
        mix_w : torch.Tensor
            Encoded mixture, real or complex, [batch, channels, frames]; of a
            ``stereo`` masknet complex, and [batch, 1 or 2, channels, frames]
            as well.
        key_padding_mask : torch.Tensor, optional
            Boolean, [batch, frames], True for padding that a Performer skips.

        Returns
        -------
        torch.Tensor
            Masks, real, [num_spks, batch, channels, frames]. With softmax and
            sigmoid in [0, 1], with relu at least 0.
        """
        if not self.causal:
            return self._masks(mix_w, key_padding_mask)
        # masks come late
        late = self.lookahead_frames
        if key_padding_mask is not None:
            key_padding_mask = F.pad(key_padding_mask, (0, late), value=True)
        mix_w = F.pad(mix_w, (0, late))
        return self._masks(mix_w, key_padding_mask, Memory())[..., late:]

    def stream(self, mix_w, state=None):
        """Masks of a part of a stream, of what is causal.

        The frames of `mix_w` follow those of the call that returned `state`, a
        list of tensors. Gives masks as ``forward``, of the frames that are
        ``lookahead_frames`` before, and the next state.
        """
        memory = Memory(state)
        return self._masks(mix_w, None, memory), memory.tensors
