"""The ``trackformer`` commands about trained models: export and info."""

import json

from trackformer_sb.cli_data import complain, positive


def add_model(parser):
    """Adds which model: ``MODEL``.

    Arguments
    ---------
    parser : argparse.ArgumentParser
        Of a command.
    """
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="default",
        help="separator folder as training leaves it, or a model on the hub "
        "(default: the package's own, where it has one)",
    )


def add_loading(parser):
    """Adds where a model runs: ``--device``.

    Arguments
    ---------
    parser : argparse.ArgumentParser
        Of a command, or a group of its arguments.
    """
    parser.add_argument(
        "--device", help="cpu or cuda; by default a GPU if there is one"
    )


def add_export(commands):
    """Adds ``trackformer export``.

    Arguments
    ---------
    commands : argparse._SubParsersAction
        What ``add_subparsers`` returned.
    """
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
    """Runs ``trackformer export``."""
    from trackformer_sb.inference.runs import separator_of_run

    try:
        separator, metadata = separator_of_run(args.experiment, args.checkpoint)
        print(separator.export(args.out, metadata))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        complain(args, error)
        return 2
    if args.push:
        try:
            commit = separator.push_to_hub(
                args.push,
                private=args.private,
                model_card_kwargs={"metadata": metadata},
            )
        except (OSError, ValueError) as error:
            complain(args, f"{args.push}: not uploaded: {error}")
            return 1
        print(commit)
    return 0


def add_info(commands):
    """Adds ``trackformer info``.

    Arguments
    ---------
    commands : argparse._SubParsersAction
        What ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "info",
        help="sizes, training and speed of a separator",
        description=(
            "Prints sizes, rate, outputs and what the card says of the "
            "training, and separates noise to measure memory and speed on "
            "this machine."
        ),
    )
    add_model(parser)
    add_loading(parser)
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
    """Runs ``trackformer info``."""
    from trackformer_sb.inference.measure import (
        describe_model,
        description_text,
    )

    try:
        description = describe_model(args.model, args.device, args.seconds)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        complain(args, error)
        return 2
    if args.json:
        print(json.dumps(description, indent=2))
    else:
        print(description_text(description))
    return 0
