"""The ``trackformer`` commands about models: export, info, evaluate, demo."""

import csv
import json
import os
import signal
import sys
import threading

from trackformer_sb.cli_data import complain, positive

# Arguments that several commands have
MODEL = {
    "metavar": "MODEL",
    "default": "default",
    "help": "folder of a separator or of a run, or a model on the hub "
    "(default: the package's own)",
}
DEVICE = {"help": "cuda, mps or cpu (default: the first there is)"}


def add_adapt(parser):
    """Let a separator learn from your own songs.

    Trains a separator further on songs as they are, without stems, and shows
    what it gains on songs that were held out. A separator that got worse is not
    kept. The same command goes on after an interruption.
    """
    parser.add_argument("folder", metavar="FOLDER", help="any tree of songs")
    parser.add_argument(
        "--minutes", type=positive, default=30.0, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        default="adapted",
        metavar="DIR",
        help="folder of its own; its separator/ is the model (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--stems",
        metavar="FOLDER",
        help="songs with stems, one folder each, to measure on; by default how "
        "well the first model's stems of the songs held out are found again "
        "when they are mixed anew, which is agreement and no quality",
    )
    parser.add_argument("--model", **MODEL)
    parser.add_argument("--device", **DEVICE)
    parser.set_defaults(run=_adapt)


def _adapt(args):
    from trackformer_sb.training.adapt import adapt

    before, after, better = adapt(
        args.folder, args.out, args.minutes, args.model, args.stems, args.device
    )
    measure = "true stems" if args.stems else "agreement with the first model"
    print(f"SI-SNR improvement in dB, {measure}\n")
    print(f"{'':<12}{'before':>8}{'after':>8}")
    for name, value in before.items():
        print(f"{name:<12}{value:>8.2f}{after[name]:>8.2f}")
    kept = "the adapted separator" if better else "no gain: the first model"
    print(f"\n{args.out}/separator: {kept}")


def add_export(parser):
    """Make the separator folder of a training again.

    Writes the folder that trackformer and SpeechBrain load, from a checkpoint
    of a training: by default the best one.
    """
    parser.add_argument(
        "experiment",
        metavar="RUN",
        help="folder of a training, results/<experiment>/<seed>",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help="folder to write; a separator that is there is replaced",
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="OUT is a file for onnxruntime: the network of a causal separator "
        "(live for the package's own), frame by frame, its state in and out",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="another checkpoint than the best: RUN/save/CKPT+... or its name",
    )
    parser.add_argument(
        "--push",
        metavar="REPO",
        help="upload the folder to the hub as owner/name; needs a login or "
        "HF_TOKEN",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="a model that --push makes is private",
    )
    parser.set_defaults(run=_export)


def _export(args):
    if args.onnx:
        if args.checkpoint or args.push:
            raise ValueError(
                "--onnx: expected no --checkpoint and no --push; export the "
                "checkpoint first, then its folder"
            )
        from trackformer_sb.inference.streaming import export_onnx

        export_onnx(args.experiment, args.out)
        print(args.out)
        return
    from trackformer_sb.inference.runs import separator_of_run

    separator, metadata = separator_of_run(args.experiment, args.checkpoint)
    print(separator.export(args.out, metadata))
    if args.push:
        commit = separator.push_to_hub(
            args.push,
            private=args.private,
            model_card_kwargs={"metadata": metadata},
        )
        print(commit)


def add_info(parser):
    """Show sizes, training and speed of a separator.

    Prints sizes, rate, outputs and what the card says of the training, and
    separates noise to measure memory and speed on this machine.
    """
    parser.add_argument("model", nargs="?", **MODEL)
    parser.add_argument("--device", **DEVICE)
    parser.add_argument(
        "--seconds",
        type=positive,
        default=10.0,
        help="length of the noise (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object"
    )
    parser.set_defaults(run=_info)


def _info(args):
    from trackformer_sb.inference.measure import (
        describe_model,
        description_text,
    )

    description = describe_model(args.model, args.device, args.seconds)
    if args.json:
        print(json.dumps(description, indent=2))
    else:
        print(description_text(description))


def add_evaluate(parser):
    """Measure how well a separator does on songs with stems.

    Separates the sums of stems in windows and prints means in dB: by name, and
    by the best choice of outputs; what they are is said at the head of
    trackformer_sb/evaluation.py.
    """
    parser.add_argument("model", nargs="?", **MODEL)
    parser.add_argument(
        "--library",
        choices=("trackformer", "asteroid", "speechbrain"),
        default="trackformer",
        help="of MODEL: asteroid, a BaseModel in a file, a folder or on the "
        "hub, of whose pickle only plain values are read; speechbrain, what "
        "SepformerSeparation loads, whose yaml is code: only what you trust "
        "(default: %(default)s)",
    )
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument(
        "--dataset",
        choices=("stems", "midi", "moisesdb", "musdb18hq", "slakh2100"),
        default="stems",
        help="what FOLDER holds; stems are one folder a song and one file an "
        "instrument; of datasets with a split the test songs are taken "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=3.0,
        help="length of a window (default: %(default)s)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="csv file for the figures of each song"
    )
    parser.add_argument("--device", **DEVICE)
    parser.set_defaults(run=_evaluate)


def _evaluate(args):
    from tqdm import tqdm

    from trackformer_sb.data.music import Music
    from trackformer_sb.evaluation import (
        COLUMNS,
        averages,
        load_evaluated,
        measure_song,
    )
    from trackformer_sb.objectives.metrics import HAS_PESQ, NO_PESQ
    from trackformer_sb.training.grid_tables import markdown

    model = load_evaluated(args.model, args.library, args.device)
    songs = Music(args.data, args.dataset).songs(args.seconds)
    songs = [song for song in songs if song.split in ("", "test")]
    if not songs:
        raise ValueError(f"{args.data}: expected test songs, there are none")
    if not HAS_PESQ:
        complain(args, NO_PESQ)
    found, failed = [], 0
    out = args.out or os.devnull
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["song", *COLUMNS])
        for song in tqdm(songs, unit="song", disable=not sys.stderr.isatty()):
            try:
                values = measure_song(*model, song, args.seconds)
            except (RuntimeError, ValueError) as error:
                complain(args, f"{song.name}: {error}")
                failed = 1
                continue
            writer.writerows([song.name, *row] for row in averages(values))
            found += values
    print(markdown(COLUMNS, averages(found)))
    return failed


def add_demo(parser):
    """Open a page in the browser: drop music in, hear its sources.

    Serves a page on which to separate music, to hear its stems with mute, solo,
    gain and pan, and to download them. Ctrl+C ends it and removes the files it
    made.
    """
    parser.add_argument("model", nargs="?", **MODEL)
    parser.add_argument("--device", **DEVICE)
    parser.add_argument(
        "--port",
        type=int,
        help="of the page (default: the first free one from 7860)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; the default is reached from this machine "
        "only, 0.0.0.0 from all over the network (default: %(default)s)",
    )
    parser.add_argument(
        "--max_minutes",
        type=positive,
        default=15,
        metavar="MINUTES",
        help="longest music that is taken (default: %(default)s)",
    )
    parser.set_defaults(run=_demo)


def _wait():
    """Returns on Ctrl+C and when the process is asked to end."""
    end = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: end.set())
    end.wait()


def _demo(args):
    from trackformer_sb.inference.separator import load_separator
    from trackformer_sb.web.page import import_gradio, running_page

    import_gradio()  # before the model, which may take long
    separator = load_separator(args.model, args.device)
    sources = ", ".join(separator.groups or [f"{separator.num_spks} sources"])
    title = f"{args.model}: {sources} at {separator.sample_rate} Hz"
    options = args.host, args.port, args.max_minutes
    with running_page(separator, title, *options) as url:
        print(f"Open {url} (Ctrl+C ends it)", flush=True)
        _wait()
