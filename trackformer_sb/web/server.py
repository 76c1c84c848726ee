"""Serves the page, and cleans up behind it.

Everything comes from this machine: no fonts, scripts or statistics of others.
"""

import contextlib
import os
import socket
import tempfile
from importlib import resources
from pathlib import Path

from trackformer_sb.web.markup import TRACKS
from trackformer_sb.web.page import build_page, import_gradio


def _check_port(host, port):
    """Refuses a port on which another program listens."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise OSError(
            f"{host}:{port} cannot be used ({error.strerror}); choose another "
            "--port"
        ) from error


@contextlib.contextmanager
def running_page(
    separator,
    title,
    host="127.0.0.1",
    port=7860,
    max_megabytes=100,
    max_minutes=15,
):
    """Serves the page as long as the context lasts.

    All files that uploads leave lie in one temporary folder, which goes with
    the context; those of one visitor go when the page is closed.

    Arguments
    ---------
    separator : PerformerSeparation
        What separates.
    title : str
        What the page says of the model.
    host : str
        Address to listen at; the default is reached from this machine only.
    port : int
        In [1, 65535].
    max_megabytes : float
        Largest upload, in 2**20 bytes.
    max_minutes : float
        Longest music.

    Yields
    ------
    str
        Address of the page.

    Raises
    ------
    ImportError
        If gradio is missing.
    OSError
        If the port is taken.
    """
    gr = import_gradio()
    _check_port(host, port)
    # gradio is built on starlette
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    parts = resources.files("trackformer_sb.web")
    script = (parts / "player.js").read_text("utf-8")
    with tempfile.TemporaryDirectory(prefix="trackformer-") as root:
        root = Path(root).resolve()
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")
        (root / "uploads").mkdir()
        (root / "sources").mkdir()
        files = StaticFiles(directory=root / "sources")
        page = None
        try:
            page = build_page(
                separator, root / "sources", title, max_megabytes, max_minutes
            )
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                max_file_size=round(max_megabytes * 2**20),
                # gradio's own way to send files is slow: 4 kB at a time
                app_kwargs={"routes": [Mount(f"/{TRACKS}", files)]},
                theme=gr.themes.Base(
                    font=["system-ui", "sans-serif"],
                    font_mono=["ui-monospace", "monospace"],
                ),
                css=(parts / "player.css").read_text("utf-8"),
                head=f"<script>{script}</script>",
            )
            yield url
        finally:
            if page is not None:
                page.close(verbose=False)
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before
