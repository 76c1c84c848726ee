"""A server on loopback with the file and commit routes of the model hub.

It serves what huggingface_hub's client asks for: metadata by HEAD, small files
by git's SHA-1, large ones through a redirect by SHA-256, ranges, errors with
their X-Error-Code, and commits. It misbehaves on request.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESOLVE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
CREATE = "/api/repos/create"
PREUPLOAD = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/preupload/.+")
COMMIT = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/commit/.+")
LARGE = (".safetensors", ".bin")


class Hub:
    """What is on the hub, and how it behaves.

    Arguments
    ---------
    url : str
        Where it listens.
    """

    def __init__(self, url):
        self.url = url
        self.large_url = url.replace("127.0.0.1", "localhost") + "/large"
        self.repos = {}  # id -> {revision: {name: content}}
        self.token = None  # which it asks for
        self.status = None  # with which it answers everything
        self.cut = 0  # downloads of large files to break off half way
        self.asked = []

    def put(self, repo, folder, revision="main"):
        """Puts the files of a folder on the hub."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.repos.setdefault(repo, {})[revision] = files

    def large(self, digest):
        """The content with a SHA-256."""
        for revisions in self.repos.values():
            for files in revisions.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == digest:
                        return content
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        headers = {
            name.replace("_", "-"): text for name, text in headers.items()
        }
        headers.setdefault("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code=None):
        headers = (
            {"X_Error_Code": code, "X_Error_Message": code} if code else {}
        )
        self.answer(status, **headers)

    def granted(self):
        """Whether the request may go on; answers it otherwise."""
        hub = self.server.hub
        if hub.status is not None:
            self.refuse(hub.status)
            return False
        given = self.headers.get("Authorization")
        if hub.token and given != f"Bearer {hub.token}":
            # as the hub does: it does not tell that there is such a model
            self.refuse(
                403 if given else 401, None if given else "RepoNotFound"
            )
            return False
        return True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        hub.asked.append((self.command, self.path))
        if self.path.startswith("/large/"):
            assert "Authorization" not in self.headers
            self.send_large(hub.large(self.path.removeprefix("/large/")))
            return
        match = RESOLVE.fullmatch(self.path)
        if not self.granted():
            return
        if match is None or match[1] not in hub.repos:
            self.refuse(404, "RepoNotFound")
        elif match[2] not in hub.repos[match[1]]:
            self.refuse(404, "RevisionNotFound")
        elif match[3] not in hub.repos[match[1]][match[2]]:
            self.refuse(404, "EntryNotFound")
        else:
            content = hub.repos[match[1]][match[2]][match[3]]
            commit = hashlib.sha1(match[2].encode()).hexdigest()
            self.send_file(content, commit, match[3].endswith(LARGE))

    def send_file(self, content, commit, large):
        if large:
            digest = hashlib.sha256(content).hexdigest()
            self.answer(
                302,
                # another host, as it is on the hub: gets no token
                Location=f"{self.server.hub.large_url}/{digest}",
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{digest}"',
                X_Linked_Size=str(len(content)),
            )
        else:
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content)
            etag = f'"{digest.hexdigest()}"'
            self.answer(200, content, ETag=etag, X_Repo_Commit=commit)

    def send_large(self, content):
        hub = self.server.hub
        start, status, headers = 0, 200, {}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start, status = int(wanted[1]), 206
            headers["Content_Range"] = (
                f"bytes {start}-{len(content) - 1}/{len(content)}"
            )
        content = content[start:]
        if self.command == "GET" and hub.cut:
            hub.cut -= 1
            headers["Content_Length"] = str(len(content))
            self.answer(status, content[: len(content) // 2], **headers)
            self.close_connection = True
        else:
            self.answer(status, content, **headers)

    def do_POST(self):
        hub = self.server.hub
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append((self.command, path))
        if not self.granted():
            return
        if path == CREATE:
            wanted = json.loads(body)
            repo = f"{wanted.get('organization', 'me')}/{wanted['name']}"
            hub.repos.setdefault(repo, {"main": {}})
            answer = {"url": f"{hub.url}/{repo}"}
        elif match := PREUPLOAD.fullmatch(path):
            answer = {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        elif match := COMMIT.fullmatch(path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.repos[match[1]]["main"][line["value"]["path"]] = content
            url = f"{hub.url}/{match[1]}/commit/{'0' * 40}"
            answer = {"commitUrl": url, "commitOid": "0" * 40, "success": True}
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        else:
            self.refuse(404)
            return
        self.answer(
            200, json.dumps(answer).encode(), Content_Type="application/json"
        )


@contextmanager
def serving():
    """A running ``Hub``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(
        target=server.serve_forever, args=(0.01,), daemon=True
    )
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch, hub, cache):
    """Points huggingface_hub, whose settings are read at import, to a hub."""
    import huggingface_hub
    from huggingface_hub import constants, file_download

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # it waits a second before it resumes
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    # a new client, for this server
    huggingface_hub.close_session()
