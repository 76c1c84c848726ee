"""The parts of the page that are made of text."""

import html
from pathlib import Path
from urllib.parse import quote

import numpy as np

from trackformer_sb.web.spectrogram import band_edges

# Where the server offers the folders of the sessions.
TRACKS = "tracks"

# Frequencies that are marked in the spectrograms, in Hz.
TICKS = ((100, "100 Hz"), (1000, "1 kHz"), (10000, "10 kHz"))

SEPARATION = """\
<section class="separation" data-rate="{rate}" data-channels="{channels}" \
data-frames="{frames}" aria-label="Separation of {title}">
<div class="transport">
<button class="play" type="button">Play</button>
<span class="time"></span>
<input class="seek" type="range" min="0" max="1000" step="any" value="0" \
aria-label="Position">
<span></span>
</div>
<div class="message" role="alert"></div>
{tracks}
<p class="note">Spectrograms: {lowest:.0f} Hz to {highest:.1f} kHz on a \
logarithmic scale, colours as in the original. Levels are relative to the \
original. Together the sources are the original, which is muted at first: \
press its Solo to compare.</p>
</section>
"""

TRACK = """\
<div class="track" data-url="{url}">
<span class="name">{label}<span class="level">{level}</span></span>
<span>
<button class="mute" type="button" aria-pressed="{muted}" \
aria-label="Mute {label}">Mute</button>
<button class="solo" type="button" aria-pressed="false" \
aria-label="Solo {label}">Solo</button>
</span>
<div class="view"><img src="{picture}" alt="Spectrogram of {label}">\
{ticks}<div class="playhead"></div></div>
<a class="download" href="{url}" download="{name}" \
aria-label="Download {label}">Download</a>
</div>
"""


def escaped(text):
    """Text as it may stand in the page, also in an attribute.

    Braces too: the page's framework would fill in templates it finds.

    Arguments
    ---------
    text : str
        Any text, as the name of a file.

    Returns
    -------
    str
        HTML that shows the text.

    Example
    -------
    >>> escaped("${a} & <b>")
    '&#36;&#123;a&#125; &amp; &lt;b&gt;'
    """
    text = html.escape(text)
    # not after each other: "#" and ";" stay
    for character in "${}`":
        text = text.replace(character, f"&#{ord(character)};")
    return text


def _file_url(path):
    """Where the server offers a file of a session, relative to the page."""
    folder, name = Path(path).parts[-2:]
    return escaped(f"{TRACKS}/{quote(folder)}/{quote(name)}")


def problem(message):
    """An error as it is shown in the page.

    Arguments
    ---------
    message : str
        What is wrong.

    Returns
    -------
    str
        HTML.

    Example
    -------
    >>> problem("a<b.txt is empty")
    '<div class="problem" role="alert">a&lt;b.txt is empty</div>'
    """
    return f'<div class="problem" role="alert">{escaped(message)}</div>'


def _ticks(edges):
    """Lines at round frequencies over a spectrogram."""
    ticks = []
    for frequency, text in TICKS:
        if edges[0] < frequency < edges[-1] * 0.8:
            share = np.log(frequency / edges[0]) / np.log(edges[-1] / edges[0])
            ticks.append(
                f'<span class="tick" aria-hidden="true" '
                f'style="top:{100 * (1 - share):.1f}%">{text}</span>'
            )
    return "".join(ticks)


def separation(separated, title):
    """The player of a separated file.

    Arguments
    ---------
    separated : Separated
        Its tracks, the original first.
    title : str
        Name of the file.

    Returns
    -------
    str
        HTML that ``player.js`` brings to life.
    """
    edges = band_edges(separated.sample_rate)
    ticks = _ticks(edges)
    tracks = []
    for i, track in enumerate(separated.tracks):
        silent = track.level == float("-inf")
        level = "silent" if silent else f"{track.level:.1f} dB"
        tracks.append(
            TRACK.format(
                url=_file_url(track.path),
                label=escaped(track.label),
                level=level if i else "the file itself",
                muted="false" if i else "true",
                picture=_file_url(track.picture),
                name=escaped(Path(track.path).name),
                ticks=ticks,
            )
        )
    return SEPARATION.format(
        rate=separated.sample_rate,
        channels=separated.channels,
        frames=separated.frames,
        title=escaped(title),
        tracks="".join(tracks),
        lowest=edges[0],
        highest=edges[-1] / 1000,
    )
