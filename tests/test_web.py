"""The page: what becomes of an upload, the server, and a real browser."""

import argparse
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile

import matplotlib.image
import numpy as np
import pytest
import soundfile
from separators import RATE, named, write_noise

from trackformer_sb.cli import main
from trackformer_sb.web.page import running_page, separate_upload

# What a URL, HTML and two template languages may stumble on.
NAME = "Für Elise ${1+1} {{x}} <b> & 100%.wav"


@pytest.fixture(scope="module")
def separator():
    return named(["drums", "bass", "vocals"])


@pytest.fixture(scope="module")
def model(separator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    separator.save_pretrained(folder)
    return folder


def write_bad(folder, what):
    path = folder / "a <b>.wav"
    if what == "text":
        path.write_text("this is no audio")
    elif what == "long":
        soundfile.write(path, np.zeros(31 * RATE), RATE)
    return path


BAD = {
    "text": "a b.wav: format not recognised",
    "long": "a b.wav is too long: expected at most 0.5 minutes",
}


def test_a_closed_page_ends_its_separation(separator, tmp_path):
    path = tmp_path / "a.wav"
    write_noise(path, frames=20 * RATE)
    folder = tmp_path / "stems"
    folder.mkdir()
    with pytest.raises(ValueError):
        separate_upload(
            *(separator, path, folder, 0.5),
            progress=lambda share, desc: shutil.rmtree(folder),
        )
    assert not folder.exists()


# --- the command -------------------------------------------------------------


def test_without_gradio(monkeypatch, capsys):
    # None in sys.modules makes its import fail
    monkeypatch.setitem(sys.modules, "gradio", None)
    # before it looks for the model
    assert main(["demo", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trackformer demo: the page needs gradio: pip")


# --- the server --------------------------------------------------------------


@pytest.fixture(scope="module")
def server(separator, tmp_path_factory):
    """A running page that takes at most 0.5 minutes, which is 25 MB."""
    pytest.importorskip("gradio", reason="the page needs the extra [demo]")
    folder = tmp_path_factory.mktemp("temporary")
    connections = []
    connect = socket.socket.connect

    def recorded(self, address):
        connections.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        patch.setattr(socket.socket, "connect", recorded)
        with running_page(
            *(separator, "a <b> model", "127.0.0.1", None), max_minutes=0.5
        ) as url:
            (root,) = folder.glob("trackformer-*")
            yield argparse.Namespace(url=url, root=root, asked=connections)
        assert not root.exists()


def upload(url, path):
    """What ``player.js`` gets after a file is dropped."""
    import gradio_client

    client = gradio_client.Client(url, verbose=False)
    file = gradio_client.handle_file(str(path))
    return client, client.predict(file, api_name="/separate")


def fetched(url):
    """Status and body of a file of the page."""
    import httpx

    response = httpx.get(url)
    return response.status_code, response.content


def test_the_page_separates(server, tmp_path):
    path = write_noise(tmp_path / NAME)
    client, made = upload(server.url, path)
    stems = {stem["name"]: stem["file"] for stem in made["stems"]}
    assert list(stems) == ["Drums", "Bass", "Vocals"]
    total = 0
    for stem in made["stems"]:
        status, body = fetched(server.url + stem["url"])
        assert status == 200
        total = total + soundfile.read(io.BytesIO(body))[0]
        _, picture = fetched(server.url + stem["picture"])
        picture = matplotlib.image.imread(io.BytesIO(picture), "png")
        assert picture.std() > 0.01
    assert np.allclose(total, soundfile.read(path)[0], atol=1e-6)
    _, archive = fetched(server.url + made["archive"])
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        assert packed.namelist() == list(stems.values())
        assert packed.read(stem["file"]) == body
    # without the file its stems go
    assert client.predict(None, api_name="/separate") is None
    assert fetched(server.url + stem["url"])[0] in (403, 404)
    assert {address[0] for address in server.asked} == {"127.0.0.1"}


@pytest.mark.parametrize("what", BAD)
def test_the_page_says_what_is_wrong(what, server, tmp_path):
    import gradio_client

    with pytest.raises(gradio_client.exceptions.AppError) as error:
        upload(server.url, write_bad(tmp_path, what))
    message = str(error.value)
    # HTML in the page; gradio leaves "<" out of the names of files
    assert BAD[what] in message and str(server.root) not in message


def test_what_the_server_refuses(server):
    import httpx

    files = {"files": ("big.wav", b"\0" * (25_000_001))}
    url = f"{server.url}gradio_api/upload"
    assert httpx.post(url, files=files).status_code == 413
    for path in ("/etc/passwd", __file__):
        status, _ = fetched(f"{server.url}gradio_api/file={path}")
        assert status in (403, 404)


@pytest.mark.slow
def test_the_command_leaves_nothing(server, model, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "trackformer_sb"),
            *("demo", model, "--device", "cpu"),
        ],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        words = process.stdout.readline().split()
        assert words[0] == "Open"
        upload(words[1], write_noise(tmp_path / "a.wav"))
        assert list(temporary.rglob("a_drums.wav"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()
    assert list(temporary.glob("trackformer-*")) == []


# --- a browser ---------------------------------------------------------------


@pytest.fixture
def browser(server):
    """A headless Chromium with the page open."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not all(map(shutil.which, ("chromium", "chromedriver"))):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new",
        "--disable-dev-shm-usage",
        # what runs as root, as in a container, has no sandbox
        "--no-sandbox",
        # names of other hosts lead nowhere
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    driver.get(server.url)
    yield driver
    driver.quit()


@pytest.mark.slow
def test_a_file_is_dropped_and_heard(browser, server, tmp_path):
    def all_of(selector):
        return browser.find_elements("css selector", selector)

    def wait(condition):
        end = time.monotonic() + 120
        while not (found := condition()):
            assert time.monotonic() < end, all_of("body")[0].text
            time.sleep(0.1)
        return found

    def player(script):
        return browser.execute_script(
            "const all = [...document.querySelectorAll('*')];"
            "const p = all.find((node) => node.player).player;"
            f"return {script};"
        )

    def drop(path):
        wait(lambda: all_of("input[type=file]"))[0].send_keys(str(path))

    drop(write_bad(tmp_path, "text"))
    toast = wait(lambda: all_of(".toast-body"))[0]
    wait(lambda: "format not recognised" in toast.text)
    clear, *_ = all_of("button[aria-label='Clear']")
    browser.execute_script("arguments[0].click()", clear)  # below the toast
    drop(write_noise(tmp_path / NAME, frames=4 * RATE))
    play = wait(lambda: all_of(".stem button"))[0]
    wait(lambda: play.text == "Play")
    play.click()
    wait(lambda: player("p.now()") > 0.5)
    all_of(".Mute")[1].click()
    gains = "p.stems.map((x) => Math.round(100 * x.gain.gain.value) / 100)"
    wait(lambda: player(gains) == [1, 0, 1])
    all_of(".Solo")[0].click()
    wait(lambda: player(gains) == [1, 0, 0])
    player("p.stems[0].volume.value = -6, p.mix()")
    wait(lambda: player(gains) == [0.5, 0, 0])
    # what is heard of it, left and right
    player(
        "p.meters = [0, 1].map(() => p.context.createAnalyser()),"
        "p.split = p.context.createChannelSplitter(2),"
        "p.meters.forEach((meter, side) => p.split.connect(meter, side)),"
        "p.stems[0].panner.connect(p.split), 0"
    )
    levels = (
        "p.meters.map((meter) => {"
        "  const sig = new Float32Array(meter.fftSize);"
        "  meter.getFloatTimeDomainData(sig);"
        "  return Math.hypot(...sig); })"
    )
    player("p.seek(0)")
    wait(lambda: min(player(levels)) > 0)
    player("p.stems[0].pan.value = 1, p.mix()")
    wait(lambda: player(levels)[0] < 1e-3 < player(levels)[1])
    assert all_of(".stem small")[0].text == "-6.0 dB, pan 1"
    player("p.stems[0].volume.value = -40, p.mix()")
    wait(lambda: player(gains) == [0, 0, 0])
    # to the end, and back to the beginning
    wait(lambda: play.text == "Play")
    assert all_of(".stem span")[0].text == "0:00 / 0:04"
    all_of(".view")[0].click()
    assert player("p.position") == pytest.approx(2.0, abs=0.05)
    log = [entry["message"] for entry in browser.get_log("performance")]
    asked = [line for line in log if "Network.requestWillBeSent" in line]
    assert len(asked) > 5
    assert not [x for x in asked if '"url":"http' in x and server.url not in x]
    # a closed page leaves nothing
    assert list(server.root.glob("stems/*/*_drums.wav"))
    browser.get("about:blank")
    wait(lambda: not list(server.root.glob("stems/*/*_drums.wav")))
