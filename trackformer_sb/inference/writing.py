"""Writes separated streams to files, whole or not at all."""

import io
import os
import shutil
import stat
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import soundfile
from speechbrain.utils.logger import get_logger

from trackformer_sb.inference.files import PARTIAL, name_of
from trackformer_sb.inference.remix import (
    REMIX,
    check_outputs,
    loudest_first,
    remix_gains,
)

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

FIGURE = "figure"


def output_paths(
    out_folder,
    stem,
    num_spks,
    file_format="wav",
    outputs=None,
    remix=None,
    figure=False,
):
    """The files that a separation writes.

    Arguments
    ---------
    out_folder : str or Path
        Where they go.
    stem : str
        What their names begin with.
    num_spks : int
        Number of outputs of the model.
    file_format : str
        wav, flac or ogg.
    outputs : dict or str, optional
        Which outputs to write, see ``parse_outputs``; by default all.
    remix : dict or str, optional
        Gains of a remix, see ``parse_remix``.
    figure : bool
        Whether there is a picture.

    Returns
    -------
    list of Path
        The outputs, the remix and the picture.

    Raises
    ------
    ValueError
        If the format is unknown, the model has no such output, or nothing is
        left to write.

    Example
    -------
    >>> [path.name for path in output_paths("", "song", 4, "flac", "0,2")]
    ['song_source0.flac', 'song_source2.flac']
    """
    if file_format not in FORMATS:
        raise ValueError(
            f"expected file_format {', '.join(FORMATS)}, got {file_format!r}"
        )
    outputs = check_outputs(outputs, num_spks)
    names = [f"{stem}_{name}.{file_format}" for name in outputs]
    if remix is not None:
        remix_gains(remix, outputs, num_spks)
        names.append(f"{stem}_{REMIX}.{file_format}")
    if figure:
        names.append(f"{stem}_{FIGURE}.png")
    if not names:
        raise ValueError("expected an output, a remix or a figure to write")
    return [Path(out_folder) / name for name in names]


def check_paths(paths):
    """Finds out before a separation where its results cannot go.

    Arguments
    ---------
    paths : list of Path
        See ``output_paths``.

    Raises
    ------
    OSError
        If there is a folder in the place of one, or a name is too long.
    """
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{path}: expected no folder there")


def write_sources(
    blocks,
    reader,
    out_folder,
    stem,
    file_format="wav",
    outputs=None,
    ranked=False,
    remix=None,
    figure=False,
    comment="",
):
    """Writes a stream to files, in memory that does not depend on its length.

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
    file_format : str
        wav (32-bit float), flac (24 bit) or ogg (Vorbis). In flac and ogg,
        which end at full scale, outputs beyond it are turned down, all by the
        same factor, with a warning.
    outputs : dict or str, optional
        Which outputs to write, see ``parse_outputs``; by default all.
    ranked : bool
        Whether the outputs are numbered by their energy, 0 the loudest, also
        in ``outputs`` and ``remix``; otherwise as the model numbers them.
    remix : dict or str, optional
        Gains in dB, see ``parse_remix``: writes ``<stem>_remix.wav``.
    figure : bool
        Whether to draw ``<stem>_figure.png``.
    comment : str
        Text that sounds and picture carry, see ``provenance``.

    Returns
    -------
    list of Path
        The outputs in the order asked for, the remix and the picture.

    Raises
    ------
    ValueError
        If the options do not fit the outputs, or if the format cannot hold the
        rate and the channels of the file.
    """
    _check_format(file_format, reader)
    out_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".", suffix=PARTIAL, dir=out_folder
    ) as partial:
        partial = Path(partial)
        sources, energies = _write_streams(
            blocks, reader, partial / "streams", comment
        )
        if ranked:
            sources = [sources[i] for i in loudest_first(energies)]
        num_spks = len(sources)
        paths = output_paths(
            out_folder, stem, num_spks, file_format, outputs, remix, figure
        )
        finished = [partial / path.name for path in paths]
        outputs = check_outputs(outputs, num_spks)
        mixes = {
            name: _Mix(sources, [float(i in indices) for i in range(num_spks)])
            for name, indices in outputs.items()
        }
        if remix is not None:
            mix = _Mix(sources, remix_gains(remix, outputs, num_spks))
            # the outputs need the files that it may be equal to
            solo = {finished[len(mixes)]: mix}
            _write_mixes(solo, file_format, reader, comment, move=False)
        if figure:
            # Imported here: matplotlib is slow to import.
            from trackformer_sb import plots

            frames = soundfile.info(os.fsencode(sources[0])).frames
            rate = reader.samplerate
            drawn = {
                name: plots.spectrogram(mix.blocks(), frames, rate)
                for name, mix in {
                    "mixture": _Mix(sources, [1.0] * num_spks),
                    **mixes,
                }.items()
            }
            picture = plots.separation_figure([drawn], frames / rate, rate)
            plots.save_figure(picture, finished[-1], comment)
        _write_mixes(
            dict(zip(finished, mixes.values())), file_format, reader, comment
        )
        for path, whole in zip(paths, finished):
            os.replace(whole, path)
    return paths


def _sound_file(path, file_format, reader, comment=""):
    """A file to write, of the rate and the channels of another."""
    container, subtype = FORMATS[file_format]
    if container == "WAV":
        container = _wav_format(reader.frames, reader.channels)
    file = soundfile.SoundFile(
        path if isinstance(path, io.BytesIO) else os.fsencode(path),
        "w",
        reader.samplerate,
        reader.channels,
        subtype=subtype,
        format=container,
    )
    if comment:
        file.comment = comment
    return file


@contextmanager
def _naming(path):
    """libsndfile says "System error." of a full disk, and of no file."""
    try:
        yield
    except soundfile.LibsndfileError as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            f"could not write {path}, {free:.0f} MB are free there "
            f"({error.error_string})"
        ) from error


def _wav_format(frames, channels):
    """RF64, the 64-bit wav, where the sizes would not fit a wav header."""
    return "RF64" if frames * channels * 4 > MAX_WAV_BYTES else "WAV"


def _check_format(file_format, reader):
    """Finds out before the separation what cannot be written after it."""
    if file_format not in FORMATS:
        raise ValueError(
            f"expected file_format {', '.join(FORMATS)}, got {file_format!r}"
        )
    if file_format == "ogg" and reader.channels > 2:
        # it would take the last of six for the bass, and cut the rest of it
        raise ValueError(
            f"{name_of(reader)}: expected wav or flac for {reader.channels} "
            "channels, as Vorbis has another order of loudspeakers, got ogg"
        )
    if file_format == "ogg" and reader.samplerate > MAX_OGG_RATE:
        raise ValueError(
            f"{name_of(reader)}: expected wav or flac at {reader.samplerate} "
            f"Hz, as Vorbis ends at {MAX_OGG_RATE} Hz, got ogg"
        )
    try:
        with _sound_file(io.BytesIO(), file_format, reader) as file:
            if file_format == "flac":
                # it checks its rate no earlier
                file.write(np.zeros((1, reader.channels), dtype="float32"))
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{name_of(reader)}: {file_format} cannot hold {reader.channels} "
            f"channels at {reader.samplerate} Hz ({error.error_string})"
        ) from error


def _write_streams(blocks, reader, folder, comment):
    """Writes one float wav per source; returns the paths and the energies."""
    folder.mkdir()
    paths, writers, energies = [], [], []
    with ExitStack() as stack:
        for block in blocks:
            for i in range(len(writers), len(block)):
                paths.append(folder / f"{i}.wav")
                writer = _sound_file(paths[i], "wav", reader, comment)
                writers.append(stack.enter_context(writer))
                energies.append(0.0)
            for i, (writer, source) in enumerate(
                zip(writers, block, strict=True)
            ):
                with _naming(paths[i]):
                    writer.write(source.T.numpy())
                energies[i] += float(source.double().square().sum())
    return paths, energies


class _Mix:
    """Some of the sources with gains, read from disk as often as needed."""

    def __init__(self, sources, gains):
        self.parts = [
            (path, gain) for path, gain in zip(sources, gains) if gain != 0
        ]
        self.template = sources[0]

    @property
    def whole_file(self):
        """The path of the source that this is, if it is one of them."""
        if len(self.parts) == 1 and self.parts[0][1] == 1:
            return self.parts[0][0]
        return None

    def blocks(self):
        """Yields the samples, [time, channels]."""
        parts = self.parts or [(self.template, 0.0)]
        with ExitStack() as stack:
            readers = [
                (
                    stack.enter_context(soundfile.SoundFile(os.fsencode(path))),
                    gain,
                )
                for path, gain in parts
            ]
            while True:
                total = 0.0
                for reader, gain in readers:
                    block = reader.read(
                        BLOCK_FRAMES, dtype="float32", always_2d=True
                    )
                    total = total + np.float32(gain) * block
                if not len(total):
                    return
                yield total

    def peak(self):
        """The largest absolute value."""
        return max(float(np.abs(block).max()) for block in self.blocks())


def _write_mixes(mixes, file_format, reader, comment, move=True):
    """Writes path -> _Mix, all turned down alike if the format needs it.

    With `move` the file of a source becomes that of a mix of it alone.
    """
    gain = 1.0
    if file_format != "wav":
        peak = max((mix.peak() for mix in mixes.values()), default=0.0)
        if peak > 1:
            gain = 1 / peak
            logger.warning(
                f"{name_of(reader)}: turned down by "
                f"{20 * np.log10(peak):.1f} dB, as {file_format} ends at "
                f"full scale: {', '.join(path.name for path in mixes)}"
            )
    moved = {}
    for path, mix in mixes.items():
        source = mix.whole_file
        free = move and source not in moved.values()
        if file_format == "wav" and source and free:
            moved[path] = source  # later, others may need it
            continue
        with _sound_file(path, file_format, reader, comment) as writer:
            for block in mix.blocks():
                with _naming(path):
                    writer.write(
                        block if gain == 1 else block * np.float32(gain)
                    )
    for path, source in moved.items():
        os.replace(source, path)
