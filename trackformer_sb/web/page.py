"""The page of ``trackformer demo``: drop music in, hear and take its stems.

Everything comes from this machine: no fonts, scripts or statistics of others.
"""

import contextlib
import html
import os
import shutil
import tempfile
import zipfile
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from trackformer_sb import plots
from trackformer_sb.paths import shortened

BYTES_PER_MINUTE = 50e6  # at most: float samples in stereo at 96 kHz


def import_gradio():
    """Gradio, with its statistics off; an ImportError names its extra."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if find_spec("gradio") is None:
        raise ImportError(
            "the page needs gradio: pip install 'trackformer_sb[demo]'"
        )
    import gradio

    return gradio


def separate_upload(separator, path, folder, max_minutes, progress):
    """Separates a file into a folder, draws its stems, and packs them.

    ``progress`` is called with the share of the work that is done, and
    ``desc``, in words. If the folder goes meanwhile, as the page was closed,
    the separation ends. Returns, for ``player.js``, ``stems``, a list of dicts
    of name, address of the wav and of its spectrogram, which sum to the file,
    and ``archive``, the address of a zip of all stems.
    """

    def separated(done, total):
        if total > 60 * max_minutes:
            raise ValueError(
                f"{path.name} is too long: expected at most {max_minutes:g} "
                "minutes"
            )
        if not folder.exists():
            raise ValueError("the page was closed")
        text = f"Separated {done:.0f} of {total:.0f} s"
        progress(0.9 * done / total, desc=text)

    wavs = separator.separate_file(path, folder, progressbar=separated)
    progress(0.9, desc="Drawing spectrograms")
    powers = [plots.file_spectrogram(wav)[0] for wav in wavs]
    loudest = max(power.max() for power in powers)
    names = separator.groups or [f"source {i}" for i in range(len(wavs))]
    stems = []
    for name, wav, power in zip(names, wavs, powers):
        picture = wav.with_suffix(".png")
        plots.save_spectrogram(power, loudest, picture)
        stems.append(
            {
                "name": name.capitalize(),
                "file": wav.name,
                "url": _address(wav),
                "picture": _address(picture),
            }
        )
    archive = folder / f"{shortened(path.stem)}_stems.zip"
    # sound does not get smaller
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for wav in wavs:
            packed.write(wav, wav.name)
    return {"stems": stems, "archive": _address(archive)}


def _address(path):
    """Where gradio serves a file, relative to the page."""
    return f"gradio_api/file={quote(str(path))}"


def build_page(separator, root, title, max_minutes):
    """The page, ready to be launched, see ``running_page``.

    ``root`` is an existing folder for the stems, one folder a visitor.
    """
    gr = import_gradio()
    parts = resources.files("trackformer_sb.web")

    def discard(request: gr.Request):
        shutil.rmtree(root / request.session_hash, ignore_errors=True)

    # gradio finds the progress bar by the default of an argument
    def separate(upload, request: gr.Request, bar=gr.Progress()):  # noqa: B008
        discard(request)
        if upload is None:
            return None
        folder = root / request.session_hash
        folder.mkdir()
        try:
            return separate_upload(
                separator, Path(upload), folder, max_minutes, bar
            )
        except (ValueError, OSError, RuntimeError) as error:
            # libsndfile's and torch's are RuntimeErrors
            message = str(error).replace(str(upload), Path(upload).name)
            raise gr.Error(
                html.escape(message), duration=20, print_exception=False
            ) from error

    # uploads go after an hour
    with gr.Blocks(
        title="trackformer", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        gr.HTML(f"<h1>trackformer</h1><p>{html.escape(title)}</p>")
        file = gr.File(
            label="Music (wav, flac, mp3, m4a, films, ...), at most "
            f"{max_minutes:g} minutes",
            height=140,
        )
        player = gr.HTML(
            html_template="",
            css_template=(parts / "player.css").read_text("utf-8"),
            js_on_load=(parts / "player.js").read_text("utf-8"),
            min_height=120,
        )
        file.change(
            separate, file, player, concurrency_limit=1, api_name="separate"
        )
        page.unload(discard)
    return page


@contextlib.contextmanager
def running_page(separator, title, host, port, max_minutes):
    """Serves the page as long as the context lasts; yields its address.

    All files that visitors leave lie in one temporary folder, which goes with
    the context; the stems of a visitor go when the page is closed. ``title``
    is what the page says of the model; the rest is as of ``trackformer demo``.
    An OSError says that the port is taken.
    """
    gr = import_gradio()
    with tempfile.TemporaryDirectory(prefix="trackformer-") as root:
        root = Path(root).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")
        stems = root / "stems"
        stems.mkdir()
        page = build_page(separator, stems, title, max_minutes)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                footer_links=[],
                allowed_paths=[str(stems)],
                max_file_size=round(max_minutes * BYTES_PER_MINUTE),
                theme=gr.themes.Base(
                    font=["system-ui", "sans-serif"],
                    font_mono=["ui-monospace", "monospace"],
                ),
            )
            yield url
        finally:
            page.close(verbose=False)
            del os.environ["GRADIO_TEMP_DIR"]
