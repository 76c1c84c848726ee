"""Whole Ogg and mp3 files pass, cut ones do not, wherever they were cut."""

import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from trackformer_sb.truncation import (
    LARGEST_MP3_FRAME,
    OGG_TAIL,
    cut_sizes,
    find_cut,
)

RATE = 48000
OPTIONS = {
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3"},
}
REAL_MUSIC = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def contents():
    """Extension -> bytes of 3 s of stereo noise."""
    sig = np.random.default_rng(0).uniform(-0.3, 0.3, (3 * RATE, 2))
    made = {}
    for extension, options in OPTIONS.items():
        file = io.BytesIO()
        with soundfile.SoundFile(file, "w", RATE, 2, **options) as writer:
            for block in np.split(sig, 9):  # a long one overflows the encoder
                writer.write(block)
        made[extension] = file.getvalue()
    return made


@pytest.fixture(scope="module")
def cut_of(tmp_path_factory):
    """What is found of a file with these bytes."""
    path = tmp_path_factory.mktemp("cuts") / "song"

    def find(content):
        path.write_bytes(content)
        return find_cut(path)

    return find


def id3v2(num_bytes, footer=False):
    size = bytes((num_bytes >> shift) & 127 for shift in (21, 14, 7, 0))
    head = b"ID3\4\0" + bytes([0x10 * footer]) + size
    return head + bytes(num_bytes) + (b"3DI" + head[3:]) * footer


TAGS_AFTER = {
    "nothing": b"",
    "ID3v1": b"TAG" + b"x" * 125,
    "APEv2": b"APETAGEX" + bytes(300),
    "Lyrics3": b"LYRICSBEGIN" + bytes(20) + b"000031LYRICS200",
}


@pytest.mark.parametrize("extension", OPTIONS)
@pytest.mark.parametrize("tag", TAGS_AFTER)
def test_whole_files_pass(contents, cut_of, extension, tag):
    content = contents[extension]
    assert cut_of(content + TAGS_AFTER[tag]) is None
    if extension == "mp3":
        assert cut_of(id3v2(200000) + content + TAGS_AFTER[tag]) is None


@pytest.mark.skipif(
    not REAL_MUSIC.is_dir(), reason=f"no real music at {REAL_MUSIC}"
)
def test_real_music_passes():
    files = sorted(REAL_MUSIC.rglob("*.ogg"))
    assert files
    assert [path for path in files if find_cut(path)] == []


# --- Ogg ---------------------------------------------------------------------


def page(packets, flags=0, serial=1):
    """A page of packets below 255 bytes; nobody looks at its checksum."""
    sizes = bytes([len(packets), *map(len, packets)])
    number = serial.to_bytes(4, "little")
    head = b"OggS\0" + bytes([flags]) + bytes(8) + number + bytes(8)
    return head + sizes + b"".join(packets)


def page_ends(content):
    """Where each page ends, walking from the first."""
    ends, place = [], 0
    while place < len(content):
        assert content[place : place + 4] == b"OggS"
        count = content[place + 26]
        sizes = content[place + 27 : place + 27 + count]
        place += 27 + count + sum(sizes)
        ends.append(place)
    return ends


@pytest.mark.parametrize("extension", ["ogg", "opus"])
@settings(max_examples=200, deadline=None)
@given(missing=st.integers(1), near=st.booleans())
def test_ogg_is_never_whole_without_its_last_bytes(
    contents, cut_of, extension, missing, near
):
    content = contents[extension]
    # four bytes say that it is Ogg
    size = len(content) - 1 - missing % (600 if near else len(content) - 4)
    cut = cut_of(content[:size])
    assert cut.certain == (size not in page_ends(content))
    if cut.certain:
        assert cut.reason.startswith(f"truncated, {size} of at least ")
        assert size < int(cut.reason.split()[5]) <= len(content)


@pytest.mark.parametrize("extension", ["ogg", "opus"])
def test_ogg_cut_between_two_pages_may_be_a_live_recording(
    contents, cut_of, extension
):
    content = contents[extension]
    *ends, size = page_ends(content)
    assert size == len(content)
    for end in ends:
        cut = cut_of(content[:end])
        assert not cut.certain
        assert "no end-of-stream page" in cut.reason


def test_ogg_cut_near_the_start_of_a_page(cut_of):
    """Of the next page there is less than its header, or its sizes."""
    content = page([b"music"]) + page([b"more", b"music"], flags=4)
    first = len(page([b"music"]))
    for size in range(first + 1, len(content)):
        needed = first + 27
        if size >= first + 27:
            needed += 2 + sum(content[first + 27 : size][:2])
        words = f"truncated, {size} of at least {needed} bytes"
        assert cut_of(content[:size]) == (words, True)
    assert cut_of(content) is None


def test_ogg_of_several_streams(cut_of):
    """Chained or multiplexed: the last page counts, whosever it is."""
    skeleton = page([b"fishead"], 2, 7) + page([b""], 4, 7)
    cover = page([b"theora"], 2, 8) + page([b"frame"], 4, 8)
    music = page([b"vorbis"], 2) + page([b"notes"], 0) + page([b"end"], 4)
    assert cut_of(skeleton + music) is None
    assert cut_of(cover + music) is None
    assert cut_of(music + music) is None
    assert cut_of(page([b"fishead"], 2, 7) + music + page([], 4, 7)) is None
    for content in (skeleton + music, music + music):
        assert cut_of(content[:-1]).certain
        assert not cut_of(content[: -len(page([b"end"]))]).certain
    # in the letters that a page starts with, the last page being one that ends
    assert cut_of(music + music[:2]).certain


def test_ogg_chain_is_longer_than_what_is_read(contents, cut_of):
    """One stream after the other, as a radio station's recording."""
    first = contents["ogg"]
    second = b"".join(
        # another number of the stream; nobody checks the checksum here
        first[a : a + 14] + b"abcd" + first[a + 18 : b]
        for a, b in zip([0, *page_ends(first)], page_ends(first))
    )
    assert cut_of(second) is None
    cut = cut_of(first + second)
    assert cut.certain
    assert cut.reason.startswith("several Ogg streams in a row")
    # a recording that was stopped
    chain = first + second
    assert cut_of(chain[: page_ends(chain)[-2]]) == cut


@pytest.mark.parametrize(
    "packet",
    [b"OggS is where a page starts", page([b"x" * 250], 4), page([b"x"], 4)],
)
def test_letters_in_packets_are_no_pages(cut_of, packet):
    packet = packet[:200]
    content = page([b"head"], 2) + page([packet]) + page([b"end"], 4)
    assert cut_of(content) is None
    last = page([packet], 4)
    assert cut_of(page([b"head"], 2) + last) is None
    assert not cut_of(page([b"head"], 2) + page([packet])).certain


def test_ogg_with_much_after_its_last_page(cut_of):
    """Space that was reserved for a download shows no page at all."""
    content = page([b"head"], 2) + page([b"end"], 4)
    assert cut_of(content + bytes(OGG_TAIL - len(content))) is None
    assert not cut_of(content + bytes(OGG_TAIL)).certain


def test_largest_page_fits(cut_of):
    largest = page([b"x" * 254 + b"y"] * 255, flags=4)
    assert len(largest) == 65307
    content = page([b"head"], 2) + largest
    assert cut_of(content) is None
    assert cut_of(content + TAGS_AFTER["ID3v1"]) is None
    for missing in (1, 65000, 65306):
        assert cut_of(content[:-missing]).certain


# --- mp3 ---------------------------------------------------------------------


def test_mp3_written_here_has_a_header(contents):
    """Otherwise the tests below say nothing."""
    assert contents["mp3"][36:40] in (b"Xing", b"Info")


@settings(max_examples=200, deadline=None)
@given(missing=st.integers(0), near=st.booleans(), tag=st.integers(0, 5000))
def test_mp3_is_cut_if_more_than_a_frame_is_missing(
    contents, cut_of, missing, near, tag
):
    whole = (id3v2(tag) if tag else b"") + contents["mp3"]
    # the field that says how many bytes there are ends before 54
    most = len(contents["mp3"]) - 54
    size = len(whole) - missing % (3000 if near else most)
    cut = cut_of(whole[:size])
    if len(whole) - size <= LARGEST_MP3_FRAME:
        assert cut is None
    else:
        assert cut == (f"truncated, {size} of {len(whole)} bytes", True)


def mp3(kind, num_bytes, audio, second=0xFB, fourth=0, place=36, flags=3):
    """A first frame that promises a number of bytes, then others."""
    head = bytes([0xFF, second, 0x90, fourth])
    promise = num_bytes.to_bytes(4, "big")
    if kind == b"VBRI":
        fields = bytes(6) + promise + bytes(20)
    else:
        frames = bytes(4) if flags & 1 else b""
        fields = flags.to_bytes(4, "big") + frames + promise
    frame = (head.ljust(place, b"\0") + kind + fields).ljust(417, b"\0")
    return frame + bytes([0xFF, second]) + bytes(audio - 2)


# second and fourth byte of a frame, and where the header is in it
LAYOUTS = {
    "MPEG 1, stereo": (0xFB, 0x00, 36),
    "MPEG 1, joint stereo": (0xFB, 0x40, 36),
    "MPEG 1, mono": (0xFB, 0xC0, 21),
    "MPEG 2, stereo": (0xF3, 0x00, 21),
    "MPEG 2, mono": (0xF3, 0xC0, 13),
    "MPEG 2.5, mono": (0xE3, 0xC0, 13),
    "with a checksum": (0xFA, 0x00, 38),
    "with a checksum that is not there": (0xFA, 0x00, 36),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [b"Xing", b"Info", b"VBRI"])
@pytest.mark.parametrize("flags", [2, 3, 15])
def test_headers_of_mp3(cut_of, layout, kind, flags):
    second, fourth, place = LAYOUTS[layout]
    place = 36 if kind == b"VBRI" else place
    content = mp3(kind, 10417, 10000, second, fourth, place, flags)
    for before in (b"", bytes(1000), id3v2(300), id3v2(9, True) + id3v2(500)):
        assert cut_of(before + content) is None
        cut = cut_of((before + content)[:-2000])
        promised = len(before) + 10417
        assert cut.reason == f"truncated, {promised - 2000} of {promised} bytes"


@pytest.mark.parametrize("kind", [b"Xing", b"VBRI"])
@pytest.mark.parametrize("num_bytes", [0, 2**31, 2**32 - 1])
def test_mp3_header_without_a_size(cut_of, kind, num_bytes):
    assert cut_of(mp3(kind, num_bytes, 10000)) is None


def test_mp3_that_does_not_say_its_size(cut_of):
    assert cut_of(mp3(b"Xing", 10**6, 10000, flags=1)) is None
    assert cut_of(mp3(b"none", 10**6, 10000)) is None
    # Layer II
    assert cut_of(mp3(b"Xing", 10**6, 10000, second=0xFD)) is None
    assert cut_of(id3v2(5000)[:4000]) is None


@pytest.mark.parametrize("kind", [b"Xing", b"VBRI"])
def test_mp3_that_ends_in_its_header(cut_of, kind):
    content = mp3(kind, 10**6, 10000)
    assert [cut_of(content[:size]) for size in range(54)] == [None] * 54
    assert cut_of(content[:54]).certain


# --- what is neither ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "AIFF"])
def test_other_formats_are_not_looked_at(cut_of, kind):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(9000), RATE, format=kind)
    assert cut_of(file.getvalue()) is None
    assert cut_of(file.getvalue()[:50]) is None


@pytest.mark.parametrize("content", [b"", b"O", b"\xff", b"ID3", bytes(9000)])
def test_bytes_that_say_nothing(cut_of, content):
    assert cut_of(content) is None


def test_what_is_no_regular_file(tmp_path):
    assert find_cut(tmp_path) is None
    assert find_cut(tmp_path / "missing.ogg") is None
    assert find_cut(io.BytesIO(b"OggS")) is None
    assert find_cut(None) is None
    with open(tmp_path / "song.ogg", "wb+") as file:
        file.write(b"OggS")
        file.flush()
        assert find_cut(file.fileno()) is None
        assert find_cut(os.fsencode(file.name)).certain


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipes_keep_their_bytes(tmp_path):
    os.mkfifo(tmp_path / "pipe.ogg")
    found = []
    thread = threading.Thread(
        target=lambda: found.append(find_cut(tmp_path / "pipe.ogg")),
        daemon=True,
    )
    thread.start()
    thread.join(timeout=30)
    assert found == [None]


@pytest.mark.parametrize(
    ("log", "sizes"),
    [
        ("  data : 400 (should be 100)\n", (100, 400)),
        ("Form\nSSND : 400 (should be 399)\n", (399, 400)),
        ("data : 100 (should be 400)", None),
        ("data : 2147479552 (should be 100)", None),
        ("data : 4294967295 (should be 100)", None),
        ("data : 400", None),
        ("", None),
    ],
)
def test_sizes_in_the_log(log, sizes):
    assert cut_sizes(log) == sizes
