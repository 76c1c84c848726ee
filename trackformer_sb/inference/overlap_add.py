"""Separation of audio of any length, chunk by chunk, in constant memory.

Neighbouring chunks share some samples. What a model sees at the edge of a
chunk it sees without context, and estimates worse: of the shared samples only
the middle is used of both chunks, in a short crossfade, and the outermost of
each are thrown away. Before that, the outputs of the later chunk are put into
the order of the earlier one, as nothing ties a model trained without labels to
one order.
"""

from itertools import islice

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from trackformer_sb.audio import name_of, read_on, resample
from trackformer_sb.inference.separation import distribute_residual

# A learned encoder needs at least its kernel of samples.
MIN_CHUNK_SECONDS = 0.1

# What a wrong order has to gain before it is preferred, in parts of the level.
TIE = 1e-9

# Outputs below this part of the level of all of them, -60 dB, have a smaller
# say in the order.
FLOOR = 1e-3

# The part of the shared samples that is crossfaded; the rest is context.
FADE_SHARE = 0.2


def joining_weights(shared):
    """Weights of a chunk on the samples that it shares with the one before.

    [shared]: zeros, a raised cosine over the middle fifth, ones. Those of the
    chunk before are one minus these: where they are 0 or 1, one of both is
    context, which the model has seen and nobody hears.

    Example
    -------
    >>> joining_weights(5)
    tensor([0.0000, 0.0000, 0.5000, 1.0000, 1.0000])
    """
    fade = max(1, round(FADE_SHARE * shared))
    place = torch.arange(shared) - (shared - fade) // 2
    phase = ((place + 0.5) / fade).clamp(0, 1)
    return torch.sin(0.5 * torch.pi * phase).square()


def best_order(previous, current):
    """The order [sources] of outputs in which two estimates are most alike.

    Both are [sources, channels, time], of the same samples. Minimises the sum
    of ``|p_i - c_order(i)|^2 / (|p_i|^2 + |c_order(i)|^2)``: the stitching of
    continuous speech separation (arXiv 2001.11482), measured on the waveforms
    and against the level of each pair, so that quiet outputs count as loud ones
    do. Samples near the edges weigh less (a Hann window), as each estimate is
    worse at one of them. Where nothing favours another order, as in silence,
    outputs keep theirs.

    Example
    -------
    >>> previous = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
    >>> best_order(previous, previous.flip(0))
    tensor([1, 0])
    """
    time = previous.shape[-1]
    phase = (torch.arange(time, dtype=torch.double) + 0.5) / max(time, 1)
    window = torch.sin(torch.pi * phase)  # on both: their product is Hann's
    previous = (previous.double() * window).flatten(1)
    current = (current.double() * window).flatten(1)
    level = previous.norm() * current.norm()
    if level == 0:
        return torch.arange(len(current))
    energies = previous.square().sum(1)[:, None] + current.square().sum(1)
    energies = energies.clamp(min=2 * FLOOR**2 * level)
    similarity = 2 * (previous @ current.T) / energies
    similarity += TIE * torch.eye(len(current))
    _, order = linear_sum_assignment(similarity.numpy(), maximize=True)
    return torch.from_numpy(order)


def _read_chunks(reader, chunk, hop):
    """Chunks of a file, which all are as long as the first one.

    Yields each with the number of its samples that are there only to make the
    last one as long as the others, and whether it is the last.
    """
    sig = torch.from_numpy(read_on(reader, chunk).T)
    repeated, new = 0, sig.shape[-1]
    while new:
        ahead = torch.from_numpy(read_on(reader, hop).T)
        new = ahead.shape[-1]
        yield sig, repeated, new == 0
        # a file shorter than a chunk never comes here with new samples
        sig = torch.cat([sig[:, new:], ahead], dim=-1)
        repeated = hop - new


def _separate_batches(chunks, reader, sample_rate, separate_chunks, batch_size):
    """Adds [sources, channels, time] to what ``_read_chunks`` yields."""
    file_rate = reader.samplerate
    shortest = round(MIN_CHUNK_SECONDS * sample_rate)
    while batch := list(islice(chunks, batch_size)):
        mixes = torch.stack([sig for sig, _, _ in batch])
        heard = resample(mixes, file_rate, sample_rate)
        heard = F.pad(heard, (0, max(0, shortest - heard.shape[-1])))
        found = separate_chunks(heard).detach().cpu().float().contiguous()
        number, channels, time = heard.shape
        shape = list(found.shape)
        if shape[:1] + shape[2:] != [number, channels, time]:
            raise ValueError(
                f"expected separate_chunks to return [{number}, sources, "
                f"{channels}, {time}], got {shape}"
            )
        found = resample(found, sample_rate, file_rate)
        found = found[..., : mixes.shape[-1]]
        if not found.isfinite().all():
            raise ValueError(
                f"{name_of(reader)}: the model returned NaN or infinite "
                f"samples before {reader.tell() / file_rate:.3f} s"
            )
        for (sig, repeated, last), est_source in zip(batch, found):
            yield sig, est_source, repeated, last


def separate_stream(
    reader,
    separate_chunks,
    sample_rate,
    chunk_seconds=10.0,
    overlap=0.25,
    batch_size=1,
    keep_order=False,
):
    """Separates an open audio file block by block.

    Each chunk is resampled to the rate of the model, separated, and resampled
    back. What resampling and rounding took from the file is distributed
    evenly over the outputs: at the file's own rate they sum to it.

    Arguments
    ---------
    reader : soundfile.SoundFile or FFmpegFile
        What ``open_audio`` gave, of any rate and number of channels.
    separate_chunks : callable
        [batch, channels, time] at ``sample_rate`` ->
        [batch, sources, channels, time].
    sample_rate : int
        Rate of the model in Hz.
    chunk_seconds, overlap, batch_size
        As of ``Separator.separate_file``. The last chunk begins earlier rather
        than being shorter. With an overlap of 0.25 a tenth of a chunk at either
        side is computed and thrown away; with 0 nothing is aligned.
    keep_order : bool
        Whether outputs mean the same in all chunks, as named ones do; otherwise
        those of a chunk are brought into the order of the one before.

    Yields
    ------
    torch.Tensor
        The next samples of all outputs, [sources, channels, time], at the
        rate of the file.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    UnreadableAudio
        If the file is truncated or holds NaN or infinite samples; the message
        names it.

    Example
    -------
    >>> import io
    >>> import soundfile
    >>> file = io.BytesIO()
    >>> soundfile.write(file, torch.rand(900, 2).numpy(), 100, format="WAV")
    >>> reader = soundfile.SoundFile(io.BytesIO(file.getvalue()))
    >>> halves = lambda mix: torch.stack([mix / 2, mix / 2], dim=1)
    >>> blocks = separate_stream(reader, halves, 100, chunk_seconds=4.0)
    >>> [list(block.shape) for block in blocks]
    [[2, 2, 300], [2, 2, 300], [2, 2, 300]]
    """
    chunk = round(chunk_seconds * reader.samplerate)
    if chunk < 1 or not 0 <= overlap <= 0.5:
        raise ValueError(
            "expected chunk_seconds > 0 and overlap in [0, 0.5], got "
            f"chunk_seconds={chunk_seconds}, overlap={overlap}"
        )
    if batch_size < 1:
        raise ValueError(f"expected batch_size from 1 up, got {batch_size}")
    chunk = min(chunk, reader.frames)
    shared = int(overlap * chunk)
    weights = joining_weights(shared)
    chunks = _separate_batches(
        _read_chunks(reader, chunk, chunk - shared),
        reader,
        sample_rate,
        separate_chunks,
        batch_size,
    )
    tail = None
    for sig, est_source, repeated, last in chunks:
        sig, est_source = sig[:, repeated:], est_source[..., repeated:]
        if tail is not None:
            head = est_source[..., :shared]
            if not keep_order:
                est_source = est_source[best_order(tail, head)]
            # lerp(a, a, w) is a, bit by bit
            est_source[..., :shared] = torch.lerp(
                tail, est_source[..., :shared], weights
            )
        end = est_source.shape[-1] - (0 if last else shared)
        yield distribute_residual(sig[:, :end], est_source[..., :end])
        tail = est_source[..., end:]
