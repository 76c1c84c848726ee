"""What happens to an uploaded file: checks, separation, pictures."""

import inspect
from collections import namedtuple
from pathlib import Path

import numpy as np
import soundfile

from trackformer_sb.truncation import find_cut
from trackformer_sb.web.spectrogram import save_picture, spectrogram

BLOCK = 1 << 18  # frames read at once

READABLE = "wav, flac, ogg, mp3 or aiff"

Track = namedtuple("Track", "label path picture level")
Track.__doc__ = "One row of the page: a wav, its spectrogram, its level in dB."

Separated = namedtuple("Separated", "tracks sample_rate channels frames")
Separated.__doc__ = "The original and its sources, all of the same length."

# Shares of the work after which a step ends, for the progress bar.
READ, SEPARATED = 0.05, 0.9


def decode(path, wav_path, max_minutes):
    """Decodes a file to a float wav that a browser plays sample by sample.

    Arguments
    ---------
    path : str or Path
        Any file.
    wav_path : str or Path
        The wav to write, at the rate and with the channels of the file.
    max_minutes : float
        Length above which a file is refused, whatever its header says.

    Returns
    -------
    tuple
        Sample rate in Hz, channels, frames, and mean power of a sample.

    Raises
    ------
    ValueError
        If the file is no audio, is empty, cut or too long, or holds NaN or
        infinite samples; the message names the file without its folder.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "notes.txt")
    ...     _ = path.write_text("no music")
    ...     try:
    ...         decode(path, Path(folder, "original.wav"), max_minutes=15)
    ...     except ValueError as error:
    ...         print(error)
    notes.txt is no audio file that can be read (wav, flac, ogg, mp3 or aiff)
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty")
    try:
        reader = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError) as error:  # one of a .raw
        raise ValueError(
            f"{path.name} is no audio file that can be read ({READABLE})"
        ) from error
    cut = find_cut(path, reader.extra_info)
    if cut is not None and cut.certain:
        reader.close()
        raise ValueError(f"{path.name} is not whole: {cut.reason}")
    # soundfile seeks after each read, and after that some mp3 files are wrong
    reader.seekable = lambda: False
    frames, energy = 0, 0.0
    rate, channels = reader.samplerate, reader.channels
    with (
        reader,
        soundfile.SoundFile(
            wav_path, "w", rate, channels, "FLOAT", format="WAV"
        ) as writer,
    ):
        while True:
            try:
                block = min(BLOCK, reader.frames - frames)
                sig = reader.read(block, "float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise ValueError(f"{path.name} is damaged") from error
            if len(sig) == 0:
                break
            frames += len(sig)
            if frames > max_minutes * 60 * rate:
                raise ValueError(
                    f"{path.name} is too long: expected at most "
                    f"{max_minutes:g} minutes"
                )
            if not np.isfinite(sig).all():
                raise ValueError(
                    f"{path.name} holds NaN or infinite samples before "
                    f"{frames / rate:.1f} s"
                )
            energy += float(np.square(sig, dtype=np.float64).sum())
            writer.write(sig)
    if frames == 0:
        raise ValueError(f"{path.name} holds no samples")
    return rate, channels, frames, energy / (frames * channels)


def _mean_power(path):
    """Mean square of the samples of a file."""
    with soundfile.SoundFile(path) as reader:
        energy = sum(
            float(np.square(sig).sum()) for sig in reader.blocks(BLOCK)
        )
        return energy / (reader.frames * reader.channels)


def _level(power, reference):
    """Decibels of a power above another; minus infinity for silence."""
    if power == 0 or reference == 0:
        return float("-inf")
    return 10 * float(np.log10(power / reference))


def separate_upload(separator, path, folder, max_minutes=15, progress=None):
    """Separates a file and draws what came out.

    Arguments
    ---------
    separator : PerformerSeparation
        Or any object with its ``separate_file``.
    path : str or Path
        The uploaded file.
    folder : Path
        An existing folder for the sources and pictures.
    max_minutes : float
        Longest file that is taken, in minutes.
    progress : callable, optional
        Called with the share of the work done, in [0, 1], and what comes next.
        Whatever it raises ends the work.

    Returns
    -------
    Separated
        The original first, then the sources in the order of the model, which
        sum to it, by their names where the model has names.

    Raises
    ------
    ValueError
        As of ``decode``, or of the separator; the message names the file
        without its folder.

    Example
    -------
    >>> import tempfile
    >>> class Halves:
    ...     def separate_file(self, path, out_folder, progressbar):
    ...         sig, rate = soundfile.read(path)
    ...         paths = [Path(out_folder, f"song_{i}.wav") for i in range(2)]
    ...         for half in paths:
    ...             soundfile.write(half, sig / 2, rate, "FLOAT")
    ...         return paths
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/song.wav", np.ones(900) / 2, 8000)
    ...     done = separate_upload(Halves(), f"{folder}/song.wav", Path(folder))
    >>> [(track.label, round(track.level)) for track in done.tracks]
    [('Original', 0), ('Source 0', -6), ('Source 1', -6)]
    """
    path = Path(path)
    progress = progress or (lambda share, text: None)
    progress(0.0, "Reading")
    original = folder / f"{path.stem}_original.wav"
    rate, channels, frames, power = decode(path, original, max_minutes)
    seconds = frames / rate
    progress(READ, f"Separating {seconds:.0f} s of music")

    def separated(done, total):
        share = min(done / (total or seconds), 1.0)
        progress(
            READ + share * (SEPARATED - READ),
            f"Separated {done:.0f} of {total or seconds:.0f} s",
        )

    options = {"progressbar": False}
    if "progress" in inspect.signature(separator.separate_file).parameters:
        options["progress"] = separated
    try:
        sources = separator.separate_file(path, folder, **options)
    except (ValueError, OSError, RuntimeError) as error:
        # soundfile's and torch's errors are RuntimeErrors
        message = str(error).replace(str(path), path.name)
        if path.name not in message:
            message = f"{path.name}: {message}"
        raise ValueError(message) from error
    groups = getattr(separator, "groups", None)
    names = groups or [f"source {i}" for i in range(len(sources))]
    named = [("Original", original, 0.0)]
    for name, source in zip(names, sources):
        level = _level(_mean_power(source), power)
        named.append((name.capitalize(), Path(source), level))
    tracks = []
    for i, (label, wav, level) in enumerate(named):
        share = SEPARATED + (1 - SEPARATED) * i / len(named)
        progress(share, "Drawing spectrograms")
        image = spectrogram(wav)
        if i == 0:
            loudest = image.max()
        picture = wav.with_suffix(".png")
        save_picture(image, loudest, picture)
        tracks.append(Track(label, wav, picture, level))
    return Separated(tracks, rate, channels, frames)
