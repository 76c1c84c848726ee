"""Sound of what libsndfile does not decode exactly, by FFmpeg (PyAV).

A length here is what decoding gives. What containers say of theirs is up to
seconds off: an mp3 without a Xing header is guessed from its first frames, raw
aac from its bit rate.
"""

import functools
import itertools
import os

import av
import numpy as np

# Seconds decoded before a place and dropped: frames of mp3 lean on up to ten
# before them, of 72 ms each at 8 kHz.
LEAD = 1.0
CONTAINERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,iff,matroska,"
    "mov,mp3,mpc,mpc8,mpeg,ogg,tak,tta,w64,wav,wv"
)
# Containers whose time stamps are exact after a seek; those of others are
# rounded to milliseconds (matroska, asf), guessed (ac3), off by frames (ogg).
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "mp3", "aac")
BLOCK = 2**16  # samples that are skipped at once
# The header between two joined mp3 files is one; a damaged file has more.
BAD_PACKETS = 3
MP3_SLACK = 2000  # bytes: the largest frame, which some do not count


class FFmpegFile:
    """The first sound of a file, with the names of ``soundfile.SoundFile``.

    Raises av.FFmpegError, here or later, if FFmpeg cannot read it, there is no
    sound in it, or less of an mp3 than its header says.
    """

    format = "FFMPEG"

    def __init__(self, path):
        self.name = path
        self._open()

    def _open(self):
        # not the lists of other files that FFmpeg takes for films, and no URLs
        self._container = av.open(
            f"file:{os.fspath(self.name)}",
            metadata_errors="ignore",
            options={"format_whitelist": CONTAINERS},
        )
        if not self._container.streams.audio:
            self.close()
            raise av.InvalidDataError(0, "no sound in it")
        self._stream = self._container.streams.audio[0]
        self.samplerate = self._stream.rate
        self.channels = self._stream.channels
        self.subtype = self._stream.codec_context.name
        self._use(self._decode(), 0)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Closes the file."""
        self._container.close()

    @functools.cached_property
    def _header_fits(self):
        if self._container.format.name == "mp3":
            return _header_fits(self.name)
        return None

    @functools.cached_property
    def frames(self):
        """Length in samples per channel; found by decoding where need be."""
        if self._header_fits:
            seconds = self._stream.duration * self._stream.time_base
            return round(seconds * self.samplerate)
        with FFmpegFile(self.name) as other:
            return sum(len(block) for _, block in other._decode())

    def tell(self):
        """The sample [int] that is read next."""
        return self._place

    def seek(self, first):
        """Lets the next ``read`` begin at a sample [int]."""
        begin = first / self.samplerate - LEAD
        origin = None
        # a header that does not fit leads seeks astray
        by_clock = self._header_fits is not False
        if begin > 0 and by_clock and self._container.format.name in SEEKABLE:
            origin, _ = next(self._decode(), (None, None))
        if origin is not None:
            place = round((begin + origin) / self._stream.time_base)
            self._container.seek(place, stream=self._stream)
            blocks = self._decode()
            time, block = next(blocks, (None, None))
            if time is not None:
                place = round((time - origin) * self.samplerate)
                if place <= first:
                    self._use(itertools.chain([(time, block)], blocks), place)
                    self._skip(first - place)
                    return
        # from the beginning, counting
        self.close()
        self._open()
        self._skip(first)

    def read(self, count, **_):
        """Up to `count` samples, float32 [time, channels]."""
        parts, missing = [self._rest[:count]], count - len(self._rest)
        self._rest = self._rest[count:]
        while missing > 0 and (block := self._next()) is not None:
            parts.append(block[:missing])
            self._rest = block[missing:]
            missing -= len(block)
        sig = np.concatenate(parts)
        self._place += len(sig)
        return sig

    def _use(self, blocks, place):
        self._blocks, self._place = blocks, place
        self._rest = np.zeros((0, self.channels), np.float32)

    def _next(self):
        return next(self._blocks, (None, None))[1]

    def _skip(self, count):
        while count > 0 and len(sig := self.read(min(count, BLOCK))):
            count -= len(sig)

    def _decode(self):
        """Yields (seconds by the clock of the file, [time, channels])."""
        bad, converters = 0, {}
        layout = self._stream.layout.name
        for packet in self._container.demux(self._stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                bad += 1
                if bad > BAD_PACKETS:
                    raise
                continue
            for frame in frames:
                kind = frame.format.name, frame.layout.name, frame.sample_rate
                if kind not in converters:  # joined files may change theirs
                    converters[kind] = av.AudioResampler(
                        "flt", layout, self.samplerate
                    )
                time = frame.time
                for one in converters[kind].resample(frame):
                    sig = one.to_ndarray().reshape(-1, self.channels)
                    yield time, sig


def _header_fits(path):
    """Whether an mp3's Xing header agrees with its size; None without one."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        tag, begin = file.read(10), 0
        if tag[:3] == b"ID3":
            # 28 bits in 4 bytes
            parts = zip(tag[6:10], (21, 14, 7, 0))
            begin = 10 + sum(part << shift for part, shift in parts)
        file.seek(begin)
        header = file.read(64)
        place = max(header.find(b"Xing"), header.find(b"Info"))
        if place < 0 or len(header) < place + 16 or header[place + 7] & 3 != 3:
            return None
        end = begin + int.from_bytes(header[place + 12 : place + 16], "big")
        if end > size + MP3_SLACK:
            raise av.InvalidDataError(0, f"truncated, {size} of {end} bytes")
        file.seek(end)
        more = file.read(3)
        # tags may follow, another mp3 begins with a tag or a frame of layer 3
        joined = more == b"ID3" or (
            len(more) > 1 and more[0] == 0xFF and more[1] & 0xE6 == 0xE2
        )
        # FFmpeg itself goes by the header up to 1 % of the size
        return end > size - MP3_SLACK or (end > 0.99 * size and not joined)
