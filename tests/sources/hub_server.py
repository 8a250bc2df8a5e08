"""The Hub's read API over files in memory: what `datasets` asks of it, and no more.

`with HubServer({"org/set": {"path": b"..."}}) as url:` answers for one commit (COMMIT) of each
dataset, under that sha and the names `main` and `v1`. A dataset whose name holds `private` asks for
a token, one whose name holds `down` fails.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = {COMMIT, "main", "v1"}

_API = re.compile(
    r"/api/datasets/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info)/(?P<rev>[^/]+))?"
    r"(/(?P<folder>.*))?"
)
_FILE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")


class HubServer:
    def __init__(self, sets):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(sets))
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def _handler(sets):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            self.answer(_FILE.fullmatch(path), _API.fullmatch(path))

        def do_HEAD(self):
            self.do_GET()

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path)
            self.answer(None, _API.fullmatch(path), body)

        def answer(self, file, api, body=b""):
            found = file or api
            if found is None:
                return self.error(404, "EntryNotFound")
            repo, rev = found["repo"], found["rev"] or "main"
            if "down" in repo:
                return self.error(503, "")
            if "private" in repo and not self.headers.get("Authorization"):
                return self.error(401, "GatedRepo")
            if repo not in sets:
                return self.error(404, "RepoNotFound")
            if rev not in NAMES:
                return self.error(404, "RevisionNotFound")
            if file:
                return self.file(sets[repo], file["path"])
            return self.api(repo, sets[repo], api, body)

        def api(self, repo, files, api, body):
            if api["what"] == "paths-info":
                wanted = set(json.loads(body)["paths"])
                return self.json([_entry(files, path) for path in files if path in wanted])
            if api["what"] == "tree":
                inside = _children(files, api["folder"] or "")
                return self.json(inside) if inside else self.error(404, "EntryNotFound")
            about = {"id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
            return self.json(about | {"siblings": [{"rfilename": path} for path in files]})

        def file(self, files, path):
            if path not in files:
                return self.error(404, "EntryNotFound")
            data = files[path]
            return self.send(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT})

        def json(self, value):
            data = json.dumps(value).encode()
            return self.send(200, data, {"Content-Type": "application/json"})

        def error(self, status, code):
            return self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def send(self, status, data, headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_):
            """Say nothing."""

    return Handler


def _children(files, folder):
    """The files and folders right inside a folder."""
    start = f"{folder}/" if folder else ""
    names = sorted({path[len(start) :].split("/")[0] for path in files if path.startswith(start)})
    paths = [start + name for name in names]
    return [
        _entry(files, path)
        if path in files
        else {"type": "directory", "path": path, "size": 0, "oid": _oid(path.encode())}
        for path in paths
    ]


def _entry(files, path):
    return {"type": "file", "path": path, "size": len(files[path]), "oid": _oid(files[path])}


def _oid(data):
    return hashlib.sha1(data).hexdigest()
