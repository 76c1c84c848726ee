"""The ``trackformer separate`` command."""

import argparse
import glob
import os
import signal
import sys
import threading
from contextlib import contextmanager

from trackformer_sb.cli_data import complain, number, positive
from trackformer_sb.cli_model import add_loading

DESCRIPTION = """\
Writes one file per stem (drums, bass, vocals, other), at the rate and with the
channels of the input; together they sum to it. Music of any length takes the
same memory.
"""

EPILOG = """\
examples:
  trackformer separate song.mp3
  trackformer separate song.mp3 --stems vocals
  trackformer separate music/ --out stems --skip-existing
  trackformer separate "*.mp3" --format flac
  trackformer separate song.mp3 --outputs none --remix vocals:-inf,drums:+3
  trackformer separate song.mp3 --model results/separator/1234/separator

exit codes: 0 if all went well, 1 if a file failed (the others are done), 2 for
a wrong usage or a model that does not load, 130 after Ctrl+C, 143 if asked to
end; an unfinished file leaves no results. Paths of written files go to the
standard output, one a line, errors to the standard error.
"""


def _overlap(text):
    """A fraction of a chunk."""
    value = number(text)
    if not 0 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"must be in [0, 0.5], got {text}")
    return value


def _from_one_up(text):
    """A number of things."""
    value = number(text, int)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


def _outputs(text):
    """Which outputs to write."""
    from trackformer_sb.inference.remix import parse_outputs

    try:
        return parse_outputs(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _remix(text):
    """Gains of outputs."""
    from trackformer_sb.inference.remix import parse_remix

    try:
        return parse_remix(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_separate(commands):
    """Adds ``trackformer separate``.

    Arguments
    ---------
    commands : argparse._SubParsersAction
        What ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "separate",
        help="separate audio files into sources",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="audio files, folders (with all that is below them) or globs",
    )
    parser.add_argument(
        "--model",
        default="default",
        metavar="DIR",
        help="separator folder as training leaves it, or a model on the hub "
        "(default: the package's own)",
    )
    parser.add_argument(
        "--out",
        default=".",
        metavar="DIR",
        help="folder for the stems: <file>_drums.wav and so on, or "
        "<file>_source0.wav where the model has no names; files of the same "
        "name go to folders in it as they come from (default: this folder)",
    )
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--format",
        choices=("wav", "flac", "ogg"),
        default="wav",
        help="wav (32-bit float), flac (24 bit) or ogg (Vorbis); where outputs "
        "exceed full scale, flac and ogg have all outputs of the file turned "
        "down alike, and a remix by itself (default: %(default)s)",
    )
    which = written.add_mutually_exclusive_group()
    which.add_argument(
        "--stems",
        metavar="NAMES",
        help="named stems to write, as vocals or drums,bass, and the rest as "
        "one (default: all)",
    )
    which.add_argument(
        "--slots",
        dest="outputs",
        action="store_const",
        const="all",
        help="all outputs of the model as they are, several a stem",
    )
    which.add_argument(
        "--outputs",
        type=_outputs,
        metavar="LIST",
        help="outputs to keep, as 0,2, or to sum into groups, as "
        "drums=0+3,rest=1+2; none for only a remix or a figure",
    )
    written.add_argument(
        "--ranked",
        action="store_true",
        help="number outputs without names by their energy in the file, 0 the "
        "loudest",
    )
    written.add_argument(
        "--remix",
        type=_remix,
        metavar="GAINS",
        help="write <file>_remix as well, the sum with gains in dB: "
        "vocals:-inf,drums:+3 mutes the vocals and raises the drums, 0:-inf "
        "mutes output 0 of a model without names; the others stay",
    )
    written.add_argument(
        "--figure",
        action="store_true",
        help="draw <file>_figure.png: spectrograms of song and stems",
    )
    written.add_argument(
        "--skip-existing",
        "--skip_existing",
        dest="skip_existing",
        action="store_true",
        help="leave out files whose results are all there, not older, and made "
        "of this file by this model with these options",
    )
    model = parser.add_argument_group("how the model runs")
    add_loading(model)
    model.add_argument(
        "--chunk_seconds",
        type=positive,
        default=10.0,
        metavar="SECONDS",
        help="what the model sees at once (default: %(default)s)",
    )
    model.add_argument(
        "--overlap",
        type=_overlap,
        default=0.25,
        metavar="SHARE",
        help="of a chunk with the next, 0 to 0.5: context, and a fifth of it "
        "for the crossfade (default: %(default)s)",
    )
    model.add_argument(
        "--batch",
        type=_from_one_up,
        default=1,
        metavar="N",
        help="chunks that the model sees at a time (default: %(default)s)",
    )
    parser.set_defaults(run=_separate)


def _prepare(args):
    """The separator, and options of ``separate_file`` by file."""
    from trackformer_sb.data.audio import AUDIO_EXTENSIONS
    from trackformer_sb.inference.files import (
        check_overwriting,
        find_files,
        place_files,
    )
    from trackformer_sb.inference.remix import chosen_stems
    from trackformer_sb.inference.separator import load_separator
    from trackformer_sb.inference.writing import output_paths

    out = os.path.realpath(args.out)
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {args.out}: expected a folder, got a file")
    for path in args.files:
        if os.path.isdir(path) and os.path.realpath(path) == out:
            raise ValueError(
                f"--out {args.out}: expected another folder than that of the "
                "music, whose results would be separated next time"
            )
    files = find_files(args.files, args.out, AUDIO_EXTENSIONS)
    if not files:
        raise ValueError(f"no audio files in {', '.join(args.files)}")
    separator = load_separator(args.model, args.device)
    outputs = args.outputs
    if args.stems is not None:
        outputs = chosen_stems(args.stems, separator.groups)
    wanted = {
        "file_format": args.format,
        "outputs": outputs,
        "remix": args.remix,
        "figure": args.figure,
    }
    jobs, planned = {}, {}
    for path, (folder, stem) in zip(files, place_files(files)):
        out_folder = os.path.join(args.out, folder) if folder else args.out
        jobs[path] = {"out_folder": out_folder, "stem": stem, **wanted}
        planned[path] = output_paths(
            num_spks=separator.num_spks,
            **{**jobs[path], "outputs": separator.named_outputs(outputs)},
        )
    check_overwriting(planned)
    return separator, jobs


@contextmanager
def _clean_stop():
    """Has signals unwind the stack, so that unfinished files are removed."""

    def stop(signum, _):
        raise SystemExit(128 + signum)

    before = {}
    # only the main thread may set handlers
    if threading.current_thread() is threading.main_thread():
        # a closed terminal, which not all systems tell of
        names = [n for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
        before = {
            signum: signal.signal(signum, stop)
            for signum in (getattr(signal, name) for name in names)
            # nohup has asked for it
            if signal.getsignal(signum) != signal.SIG_IGN
        }
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class _Bars:
    """Progress of a file and of all files, on a terminal only."""

    def __init__(self, files):
        from tqdm import tqdm

        self.shown = sys.stderr.isatty()
        self.seconds = {path: self._seconds(path) for path in files}
        self.before = 0.0
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"
        self.one = tqdm(
            total=1.0, disable=not self.shown, bar_format=form, leave=False
        )
        self.all = tqdm(
            total=sum(self.seconds.values()) or 1.0,
            desc=f"all {len(files)} files",
            disable=not self.shown or len(files) < 2,
            bar_format=form + " [{elapsed}<{remaining}]",
        )

    def _seconds(self, path):
        if not self.shown:
            return 0.0
        import soundfile

        from trackformer_sb.inference.overlap_add import UNKNOWN_FRAMES

        try:
            info = soundfile.info(os.fsencode(path))
        except (OSError, RuntimeError, TypeError):  # the last of a .raw file
            return 0.0  # separate_file says what is wrong
        return 0.0 if info.frames == UNKNOWN_FRAMES else info.duration

    def start(self, path, place):
        """Begins a file; returns what reports the seconds done of it."""
        self.begun = False
        self.one.reset(total=self.seconds[path] or 1.0)
        self.one.set_description_str(
            f"{place}/{len(self.seconds)} {os.path.basename(path)}"
        )

        def progress(done, total):
            self.begun = True
            self.one.update(done - self.one.n)
            self.all.update(self.before + done - self.all.n)

        return progress

    def stop(self, path):
        """Ends a file, however far it came."""
        self.before += self.seconds[path]
        self.all.update(self.before - self.all.n)
        self.one.refresh()

    def print(self, lines):
        """Prints lines above the bars."""
        from tqdm import tqdm

        try:
            for line in lines:
                tqdm.write(str(line), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            # nobody reads on, as in "| head": the files are wanted all the same
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def complain(self, args, message):
        """Prints a message of an error above the bars."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            complain(args, message)

    def close(self):
        """Leaves the terminal as it is."""
        self.one.close()
        self.all.close()


def _separate(args):
    """Runs ``trackformer separate``."""
    from trackformer_sb.inference.files import PARTIAL

    try:
        separator, jobs = _prepare(args)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        complain(args, error)
        return 2
    for folder in {job["out_folder"] for job in jobs.values()}:
        for left in sorted(glob.glob(f"{glob.escape(folder)}/.*{PARTIAL}")):
            complain(
                args,
                f"{left}: left by a run that was killed, unless one is at work "
                "there; it may be deleted",
            )
    bars = _Bars(jobs)
    try:
        with _clean_stop():
            failed = _separate_all(args, separator, jobs, bars)
    finally:
        bars.close()
    return 1 if failed else 0


def _separate_all(args, separator, jobs, bars):
    """Separates file after file; returns how many failed."""
    failed = 0
    for place, (path, options) in enumerate(jobs.items(), 1):
        progress = bars.start(path, place)
        try:
            written = separator.separate_file(
                path,
                chunk_seconds=args.chunk_seconds,
                overlap=args.overlap,
                batch_size=args.batch,
                ranked=args.ranked,
                skip_existing=args.skip_existing,
                progressbar=False,
                progress=progress,
                **options,
            )
        except (OSError, ValueError, RuntimeError) as error:
            # soundfile's and torch's errors are RuntimeErrors
            reason = str(error)
            if path not in reason:
                reason = f"{path}: {reason}"
            bars.complain(args, reason)
            failed += 1
        else:
            if bars.begun:
                bars.print(written)
            else:
                bars.complain(args, f"{path}: skipped, its results are there")
        finally:
            bars.stop(path)
    return failed
