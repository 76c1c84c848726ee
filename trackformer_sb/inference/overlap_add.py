"""Separation of audio of any length, chunk by chunk, in constant memory.

Neighbouring chunks share some samples. On these, the outputs of the later
chunk are put into the order of the earlier one, as nothing ties a model
trained without labels to one order, and the two are crossfaded.
"""

import os
import tempfile
from contextlib import ExitStack
from fractions import Fraction

import soundfile
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F
from torchaudio.functional import resample

# The equivalent of resampy's "kaiser_best": pass band up to 0.948 of the lower
# Nyquist frequency. torchaudio's default (6 zero crossings) is audibly dull.
FILTER = {
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}

# The resampling filter grows with the terms of the ratio of the rates: 44100
# to 44101 Hz would take 16 GB. Such a ratio is rounded, which costs nothing,
# as the outputs go back by the same ratio.
MAX_RATIO_TERM = 1000

# A learned encoder needs at least its kernel of samples.
MIN_CHUNK_SECONDS = 0.1

# What a wrong order has to gain before it is preferred, in parts of the level.
TIE = 1e-9

# The length libsndfile gives to a stream whose header has none.
UNKNOWN_FRAMES = 2**63 - 1

# Sizes in a wav header are 32-bit numbers.
MAX_WAV_BYTES = 2**32 - 2**16


def crossfade_weights(length):
    """Raised-cosine weights of a signal that fades in.

    Those of the signal that fades out are one minus these: both sum to one,
    which keeps the level of outputs that agree.

    Arguments
    ---------
    length : int
        Number of samples.

    Returns
    -------
    torch.Tensor
        [length], rising in (0, 1).

    Example
    -------
    >>> crossfade_weights(4)
    tensor([0.0381, 0.3087, 0.6913, 0.9619])
    """
    phase = (torch.arange(length) + 0.5) / max(length, 1)
    return torch.sin(0.5 * torch.pi * phase).square()


def best_order(previous, current):
    """The order of outputs in which two estimates differ least.

    Minimises the sum of ``|previous_i - current_order(i)|^2``, that is
    maximises the sum of their inner products: the stitching of continuous
    speech separation (arXiv 2001.11482), measured on the waveforms.

    Arguments
    ---------
    previous : torch.Tensor
        [sources, channels, time].
    current : torch.Tensor
        The same samples estimated again, [sources, channels, time].

    Returns
    -------
    torch.Tensor
        Indices into ``current``, [sources]. Where nothing favours another
        order, as in silence, outputs keep theirs.

    Example
    -------
    >>> previous = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
    >>> best_order(previous, previous.flip(0))
    tensor([1, 0])
    >>> best_order(torch.zeros(2, 1, 5), torch.zeros(2, 1, 5))
    tensor([0, 1])
    """
    previous = previous.flatten(1).double()
    current = current.flatten(1).double()
    level = previous.norm() * current.norm()
    if level == 0:
        return torch.arange(len(current))
    similarity = previous @ current.T / level
    similarity += TIE * torch.eye(len(current))
    _, order = linear_sum_assignment(similarity.numpy(), maximize=True)
    return torch.from_numpy(order)


def distribute_residual(mix, est_source):
    """Adds what the sources lack of the mixture evenly to them.

    Arguments
    ---------
    mix : torch.Tensor
        [channels, time].
    est_source : torch.Tensor
        [sources, channels, time].

    Returns
    -------
    torch.Tensor
        [sources, channels, time], with the mixture as their sum.

    Example
    -------
    >>> mix, est_source = torch.ones(1, 2), torch.zeros(4, 1, 2)
    >>> distribute_residual(mix, est_source)[3]
    tensor([[0.2500, 0.2500]])
    """
    missing = mix - est_source.sum(0)
    return est_source + missing / len(est_source)


def _read(reader, frames):
    """Up to ``frames`` samples as [channels, time]."""
    start = reader.tell()
    block = torch.from_numpy(
        reader.read(frames, dtype="float32", always_2d=True)
    )
    if not block.isfinite().all():
        raise ValueError(
            f"{reader.name}: NaN or infinite samples after "
            f"{start / reader.samplerate:.3f} s"
        )
    return block.T


def _check_whole(reader, frames):
    """Refuses a file that ended before its header said it would."""
    if reader.frames == UNKNOWN_FRAMES or reader.format == "MP3":
        return  # unknown, or an estimate
    if frames < reader.frames:
        raise ValueError(
            f"{reader.name}: truncated, {frames} of {reader.frames} samples"
        )


def _separate_resampled(sig, file_rate, sample_rate, separate_chunk):
    """[channels, time] -> [sources, channels, time] at the file's rate."""
    length = sig.shape[-1]
    ratio = Fraction(sample_rate, file_rate).limit_denominator(MAX_RATIO_TERM)
    mix = sig
    if ratio != 1:
        mix = resample(sig, ratio.denominator, ratio.numerator, **FILTER)
    shortest = round(MIN_CHUNK_SECONDS * sample_rate)
    mix = F.pad(mix, (0, max(0, shortest - mix.shape[-1])))
    est_source = separate_chunk(mix.unsqueeze(0)).detach().cpu().float()
    if est_source.shape[::2] != (1, len(mix)) or (
        est_source.shape[-1] != mix.shape[-1]
    ):
        raise ValueError(
            "expected separate_chunk to return [1, sources, "
            f"{len(mix)}, {mix.shape[-1]}], got {list(est_source.shape)}"
        )
    est_source = est_source.squeeze(0)
    if ratio != 1:
        est_source = resample(
            est_source, ratio.numerator, ratio.denominator, **FILTER
        )
    return est_source[..., :length]


def separate_stream(
    reader, separate_chunk, sample_rate, chunk_seconds=10.0, overlap=0.25
):
    """Separates an open audio file block by block.

    Each chunk is resampled to the rate of the model, separated, and resampled
    back. What resampling and rounding took from the file is distributed
    evenly over the outputs: at the file's own rate they sum to it.

    Arguments
    ---------
    reader : soundfile.SoundFile
        The file, open for reading, of any rate and number of channels.
    separate_chunk : callable
        [1, channels, time] at ``sample_rate`` ->
        [1, sources, channels, time].
    sample_rate : int
        Rate of the model in Hz.
    chunk_seconds : float
        Length of the chunks in seconds. The last one begins earlier rather
        than being shorter.
    overlap : float
        What neighbouring chunks share of their length, in [0, 0.5]. With 0
        nothing is aligned or crossfaded.

    Yields
    ------
    torch.Tensor
        The next samples of all outputs, [sources, channels, time], at the
        rate of the file.

    Raises
    ------
    ValueError
        If an argument is out of its range, or the file is empty, truncated or
        holds NaN or infinite samples; the message names it.

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
    shared = int(overlap * chunk)
    hop = chunk - shared
    fade = crossfade_weights(shared)
    sig = _read(reader, chunk)
    if sig.shape[-1] == 0:
        raise ValueError(f"{reader.name}: the file holds no samples")
    given = 0  # samples of sig whose outputs have been yielded
    position = sig.shape[-1]
    tail = None
    while True:
        est_source = _separate_resampled(
            sig, reader.samplerate, sample_rate, separate_chunk
        )[..., given:]
        if not est_source.isfinite().all():
            raise ValueError(
                f"{reader.name}: the model returned NaN or infinite samples "
                f"before {position / reader.samplerate:.3f} s"
            )
        if tail is not None:
            head = est_source[..., :shared]
            est_source = est_source[best_order(tail, head)]
            # lerp(a, a, w) is a, bit by bit
            est_source[..., :shared] = torch.lerp(
                tail, est_source[..., :shared], fade
            )
        ahead = _read(reader, hop)
        new = ahead.shape[-1]
        if new == 0:
            _check_whole(reader, position)
            yield distribute_residual(sig[:, given:], est_source)
            return
        end = est_source.shape[-1] - shared
        yield distribute_residual(
            sig[:, given : given + end], est_source[..., :end]
        )
        tail = est_source[..., end:]
        sig = torch.cat([sig[:, new:], ahead], dim=-1)
        # the last chunk is read whole; what it repeats is left out
        given = hop - new
        position += new


def _wav_format(frames, channels):
    """RF64, the 64-bit wav, where the sizes would not fit a wav header."""
    return "RF64" if frames * channels * 4 > MAX_WAV_BYTES else "WAV"


def write_sources(blocks, reader, out_folder, stem):
    """Writes a stream to one float wav per source.

    A run that ends early leaves nothing: the files grow in a hidden folder and
    move out of it when all of them are whole.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        [sources, channels, time], as of ``separate_stream``.
    reader : soundfile.SoundFile
        The file they come from, which gives rate and channels.
    out_folder : Path
        Where to write ``<stem>_source0.wav`` and so on.
    stem : str
        Beginning of the names.

    Returns
    -------
    list of Path
        The files, in the order of the sources.
    """
    out_folder.mkdir(parents=True, exist_ok=True)
    names, writers = [], []
    with tempfile.TemporaryDirectory(
        prefix=".", suffix=".partial", dir=out_folder
    ) as partial:
        with ExitStack() as stack:
            for block in blocks:
                for i in range(len(writers), len(block)):
                    names.append(f"{stem}_source{i}.wav")
                    writer = soundfile.SoundFile(
                        os.path.join(partial, names[-1]),
                        "w",
                        reader.samplerate,
                        reader.channels,
                        subtype="FLOAT",
                        format=_wav_format(reader.frames, reader.channels),
                    )
                    writers.append(stack.enter_context(writer))
                for writer, source in zip(writers, block, strict=True):
                    writer.write(source.T.numpy())
        for name in names:
            os.replace(os.path.join(partial, name), out_folder / name)
    return [out_folder / name for name in names]
