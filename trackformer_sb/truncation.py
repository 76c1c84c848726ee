"""Audio files that were cut, as interrupted downloads and full disks leave.

libsndfile reads such a file as a shorter one. Of a wav or aiff file it notes in
its log what the header promised. The length of an Ogg file it takes from the
last page it finds, so the file has to end as RFC 3533 says: with a whole page
that ends its stream. An mp3 file says how long it is only in a Xing, Info or
VBRI header, which most encoders write into a first frame without music.
"""

import os
import re
from typing import NamedTuple

# Writers that cannot seek back leave such a placeholder in the data size.
STREAMED_BYTES = 0x7FFFF000

# In libsndfile's log: "data : 176400 (should be 88200)".
CUT_HEADER = re.compile(
    r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE
)

# An Ogg page is a header, of which the last byte is the number of segments, the
# sizes of up to 255 segments, a byte each, and the segments.
PAGE, PAGE_HEADER, FIRST_SEGMENT = b"OggS", 27, 26
BEGIN_OF_STREAM, END_OF_STREAM = 0x02, 0x04
SERIAL = 14  # where the number of the stream begins

# The largest page has 65,307 bytes; the rest is for an ID3v1 tag after it.
OGG_TAIL = 2**16

# Encoders may count the frame of the header or not. 320 kbit/s at 32 kHz.
LARGEST_MP3_FRAME = 1441

# Enough for the frame of a header with some padding before it; the numbers of
# the header end here at the latest.
MP3_HEAD, MP3_HEADER_END = 2**12, 54


class Cut(NamedTuple):
    """What is wrong with the end of a file.

    Arguments
    ---------
    reason : str
        In words, to follow the name of the file.
    certain : bool
        Whether something is missing. If not, the file may as well have been
        recorded from a live stream, which nobody ended.
    """

    reason: str
    certain: bool


def cut_sizes(log):
    """Bytes of samples that a cut wav or aiff file has, and was to have.

    Arguments
    ---------
    log : str
        What libsndfile noted on opening, ``SoundFile.extra_info``.

    Returns
    -------
    tuple of int or None
        Bytes present and bytes promised; None if nothing is missing, or if the
        header only holds the place of a size.

    Example
    -------
    >>> cut_sizes("data : 176400 (should be 88200)")
    (88200, 176400)
    """
    sizes = CUT_HEADER.search(log)
    if sizes is None:
        return None
    promised, present = map(int, sizes.groups())
    return (present, promised) if present < promised < STREAMED_BYTES else None


def find_cut(path, log=""):
    """Tells whether a file ends too early.

    Of Ogg and mp3 files by their two ends, of wav and aiff files by the log.

    Arguments
    ---------
    path : str, bytes or Path
        The file. Whatever is no regular file is not looked at.
    log : str
        Of ``cut_sizes``, if the file is open.

    Returns
    -------
    Cut or None
        None if the file is whole, is of another format, cannot be read, or
        does not say how long it is, as an mp3 file without a header.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     page = b"OggS\\0\\4" + bytes(20) + b"\\2\\xff\\x10" + bytes(271)
    ...     _ = file.write(page[:100])
    ...     file.flush()
    ...     cut = find_cut(file.name)
    ...     _ = file.write(page[100:])
    ...     file.flush()
    ...     print(cut.reason, find_cut(file.name), sep="; now ")
    truncated, 100 of at least 300 bytes; now None
    """
    if sizes := cut_sizes(log):
        return Cut("truncated, {} of {} bytes".format(*sizes), certain=True)
    # a number would be an open file, and a pipe gives its bytes only once
    is_path = isinstance(path, (str, bytes, os.PathLike))
    if not is_path or not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            start, head = _after_tags(file)
            if head.startswith(PAGE):
                first = max(0, size - OGG_TAIL)
                file.seek(first)
                tail = file.read(OGG_TAIL)
                cut = _ogg_cut(tail, first)
                # a recording of several streams may lack its last page
                if cut is None or not cut.certain:
                    cut = _ogg_chain(head, tail) or cut
                return cut
    except OSError:
        return None  # what reads the samples says why
    promised = _mp3_bytes(head)
    if not 0 < promised < STREAMED_BYTES:
        return None
    promised += start
    if size >= promised - LARGEST_MP3_FRAME:
        return None
    return Cut(f"truncated, {size} of {promised} bytes", certain=True)


def _after_tags(file):
    """Where an open file begins after its ID3v2 tags, and its bytes there."""
    start = 0
    while True:
        file.seek(start)
        head = file.read(MP3_HEAD)
        if len(head) < 10 or not head.startswith(b"ID3"):
            break
        # four times seven bits, without header and footer
        size = sum(
            byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0))
        )
        start += 10 + size + (10 if head[5] & 0x10 else 0)
    rest = head.lstrip(b"\0")
    return start + len(head) - len(rest), rest


def _ogg_cut(tail, first):
    """What is wrong with the last page, given the bytes from `first` on."""
    flags, end = 0, None
    place = tail.find(PAGE)
    while place >= 0:
        header = tail[place : place + PAGE_HEADER]
        resume = place + 1
        # version 0 and three flags, else these are letters of a packet
        if header[4:5] <= b"\0" and header[5:6] <= b"\7":
            sizes = place + PAGE_HEADER
            count = header[FIRST_SEGMENT] if sizes <= len(tail) else 0
            end = sizes + count + sum(tail[sizes : sizes + count])
            flags = header[5] if len(header) > 5 else 0
            if end <= len(tail):
                resume = end
        place = tail.find(PAGE, resume)
    present = first + len(tail)
    if end is not None:
        rest = tail[end:]
        if rest and PAGE.startswith(rest):
            end += PAGE_HEADER
        if end > len(tail):
            words = f"truncated, {present} of at least {first + end} bytes"
            return Cut(words, certain=True)
        # the rest is a tag, or nothing
        if flags & END_OF_STREAM:
            return None
    words = "no end-of-stream page, a live recording or cut between two pages"
    return Cut(words, certain=False)


def _pages(data):
    """Places of the pages in a part of an Ogg file that has no false ones."""
    place = data.find(PAGE)
    while 0 <= place <= len(data) - PAGE_HEADER:
        # version 0 and three flags, else these are letters of a packet
        if data[place + 4] == 0 and data[place + 5] <= 7:
            yield place
        place = data.find(PAGE, place + 1)


def _ogg_chain(head, tail):
    """Whether the last stream is none of those that begin the file.

    Of streams one after the other, as the recordings of a radio station,
    libsndfile reads the first.
    """
    starts = {
        head[p + SERIAL : p + SERIAL + 4]
        for p in _pages(head)
        if head[p + 5] & BEGIN_OF_STREAM
    }
    ends = [tail[p + SERIAL : p + SERIAL + 4] for p in _pages(tail)]
    if not ends or not starts or ends[-1] in starts:
        return None
    words = "several Ogg streams in a row, of which only the first is read"
    return Cut(words, certain=True)


def _mp3_bytes(head):
    """Bytes of an mp3 from its first frame on, 0 if that does not say."""
    if len(head) < MP3_HEADER_END or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0  # no frame of Layer III
    is_mpeg1, is_stereo = head[1] & 0x18 == 0x18, head[3] >> 6 != 3
    # the header comes where the side information of a frame would end
    place = 4 + (9, 17, 32)[is_mpeg1 + is_stereo]
    for begin in (place, place + 2):  # after a checksum, if there is one
        if head[begin : begin + 4] in (b"Xing", b"Info"):
            has_frames, has_bytes = head[begin + 7] & 1, head[begin + 7] & 2
            begin += 12 if has_frames else 8
            field = head[begin : begin + 4] if has_bytes else b""
            return int.from_bytes(field, "big")
    if head[36:40] == b"VBRI":
        return int.from_bytes(head[46:50], "big")
    return 0
