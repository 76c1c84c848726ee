"""The ``trackformer`` command that opens a page in the browser."""

import argparse
import signal
import sys
import threading

from trackformer_sb.cli_data import complain, number, positive
from trackformer_sb.cli_model import add_loading, add_model


def _port(text):
    """A number of a TCP port, for argparse."""
    value = number(text, int)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be in [1, 65535], got {text}")
    return value


def add_demo(commands):
    """Adds ``trackformer demo``.

    Arguments
    ---------
    commands : argparse._SubParsersAction
        What ``add_subparsers`` returned.

    Example
    -------
    >>> parser = argparse.ArgumentParser()
    >>> add_demo(parser.add_subparsers())
    >>> args = parser.parse_args(["demo", "separator"])
    >>> args.host, args.max_minutes
    ('127.0.0.1', 15)
    """
    parser = commands.add_parser(
        "demo",
        help="a page in the browser: drop music in, hear its sources",
        description=(
            "Serves a page on which to separate music, to hear its stems with "
            "mute, solo and volume, and to download them. Ctrl+C ends it and "
            "removes the files it made."
        ),
    )
    add_model(parser)
    parser.add_argument(
        "--port",
        type=_port,
        help="of the page (default: the first free one from 7860)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; the default is reached from this machine "
        "only, 0.0.0.0 from all over the network (default: %(default)s)",
    )
    add_loading(parser)
    parser.add_argument(
        "--max_megabytes",
        type=positive,
        default=100,
        metavar="MB",
        help="largest file that is taken (default: %(default)s)",
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
    before = signal.signal(signal.SIGTERM, lambda *_: end.set())
    try:
        end.wait()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _demo(args):
    """Runs ``trackformer demo``."""
    from trackformer_sb.inference.separator import load_separator
    from trackformer_sb.web.page import import_gradio, running_page

    try:
        import_gradio()  # before the model, which may take long
        separator = load_separator(args.model, args.device)
        sources = ", ".join(
            separator.groups or [f"{separator.num_spks} sources"]
        )
        title = f"{args.model}: {sources} at {separator.sample_rate} Hz"
        page = running_page(
            separator,
            title,
            host=args.host,
            port=args.port,
            max_megabytes=args.max_megabytes,
            max_minutes=args.max_minutes,
        )
        with page as url:
            print(f"Open {url} (Ctrl+C ends it)", flush=True)
            if args.host not in ("127.0.0.1", "localhost", "::1"):
                print(
                    f"{args.host} may be reached from other machines: whoever "
                    "can open the page can use this one to separate",
                    file=sys.stderr,
                    flush=True,
                )
            _wait()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        complain(args, error)
        return 2
    return 0
