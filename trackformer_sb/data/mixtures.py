"""Mixtures of mixtures: the two segments of a MixIT training item.

MixIT (arXiv 2006.12701) trains on the sum of two mixtures. Here they are
segments of two songs, drawn so that an item depends on seed, epoch, segment and
rank alone: not on the order of items, the worker, or an interrupted run.
"""

import numpy as np
import torch

from trackformer_sb.audio import UnreadableAudio, read_segment
from trackformer_sb.data.augment import Augmentation
from trackformer_sb.data.manifest import Manifest

# Root mean square below which a stem counts as silent: -80 dB full scale,
# above the noise that lossy codecs leave in a rest.
SILENCE_RMS = 1e-4

MAX_FAILURES = 20  # unreadable segments in one item, which are an error

# The channel a mono model hears; "random" draws left or right for a mixture.
CHANNELS = ("mean", "left", "right", "random")


def read_tracks(row, sample_rate, channel="mean"):
    """Reads all tracks of a segment, mono: [tracks, time].

    `row` is of a manifest: "tracks" (name -> path, or paths of files that are
    added), "start" and "duration" are used. `channel` and errors are those of
    ``audio.read_segment``.

    Example
    -------
    >>> import tempfile, soundfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tracks = {"bass": f"{folder}/b.wav", "drums": [f"{folder}/d.wav"]}
    ...     soundfile.write(tracks["bass"], np.full(8, 0.5), 4)
    ...     soundfile.write(tracks["drums"][0], np.full(6, 0.25), 4)
    ...     row = {"tracks": tracks, "start": 1.0, "duration": 1.0}
    ...     read_tracks(row, sample_rate=4)
    tensor([[0.5000, 0.5000, 0.5000, 0.5000],
            [0.2500, 0.2500, 0.0000, 0.0000]])
    """
    time = round(row["duration"] * sample_rate)
    tracks = torch.empty(len(row["tracks"]), time)
    for track, files in zip(tracks, row["tracks"].values(), strict=True):
        track.copy_(_read_track(row, files, sample_rate, channel))
    return tracks


def _read_track(row, files, sample_rate, channel):
    """One track [time], the sum of its files."""
    first, *others = [files] if isinstance(files, str) else files
    what = row["start"], row["duration"], sample_rate
    track = read_segment(first, *what, channel=channel)
    for path in others:
        track += read_segment(path, *what, channel=channel)
    return track


class MixtureOfMixtures:
    """Makes an item of two mixtures from a segment and a drawn partner.

    Mixture 0 is the segment asked for. Mixture 1, its partner, is a segment of
    another song, every segment of the other songs being equally likely. A
    segment that cannot be read is replaced by a drawn one.

    All choices come from a generator seeded by (seed, epoch, index of the
    segment among the sorted rows, rank), always drawn in the same order:
    another `gain_db` leaves the partners as they are.

    Arguments
    ---------
    rows : Mapping
        A ``Manifest``, or a dict: segment id -> row.
    sample_rate : int
        Rate of the mixtures in Hz.
    seed : int
        Seed of all choices, from 0.
    rank : int
        Process number in distributed training, so that ranks draw differently.
    gain_db : float
        Each mixture is scaled by a gain uniform in -gain_db..gain_db.
    single_stem_share : float
        Share of items, 0 to 1, whose partner is a single stem, one that sounds
        in the segment if there is any. Without stems it stays a mixture.
        Such 1+1 and N+1 items help MixIT to separate within a song.
    silent_share : float
        Share of items, 0 to 1, whose partner is silence. The two shares add up
        to 1 at most.
    equal_levels : bool
        Whether the partner is brought to the level of mixture 0, before the
        gains; silence stays silence.
    channel : str
        What of a stereo file is heard: "mean", "left", "right", or "random",
        one of the two for each mixture. Evaluation hears the mean.
    augmentation : Augmentation, optional
        Changes each mixture, not in evaluation.
    with_stems : bool
        For evaluation: returns the stems of mixture 0 and ignores `set_epoch`.

    Raises
    ------
    ValueError
        If rows hold fewer than two songs or an argument is out of range.

    Example
    -------
    >>> import tempfile, soundfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> rows = {}
    >>> for song, level in (("loud", 0.5), ("soft", 0.125)):
    ...     path = f"{folder.name}/{song}.wav"
    ...     soundfile.write(path, np.full(4, level), 4)
    ...     rows[song] = {"song": song, "tracks": {"mixture": path}}
    ...     rows[song].update(start=0.0, duration=1.0, has_stems=False)
    >>> make_item = MixtureOfMixtures(rows, sample_rate=4, seed=0)
    >>> mixtures, stems, skipped = make_item("soft")
    >>> mixtures
    tensor([[0.1250, 0.1250, 0.1250, 0.1250],
            [0.5000, 0.5000, 0.5000, 0.5000]])
    >>> folder.cleanup()
    """

    def __init__(
        self,
        rows,
        sample_rate,
        seed,
        rank=0,
        gain_db=0.0,
        single_stem_share=0.0,
        silent_share=0.0,
        equal_levels=False,
        channel="mean",
        augmentation=None,
        with_stems=False,
    ):
        shares = (single_stem_share, silent_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                "expected single_stem_share and silent_share from 0 to 1 in "
                f"sum, got {single_stem_share} and {silent_share}"
            )
        if gain_db < 0 or seed < 0:
            raise ValueError(
                f"expected gain_db and seed from 0, got {gain_db} and {seed}"
            )
        if channel not in CHANNELS:
            raise ValueError(
                f"channel must be one of {', '.join(CHANNELS)}, got {channel!r}"
            )
        self.rows = rows if isinstance(rows, Manifest) else Manifest(rows)
        self.sample_rate = sample_rate
        self.seed = seed
        self.rank = rank
        self.gain_db = gain_db
        self.single_stem_share = single_stem_share
        self.silent_share = silent_share
        self.equal_levels = equal_levels
        self.channel = "mean" if with_stems else channel
        self.augmentation = augmentation or Augmentation()
        if with_stems:
            self.augmentation = Augmentation()
        self.with_stems = with_stems
        self.epoch = 0
        if self.rows.num_songs < 2:
            raise ValueError(
                "mixtures of mixtures need segments of at least 2 songs, got "
                f"{len(rows)} segments of {self.rows.num_songs} songs"
            )

    def set_epoch(self, epoch, skip_batches=0):
        """Other partners and gains from here on, except in evaluation.

        Call it before the workers of the epoch start: each has its own copy.
        ``skip_batches`` is for datasets that pass over batches themselves.
        """
        if not self.with_stems:
            self.epoch = epoch

    def __call__(self, segment_id):
        """Makes the item of a segment.

        Arguments
        ---------
        segment_id : str
            A key of the rows.

        Returns
        -------
        mixtures : torch.Tensor
            [2, time]: the segment and its partner, with their gains.
        stems : torch.Tensor
            [tracks, time], summing to mixture 0; [0, time] without
            `with_stems` or if the row has none.
        skipped : list of (str, str)
            File, and message with the reason, of every segment replaced.

        Raises
        ------
        UnreadableAudio
            After 20 unreadable segments.
        """
        index = self.rows.index(segment_id)
        rng = np.random.default_rng((self.seed, self.epoch, index, self.rank))
        partner_draw, kind = rng.random(2)
        gains = 10 ** (rng.uniform(-self.gain_db, self.gain_db, size=2) / 20)
        heard = self._draw_heard(rng), self._draw_heard(rng)
        skipped = []
        index, (mixture, stems) = self._read_or_replace(
            index,
            lambda: int(rng.integers(len(self.rows))),
            lambda row: self._read_mixture(row, *heard[0]),
            skipped,
        )
        mixtures = torch.zeros(2, len(mixture))
        torch.mul(mixture, gains[0], out=mixtures[0])
        if kind >= self.silent_share:
            single = kind < self.silent_share + self.single_stem_share
            try:
                _, partner = self._read_or_replace(
                    self._partner(index, partner_draw),
                    lambda: self._partner(index, rng.random()),
                    lambda row: self._read_partner(row, single, rng, *heard[1]),
                    skipped,
                )
            except UnreadableAudio:
                if not self.with_stems:
                    raise
                # an evaluation goes on with the song alone, and tells
                return mixtures, stems * gains[0], skipped
            gain = gains[1]
            if self.equal_levels:
                gain *= _level_ratio(mixture, partner)
            torch.mul(partner, gain, out=mixtures[1])
        return mixtures, stems * gains[0], skipped

    def _draw_heard(self, rng):
        """Channel and change of a mixture."""
        side = "left" if rng.random() < 0.5 else "right"
        channel = side if self.channel == "random" else self.channel
        return channel, self.augmentation.draw(rng)

    def _partner(self, index, draw):
        """Index of a segment of another song for a draw in [0, 1)."""
        first, end = self.rows.song_range(index)
        own = end - first
        partner = int(draw * (len(self.rows) - own))
        return partner if partner < first else partner + own

    def _read_or_replace(self, index, draw, read, skipped):
        """What `read` makes of row `index`, or of the first readable draw."""
        while True:
            try:
                return index, read(self.rows.row(index))
            except UnreadableAudio as error:
                skipped.append((error.path, str(error)))
                if len(skipped) >= MAX_FAILURES:
                    reasons = dict.fromkeys(reason for _, reason in skipped)
                    raise UnreadableAudio(
                        f"no readable segment found after {len(skipped)} "
                        f"tries: {'; '.join(reasons)}"
                    ) from error
            index = draw()

    def _read_mixture(self, row, channel, change):
        """The mixture of a row [time], and its stems [tracks, time] if any."""
        source = self._source(row, change)
        tracks = read_tracks(source, self.sample_rate, channel)
        mixture = self._changed(tracks.sum(0), row, change)
        has_stems = self.with_stems and row["has_stems"]
        return mixture, tracks if has_stems else mixture.new_zeros(
            0, len(mixture)
        )

    def _read_partner(self, row, single, rng, channel, change):
        """The mixture of a row, or one stem that sounds, [time]."""
        if not (single and row["has_stems"]):
            return self._read_mixture(row, channel, change)[0]
        source = self._source(row, change)
        tracks = list(row["tracks"].values())
        for i in rng.permutation(len(tracks)):
            stem = _read_track(source, tracks[i], self.sample_rate, channel)
            if stem.square().mean().sqrt() > SILENCE_RMS:
                break
        return self._changed(stem, row, change)

    def _source(self, row, change):
        """The row with the part of the song that a change needs."""
        if self.augmentation.is_off:
            return row
        start, seconds = self.augmentation.source(
            change, row["start"], row["duration"], row["song_seconds"]
        )
        return {**row, "start": start, "duration": seconds}

    def _changed(self, sig, row, change):
        if self.augmentation.is_off:
            return sig
        num_samples = round(row["duration"] * self.sample_rate)
        return self.augmentation.apply(
            change, sig, num_samples, self.sample_rate
        )


def _level_ratio(sig, other):
    """The gain that brings a signal to the level of another one."""
    level, other_level = (float(x.square().mean().sqrt()) for x in (sig, other))
    if min(level, other_level) < SILENCE_RMS:
        return 1.0
    return level / other_level
