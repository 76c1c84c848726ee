"""The ``trackformer`` commands separate, karaoke, remix and transcribe."""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from trackformer_sb import __version__
from trackformer_sb.cli_data import complain, positive
from trackformer_sb.cli_model import DEVICE, MODEL
from trackformer_sb.inference.files import (
    add_record,
    check_overwriting,
    describe,
    find_files,
    place_files,
    read_record,
)
from trackformer_sb.paths import shortened

EPILOG = """\
examples:
  trackformer separate song.mp3
  trackformer separate song.mp3 --stems vocals
  trackformer separate song.mp3 --stems auto --figure
  trackformer separate music/ --out stems --skip-existing
  trackformer separate *.mp3 --format mp3 --song_folders
  trackformer separate song.mp3 --outputs none --remix vocals:-inf,drums:+3
  trackformer separate song.mp3 --model results/separator/1234/separator

exit codes: 0 if all went well, 1 if a file failed (the others are done), 2 for
a wrong usage or a model that does not load, 130 after Ctrl+C; an unfinished
file leaves no results. Paths of written files go to the standard output, one a
line, errors to the standard error.
"""

# Of ``Separator.separate_file``, which make results what they are
OPTIONS = "outputs remix ranked figure file_format song_folders".split()
HOW = "chunk_seconds overlap spatial".split()

# Of ``trackformer separate``, as karaoke and remix have them
ONE_MIX = {
    **{"stems": None, "file_format": "same", "skip_existing": False},
    **{"remix": None, "ranked": False, "figure": False, "song_folders": False},
}


def share(text):
    """A share of a chunk, for argparse."""
    value = float(text)
    if not 0 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"must be in [0, 0.5], got {text}")
    return value


def _add_common(parser, results):
    """What all four commands have in common."""
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="audio files and folders (with all that is below them)",
    )
    parser.add_argument("--model", **MODEL)
    parser.add_argument(
        "--out",
        default=".",
        metavar="DIR",
        help=f"folder for the results: {results}; files of the same name go to "
        "folders in it as they come from (default: this folder)",
    )
    model = parser.add_argument_group("how the model runs")
    model.add_argument("--device", **DEVICE)
    model.add_argument(
        "--chunk_seconds",
        type=positive,
        default=10.0,
        metavar="SECONDS",
        help="what the model sees at once (default: %(default)s)",
    )
    model.add_argument(
        "--overlap",
        type=share,
        default=0.25,
        metavar="SHARE",
        help="of a chunk with the next, 0 to 0.5: context, and a fifth of it "
        "for the crossfade (default: %(default)s)",
    )
    model.add_argument(
        "--spatial",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="tell named stems apart by their places between the channels too; "
        "without effect on --slots",
    )
    model.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="chunks that the model sees at a time (default: %(default)s)",
    )
    parser.set_defaults(run=_separate)


def add_separate(parser):
    """Separate audio files into sources.

    Writes one file per stem (drums, bass, vocals, other), at the rate and with
    the channels of the input; together they sum to it. Music of any length
    takes the same memory. trackformer.json, beside the files, says what each
    was made of.
    """
    parser.epilog = EPILOG
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--format",
        dest="file_format",
        choices=("wav", "flac", "ogg", "mp3", "m4a", "same"),
        default="wav",
        help="wav (32-bit float), flac (24 bit), ogg (Vorbis), mp3 or m4a "
        "(AAC), or the same as the input, with its tags; where outputs exceed "
        "full scale, all but wav have all outputs of the file turned down "
        "alike (default: %(default)s)",
    )
    written.add_argument(
        "--song_folders",
        action="store_true",
        help="write <file>/drums.wav in place of <file>_drums.wav",
    )
    which = written.add_mutually_exclusive_group()
    which.add_argument(
        "--stems",
        metavar="NAMES",
        help="named stems to write, as vocals or drums,bass, and the rest as "
        "one; auto for those that sound in the song (default: all)",
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
        action="append",
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
        action="store_true",
        help="leave out files whose results are there, whole, and made of this "
        "file by this model with these options",
    )
    _add_common(parser, "<file>_drums.wav, or _source0.wav without names")


def add_karaoke(parser):
    """Write songs without their vocals.

    In their format or the nearest that can be written, with their tags and at
    their level: only where a peak exceeds full scale are they turned down.
    """
    parser.add_argument(
        "--keep-backing",
        "--keep_backing",
        dest="outputs",
        action="store_const",
        const="karaoke+backing",
        default="karaoke",
        help="take out only what of the vocals is in the centre of stereo, as "
        "the lead mostly is; backing voices at the sides stay, and with them "
        "some of the lead's reverberation",
    )
    _add_common(parser, "<file>_karaoke")
    parser.set_defaults(**ONE_MIX)


def add_remix(parser):
    """Write songs with other gains of their stems.

    In their format, with their tags:
    trackformer remix song.mp3 --vocals=-6 --drums=3 --pan other=0.3. Where the
    true peak exceeds -1 dB they are turned down.
    """
    # all become parts of what ``separate --remix`` takes
    for name in ("drums", "bass", "vocals", "other"):
        parser.add_argument(
            f"--{name}",
            dest="remix",
            action="append",
            type=f"{name}:{{}}".format,
            metavar="DB",
            help=f"gain of {name}, as --{name}=-6; -inf mutes",
        )
    parser.add_argument(
        "--gain",
        dest="remix",
        action="append",
        type=lambda text: text.replace("=", ":"),
        metavar="NAME=DB",
        help="gain of any stem, of source0 and so on where they have no names",
    )
    parser.add_argument(
        "--pan",
        dest="remix",
        action="append",
        type=lambda text: text.replace("=", "@"),
        metavar="NAME=PLACE",
        help="move a stem to the left, down to -1, or to the right, up to 1; "
        "mono becomes stereo",
    )
    _add_common(parser, "<file>_remix")
    parser.set_defaults(outputs="none", **ONE_MIX)


def _fingerprint(separator):
    """A name for what a separator computes: its parts and their weights."""
    import torch

    digest = hashlib.sha256(json.dumps(separator.config).encode())
    for value in separator.state_dict().values():
        content = value.cpu().flatten().view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()[:12]


def _plan(args, results_of):
    """Each file -> its results, none in the place of a file or of others.

    ``results_of`` takes the file, the folder and what their names begin with.
    """
    from trackformer_sb.audio import AUDIO_EXTENSIONS, UNREAD_MUSIC

    files = find_files(args.files, args.out, AUDIO_EXTENSIONS)
    folders = filter(os.path.isdir, args.files)
    for path in find_files(folders, args.out, tuple(UNREAD_MUSIC)):
        if reason := UNREAD_MUSIC.get(Path(path).suffix.lower()):
            complain(args, f"{path}: left out: {reason}")
    results = {
        path: results_of(
            path, Path(args.out, folder), shortened(Path(path).stem)
        )
        for path, folder in zip(files, place_files(files))
    }
    check_overwriting(results)
    os.makedirs(args.out, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # it can be written
    return results


def _for_each(args, results, work):
    """Works on file after file; returns the exit code.

    ``work`` takes a file and its planned results, and gives those it wrote and
    what is to be said. A file that fails is named in a line and stops no other.
    """
    from tqdm import tqdm

    failed = 0
    quiet = not sys.stderr.isatty() or len(results) < 2
    for path, paths in tqdm(results.items(), unit="file", disable=quiet):
        try:
            written, message = work(path, paths)
        except (OSError, ValueError, RuntimeError) as error:
            # soundfile's and torch's errors are RuntimeErrors
            written, message = [], str(error)
            if path not in message:
                message = f"{path}: {message}"
            failed = 1
        if written:
            with tqdm.external_write_mode():
                print(*written, sep="\n", flush=True)
        if message:
            with tqdm.external_write_mode(sys.stderr):
                complain(args, message)
    return failed


def _separate(args):
    from trackformer_sb.inference.remix import chosen_stems
    from trackformer_sb.inference.separator import AUTO, load_separator
    from trackformer_sb.inference.writing import format_of, output_paths

    if args.command == "remix" and not args.remix:
        raise ValueError("remix: expected a gain or a place, as --vocals=-6")
    separator = load_separator(args.model, args.device)
    outputs = args.outputs
    if args.stems == AUTO:
        outputs = AUTO
    elif args.stems is not None:
        outputs = chosen_stems(args.stems, separator.groups)
    remix = args.remix and ",".join(args.remix)
    names, *_ = separator.mixes(outputs, remix)
    options = {name: getattr(args, name) for name in (*OPTIONS, *HOW)}
    options |= {"outputs": outputs, "remix": remix}
    model = {"version": __version__, "model": _fingerprint(separator)}
    made = {**model, **options}

    def results_of(path, folder, stem):
        kind = format_of(path, args.file_format)
        what = names, kind, args.figure, args.song_folders
        return output_paths(folder, stem, *what)

    def work(path, paths):
        folder = paths[0].parents[1 if args.song_folders else 0]
        place = os.path.relpath(folder / shortened(Path(path).stem), args.out)
        known = args.skip_existing and read_record(args.out).get(place)
        # what was counted is beside it
        if known and known | describe(path, paths, made) == known:
            return [], f"{path}: skipped, its results are there"
        counts = {}
        written = separator.separate_file(
            path,
            folder,
            batch_size=args.batch,
            progressbar=sys.stderr.isatty(),
            on_count=partial(counts.__setitem__, "count"),
            **options,
        )
        for stale in {*paths} - {*written} if args.stems == AUTO else ():
            # of a separation in which more stems sounded
            stale.unlink(missing_ok=True)
        if args.command == "separate":
            description = describe(path, paths, made) | counts
            add_record(args.out, place, description)
        return written, ""

    return _for_each(args, _plan(args, results_of), work)


def add_transcribe(parser):
    """Write the notes of songs as MIDI files.

    A track a stem: melodies of vocals and bass, kick, snare and hi-hat of the
    drums, all notes of the others.
    """
    parser.add_argument(
        "--stems",
        metavar="NAMES",
        help="those to transcribe, as vocals,bass (default: all)",
    )
    _add_common(parser, "<file>.mid")
    parser.set_defaults(run=_transcribe)


def _transcribe(args):
    from trackformer_sb.inference.separator import load_separator
    from trackformer_sb.inference.transcription import (
        heard_stems,
        transcribe_file,
    )

    separator = load_separator(args.model, args.device)
    outputs = heard_stems(separator, args.stems)
    options = {name: getattr(args, name) for name in HOW}
    options |= {"batch_size": args.batch, "progressbar": sys.stderr.isatty()}

    def work(path, paths):
        tracks = transcribe_file(separator, path, *paths, outputs, **options)
        silent = f"{path}: no notes found, {paths[0]} has none"
        return paths, "" if any(tracks.values()) else silent

    def results_of(path, folder, stem):
        return [folder / f"{stem}.mid"]

    return _for_each(args, _plan(args, results_of), work)
