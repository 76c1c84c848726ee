"""Writes separated streams to files, whole or not at all."""

import io
import itertools
import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr
from speechbrain.utils.logger import get_logger

from trackformer_sb.audio import UnreadableAudio, name_of, open_audio
from trackformer_sb.ffmpeg import FFmpegWriter, read_tags
from trackformer_sb.inference.remix import REMIX

logger = get_logger(__name__)

FORMATS = ("wav", "flac", "ogg", "mp3", "m4a")

# The format of a file, or the nearest to it: to others than these, m4a.
SAME = "same"
NEAREST = {
    "wav": ".wav .wave .aiff .aif .aifc .w64 .caf .au .voc",
    "flac": ".flac .ape .wv .tta .tak .dsf",
    "ogg": ".ogg .oga",
    "mp3": ".mp3",
}

# True peak of a remix at most, -1 dB (EBU R 128): lossy formats add to it.
CEILING = 10 ** (-1 / 20)

# libsndfile ends the process where it closes a Vorbis file of a higher rate.
MAX_OGG_RATE = 200_000

# Frames read or written in one go. libsndfile puts all that a Vorbis file is
# given at once on the stack, and crashes on a song.
BLOCK_FRAMES = 2**14


def format_of(path, file_format):
    """The format to write: of ``same``, that of a file or the nearest."""
    if file_format != SAME:
        return file_format
    ending = Path(path).suffix.lower()
    found = [x for x in NEAREST if ending in NEAREST[x].split()]
    nearest = found[0] if found else "m4a"
    # of what cannot be read it is said where it is separated
    with suppress(UnreadableAudio, av.FFmpegError):
        with open_audio(path, counted=False) as reader:
            if not _fits(nearest, reader, read_tags(path)):
                return "flac"  # of surround sound
    return nearest


def output_paths(out_folder, stem, names, file_format, figure, song_folders):
    """The files that a separation writes, see ``write_sources``."""
    if file_format not in FORMATS:
        raise ValueError(
            f"expected file_format {', '.join(FORMATS)}, got {file_format!r}"
        )
    files = [f"{name}.{file_format}" for name in names]
    files += ["figure.png"] * figure
    if not files:
        raise ValueError("expected an output, a remix or a figure to write")
    if song_folders:
        return [Path(out_folder, stem, file) for file in files]
    return [Path(out_folder, f"{stem}_{file}") for file in files]


def write_sources(
    blocks,
    reader,
    out_folder,
    stem,
    names,
    gains,
    file_format="wav",
    choose=None,
    figure=False,
    song_folders=False,
    count=None,
    channels=None,
):
    """Writes mixes of a stream, in memory that does not depend on its length.

    A run that ends early leaves no results: the files grow in a hidden folder
    and move out of it when all of them are whole.

    ``blocks`` are [sources, channels, time], as of ``separate_stream``, and
    ``reader`` is the file they come from, which gives rate, channels and tags;
    the rest is as of ``mix_gains`` and ``Separator.separate_file``. ``choose``
    gives other names and gains once the energies of the sources, [sources], are
    known; ``count`` is a ``SongCount`` to draw in the figure; ``channels`` are
    2 of mono that became stereo. Formats other than wav end at full scale:
    outputs beyond it are turned down, all by the same factor. A remix is by
    itself, in wav too, and by its true peak. Warnings say so.
    """
    path = name_of(reader)
    tags = read_tags(path)
    channels = channels or reader.channels
    if channels != reader.channels:
        logger.warning(f"{path}: mono becomes stereo")
        tags = tags._replace(layout="stereo")
    subtype = reader.subtype if file_format == SAME else None
    limited = file_format != "wav"  # whose float samples hold what exceeds it
    file_format = format_of(path, file_format)
    if subtype and not path.lower().endswith(f".{file_format}"):
        logger.warning(f"{path}: written as {file_format}, the nearest")
    paths = output_paths(
        out_folder, stem, names, file_format, figure, song_folders
    )
    title = tags.metadata.get("title", stem)
    title = title.encode("utf-8", "replace").decode()  # a name may be no UTF-8
    if not _fits(file_format, reader, tags):
        raise ValueError(
            f"{path}: expected wav or flac for {channels} channels at "
            f"{reader.samplerate} Hz, got {file_format}"
        )
    partial = out_folder / f".{stem}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        if choose is not None:
            sources = range(gains.shape[1])
            pairs = [(partial / f".{i}.wav", tags) for i in sources]
            energies, _ = _write(blocks, np.eye(len(pairs)), reader, pairs)
            names, gains = choose(energies)
            paths = output_paths(
                out_folder, stem, names, file_format, figure, song_folders
            )
            blocks = _together([wav for wav, _ in pairs])
        finished = [partial / path.name for path in paths]
        tags_of = [
            tags._replace(
                metadata={**tags.metadata, "title": f"{title} ({name})"}
            )
            for name in names
        ]
        wavs = [
            path.with_suffix(".float.wav") for path in finished[: len(names)]
        ]
        growing = list(zip(wavs, tags_of))
        mixture = partial / ".mixture.wav"
        if figure:
            gains = np.vstack([gains, np.ones(gains.shape[1])])
            growing.append((mixture, tags))
        _, peaks = _write(blocks, gains, reader, growing)
        outputs = len(names) - (REMIX in names)  # the remix is the last
        if figure:
            drawn = {"mixture": mixture, **dict(zip(names[:outputs], wavs))}
            curve = () if count is None else count.means()[0]
            _draw(drawn, reader, finished[-1], curve)
        pairs = list(zip(wavs, finished, tags_of))
        peak = peaks[:outputs].max(initial=1.0) if limited else 1.0
        _convert(pairs[:outputs], 1 / peak, reader, subtype)
        if outputs < len(names):
            peak = max(peaks[outputs], true_peak(_read(wavs[-1]), channels))
            gain = CEILING / max(peak, CEILING)
            _convert(pairs[outputs:], gain, reader, subtype)
        for whole, path in zip(finished, paths):
            path.parent.mkdir(exist_ok=True)
            os.replace(whole, path)
    except (soundfile.LibsndfileError, av.FFmpegError) as error:
        # they say "System error." of a full disk, and name no file
        free = shutil.disk_usage(partial).free / 1e6
        raise OSError(
            f"could not write {', '.join(map(str, paths))}, {reader.channels} "
            f"channels at {reader.samplerate} Hz, {free:.0f} MB are free there "
            f"({error})"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return paths


def _fits(file_format, reader, tags):
    """Whether a format has the rate and the channels of a file."""
    if file_format == "ogg":
        return reader.channels <= 2 and reader.samplerate <= MAX_OGG_RATE
    try:
        FFmpegWriter(io.BytesIO(), file_format, reader.samplerate, tags).close()
    except av.FFmpegError:
        return False
    return True


def _create(path, reader, tags, subtype=None):
    """A file to write, of the rate and the channels of another."""
    if path.suffix != ".ogg":
        return FFmpegWriter(
            path, path.suffix[1:], reader.samplerate, tags, subtype
        )
    # PyAV comes without an encoder of Vorbis
    file = soundfile.SoundFile(
        os.fsencode(path),
        "w",
        reader.samplerate,
        2 if tags.layout == "stereo" else 1,
        "VORBIS",
        format="OGG",
    )
    for key, value in tags.metadata.items():
        # it knows fewer, and leaves the others out
        setattr(file, {"track": "tracknumber"}.get(key, key), value)
    return file


def _write(blocks, gains, reader, growing):
    """Writes mixes as float wavs; returns their energies and peaks.

    ``growing`` are pairs of path and tags.
    """
    gains = gains.astype("float32")
    energies, peaks = np.zeros(len(growing)), np.zeros(len(growing))
    with ExitStack() as stack:
        files = [
            stack.enter_context(_create(path, reader, tags))
            for path, tags in growing
        ]
        for block in blocks:
            # under the same name, which lets go of the sources
            block = np.tensordot(gains, np.asarray(block), 1)
            for k, sig in enumerate(block):
                files[k].write(sig.T)
                energies[k] += np.square(sig, dtype=float).sum()
                peaks[k] = max(peaks[k], np.abs(sig).max())
    return energies, peaks


def _read(path):
    """The samples of a file, [time, channels] block by block."""
    return soundfile.blocks(
        os.fsencode(path), BLOCK_FRAMES, dtype="float32", always_2d=True
    )


def _together(wavs):
    """The blocks [sources, channels, time] of files of a source each."""
    for block in zip(*map(_read, wavs)):
        yield np.stack(block).transpose(0, 2, 1)


def _draw(drawn, reader, path, count):
    """Draws spectrograms of files, the mixture first."""
    # Imported here: matplotlib is slow to import.
    from trackformer_sb import plots

    column = {name: plots.file_spectrogram(wav) for name, wav in drawn.items()}
    rate = reader.samplerate
    figure = plots.separation_figure(
        [column], reader.frames / rate, rate, count=count
    )
    plots.save_figure(figure, path)


def true_peak(blocks, channels):
    """The largest magnitude of a signal, between its samples too.

    By four times its rate (ITU-R BS.1770-4, annex 2), of float32 blocks
    [time, channels].

    Example
    -------
    >>> time = np.arange(1000)
    >>> sig = np.hanning(1000) * np.sin(np.pi / 2 * time + np.pi / 4)
    >>> sig = sig.astype("float32")[:, None]
    >>> f"{np.abs(sig).max():.2f} {true_peak([sig], 1):.2f}"
    '0.71 1.00'
    """
    resampler = soxr.ResampleStream(1, 4, channels)
    peak, nothing = 0.0, np.zeros((0, channels), "float32")
    for block in itertools.chain(blocks, [nothing]):
        sig = resampler.resample_chunk(block, last=block is nothing)
        peak = max(peak, np.abs(sig).max(initial=0.0))
    return peak


def _convert(growing, gain, reader, subtype):
    """Writes float wavs in their formats, turned down alike if need be.

    ``growing`` are the wav, the path and the tags of each.
    """
    if gain < 1:
        logger.warning(
            f"{name_of(reader)}: turned down by {-20 * np.log10(gain):.1f} dB "
            "to stay below full scale: "
            f"{', '.join(path.name for _, path, _ in growing)}"
        )
    for wav, path, tags in growing:
        if path.suffix == ".wav" and not subtype and gain == 1:
            os.replace(wav, path)
            continue
        with _create(path, reader, tags, subtype) as file:
            for block in _read(wav):
                file.write(np.float32(gain) * block)
        wav.unlink()
