"""The notes of a song: of each stem by itself, in a MIDI file.

Vocals and bass sound one note at a time: their pitch, by CREPE (Kim et al.,
arXiv 1802.06182), is cut into notes. Drums are onsets in three bands. All else
is heard by Basic Pitch (Bittner et al., arXiv 2203.09893).
"""

import struct
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import maximum_filter1d, median_filter, uniform_filter1d
from speechbrain.utils.logger import get_logger

from trackformer_sb.audio import audio_info, resample
from trackformer_sb.inference.files import write_whole
from trackformer_sb.inference.remix import chosen_stems
from trackformer_sb.nnet.stft import STFTEncoder

logger = get_logger(__name__)

SILENT = 1e-3  # peak of a stem, of full scale, below which it has no notes
AUDIBLE = -40.0  # dB below its loudest frame, in which there are notes
SHORTEST = 0.05  # seconds, of a note
SPLIT = 0.8  # semitones from a note, beyond which there is another
STRIKE = 9.0  # dB in 30 ms, by which the level rises at a new note
FRAME = 0.01  # seconds, of CREPE
PERIODIC = 0.4  # its periodicity, from which on there is a pitch
# General MIDI note -> from and to in Hz, flux of an onset above the mean around
DRUM_BANDS = {36: (30, 130, 0.2), 38: (150, 400, 0.3), 42: (7000, 16000, 0.02)}
# of Basic Pitch: Hz, samples of a frame and of a window, its frames that count
RATE, HOP, WINDOW, INNER = 22050, 256, 43844, slice(15, 156)
ONSET, HELD = 0.5, 0.3  # its activations, from which on there is one
TICKS, VELOCITY = 960, 90  # a second, in which a file without tempo has 2 beats


class Note(NamedTuple):
    """From and to in seconds, and the MIDI number: middle C is 60."""

    onset: float
    offset: float
    pitch: int


def cut_notes(pitch, struck, frame):
    """Notes of a pitch track, as McNab et al. (ACSC 1996) find them.

    `pitch` [frames] are fractional MIDI numbers, NaN where nothing sounds. A
    note ends there, or where the next is `struck` [frames], or where the pitch
    is 0.8 semitones from its median. A `frame` is in seconds.

    Example
    -------
    >>> vibrato = 60 + 0.5 * np.sin(np.arange(30))
    >>> pitch = np.concatenate([vibrato, np.full(20, 62.0)])
    >>> for note in cut_notes(pitch, np.zeros(50), 0.01):
    ...     print(note)
    Note(onset=0.0, offset=0.3, pitch=60)
    Note(onset=0.3, offset=0.5, pitch=62)
    """
    runs = []
    for t in np.flatnonzero(~np.isnan(pitch)).tolist():
        goes_on = runs and runs[-1][1] == t and not struck[t]
        if goes_on:
            distance = pitch[t] - np.median(pitch[slice(*runs[-1])])
            goes_on = abs(distance) < SPLIT
        if not goes_on:
            runs.append([t, t])
        runs[-1][1] = t + 1
    return [
        Note(start * frame, end * frame, round(np.median(pitch[start:end])))
        for start, end in runs
        if (end - start) * frame >= SHORTEST
    ]


def melody_notes(sig, sample_rate, band):
    """Notes of one voice [time] in a band (lowest, highest) in Hz."""
    import torchcrepe

    rate = torchcrepe.SAMPLE_RATE
    hop = round(FRAME * rate)
    sig = resample(sig, sample_rate, rate)
    pitch, periodicity = torchcrepe.predict(
        *(sig[None], rate, hop, *band, "tiny"),
        decoder=torchcrepe.decode.weighted_argmax,
        return_periodicity=True,
        batch_size=512,
    )
    pitch = 69 + 12 * np.log2(pitch[0].numpy() / 440)
    level = _levels(sig.numpy(), hop)
    rise = level - np.pad(level, (3, 0), "edge")[:-3]
    struck = (rise > STRIKE) & (rise == maximum_filter1d(rise, 9))
    voiced = periodicity[0].numpy() > PERIODIC
    voiced = median_filter(voiced & (level > AUDIBLE), 5)
    pitch = np.where(voiced, median_filter(pitch, 5), np.nan)
    return cut_notes(pitch, struck, FRAME)


def drum_notes(sig, sample_rate):
    """Kick, snare and hi-hat [time], as General MIDI's 36, 38 and 42.

    Peaks of the spectral flux (Dixon, DAFx 2006) in three bands: the mean rise
    of ln(1 + 30 |X| / max |X|) from frame to frame.

    Example
    -------
    >>> import torch
    >>> sig, time = torch.zeros(44100), torch.arange(4410)
    >>> sig[22050:26460] = torch.hann_window(4410) * torch.sin(0.008 * time)
    >>> [(round(note.onset, 1), note.pitch) for note in drum_notes(sig, 44100)]
    [(0.5, 36)]
    """
    encoder, rate = STFTEncoder(1024, 256), 44100
    sig = resample(sig, sample_rate, rate)
    magnitude = encoder(sig[None])[0].abs().numpy()
    compressed = np.log1p(30 * magnitude / magnitude.max())
    flux = np.maximum(np.diff(compressed, prepend=0), 0)
    notes = []
    for pitch, (*band, threshold) in DRUM_BANDS.items():
        first, last = (round(x * encoder.n_fft / rate) for x in band)
        curve = flux[first : last + 1].mean(0)
        peaks = curve == maximum_filter1d(curve, 17)
        peaks &= curve > threshold + uniform_filter1d(curve, 41)
        onsets = (np.flatnonzero(peaks) + 0.5) * encoder.hop_length / rate
        notes += [Note(onset, onset + 0.1, pitch) for onset in onsets.tolist()]
    return sorted(notes)


def polyphonic_notes(sig, sample_rate):
    """Notes of any instruments [time], by the small model of Basic Pitch."""
    from onnxruntime import InferenceSession

    folder = Path(find_spec("basic_pitch").origin).parent
    session = InferenceSession(folder / "saved_models/icassp_2022/nmp.onnx")
    (source,) = session.get_inputs()
    outputs = ["StatefulPartitionedCall:1", "StatefulPartitionedCall:2"]
    sig = resample(sig, sample_rate, RATE).numpy()
    step = HOP * (INNER.stop - INNER.start)
    padded = np.pad(sig, (HOP * INNER.start, WINDOW + step))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::step]
    parts = []
    for window in windows:
        found = session.run(outputs, {source.name: window[None, :, None]})
        parts.append([x[0, INNER] for x in found])
    level = _levels(sig, HOP)
    # [frames, 88 pitches]
    held, onset = (np.concatenate(x)[: len(level)] for x in zip(*parts))
    held = (held > HELD) & (level > AUDIBLE)[:, None]
    struck = (onset > ONSET) & (onset == maximum_filter1d(onset, 3, axis=0))
    notes = []
    for key in range(held.shape[1]):
        pitch = np.where(held[:, key], 21.0 + key, np.nan)
        notes += cut_notes(pitch, struck[:, key], HOP / RATE)
    return sorted(notes)


def _levels(sig, hop):
    """Levels of blocks of samples of a signal [time], in dB of the loudest."""
    frames = 1 + len(sig) // hop
    blocks = np.pad(sig, (0, hop))[: frames * hop].reshape(frames, hop)
    power = np.square(blocks).mean(1)
    return 10 * np.log10(power / power.max() + 1e-9)


# stem -> how it is heard, General MIDI program, package and how to install it
CREPE = ("torchcrepe", "'trackformer_sb[transcribe]'")
METHODS = {
    "vocals": (partial(melody_notes, band=(65, 1100)), 53, *CREPE),
    "bass": (partial(melody_notes, band=(32, 400)), 33, *CREPE),
    "drums": (drum_notes, 0, "scipy", "scipy"),
}
OTHER = (polyphonic_notes, 0, "basic_pitch", "--no-deps basic-pitch")


def stem_notes(name, sig, sample_rate):
    """Notes of a stem [channels, time], heard as its name says."""
    method = METHODS.get(name, OTHER)[0]
    sig = sig.mean(0)
    return method(sig, sample_rate) if sig.abs().max() > SILENT else []


def heard_stems(separator, stems=None):
    """Which outputs of a separator to transcribe: name -> their numbers.

    Of the names in `stems`, as "vocals,bass"; by default of all, but without
    Basic Pitch none that it would hear: a warning says how to install it.
    Raises an ImportError if another package is missing, a ValueError if the
    separator has no such stem.
    """
    names = ",".join(separator.groups or METHODS)
    outputs = chosen_stems(stems or names, separator.groups)
    for name in [*outputs]:
        _, _, package, how = METHODS.get(name, OTHER)
        if name not in separator.groups:
            del outputs[name]  # the rest
        elif not find_spec(package):
            message = f"{name}: expected {package}: pip install {how}"
            if stems or package != "basic_pitch":
                raise ImportError(message)
            logger.warning(f"left out {message}")
            del outputs[name]
    return outputs


def transcribe_file(separator, path, result, outputs, **options):
    """Writes the notes of a song as a MIDI file, a track a stem.

    `outputs` are as of ``heard_stems``, `options` those of
    ``Separator.separate_file``. Returns name -> list of Note.
    """
    sources = separator.separate_file(path, outputs=outputs, **options)
    rate = audio_info(path).sample_rate
    tracks = {
        name: stem_notes(name, sig, rate) for name, sig in zip(outputs, sources)
    }
    write_midi(result, tracks)
    return tracks


def write_midi(path, tracks):
    """Writes notes, name -> list of Note, as a MIDI file of format 1."""
    chunks = [b"MThd", struct.pack(">IHHH", 6, 1, len(tracks), TICKS // 2)]
    channels = iter([*range(9), *range(10, 16)])
    for name, notes in tracks.items():
        channel = 9 if name == "drums" else next(channels)
        title, program = name.encode(), METHODS.get(name, OTHER)[1]
        body = bytes([0, 0xFF, 3, len(title), *title])
        body += bytes([0, 0xC0 + channel, program])
        events = [
            (round(time * TICKS), status + channel, note.pitch)
            for note in notes
            for time, status in ((note.onset, 0x90), (note.offset, 0x80))
        ]
        now = 0
        # at equal times notes end before others begin
        for tick, *event in sorted(events):
            # 7 bits a byte, of which all but the last have the highest bit
            delta = [tick - now >> bits & 0x7F | 0x80 for bits in (21, 14, 7)]
            body += bytes([*delta, tick - now & 0x7F, *event, VELOCITY])
            now = tick
        body += bytes([0, 0xFF, 0x2F, 0])
        chunks += [b"MTrk", struct.pack(">I", len(body)), body]
    write_whole(Path(path), b"".join(chunks))
