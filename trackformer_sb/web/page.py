"""The page of ``trackformer demo``: drop music in, hear its sources."""

import os
import shutil
import tempfile
import threading
from pathlib import Path

from trackformer_sb.web.markup import escaped, problem, separation
from trackformer_sb.web.uploads import separate_upload

HINT = (
    "Drop a file of music above: wav, flac, ogg, mp3 or aiff, at most "
    "{minutes:g} minutes and {megabytes:g} MB."
)


def import_gradio():
    """Gradio, with its statistics switched off.

    Returns
    -------
    module
        ``gradio``.

    Raises
    ------
    ImportError
        If it is not installed; the message names the extra that brings it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            "the page needs gradio: pip install 'trackformer_sb[demo]' "
            f"({error})"
        ) from error
    return gradio


class Uploads:
    """The files of everyone who has the page open.

    Arguments
    ---------
    root : Path
        An existing folder for all of them.
    """

    def __init__(self, root):
        self.root = root
        self._lock = threading.Lock()
        self._of_session = {}  # session -> (uploaded file, folder)

    def start(self, session, upload):
        """Takes a new upload in place of the session's former one.

        Arguments
        ---------
        session : str
            Who uploaded.
        upload : str
            The file.
        """
        self.discard(session)
        folder = Path(tempfile.mkdtemp(dir=self.root))
        with self._lock:
            self._of_session[session] = (Path(upload), folder)

    def get(self, session):
        """The upload of a session.

        Arguments
        ---------
        session : str
            Who asks.

        Returns
        -------
        tuple of Path, or None
            The uploaded file and the folder of its sources.
        """
        with self._lock:
            return self._of_session.get(session)

    def discard(self, session):
        """Removes what a session has left.

        Arguments
        ---------
        session : str
            Who left, or dropped another file.
        """
        with self._lock:
            upload, folder = self._of_session.pop(session, (None, None))
            # gradio keeps equal uploads once
            others = [other for other, _ in self._of_session.values()]
            if upload is not None and upload not in others:
                upload.unlink(missing_ok=True)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


class _Discarded(Exception):
    """Nobody waits for this separation any more."""


def build_page(separator, root, title, max_megabytes=100, max_minutes=15):
    """The page, ready to be launched.

    Arguments
    ---------
    separator : PerformerSeparation
        What separates; one file at a time.
    root : Path
        An existing folder for uploads and sources.
    title : str
        What the page says of the model.
    max_megabytes, max_minutes : float
        Limits that the page announces; ``max_minutes`` is enforced here.

    Returns
    -------
    gradio.Blocks
        The page.

    Raises
    ------
    ImportError
        If gradio is missing.
    """
    gr = import_gradio()
    uploads = Uploads(root)
    hint = HINT.format(minutes=max_minutes, megabytes=max_megabytes)
    hint = f'<p class="hint">{escaped(hint)}</p>'

    def receive(upload, request: gr.Request):
        uploads.start(request.session_hash, upload)
        return ""

    def discard(request: gr.Request):
        uploads.discard(request.session_hash)

    def clear(request: gr.Request):
        uploads.discard(request.session_hash)
        return hint

    # gradio finds the progress bar by the default of an argument
    def separate(request: gr.Request, bar=gr.Progress()):  # noqa: B008
        mine = uploads.get(request.session_hash)
        if mine is None:
            return gr.skip()
        upload, folder = mine

        def progress(share, text):
            if uploads.get(request.session_hash) != mine:
                raise _Discarded
            bar(share, desc=text)

        try:
            separated = separate_upload(
                separator, upload, folder, max_minutes, progress
            )
            return separation(separated, upload.name)
        except _Discarded:
            return gr.skip()
        except (ValueError, OSError, RuntimeError) as error:
            if uploads.get(request.session_hash) != mine:
                return gr.skip()
            return problem(str(error))

    with gr.Blocks(title="trackformer", analytics_enabled=False) as page:
        gr.HTML(f"<h1>trackformer</h1><p>{escaped(title)}</p>", padding=False)
        file = gr.File(label="Music", height=140)
        result = gr.HTML(hint, js_on_load=None, elem_id="result")
        file.upload(
            receive, file, result, queue=False, trigger_mode="multiple"
        ).then(
            separate,
            None,
            result,
            concurrency_limit=1,
            trigger_mode="multiple",
            api_name="separate",
        )
        file.clear(clear, None, result, queue=False)
        page.unload(discard)
    return page
