"""A server on loopback with the files of the model hub.

It serves what huggingface_hub's client asks for: files by git's SHA-1, and
errors with their X-Error-Code. It asks for a token on request.
"""

import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESOLVE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


class Hub:
    """What is on the hub, and how it behaves."""

    def __init__(self, url):
        self.url = url
        self.repos = {}  # id -> {revision: {name: content}}
        self.token = None  # which it asks for
        self.asked = []

    def put(self, repo, folder, revision="main"):
        """Puts the files of a folder on the hub."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.repos.setdefault(repo, {})[revision] = files


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        headers["Content_Length"] = str(len(content))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code):
        self.answer(status, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        hub.asked.append((self.command, self.path))
        repo, revision, name = RESOLVE.fullmatch(self.path).groups()
        repos, given = hub.repos, self.headers.get("Authorization")
        if hub.token and given != f"Bearer {hub.token}":
            # as the hub does: it does not tell that there is such a model
            self.refuse(401, "RepoNotFound")
        elif repo not in repos:
            self.refuse(404, "RepoNotFound")
        elif revision not in repos[repo]:
            self.refuse(404, "RevisionNotFound")
        elif name not in repos[repo][revision]:
            self.refuse(404, "EntryNotFound")
        else:
            content = repos[repo][revision][name]
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content)
            commit = hashlib.sha1(revision.encode()).hexdigest()
            etag = f'"{blob.hexdigest()}"'
            self.answer(200, content, ETag=etag, X_Repo_Commit=commit)


@contextmanager
def serving():
    """A running ``Hub``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(
            target=server.serve_forever, args=(0.01,), daemon=True
        ).start()
        yield server.hub
        server.shutdown()


def use_hub(monkeypatch, hub, cache):
    """Points huggingface_hub, whose settings are read at import, to a hub."""
    import huggingface_hub
    from huggingface_hub import constants

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # a new client, for this server
    huggingface_hub.close_session()
