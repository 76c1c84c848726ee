"""Writes separated streams to files, whole or not at all."""

import io
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import av
import numpy as np
import soundfile
from speechbrain.utils.logger import get_logger

from trackformer_sb.audio import name_of
from trackformer_sb.ffmpeg import FFmpegWriter, read_tags
from trackformer_sb.inference.remix import REMIX

logger = get_logger(__name__)

FORMATS = ("wav", "flac", "ogg", "mp3", "m4a")

# libsndfile ends the process where it closes a Vorbis file of a higher rate.
MAX_OGG_RATE = 200_000

# Frames read or written in one go. libsndfile puts all that a Vorbis file is
# given at once on the stack, and crashes on a song.
BLOCK_FRAMES = 2**14


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
):
    """Writes mixes of a stream, in memory that does not depend on its length.

    A run that ends early leaves no results: the files grow in a hidden folder
    and move out of it when all of them are whole.

    ``blocks`` are [sources, channels, time], as of ``separate_stream``, and
    ``reader`` is the file they come from, which gives rate, channels and tags;
    the rest is as of ``mix_gains`` and ``Separator.separate_file``. ``choose``
    gives other names and gains once the energies of the sources, [sources], are
    known; ``count`` is a ``SongCount`` to draw in the figure. Formats
    other than wav end at full scale: outputs beyond it are turned down, all by
    the same factor, and a remix by itself, with a warning.
    """
    paths = output_paths(
        out_folder, stem, names, file_format, figure, song_folders
    )
    tags = read_tags(name_of(reader))
    title = tags.metadata.get("title", stem)
    title = title.encode("utf-8", "replace").decode()  # a name may be no UTF-8
    if not _fits(file_format, reader, tags):
        raise ValueError(
            f"{name_of(reader)}: expected wav or flac for {reader.channels} "
            f"channels at {reader.samplerate} Hz, got {file_format}"
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
        wavs = [path.with_suffix(".wav") for path in finished[: len(names)]]
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
        for group in (slice(outputs), slice(outputs, len(names))):
            if file_format != "wav":
                pairs = list(zip(finished, tags_of))[group]
                peak = peaks[group].max(initial=0.0)
                _convert(wavs[group], pairs, peak, reader)
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


def _create(path, reader, tags):
    """A file to write, of the rate and the channels of another."""
    if path.suffix != ".ogg":
        return FFmpegWriter(path, path.suffix[1:], reader.samplerate, tags)
    # PyAV comes without an encoder of Vorbis
    file = soundfile.SoundFile(
        os.fsencode(path),
        "w",
        reader.samplerate,
        reader.channels,
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


def _convert(wavs, growing, peak, reader):
    """Writes wavs in another format, turned down alike if need be."""
    gain = np.float32(1 / max(1.0, peak))
    if gain < 1:
        logger.warning(
            f"{name_of(reader)}: turned down by {20 * np.log10(peak):.1f} dB, "
            f"as {growing[0][0].suffix[1:]} ends at full scale: "
            f"{', '.join(path.name for path, _ in growing)}"
        )
    for wav, (path, tags) in zip(wavs, growing):
        with _create(path, reader, tags) as file:
            for block in _read(wav):
                file.write(gain * block)
        wav.unlink()
