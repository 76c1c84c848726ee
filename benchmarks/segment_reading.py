"""How fast segments are read from audio files.

    python benchmarks/segment_reading.py [--formats wav flac ogg mp3] \
        [--lengths 3 30] [--workers 0 1 2] [--quick]

Music: songs of the demo band, stereo at 44.1 kHz, --song_seconds long (wav with
16 bits, flac, Vorbis, mp3), written just before: all reads come from the
system's cache, so decoding is measured and no disk.

Reading. Three ways give the same segment, the mean of its channels:
trackformer_sb's `read_segment` (seeks, decodes what is needed); the whole file
by `soundfile.read`, then its slice, as loaders do that know no offsets
(torchaudio's own `load` needs torchcodec and is not measured); SpeechBrain's
`read_audio` with start and stop. Segments are drawn at random, the same for
every way, and come from a torch DataLoader in batches of --batch_size. In each
of --rounds rounds every way reads for --period seconds with every number of
workers, ways turn by turn; the first batch of every worker is not counted, nor
is the start of the workers. One thread a process. Medians of the rounds, with
the range; a ratio above 1 means that trackformer_sb is faster. Before that,
segments from all over every song, beginning and end among them, are compared
with the slice of the whole file.

--quick tries everything in seconds; its figures mean nothing, and it writes no
record unless given --output.
"""

import functools
import pathlib
import statistics
import tempfile
import time

import numpy as np
import soundfile
import torch
from common import Record, new_parser, parse_args, say, table
from speechbrain.dataio.dataio import read_audio
from torch.utils.data import DataLoader, Dataset

from trackformer_sb.audio import audio_info, read_segment
from trackformer_sb.data.band import make_song

SAMPLE_RATE = 44100
FORMATS = ("wav", "flac", "ogg", "mp3")
PANS = (0.5, 0.4, 0.2, 0.8)  # of drums, bass, chords, lead; 0 is left

SONGS = 4  # to read from, of each format
TRIALS = 15  # segments of a song compared with the whole file
QUICK = dict(lengths=[1.0, 3.0], song_seconds=6.0, workers=[0, 1], rounds=1)
QUICK |= dict(period=0.05, batch_size=1)


# --- music -------------------------------------------------------------------


def music(seed, seconds):
    """A song of the demo band in stereo, [time, 2]."""
    stems = make_song(seed, seconds, SAMPLE_RATE).values()
    left, right = (
        sum(stem * np.float32(gain) for stem, gain in zip(stems, gains))
        for gains in ([1 - pan for pan in PANS], PANS)
    )
    sig = np.stack([left, right], axis=1)
    return sig * np.float32(0.9 / np.abs(sig).max())


def write_song(path, sig):
    """Writes a stereo file in the format its ending says."""
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 2) as audio:
        # libsndfile's Vorbis encoder can crash on a long array in one call.
        for begin in range(0, len(sig), SAMPLE_RATE):
            audio.write(sig[begin : begin + SAMPLE_RATE])


# --- reading -----------------------------------------------------------------


def read_ours(path, first, count):
    """Segment as the package reads it, [time]."""
    start, duration = first / SAMPLE_RATE, count / SAMPLE_RATE
    return read_segment(path, start, duration, SAMPLE_RATE)


def read_whole(path, first, count):
    """Segment as the slice of the whole file, [time]."""
    sig, _ = soundfile.read(path, dtype="float32")
    return torch.from_numpy(sig[first : first + count]).mean(dim=1)


def read_speechbrain(path, first, count):
    """Segment as SpeechBrain reads it, [time]."""
    segment = {"file": path, "start": first, "stop": first + count}
    return read_audio(segment).mean(dim=1)


OURS, WHOLE, SPEECHBRAIN = "trackformer_sb", "whole file", "SpeechBrain"
READERS = {OURS: read_ours, WHOLE: read_whole, SPEECHBRAIN: read_speechbrain}
PEERS = (WHOLE, SPEECHBRAIN)


class RandomSegments(Dataset):
    """Segments of files at random; item i is the same for every reader."""

    def __init__(self, paths, seconds, read, seed):
        self.paths = [str(path) for path in paths]
        self.frames = [audio_info(path).num_frames for path in paths]
        self.count = round(seconds * SAMPLE_RATE)
        self.read = read
        self.seed = seed

    def __len__(self):
        return 2**31  # more than any period takes

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        song = int(rng.integers(len(self.paths)))
        first = int(rng.integers(self.frames[song] - self.count + 1))
        return self.read(self.paths[song], first, self.count)


def segments_per_second(dataset, args, workers):
    """Segments a second of a loader that is already running."""
    loader = DataLoader(
        dataset, batch_size=args.batch_size, num_workers=workers
    )
    batches = iter(loader)
    # Workers finish side by side: count whole turns of all of them.
    turn = max(1, workers)
    for _ in range(turn):
        next(batches)
    number, seconds, start = 0, 0.0, time.perf_counter()
    while seconds < args.period:
        for _ in range(turn):
            next(batches)
        number += turn
        seconds = time.perf_counter() - start
    return number * args.batch_size / seconds


def measure_reading(paths, seconds, args):
    """Segments a second of every round, by number of workers and way."""
    rates = {n: {way: [] for way in READERS} for n in args.workers}
    for number in range(args.rounds):
        for workers, found in rates.items():
            for way, read in READERS.items():
                dataset = RandomSegments(paths, seconds, read, number)
                rate = segments_per_second(dataset, args, workers)
                found[way].append(rate)
    return rates


def largest_difference(paths, seconds, read):
    """Largest difference from the slice of the whole file, as text."""
    count = round(seconds * SAMPLE_RATE)
    found = []
    for path in map(str, paths):
        whole = read_whole(path, 0, audio_info(path).num_frames)
        for first in np.linspace(0, len(whole) - count, TRIALS).astype(int):
            sig = read(path, int(first), count)
            # What is missing counts as silence.
            sig = torch.nn.functional.pad(sig, (0, count - len(sig)))
            error = sig - whole[first : first + count]
            found.append(error.abs().max().item())
    wrong = sum(error > 0 for error in found)
    size = f"{max(found):.1e}, " if wrong else ""
    return f"{size}{wrong} of {len(found)} differ"


def middle(rates):
    """Median, smallest and largest rate as text."""
    low, high = min(rates), max(rates)
    return f"{statistics.median(rates):.4g} ({low:.4g} to {high:.4g})"


def report_format(name, measured):
    """Blocks of markdown: the rates of a format by length and workers."""
    rows, header = [], ["s", "workers"]
    for way in READERS:
        header += [f"{way}, segments/s", "x real time"]
    header += [f"ratio to {way}" for way in PEERS]
    ratios = {way: [] for way in PEERS}
    for (seconds, workers), rates in measured.items():
        row = [f"{seconds:g}", workers]
        medians = {way: statistics.median(rates[way]) for way in READERS}
        for way, median in medians.items():
            row += [middle(rates[way]), f"{median * seconds:.4g}"]
        for way, found in ratios.items():
            found.append(medians[OURS] / medians[way])
            row.append(f"{found[-1]:.3g}")
        rows.append(row)
    lines = [
        f"- ratio to {way}: {min(found):.3g} to {max(found):.3g}"
        for way, found in ratios.items()
    ]
    return [f"## Reading: {name}", table(header, rows), "\n".join(lines)]


def reading(folder, args, write):
    """Blocks of markdown for all formats; writes them as there are more."""
    # Of unlike lengths: their last pages and frames are not filled alike.
    lengths = [args.song_seconds + 0.37 * i for i in range(SONGS)]
    sigs = [music(seed, length) for seed, length in enumerate(lengths)]
    blocks, differences = [], []
    for name in args.formats:
        paths = [folder / f"{i}.{name}" for i in range(len(sigs))]
        for path, sig in zip(paths, sigs, strict=True):
            write_song(path, sig)
        measured = {}
        for seconds in args.lengths:
            row = [
                largest_difference(paths, seconds, read)
                for read in (read_ours, read_speechbrain)
            ]
            differences.append([name, f"{seconds:g}", *row])
            rates = measure_reading(paths, seconds, args)
            measured |= {(seconds, n): rates[n] for n in args.workers}
            say(f"{name}, {seconds:g} s: done")
        blocks += report_format(name, measured)
        write(*blocks)
        for path in paths:
            path.unlink()
    return [
        *blocks,
        "## Largest difference from the slice of the whole file",
        table(["format", "s", OURS, SPEECHBRAIN], differences),
    ]


# --- the command -------------------------------------------------------------


def arguments():
    """The command line; --quick lowers what is not given."""
    parser = new_parser(__doc__, "segment_reading")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS)
    )
    parser.add_argument(
        "--lengths", type=float, nargs="+", default=[3.0, 30.0], help="in s"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--period", type=float, default=1.0, help="in s")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--song_seconds", type=float, default=180.0)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
        return parser.parse_args()
    return parse_args(parser)


def main():
    """Measures format by format; writes the record after each."""
    args = arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        output = args.output or folder / "segment_reading.md"
        record = Record("Segment reading", __doc__, output, args.device)
        head = (
            f"{SONGS} songs of {args.song_seconds:g} s; soundfile "
            f"{soundfile.__version__}, libsndfile "
            f"{soundfile.__libsndfile_version__}."
        )
        blocks = reading(folder, args, functools.partial(record.write, head))
        record.write(head, *blocks)
        say(output.read_text(encoding="utf-8"))
    if args.output:
        say(f"wrote {args.output}")


if __name__ == "__main__":
    main()
