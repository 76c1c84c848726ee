"""The page: what becomes of an upload, the server, and a real browser."""

import argparse
import contextlib
import html.parser
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import matplotlib.image
import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml

from trackformer_sb.cli_demo import add_demo
from trackformer_sb.inference.export import export_separator
from trackformer_sb.inference.interfaces import PerformerSeparation
from trackformer_sb.inference.loading import load_separator
from trackformer_sb.inference.separator import Separator
from trackformer_sb.web import uploads
from trackformer_sb.web.markup import escaped, separation
from trackformer_sb.web.page import Uploads, import_gradio
from trackformer_sb.web.server import running_page
from trackformer_sb.web.spectrogram import (
    band_edges,
    save_picture,
    spectrogram,
)
from trackformer_sb.web.uploads import (
    Separated,
    Track,
    decode,
    separate_upload,
)

RATE = 8000
NUM_SPKS = 3

# A name that a shell, a URL, HTML and two template languages may stumble on.
NAME = "Für Elise ${1+1} {{x}} <b> & 100%.wav"

# What gradio leaves as it is.
SONG = "Für Elise (été), 2. Satz & 日本.wav"

TINY = """\
sample_rate: 8000
num_spks: 3
Encoder: !new:trackformer_sb.nnet.stft.STFTEncoder {n_fft: 256, hop_length: 64}
MaskNet: !new:trackformer_sb.nnet.masknet.PerformerMaskNet
  in_channels: 129
  num_spks: 3
  d_model: 16
  nhead: 2
  num_layers: 1
  n_features: 16
Decoder: !new:trackformer_sb.nnet.stft.STFTDecoder {n_fft: 256, hop_length: 64}
modules: {encoder: !ref <Encoder>, masknet: !ref <MaskNet>,
  decoder: !ref <Decoder>}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "hyperparams.yaml").write_text(TINY)
    torch.manual_seed(0)
    modules = load_hyperpyyaml(TINY)["modules"]
    return str(
        export_separator(
            folder / "hyperparams.yaml", modules, folder / "separator"
        )
    )


@pytest.fixture(scope="module")
def separator(model):
    return PerformerSeparation.from_hparams(
        source=model, run_opts={"device": "cpu"}
    )


@pytest.fixture(scope="module")
def named_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    masknet = {"channels": [8, 8, 8], "d_model": 16, "num_layers": 1}
    separator = Separator(["drums", "vocals"], RATE, 512, 256, masknet)
    separator.save_pretrained(folder)
    return folder


def write_noise(path, seconds=0.5, seed=0):
    rng = np.random.default_rng(seed)
    sig = rng.normal(0.0, 0.1, (round(seconds * RATE), 2))
    soundfile.write(path, sig, RATE, "FLOAT")
    return str(path)


class Shares:
    """Splits a file in fixed shares, as a separator would."""

    def __init__(self, shares):
        self.shares = shares

    def separate_file(self, path, out_folder, progressbar):
        sig, rate = soundfile.read(path)
        paths = []
        for i, share in enumerate(self.shares):
            name = f"{Path(path).stem}_source{i}.wav"
            paths.append(Path(out_folder) / name)
            soundfile.write(paths[-1], share * sig, rate, "FLOAT")
        return paths


# --- spectrograms ------------------------------------------------------------


@pytest.mark.parametrize("rate", (8000, 44100, 96000))
@pytest.mark.parametrize("frequency", (60, 440, 3000))
def test_a_tone_lies_in_its_band(rate, frequency, tmp_path):
    sig = np.sin(2 * np.pi * frequency * np.arange(rate) / rate)
    # in one channel only, and opposite in the other: nothing cancels
    soundfile.write(tmp_path / "a.wav", np.stack([sig, -sig], 1), rate)
    power = spectrogram(tmp_path / "a.wav")
    loudest = power.sum(1).argmax()
    low, high = band_edges(rate)[[loudest, loudest + 1]]
    bin_width = rate / 4096
    assert low - bin_width <= frequency <= high + bin_width


def test_a_click_lies_in_its_column(tmp_path):
    sig = np.zeros(60 * RATE)
    sig[45 * RATE : 46 * RATE] = 0.5
    soundfile.write(tmp_path / "a.wav", sig, RATE)
    power = spectrogram(tmp_path / "a.wav").sum(0)
    sounding = np.flatnonzero(power > power.max() * 1e-3) / len(power) * 60
    assert 44.4 < sounding.min() < 45.1
    assert 45.9 < sounding.max() < 46.6


@pytest.mark.parametrize("frames", (1, 100, 5000))
def test_short_and_silent_files_have_a_picture(frames, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(frames), RATE)
    power = spectrogram(tmp_path / "a.wav")
    assert power.shape[0] == len(band_edges(RATE)) - 1
    assert power.shape[1] == -(-frames * 4 // 4096)
    assert (power == 0).all()
    save_picture(power, power.max(), tmp_path / "a.png")
    picture = matplotlib.image.imread(tmp_path / "a.png")
    assert picture.shape[:2] == power.shape
    assert np.ptp(picture.reshape(-1, 4), axis=0).max() == 0


def test_pictures_are_comparable(tmp_path):
    power = np.array([[1e-8, 0.01], [1.0, 100.0]])
    save_picture(power, 100.0, tmp_path / "a.png")
    save_picture(power / 100, 100.0, tmp_path / "b.png")
    a, b = (matplotlib.image.imread(tmp_path / f"{x}.png") for x in "ab")
    # low frequencies below; 20 dB less is another colour, but for the floor
    assert a[0].sum() > a[1].sum()
    assert (a[0, 0] == b[0, 1]).all()
    assert (a[1, 0] == b[1, 0]).all()
    assert b.sum() < a.sum()


# --- uploads -----------------------------------------------------------------


def test_an_upload_is_separated(separator, tmp_path):
    path = write_noise(tmp_path / NAME)
    folder = tmp_path / "out"
    folder.mkdir()
    told = []
    done = separate_upload(
        separator,
        path,
        folder,
        progress=lambda share, text: told.append((share, text)),
    )
    assert done[1:] == (RATE, 2, RATE // 2)
    labels = [track.label for track in done.tracks]
    assert labels == ["Original", "Source 0", "Source 1", "Source 2"]
    sigs = [soundfile.read(track.path)[0] for track in done.tracks]
    assert np.array_equal(sigs[0], soundfile.read(path)[0])
    assert np.allclose(sum(sigs[1:]), sigs[0], atol=1e-6)
    for track, sig in zip(done.tracks, sigs):
        level = 10 * np.log10((sig**2).mean() / (sigs[0] ** 2).mean())
        assert track.level == pytest.approx(level)
        assert matplotlib.image.imread(track.picture).shape[:2] == (96, 4)
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and 0 <= shares[0] and shares[-1] < 1
    assert told[0] == (0.0, "Reading")
    assert told[-1][1] == "Drawing spectrograms"


def test_tracks_of_named_stems_have_their_names(named_model, tmp_path):
    separator, _ = load_separator(named_model, "cpu")
    path = write_noise(tmp_path / NAME)
    done = separate_upload(separator, path, tmp_path)
    labels = [track.label for track in done.tracks]
    assert labels == ["Original", "Drums", "Vocals"]
    assert done.tracks[2].path.name == f"{Path(NAME).stem}_vocals.wav"
    page = Elements(separation(done, NAME))
    for label in labels:
        assert label in page.text


def test_progress_of_the_separator_is_passed_on(tmp_path):
    class Talking(Shares):
        def separate_file(self, path, out_folder, progressbar, progress):
            progress(1.0, 4.0)
            progress(4.0, None)
            return super().separate_file(path, out_folder, progressbar)

    told = {}
    separate_upload(
        Talking([1.0]),
        write_noise(tmp_path / "a.wav"),
        tmp_path,
        progress=lambda share, text: told.update({text: share}),
    )
    quarter = uploads.READ + (uploads.SEPARATED - uploads.READ) / 4
    assert told["Separated 1 of 4 s"] == pytest.approx(quarter)
    # of a file whose length the header does not tell
    assert told["Separated 4 of 0 s"] == pytest.approx(uploads.SEPARATED)


def test_silence_has_no_level(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), RATE)
    done = separate_upload(Shares([1, 0]), tmp_path / "a.wav", tmp_path)
    assert [track.level for track in done.tracks[1:]] == [-np.inf, -np.inf]


def write_bad(folder, what):
    path = folder / "a b.wav"
    if what == "empty":
        path.write_bytes(b"")
    elif what == "text":
        path.write_text("this is no audio")
    elif what == "no samples":
        soundfile.write(path, np.zeros(0), RATE)
    elif what == "nan":
        sig = np.zeros(RATE, np.float32)
        sig[-1] = np.nan
        soundfile.write(path, sig, RATE, "FLOAT")
    elif what == "infinite":
        soundfile.write(path, np.full(9, np.inf), RATE, "FLOAT")
    elif what == "long":
        soundfile.write(path, np.zeros(61 * RATE), RATE)
    elif what.startswith("cut"):
        path = path.with_suffix("." + what.split()[1])
        noise = np.random.default_rng(0).normal(0, 0.1, 2 * RATE)
        soundfile.write(path, noise, RATE)
        path.write_bytes(path.read_bytes()[:-3000])
    return path


@pytest.mark.parametrize(
    "what, message",
    [
        ("empty", "a b.wav is empty"),
        (
            "text",
            "a b.wav is no audio file that can be read "
            "(wav, flac, ogg, mp3 or aiff)",
        ),
        ("no samples", "a b.wav holds no samples"),
        ("nan", "a b.wav holds NaN or infinite samples before 1.0 s"),
        ("infinite", "a b.wav holds NaN or infinite samples before 0.0 s"),
        ("long", "a b.wav is too long: expected at most 1 minutes"),
        ("cut wav", "a b.wav is not whole: truncated, "),
        ("cut ogg", "a b.ogg is not whole: truncated, "),
    ],
)
def test_bad_uploads(what, message, tmp_path):
    path = write_bad(tmp_path, what)
    with pytest.raises(ValueError) as error:
        decode(path, tmp_path / "original.wav", max_minutes=1)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < len(message) + 30


def test_mp3_of_few_bits_is_decoded_as_a_whole(tmp_path, monkeypatch):
    """After a seek, which soundfile makes after each read, it is wrong."""
    rng = np.random.default_rng(0)
    sig = rng.normal(0, 0.2, (6 * 44100, 2))
    sig *= np.sin(np.linspace(0, 20, len(sig)))[:, None] ** 4
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.9}
    soundfile.write(tmp_path / "a.mp3", sig, 44100, **options)
    monkeypatch.setattr(uploads, "BLOCK", 44100)
    decode(tmp_path / "a.mp3", tmp_path / "o.wav", max_minutes=1)
    found = soundfile.read(tmp_path / "o.wav")[0]
    expected = soundfile.read(tmp_path / "a.mp3")[0]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-6


def test_upload_that_only_its_name_calls_sound(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"a\.raw is no audio file"):
        decode(tmp_path / "a.raw", tmp_path / "o.wav", max_minutes=1)


def test_a_whole_minute_is_not_too_long(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros(60 * RATE), RATE)
    done = decode(tmp_path / "a.flac", tmp_path / "o.wav", max_minutes=1)
    assert done == (RATE, 1, 60 * RATE, 0.0)


def test_errors_of_the_separator_do_not_name_our_folders(tmp_path):
    class Failing:
        def separate_file(self, path, out_folder, progressbar):
            raise RuntimeError(self.message.format(path))

    path = write_noise(tmp_path / "a.wav")
    for Failing.message, expected in (
        ("{}: the model returned NaN", "a.wav: the model returned NaN"),
        ("CUDA out of memory", "a.wav: CUDA out of memory"),
    ):
        with pytest.raises(ValueError) as error:
            separate_upload(Failing(), path, tmp_path)
        assert str(error.value) == expected


def test_files_of_a_session_go_with_it(tmp_path):
    root = tmp_path / "sources"
    root.mkdir()
    same, other = tmp_path / "same.wav", tmp_path / "other.wav"
    same.write_text("a")
    other.write_text("b")
    sessions = Uploads(root)
    sessions.start("anna", str(same))
    sessions.start("bert", str(same))
    (_, hers), (_, his) = sessions.get("anna"), sessions.get("bert")
    assert hers != his and hers.is_dir() and his.is_dir()
    sessions.discard("anna")
    assert sessions.get("anna") is None
    # bert's upload is the same file
    assert same.exists() and his.is_dir() and not hers.exists()
    sessions.start("bert", str(other))
    assert not same.exists() and not his.exists()
    sessions.discard("bert")
    sessions.discard("bert")
    assert not other.exists() and list(root.iterdir()) == []


# --- markup ------------------------------------------------------------------


class Elements(html.parser.HTMLParser):
    """All elements with their attributes, and all text."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of_class(self, name):
        return [
            attrs
            for _, attrs in self.elements
            if name in attrs.get("class", "").split()
        ]


def test_markup_of_a_separation():
    folder = Path("/tmp/root/abc")
    tracks = [
        Track("Original", folder / NAME, folder / "o.png", 0.0),
        Track("Source 0", folder / "s0.wav", folder / "s0.png", -12.34),
        Track("Source 1", folder / "s1.wav", folder / "s1.png", -np.inf),
    ]
    source = separation(Separated(tracks, 44100, 2, 900), NAME)
    page = Elements(source)
    (player,) = page.of_class("separation")
    assert player["data-rate"] == "44100"
    assert player["data-channels"] == "2"
    assert player["data-frames"] == "900"
    assert player["aria-label"] == f"Separation of {NAME}"
    urls = [unquote(row["data-url"]) for row in page.of_class("track")]
    # relative: whatever the server is called, and no path of the machine
    assert urls == [f"tracks/abc/{x}" for x in (NAME, "s0.wav", "s1.wav")]
    downloads = page.of_class("download")
    assert [unquote(link["href"]) for link in downloads] == urls
    assert [link["download"] for link in downloads] == [
        NAME,
        "s0.wav",
        "s1.wav",
    ]
    pressed = [button["aria-pressed"] for button in page.of_class("mute")]
    assert pressed == ["true", "false", "false"]
    assert "-12.3 dB" in page.text and "silent" in page.text
    assert not {"b", "script"} & {tag for tag, _ in page.elements}
    # nothing for the template languages of the framework
    assert not set("${}`") & set(source)


def test_escaped_text_is_the_text():
    text = "&amp; <b> \" ' ${x} `y` {{z}} 日本"
    assert Elements(escaped(text)).text == text


# --- the command -------------------------------------------------------------


def run_demo(*arguments):
    parser = argparse.ArgumentParser()
    add_demo(parser.add_subparsers(dest="command"))
    args = parser.parse_args(["demo", *map(str, arguments)])
    return args.run(args)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["m", "--port", "0"], "must be in [1, 65535], got 0"),
        (["m", "--port", "65536"], "must be in [1, 65535], got 65536"),
        (["m", "--max_minutes", "0"], "must be above 0, got 0"),
        (["m", "--max_megabytes", "nan"], "must be above 0, got nan"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_demo(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_loads_nothing():
    code = (
        "import argparse, sys; from trackformer_sb.cli_demo import add_demo\n"
        "parser = argparse.ArgumentParser()\n"
        "add_demo(parser.add_subparsers())\n"
        "try: parser.parse_args(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'gradio'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
    assert "default: 127.0.0.1" in done.stdout


def test_without_gradio(monkeypatch, capsys):
    # None in sys.modules makes its import fail
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"trackformer_sb\[demo\]"):
        import_gradio()
    # before it looks for the model
    assert run_demo("nowhere") == 2
    error = capsys.readouterr().err
    assert error.startswith("trackformer demo: the page needs gradio: pip")


def test_without_a_model_the_one_in_the_package_is_shown(
    named_model, monkeypatch, capsys
):
    shown = []

    @contextlib.contextmanager
    def page(separator, title, **options):
        shown.extend([separator.groups, title])
        yield "http://127.0.0.1:7860"

    monkeypatch.setattr("trackformer_sb.web.page.import_gradio", lambda: None)
    monkeypatch.setattr("trackformer_sb.web.server.running_page", page)
    monkeypatch.setattr("trackformer_sb.cli_demo._wait", lambda: None)
    default = "trackformer_sb.inference.separator.default_folder"
    monkeypatch.setattr(default, lambda: named_model)
    assert run_demo("--device=cpu") == 0
    assert list(shown[0]) == ["drums", "vocals"]
    assert shown[1] == "default: drums, vocals at 8000 Hz"


# --- the server --------------------------------------------------------------


@pytest.fixture(scope="module")
def gradio():
    return pytest.importorskip(
        "gradio", reason="the page needs gradio, the extra [demo]"
    )


class Recording:
    """A separator that tells how often it was entered at once."""

    def __init__(self, separator):
        self.separator = separator
        self.running = self.most = self.entered = 0
        self.lock = threading.Lock()
        self.hold = threading.Event()
        self.hold.set()

    def separate_file(self, path, out_folder, progressbar, progress=None):
        with self.lock:
            self.entered += 1
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            self.hold.wait(60)
            return self.separator.separate_file(
                path, out_folder, progressbar=progressbar
            )
        finally:
            with self.lock:
                self.running -= 1


@contextlib.contextmanager
def recorded_connections():
    """Addresses to which this process connects."""
    addresses = []
    connect = socket.socket.connect

    def recorded(self, address):
        addresses.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", recorded)
        yield addresses


@pytest.fixture(scope="module")
def server(gradio, separator, tmp_path_factory):
    """A running page that takes at most 1 MB and 0.5 minutes."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        recording = Recording(separator)
        with (
            recorded_connections() as connections,
            running_page(
                recording,
                "a <b> model",
                port=free_port(),
                max_megabytes=1,
                max_minutes=0.5,
            ) as url,
        ):
            (root,) = folder.glob("trackformer-*")
            yield argparse.Namespace(
                url=url,
                root=root,
                separator=recording,
                connections=connections,
            )
        assert not root.exists()


def connected(server):
    import gradio_client

    return gradio_client.Client(server.url, verbose=False)


def upload(client, path):
    """What the page shows after a file is dropped."""
    from gradio_client import handle_file

    client.predict(handle_file(path), api_name="/receive")
    return client.predict(api_name="/separate")


def fetched(server, path, **headers):
    """Status and body of a file of the page."""
    import httpx

    response = httpx.get(server.url + path, headers=headers)
    return response.status_code, response.content


def test_the_page_separates(server, separator, tmp_path):
    path = write_noise(tmp_path / SONG)
    client = connected(server)
    page = Elements(upload(client, path))
    expected = separator.separate_file(path, progressbar=False)
    links = page.of_class("download")
    assert len(links) == NUM_SPKS + 1
    for i, link in enumerate(links[1:]):
        status, body = fetched(server, link["href"])
        assert status == 200
        (tmp_path / "got.wav").write_bytes(body)
        sig, rate = soundfile.read(tmp_path / "got.wav", dtype="float32")
        assert rate == RATE
        assert np.allclose(sig.T, expected[i], atol=1e-6)
        assert link["download"] == f"{Path(SONG).stem}_source{i}.wav"
        # the player asks for pieces
        status, part = fetched(server, link["href"], Range="bytes=100-199")
        assert (status, part) == (206, body[100:200])
    for image in page.elements:
        if image[0] == "img":
            assert fetched(server, image[1]["src"])[1][1:4] == b"PNG"
    # another file of the same visitor replaces this one
    again = upload(client, write_noise(tmp_path / "b.wav", seed=1))
    assert fetched(server, links[0]["href"])[0] == 404
    link, *_ = Elements(again).of_class("download")
    assert fetched(server, link["href"])[0] == 200


@pytest.mark.parametrize("what", ("text", "nan", "long"))
def test_the_page_explains_what_is_wrong(what, server, tmp_path):
    page = Elements(upload(connected(server), write_bad(tmp_path, what)))
    assert page.elements == [("div", {"class": "problem", "role": "alert"})]
    assert page.text.startswith("a b.wav ")
    assert str(server.root) not in page.text


def test_uploads_at_once_wait_for_each_other(server, tmp_path):
    server.separator.most = 0
    server.separator.hold.clear()
    pages = {}

    def visit(seed):
        # the same name, which must not mix them up
        (tmp_path / str(seed)).mkdir()
        path = write_noise(tmp_path / str(seed) / "song.wav", seed=seed)
        pages[seed] = upload(connected(server), path)

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    assert server.separator.running == 1
    server.separator.hold.set()
    for thread in threads:
        thread.join()
    assert server.separator.most == 1
    for seed, page in pages.items():
        links = Elements(page).of_class("download")
        total = 0
        for link in links[1:]:
            (tmp_path / "got.wav").write_bytes(fetched(server, link["href"])[1])
            total = total + soundfile.read(tmp_path / "got.wav")[0]
        mix = soundfile.read(tmp_path / str(seed) / "song.wav")[0]
        assert np.allclose(total, mix, atol=1e-6)


def test_large_uploads_are_refused(server, tmp_path):
    import httpx

    files = {"files": ("big.wav", b"\0" * (2**20 + 1))}
    url = f"{server.url}gradio_api/upload"
    assert httpx.post(url, files=files).status_code == 413
    files = {"files": ("small.wav", b"\0" * 2**19)}
    assert httpx.post(url, files=files).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "tracks/../uploads",
        "tracks/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={__file__}",
    ],
)
def test_other_files_of_the_machine_are_out_of_reach(path, server):
    status, body = fetched(server, path)
    assert status in (403, 404)
    assert b"root:" not in body and b"import" not in body


def test_nothing_leaves_the_machine(server, tmp_path):
    upload(connected(server), write_noise(tmp_path / "a.wav"))
    hosts = {address[0] for address in server.connections}
    assert hosts == {"127.0.0.1"}
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_only_loopback_listens(server):
    port = int(server.url.rstrip("/").rsplit(":")[-1])
    listening = Path("/proc/net/tcp")
    if not listening.exists():
        pytest.skip("no /proc/net/tcp")
    lines = [line.split() for line in listening.read_text().splitlines()[1:]]
    addresses = {
        line[1]
        for line in lines
        if line[3] == "0A" and line[1].endswith(f":{port:04X}")
    }
    assert addresses == {f"0100007F:{port:04X}"}


def test_taken_port(gradio, model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run_demo(model, "--device", "cpu", "--port", port) == 2
    error = capsys.readouterr().err
    assert f"trackformer demo: 127.0.0.1:{port} cannot be used" in error
    assert "choose another --port" in error


def test_wrong_model(gradio, tmp_path, capsys):
    assert run_demo(tmp_path / "separater") == 2
    assert "not found: expected a separator folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("end", (signal.SIGTERM, signal.SIGINT))
def test_the_command_leaves_nothing(end, gradio, model, tmp_path):
    import gradio_client

    code = (
        "import argparse, sys; from trackformer_sb.cli_demo import add_demo\n"
        "parser = argparse.ArgumentParser()\n"
        "add_demo(parser.add_subparsers(dest='command'))\n"
        "args = parser.parse_args(sys.argv[1:]); sys.exit(args.run(args))\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-c", code, "demo", model, "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--port", str(free_port())],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        words = process.stdout.readline().split()
        assert words[0] == "Open"
        client = gradio_client.Client(words[1], verbose=False)
        page = upload(client, write_noise(tmp_path / "a.wav"))
        assert "Source 2" in page
        assert len(list(temporary.rglob("a_source*.wav"))) == NUM_SPKS
        process.send_signal(end)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()
    assert list(temporary.glob("trackformer-*")) == []


# --- a browser ---------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    """Paths of Chromium and its driver, installed where that is possible."""
    pytest.importorskip(
        "selenium", reason="the browser is driven by selenium: pip install it"
    )
    programs = ("chromium", "chromedriver")
    if not all(map(shutil.which, programs)):
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            pytest.skip(
                "needs chromium and chromedriver (Debian: apt-get install "
                "chromium chromium-driver)"
            )
        for command in (
            ("update",),
            ("install", "-y", "chromium", "chromium-driver"),
        ):
            done = subprocess.run(
                ["apt-get", *command],
                capture_output=True,
                text=True,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )
            if done.returncode:
                pytest.skip(f"apt-get {command[0]} failed: {done.stderr}")
    return [shutil.which(program) for program in programs]


class Browser:
    """A headless Chromium with the page open.

    Arguments
    ---------
    driver : selenium.webdriver.Chrome
        The browser.
    url : str
        The page.
    """

    def __init__(self, driver, url):
        self.driver = driver
        driver.set_script_timeout(60)
        driver.get(url)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, selector, seconds=120):
        """The elements of a selector as soon as there are any."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.all(selector):
                return found
            time.sleep(0.1)
        raise AssertionError(f"no {selector} in {self.all('body')[0].text}")

    def until(self, script, seconds=60):
        """Waits for a condition of the player ``p``."""
        end = time.monotonic() + seconds
        while not self.player(script):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def upload(self, path):
        self.wait("input[type=file]")[0].send_keys(str(path))

    def player(self, script):
        """The value of an expression of the player ``p``."""
        return self.driver.execute_script(
            "const p = document.querySelector('.separation').player;"
            f"return {script};"
        )

    def heard(self):
        """Gains of all tracks, when their fades are over."""
        time.sleep(0.3)
        return self.player("p.tracks.map((t) => t.gain.gain.value)")

    def press(self, what, track):
        self.all(f".separation .{what}")[track].click()

    def record(self, seconds):
        """What comes out of the player, and when in the music it began.

        Returns
        -------
        tuple
            Position of the first sample, in samples of the file, and
            [time, channels].
        """
        for _ in range(10):
            # on a busy machine the player may have to wait for a piece
            self.until("p.run.frame / p.rate - p.now() > 3")
            before = self.player("p.run.zero")
            first, channels = self.driver.execute_async_script(
                RECORD, round(seconds * RATE)
            )
            if self.player("p.run.zero") == before:
                return first - round(before * RATE), np.array(channels).T
        raise AssertionError("the player waits all the time")

    def requests(self):
        """All addresses that were asked for since the last call."""
        messages = [
            json.loads(entry["message"])["message"]
            for entry in self.driver.get_log("performance")
        ]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


def assert_part_of(sig, whole, start):
    """Compares a recording with the file, sample by sample.

    The recorder may be connected some blocks of 128 samples later than its
    clock says: it begins within 0.1 s of ``start``.
    """
    assert np.abs(sig).max() > 0.1
    for shift in range(-RATE // 10, RATE // 10):
        begin = start + shift
        if 0 <= begin and np.allclose(
            sig[:50], whole[begin : begin + 50], atol=1e-5
        ):
            assert np.allclose(sig, whole[begin : begin + len(sig)], atol=1e-5)
            return
    raise AssertionError(f"not in the file near {start}")


# Samples with the clock of the audio, which only a worklet sees.
RECORD = """
const [count, done] = arguments;
const p = document.querySelector(".separation").player;
const code = `class Recorder extends AudioWorkletProcessor {
  process([input]) {
    this.port.postMessage([currentFrame, input.map((c) => c.slice())]);
    return true;
  }
}
registerProcessor("recorder", Recorder);`;
const type = "text/javascript";
(async () => {
  const url = URL.createObjectURL(new Blob([code], { type }));
  await p.context.audioWorklet.addModule(url).catch(() => {});
  const node = new AudioWorkletNode(p.context, "recorder", {
    channelCount: 2, channelCountMode: "explicit",
  });
  let first = null;
  const sig = [[], []];
  node.port.onmessage = ({ data: [frame, channels] }) => {
    if (channels.length === 0) return; // not connected yet
    if (first === null) first = frame;
    sig.forEach((samples, i) => samples.push(...channels[i]));
    if (sig[0].length >= count) {
      node.port.onmessage = null;
      p.output.disconnect(node);
      done([first, sig]);
    }
  };
  p.output.connect(node);
})();
"""


@pytest.fixture
def browser(chromium, server, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location, driver = chromium
    for argument in (
        "--headless=new",
        "--window-size=1280,1200",
        "--disable-dev-shm-usage",
        # what runs as root, as in a container, has no sandbox
        "--no-sandbox",
        # names of other hosts lead nowhere
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    (tmp_path / "downloads").mkdir()
    options.add_experimental_option(
        "prefs",
        {"download.default_directory": str(tmp_path / "downloads")},
    )
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Browser(chrome, server.url)
    finally:
        chrome.quit()


@pytest.mark.slow
def test_a_file_is_dropped_and_heard(browser, server, separator, tmp_path):
    path = write_noise(tmp_path / SONG, seconds=12)
    mix = soundfile.read(path)[0]
    browser.upload(path)
    rows = browser.wait(".separation .track")
    assert len(rows) == NUM_SPKS + 1
    assert browser.player("p.tracks.length") == NUM_SPKS + 1
    assert browser.player("p.seconds") == 12.0
    widths = "[...p.root.querySelectorAll('img')].map((i) => i.naturalWidth)"
    browser.until(f"{widths}.every((width) => width === 94)")

    # the sources without the original, exactly as in the file
    browser.press("play", 0)
    browser.wait(".separation .track[data-heard=true]")
    browser.until("p.now() > 0.05")
    assert browser.heard() == [0, 1, 1, 1]
    start, sig = browser.record(1.0)
    assert 0 < start < 11 * RATE
    assert_part_of(sig, mix, start)

    # mute and solo act while it plays
    separations = server.separator.entered
    browser.press("mute", 1)
    assert browser.heard() == [0, 0, 1, 1]
    browser.press("solo", 0)
    assert browser.heard() == [1, 0, 0, 0]
    browser.press("solo", 1)
    assert browser.heard() == [1, 1, 0, 0]
    browser.press("solo", 0)
    browser.press("solo", 1)
    browser.press("mute", 2)
    browser.press("mute", 3)
    assert browser.heard() == [0, 0, 0, 0]
    browser.press("mute", 1)
    assert browser.heard() == [0, 1, 0, 0]
    assert server.separator.entered == separations

    # from another place, and over the joints of its first pieces
    seek = "document.querySelector('.separation').player.seek"
    browser.driver.execute_script(f"{seek}(4.0)")
    browser.until("p.now() > 4.05")
    start, sig = browser.record(2.0)
    assert start > 4 * RATE
    source = separator.separate_file(path, progressbar=False)[0].T.numpy()
    assert_part_of(sig, source, start)

    # to the end, and back to the beginning
    browser.driver.execute_script(f"{seek}(11.5)")
    browser.until("p.run === null")
    assert browser.all(".play")[0].text == "Play"
    assert browser.all(".time")[0].text == "0:00 / 0:12"
    (message,) = browser.all(".message")
    assert message.text == ""

    browser.press("download", 2)
    file = tmp_path / "downloads" / f"{Path(SONG).stem}_source1.wav"
    end = time.monotonic() + 30
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)
    expected = separator.separate_file(path, progressbar=False)[1]
    assert np.allclose(soundfile.read(file)[0].T, expected, atol=1e-6)

    asked = [url for url in browser.requests() if url[:5] == "http:"]
    assert sum("/tracks/" in url for url in asked) > 4 * 3
    assert all(url.startswith(server.url) for url in asked)


@pytest.mark.slow
def test_no_other_host_is_asked(browser, server):
    browser.wait("input[type=file]")
    time.sleep(1)
    asked = browser.requests()
    assert len(asked) > 5
    local = (server.url, "data:", "blob:")
    assert [url for url in asked if not url.startswith(local)] == []
    fonts = browser.driver.execute_script(
        "const page = document.querySelector('.gradio-container');"
        "return getComputedStyle(page).fontFamily"
    )
    assert fonts.startswith("system-ui")


@pytest.mark.slow
def test_a_click_on_a_spectrogram_is_a_position(browser, tmp_path):
    from selenium.webdriver import ActionChains

    browser.upload(write_noise(tmp_path / "a.wav", seconds=4))
    browser.wait(".separation .track")
    (view, *_) = browser.all(".view")
    ActionChains(browser.driver).move_to_element(view).click().perform()
    assert browser.player("p.position") == pytest.approx(2.0, abs=0.02)
    assert browser.all(".time")[0].text in ("0:01 / 0:04", "0:02 / 0:04")


@pytest.mark.slow
def test_wrong_files_in_the_browser(browser, server, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("this is no audio")
    browser.upload(text)
    (problem,) = browser.wait(".problem")
    assert problem.text.startswith("notes.txt is no audio file that can be")
    # and on with a better one
    browser.wait("button[aria-label='Clear']")[0].click()
    browser.wait(".hint")
    browser.upload(write_noise(tmp_path / "a.wav"))
    browser.wait(".separation .track")
    # too large: 1 MB is the limit
    browser.wait("button[aria-label='Clear']")[0].click()
    browser.upload(write_noise(tmp_path / "big.wav", seconds=20))
    (toast,) = browser.wait(".toast-body")
    end = time.monotonic() + 30
    while not toast.text and time.monotonic() < end:  # it fades in
        time.sleep(0.1)
    assert "exceed the maximum allowed size" in toast.text
    assert "big.wav" in toast.text


@pytest.mark.slow
def test_a_closed_page_leaves_nothing(browser, server, tmp_path):
    browser.upload(write_noise(tmp_path / "left.wav"))
    browser.wait(".separation .track")
    assert len(list(server.root.rglob("left_source*.wav"))) == NUM_SPKS
    browser.driver.get("about:blank")
    end = time.monotonic() + 60
    while list(server.root.rglob("left*")) and time.monotonic() < end:
        time.sleep(0.2)
    assert list(server.root.rglob("left*")) == []
