"""Sound of what libsndfile does not decode exactly, by FFmpeg (PyAV).

And what libsndfile does not write: mp3, m4a, the places of channels, covers.

A length here is what decoding gives. What containers say of theirs is up to
seconds off: an mp3 without a Xing header is guessed from its first frames, raw
aac from its bit rate.
"""

import functools
import itertools
import os
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import soxr
from av.stream import Disposition

# Seconds decoded before a place and dropped: frames of mp3 lean on up to ten
# before them, of 72 ms each at 8 kHz.
LEAD = 1.0
CONTAINERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,iff,matroska,"
    "mov,mp3,mpc,mpc8,mpeg,mpegts,ogg,tak,tta,voc,w64,wav,wv"
)
# Containers whose time stamps are exact after a seek; those of others are
# rounded to milliseconds (matroska, asf), guessed (ac3), off by frames (ogg).
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "mp3", "aac")
BLOCK = 2**16  # samples that are skipped at once
# The header between two joined mp3 files is one; a damaged file has more.
BAD_PACKETS = 3
MP3_SLACK = 2000  # bytes: the largest frame, which some do not count

# Of each format that is written: container, codec, samples and options. LAME
# turns the sound down where it is given a bit rate, not a quality.
ENCODERS = {
    "wav": ("wav", "pcm_f32le", "flt", {}),
    "flac": ("flac", "flac", "s32", {}),
    "mp3": ("mp3", "libmp3lame", "fltp", {"flags": "+qscale"}),
    "m4a": ("mp4", "aac", "fltp", {}),
}
# Codec and samples of a format that is to be like that of a file, by the name
# of the latter in libsndfile or FFmpeg.
SUBTYPES = {
    ("wav", "PCM_U8"): ("pcm_u8", "u8"),
    ("wav", "PCM_16"): ("pcm_s16le", "s16"),
    ("wav", "PCM_24"): ("pcm_s24le", "s32"),
    ("wav", "PCM_32"): ("pcm_s32le", "s32"),
    ("wav", "DOUBLE"): ("pcm_f64le", "dbl"),
    ("wav", "ULAW"): ("pcm_mulaw", "s16"),
    ("wav", "ALAW"): ("pcm_alaw", "s16"),
    ("flac", "PCM_16"): ("flac", "s16"),
    ("m4a", "alac"): ("alac", "s32p"),
}
BIT_RATE = 160_000  # per channel, of m4a
# Of containers: a wav of more than 4 GB gets 64-bit sizes.
CONTAINER_OPTIONS = {"rf64": "auto", "brand": "M4A "}
COVERS = ("mjpeg", "png")  # which mp3, m4a and flac take
# What stays true of a part of a song; its loudness, say, does not.
KEPT = "title artist album album_artist composer genre date track disc".split()


class Tags(NamedTuple):
    """What a file says of its sound, in FFmpeg's words.

    The places of its channels, some of its metadata, and the codec, width,
    height and bytes of its cover, if it has one.
    """

    layout: str
    metadata: dict
    cover: tuple | None


def _open_container(path):
    # not the lists of other files that FFmpeg takes for films, and no URLs
    return av.open(
        f"file:{os.fspath(path)}",
        metadata_errors="ignore",
        options={"format_whitelist": CONTAINERS},
    )


def read_tags(path):
    """The Tags of an audio file, see ``FFmpegWriter``."""
    with _open_container(path) as container:
        audio = container.streams.audio[0]
        # ogg has them in the stream, as films have titles of their streams
        found = {**audio.metadata, **container.metadata}
        metadata = {key.lower(): value for key, value in found.items()}
        cover = None
        for stream in container.streams.video:
            codec = stream.codec_context
            attached = stream.disposition & Disposition.attached_pic
            if attached and codec.name in COVERS and not cover:
                picture = bytes(next(container.demux(stream)))
                cover = codec.name, codec.width, codec.height, picture
        return Tags(
            # files of one or two need not say where they are
            {1: "mono", 2: "stereo"}.get(audio.channels, audio.layout.name),
            {key: metadata[key] for key in KEPT if metadata.get(key)},
            cover,
        )


class FFmpegWriter(AbstractContextManager):
    """A file that grows, float32 wav, 24 bit flac, mp3 or m4a.

    ``file`` is a path or an open file, ``subtype`` among ``SUBTYPES``; others
    change nothing. Where mp3 or m4a have no such rate it is the next higher
    one, or their highest. Raises av.FFmpegError, at once if the format has no
    such layout of channels.

    Example
    -------
    >>> import tempfile
    >>> tags = Tags("stereo", {"title": "Song (vocals)"}, cover=None)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/song.mp3"
    ...     with FFmpegWriter(path, "mp3", 44100, tags) as file:
    ...         file.write(np.zeros((5000, 2), "float32"))
    ...     with FFmpegFile(path) as file:
    ...         print(read_tags(path).metadata["title"], file.frames)
    Song (vocals) 5000
    """

    def __init__(self, file, file_format, sample_rate, tags, subtype=None):
        if not hasattr(file, "write"):
            file = f"file:{os.fspath(file)}"
        muxer, codec, self._samples, options = ENCODERS[file_format]
        codec, self._samples = SUBTYPES.get(
            (file_format, subtype), (codec, self._samples)
        )
        rates = av.Codec(codec, "w").audio_rates or [sample_rate]
        rate = min(rates, key=lambda x: (x < sample_rate, abs(x - sample_rate)))
        # an m4a then says its length in samples
        timescale = {"movie_timescale": str(rate)}
        self._container = av.open(
            file,
            "w",
            format=muxer,
            container_options={**CONTAINER_OPTIONS, **timescale},
        )
        self._container.metadata.update(tags.metadata)
        self._stream = self._container.add_stream(
            codec,
            rate,
            options=options,
            layout=tags.layout,
            format=self._samples,
        )
        self._stream.bit_rate = BIT_RATE * self._stream.channels
        self._place, self._resampler = 0, None
        if rate != sample_rate:
            channels = self._stream.channels
            self._resampler = soxr.ResampleStream(sample_rate, rate, channels)
        if tags.cover and file_format != "wav":
            codec, width, height, content = tags.cover
            picture = av.Packet(content)
            picture.pts = picture.dts = 0
            picture.stream = self._container.add_mux_stream(
                codec, width=width, height=height
            )
            picture.stream.disposition = Disposition.attached_pic
            self._container.mux(picture)
        self._container.start_encoding()

    def __exit__(self, *error):
        self.close()

    def write(self, sig):
        """Appends float32 [time, channels]."""
        if self._resampler is not None:
            sig = self._resampler.resample_chunk(np.ascontiguousarray(sig))
        if len(sig):
            self._encode(sig)

    def _encode(self, sig):
        samples = "flt"
        if self._samples in ("s32", "s32p"):
            # the encoder would cut to 24 bits rather than round
            samples = "s32"
            sig = np.rint(sig * 2.0**23).clip(-(2**23), 2**23 - 1)
            sig = sig.astype(np.int32) << 8
        row = np.ascontiguousarray(sig).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(row, samples, self._stream.layout)
        frame.sample_rate = self._stream.rate
        frame.time_base = Fraction(1, self._stream.rate)
        frame.pts = self._place
        self._place += len(sig)
        self._container.mux(self._stream.encode(frame))

    def close(self):
        """Writes what is left, and closes the file."""
        if self._resampler is not None:
            nothing = np.zeros((0, self._stream.channels), np.float32)
            rest = self._resampler.resample_chunk(nothing, last=True)
            if len(rest):
                self._encode(rest)
        self._container.mux(self._stream.encode(None))
        self._container.close()


class FFmpegFile(AbstractContextManager):
    """The first sound of a file, with the names of ``soundfile.SoundFile``.

    Raises av.FFmpegError, here or later, if FFmpeg cannot read it, there is no
    sound in it, or less of an mp3 than its header says.
    """

    format = "FFMPEG"

    def __init__(self, path):
        self.name = path
        self._open()

    def _open(self):
        self._container = _open_container(self.name)
        if not self._container.streams.audio:
            self.close()
            raise av.InvalidDataError(0, "no sound in it")
        self._stream = self._container.streams.audio[0]
        self.samplerate = self._stream.rate
        self.channels = self._stream.channels
        self.subtype = self._stream.codec_context.name
        self._mp4 = self._container.format.name == SEEKABLE[0]
        self._use(self._decode(), 0)

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Closes the file."""
        self._container.close()

    @functools.cached_property
    def _header_fits(self):
        mp3 = self._container.format.name == "mp3"
        return _header_fits(self.name) if mp3 else None

    @functools.cached_property
    def frames(self):
        """Length in samples per channel; found by decoding where need be."""
        stream, length = self._stream, self._stream.duration
        if not self._header_fits:
            with FFmpegFile(self.name) as other:
                if not self._mp4:
                    return sum(len(block) for _, block in other._decode())
                # each packet says when it ends
                packets = other._container.demux(other._stream)
                ends = [p.pts + p.duration for p in packets if p.duration]
            length = max(ends, default=0) - max(0, stream.start_time or 0)
        return round(length * stream.time_base * self.samplerate)

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
        while missing > 0 and (found := next(self._blocks, None)):
            _, block = found
            parts.append(block[:missing])
            self._rest = block[missing:]
            missing -= len(block)
        sig = np.concatenate(parts)
        self._place += len(sig)
        return sig

    def _use(self, blocks, place):
        self._blocks, self._place = blocks, place
        self._rest = np.zeros((0, self.channels), np.float32)

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
                time, end = frame.time, frame.samples
                # encoders fill up the last one, and mp4 tells how far it counts
                until = (frame.pts or 0) + frame.duration
                if self._mp4 and until == self._stream.duration:
                    end = round(frame.duration * frame.time_base * frame.rate)
                for one in converters[kind].resample(frame):
                    sig = one.to_ndarray().reshape(-1, self.channels)
                    yield time, sig[:end]


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
