"""A local server with the part of the Hub's protocol that up- and downloads use, which can be made to fail.

The protocol: https://huggingface.co/docs/hub/api, and Git LFS's batch API (basic transfers) for large files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aTokenThatNobodyMaySee"
COMMIT = "1" * 40
LARGE = (".safetensors", ".bin", ".gguf")


class Hub(ThreadingHTTPServer):
    """Server with repositories in memory.

    faults : for each step that fails (``create``, ``list``, ``preupload``, ``batch``, ``put``, ``verify``, ``commit``),
        a status, ``hang``, ``interrupt`` (Ctrl-C) or ``cut``.
    times : how many requests fail before all work.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: dict[str, int | str] = {}
        self.times = 1_000
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool | None] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.steps: list[str] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        steps = {
            "/api/repos/create": self._create,
            "/api/validate-yaml": lambda: self._accept({"errors": [], "warnings": []}),
            "/verify": lambda: self._accept({}),
        }
        step = path.rpartition("/")[2] if path in steps else path.split("/")[-2] if "/api/" in path else "batch"
        if self._fails(step):
            return
        if path in steps:
            steps[path]()
            return
        {"preupload": self._preupload, "commit": self._commit, "batch": self._batch}[step]()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path:
            self._send_file(path)
            return
        if "/revision/" in path:
            name = path.split("/api/models/")[1].split("/revision/")[0]
            files = [{"rfilename": file} for file in self.server.repositories[name]]
            self._answer({"id": name, "sha": COMMIT, "siblings": files})
            return
        if "/tree/" not in path:
            self._answer({}, 404)
            return
        if self._fails("list"):
            return
        files = self.server.repositories[path.split("/api/models/")[1].split("/tree/")[0]]
        self._answer(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
        )

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send_file(self, path: str) -> None:
        name, _, file = path[1:].partition("/resolve/")
        data = self.server.repositories[name][file.partition("/")[2]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def do_PUT(self) -> None:
        if self._fails("put"):
            return
        body = self._read_body()
        # Upload addresses are signed, and must not get the token.
        assert self.headers["authorization"] is None
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == name
        self.server.objects[name] = body
        self._answer({})

    def _accept(self, content: Any) -> None:
        self._read_body()
        self._answer(content)

    def _create(self) -> None:
        request = json.loads(self._read_body())
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            self._answer({"error": "You already created this model repo", **url}, 409)
            return
        visibility = request.get("visibility")
        # None if the request leaves it to the organization.
        self.server.private[name] = request.get("private") if visibility is None else visibility == "private"
        self.server.repositories[name] = {}
        self._answer(url)

    def _preupload(self) -> None:
        files = json.loads(self._read_body())["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._answer({"files": modes})

    def _batch(self) -> None:
        objects = json.loads(self._read_body())["objects"]
        actions = [self._add_actions(each) for each in objects]
        self._answer({"transfer": "basic", "objects": actions}, kind="vnd.git-lfs+json")

    def _add_actions(self, file: dict[str, Any]) -> dict[str, Any]:
        if file["oid"] in self.server.objects:
            return file
        href = f"{self.server.url}/put/{file['oid']}"
        return {**file, "actions": {"upload": {"href": href}, "verify": {"href": f"{self.server.url}/verify"}}}

    def _commit(self) -> None:
        name = self.path.split("/api/models/")[1].split("/commit/")[0]
        header, *lines = (json.loads(line) for line in self._read_body().splitlines())
        for line in lines:
            value = line["value"]
            data = self.server.objects[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            self.server.repositories[name][value["path"]] = data
        self.server.commits.append(header["value"]["summary"])
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _fails(self, step: str) -> bool:
        """Fail a step if it has a fault or the token is wrong."""
        self.server.steps.append(step)
        fault = self.server.faults.get(step)
        if fault is None or self.server.times <= 0:
            if step != "put" and self.headers["authorization"] != f"Bearer {TOKEN}":
                self._answer({"error": "Invalid username or password."}, 401)
                return True
            return False
        self.server.times -= 1
        if fault == "hang":
            self.server.closing.wait(30)
        elif fault == "interrupt":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            self.server.closing.wait(30)
        elif fault == "cut":
            # Reset the connection after a part of the request.
            self.rfile.read(10)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self._read_body()
            # Like a careless server, return the token in the message.
            self._answer({"error": f"No for {self.headers['authorization']}"}, int(fault))
        return True

    def _read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _answer(self, content: Any, status: int = 200, kind: str = "json") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", f"application/{kind}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
