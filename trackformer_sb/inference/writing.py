"""Writes separated streams to files, whole or not at all."""

import os
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import soundfile
from speechbrain.utils.logger import get_logger

from trackformer_sb.audio import name_of
from trackformer_sb.inference.remix import REMIX

logger = get_logger(__name__)

# Of each format, libsndfile's name and the best it holds.
FORMATS = {
    "wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_24"),
    "ogg": ("OGG", "VORBIS"),
}

# Sizes in a wav header are 32-bit numbers.
MAX_WAV_BYTES = 2**32 - 2**16

# libsndfile ends the process where it closes a Vorbis file of a higher rate.
MAX_OGG_RATE = 200_000

# Frames read or written in one go. libsndfile puts all that a Vorbis file is
# given at once on the stack, and crashes on a song.
BLOCK_FRAMES = 2**14


def output_paths(out_folder, stem, names, file_format="wav", figure=False):
    """The files that a separation writes, see ``write_sources``.

    Example
    -------
    >>> paths = output_paths("", "song", ["drums", "rest"], "flac", True)
    >>> [path.name for path in paths]
    ['song_drums.flac', 'song_rest.flac', 'song_figure.png']
    """
    if file_format not in FORMATS:
        raise ValueError(
            f"expected file_format {', '.join(FORMATS)}, got {file_format!r}"
        )
    files = [f"{name}.{file_format}" for name in names]
    files += ["figure.png"] * figure
    if not files:
        raise ValueError("expected an output, a remix or a figure to write")
    return [Path(out_folder) / f"{stem}_{file}" for file in files]


def write_sources(
    blocks,
    reader,
    out_folder,
    stem,
    names,
    gains,
    file_format="wav",
    ranked=False,
    figure=False,
):
    """Writes mixes of a stream, in memory that does not depend on its length.

    A run that ends early leaves no results: the files grow in a hidden folder
    and move out of it when all of them are whole.

    ``blocks`` are [sources, channels, time], as of ``separate_stream``, and
    ``reader`` is the file they come from, which gives rate and channels; the
    rest is as of ``mix_gains`` and ``Separator.separate_file``. In flac and
    ogg, which end at full scale, outputs beyond it are turned down, all by the
    same factor, and a remix by itself, with a warning.
    """
    paths = output_paths(out_folder, stem, names, file_format, figure)
    high = reader.samplerate > MAX_OGG_RATE
    if file_format == "ogg" and (reader.channels > 2 or high):
        # Vorbis would take the last of six channels for the bass, and cut it
        raise ValueError(
            f"{name_of(reader)}: expected wav or flac for {reader.channels} "
            f"channels at {reader.samplerate} Hz, as Vorbis has another order "
            f"of channels and ends at {MAX_OGG_RATE} Hz, got ogg"
        )
    partial = out_folder / f".{stem}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        finished = [partial / path.name for path in paths]
        if ranked:
            blocks = _loudest_first(blocks, reader, partial, gains.shape[1])
        wavs = [partial / f"{stem}_{name}.wav" for name in names]
        mixture = partial / "mixture.wav"
        if figure:
            gains = np.vstack([gains, np.ones(gains.shape[1])])
        growing = [*wavs, mixture][: len(gains)]
        _, peaks = _write(blocks, gains, reader, growing)
        outputs = len(names) - (REMIX in names)  # the remix is the last
        if figure:
            drawn = {"mixture": mixture, **dict(zip(names[:outputs], wavs))}
            _draw(drawn, reader.samplerate, finished[-1])
        for group in (slice(outputs), slice(outputs, len(names))):
            if file_format != "wav":
                pairs = dict(zip(wavs[group], finished[group]))
                peak = peaks[group].max(initial=0.0)
                _convert(pairs, peak, file_format, reader)
        for whole, path in zip(finished, paths):
            os.replace(whole, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return paths


@contextmanager
def _naming(path, reader):
    """libsndfile says "System error." of a full disk, and names no file."""
    try:
        yield
    except soundfile.LibsndfileError as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            f"could not write {path}, {reader.channels} channels at "
            f"{reader.samplerate} Hz, {free:.0f} MB are free there "
            f"({error.error_string})"
        ) from error


def _create(path, file_format, reader):
    """A file to write, of the rate and the channels of another."""
    container, subtype = FORMATS[file_format]
    size = 4 * reader.frames * reader.channels
    if container == "WAV" and size > MAX_WAV_BYTES:
        container = "RF64"  # the wav of 64-bit sizes
    with _naming(path, reader):
        return soundfile.SoundFile(
            os.fsencode(path),
            "w",
            reader.samplerate,
            reader.channels,
            subtype,
            format=container,
        )


def _write(blocks, gains, reader, paths):
    """Writes mixes as float wavs; returns their energies and peaks."""
    gains = gains.astype("float32")
    energies, peaks = np.zeros(len(paths)), np.zeros(len(paths))
    with ExitStack() as stack:
        files = [
            stack.enter_context(_create(path, "wav", reader)) for path in paths
        ]
        for block in blocks:
            # under the same name, which lets go of the sources
            block = np.tensordot(gains, np.asarray(block), 1)
            for k, sig in enumerate(block):
                with _naming(paths[k], reader):
                    files[k].write(sig.T)
                energies[k] += np.square(sig, dtype=float).sum()
                peaks[k] = max(peaks[k], np.abs(sig).max())
    return energies, peaks


def _read(path):
    """The samples of a file, [time, channels] block by block."""
    return soundfile.blocks(
        os.fsencode(path), BLOCK_FRAMES, dtype="float32", always_2d=True
    )


def _loudest_first(blocks, reader, folder, num_sources):
    """The blocks again, their sources in the order of their energy."""
    paths = [folder / f"{i}.wav" for i in range(num_sources)]
    energies, _ = _write(blocks, np.eye(num_sources), reader, paths)
    order = np.argsort(-energies, kind="stable")
    for block in zip(*(_read(paths[i]) for i in order)):
        yield np.stack(block).transpose(0, 2, 1)


def _draw(drawn, sample_rate, path):
    """Draws spectrograms of files, the mixture first."""
    # Imported here: matplotlib is slow to import.
    from trackformer_sb import plots

    frames = soundfile.info(os.fsencode(drawn["mixture"])).frames
    column = {
        name: plots.spectrogram(_read(wav), frames, sample_rate)
        for name, wav in drawn.items()
    }
    seconds = frames / sample_rate
    picture = plots.separation_figure([column], seconds, sample_rate)
    plots.save_figure(picture, path)


def _convert(wavs, peak, file_format, reader):
    """Writes wav -> path in another format, turned down alike if need be."""
    gain = np.float32(1 / max(1.0, peak))
    if gain < 1:
        logger.warning(
            f"{name_of(reader)}: turned down by {20 * np.log10(peak):.1f} dB, "
            f"as {file_format} ends at full scale: "
            f"{', '.join(path.name for path in wavs.values())}"
        )
    for wav, path in wavs.items():
        with _create(path, file_format, reader) as file:
            for block in _read(wav):
                with _naming(path, reader):
                    file.write(gain * block)
        wav.unlink()
