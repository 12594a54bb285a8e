"""A Hugging Face Hub on this machine: as much of its HTTP interface as ``huggingface_hub`` uses to download a model."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class HubServer:
    """Serves folders as models until closed; remembers what was asked.

    Attributes:
        models: Hub id -> folder.
        refuse: Hub id -> (status, X-Error-Code) for every file of it, as gated models do.
        refuse_all: the same for every question.
        claimed_bytes: file -> size that is told instead of the real one.
        requests: "METHOD path" of every request so far.
        sent_bytes: of all files.
    """

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.refuse: dict[str, tuple[int, str]] = {}
        self.refuse_all: tuple[int, str] | None = None
        self.claimed_bytes: dict[str, int] = {}
        self.requests: list[str] = []
        self.sent_bytes = 0
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, model: str) -> str:
        """The commit hash; changes with the model's files."""
        names = "".join(f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in sorted(self.models[model].rglob("*")))
        return hashlib.sha1(names.encode()).hexdigest()

    def asked(self, word: str) -> list[str]:
        """The requests that contain a word."""
        return [request for request in self.requests if word in request]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub = self.server_hub
        hub.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        try:
            if hub.refuse_all:
                self._error(*hub.refuse_all)
            elif parts[:2] == ["api", "models"]:
                self._model_info("/".join(parts[2:4]), body)
            elif parts[2:3] == ["resolve"]:
                self._file("/".join(parts[:2]), "/".join(parts[4:]), body)
            else:
                self._error(404, "EntryNotFound")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client went away, as it does when the user cancels

    def _model_info(self, model: str, body: bool) -> None:
        hub = self.server_hub
        if model not in hub.models:
            return self._error(401, "RepoNotFound")
        root = hub.models[model]
        siblings = [
            {"rfilename": name, "size": hub.claimed_bytes.get(name, path.stat().st_size), "blobId": "0" * 40}
            for path in sorted(root.rglob("*"))
            if path.is_file() and (name := path.relative_to(root).as_posix())
        ]
        info = {"_id": "0", "id": model, "modelId": model, "sha": hub.commit(model), "private": False, "gated": False, "siblings": siblings}
        content = json.dumps({**info, "tags": [], "downloads": 0, "likes": 0, "createdAt": "2025-01-01T00:00:00.000Z"}).encode()
        self._send(200, {"Content-Type": "application/json"}, content if body else b"", len(content))

    def _file(self, model: str, name: str, body: bool) -> None:
        hub = self.server_hub
        if model in hub.refuse:
            return self._error(*hub.refuse[model])
        path = hub.models.get(model, Path("/nowhere")) / name
        if not path.is_file():
            return self._error(404, "EntryNotFound")
        content = path.read_bytes()
        headers = {
            "X-Repo-Commit": hub.commit(model),
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        self._send(200, headers, content if body else b"", len(content))
        hub.sent_bytes += len(content) if body else 0

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": f"refused: {code}"}, b"", 0)

    def _send(self, status: int, headers: dict[str, str], content: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)
