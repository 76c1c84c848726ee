"""Which segments of a song count."""

import math

import numpy as np

from trackformer_sb.data.levels import (
    active_share,
    segment_level,
    sum_levels,
)


class SegmentFilter:
    """Leaves out segments that are silent for the most part, or soft.

    Arguments
    ---------
    min_active_share : float
        Share of a segment, in [0, 1], that must be above -60 dBFS.
    min_level_db : float, optional
        Level in dBFS RMS that it must have.

    Raises
    ------
    ValueError
        For a share outside [0, 1] or a level above 0 dBFS.

    Example
    -------
    >>> SegmentFilter(0.0, None).is_on, SegmentFilter(0.5, None).is_on
    (False, True)
    """

    def __init__(self, min_active_share=0.0, min_level_db=None):
        if not 0 <= min_active_share <= 1:
            raise ValueError(
                f"expected min_active_share in [0, 1], got {min_active_share}"
            )
        if min_level_db is not None and not min_level_db <= 0:
            raise ValueError(
                f"expected min_level_db in dBFS, at most 0, got {min_level_db}"
            )
        self.min_active_share = min_active_share
        self.min_level_db = min_level_db

    @property
    def is_on(self):
        """Whether it needs the levels of the files."""
        return self.min_active_share > 0 or self.min_level_db is not None

    def passes(self, levels, start, duration):
        """Whether the segment of a mixture counts.

        Arguments
        ---------
        levels : AudioLevels
            Of the mixture.
        start, duration : float
            The segment in seconds.

        Returns
        -------
        bool
        """
        if active_share(levels, start, duration) < self.min_active_share:
            return False
        if self.min_level_db is None:
            return True
        return segment_level(levels, start, duration) >= self.min_level_db


def song_lines(
    songs,
    segment_seconds,
    hop_seconds,
    findings,
    segment_filter=None,
    levels=None,
):
    """The songs of a split with their segments, for ``write_manifest``.

    Only whole segments count, one every hop.

    Arguments
    ---------
    songs : list of Song
        With their lengths, sorted by name.
    segment_seconds, hop_seconds : float
        Length of a segment, and distance of two of them, in seconds.
    findings : Findings
        Takes songs of which no segment passes the filter.
    segment_filter : SegmentFilter, optional
        Leaves out segments.
    levels : dict, optional
        Path -> AudioLevels of all files, for the filter.

    Returns
    -------
    lines : list of (dict, numpy.ndarray)
        A line of the manifest, and the numbers of its segments.
    left_out : int
        How many segments did not pass the filter.
    """
    lines, left_out = [], 0
    for song in songs:
        # Lengths and hops in decimal seconds are not exact.
        hops = (song.seconds - segment_seconds) / hop_seconds + 1e-6
        numbers = np.arange(math.floor(hops) + 1)
        if segment_filter is not None and segment_filter.is_on:
            mixture = sum_levels([levels[path] for path in song.files])
            passed = [
                i
                for i in numbers.tolist()
                if segment_filter.passes(
                    mixture, i * hop_seconds, segment_seconds
                )
            ]
            left_out += len(numbers) - len(passed)
            numbers = np.array(passed, numbers.dtype)
            if not passed:
                findings.skip(
                    song.path,
                    "no segment is as active as min_active_share and as loud "
                    "as min_level_db ask for",
                    unwanted=True,
                )
        line = {
            "song": song.name,
            "tracks": {
                name: paths[0] if len(paths) == 1 else list(paths)
                for name, paths in song.tracks.items()
            },
            "duration": segment_seconds,
            "hop": hop_seconds,
            "song_seconds": song.seconds,
            "has_stems": song.has_stems,
        }
        lines.append((line, numbers))
    return lines, left_out
