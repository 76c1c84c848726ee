"""The ``trackformer`` commands about trained models: export, info, demo."""

import json
import signal
import threading

from trackformer_sb.cli_data import positive

# Arguments that several commands have
MODEL = {
    "metavar": "MODEL",
    "default": "default",
    "help": "folder of a separator or of a run, or a model on the hub "
    "(default: the package's own)",
}
DEVICE = {"help": "cuda, mps or cpu (default: the first there is)"}


def add_export(commands):
    """Adds ``trackformer export``."""
    parser = commands.add_parser(
        "export",
        help="make the separator folder of a training again",
        description=(
            "Writes the folder that trackformer and SpeechBrain load, from a "
            "checkpoint of a training: by default the best one."
        ),
    )
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


def add_info(commands):
    """Adds ``trackformer info``."""
    parser = commands.add_parser(
        "info",
        help="sizes, training and speed of a separator",
        description=(
            "Prints sizes, rate, outputs and what the card says of the "
            "training, and separates noise to measure memory and speed on "
            "this machine."
        ),
    )
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


def add_demo(commands):
    """Adds ``trackformer demo``."""
    parser = commands.add_parser(
        "demo",
        help="a page in the browser: drop music in, hear its sources",
        description=(
            "Serves a page on which to separate music, to hear its stems with "
            "mute, solo, gain and pan, and to download them. Ctrl+C ends it "
            "and removes the files it made."
        ),
    )
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
