"""Talk to a running ComfyUI server: queue prompts, follow them, stop them. Knows nothing of how the server was started.

Used through :class:`comfy_server.ComfyServer` by the demo and the tests.
"""

import json
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket

PREVIEW_IMAGE = 1
PREVIEW_IMAGE_WITH_METADATA = 4


class PromptRejected(Exception):
    """The server would not queue the prompt (HTTP 400); ``body`` is its answer, with ``error`` and ``node_errors``."""

    def __init__(self, body: dict[str, Any]):
        super().__init__(json.dumps(body, indent=1, ensure_ascii=False))
        self.body = body


class PromptFailed(Exception):
    """A queued prompt ended without success; ``entry`` is its history entry, ``error`` the execution_error or _interrupted message."""

    def __init__(self, entry: dict[str, Any]):
        self.entry = entry
        self.error = next((data for kind, data in entry["status"]["messages"] if kind in ("execution_error", "execution_interrupted")), {})
        where = f"{self.error.get('node_type', 'prompt')} ({self.error.get('node_id', '?')})"
        super().__init__(f"{where}: {self.error.get('exception_type', 'interrupted')}: {self.error.get('exception_message', '')}".strip())


@dataclass(frozen=True)
class Event:
    """One websocket message. ``kind`` is ComfyUI's type ("progress", "executing", ...), or "preview" for a picture."""

    kind: str
    data: dict[str, Any] = field(default_factory=dict)
    image: bytes = b""
    received_s: float = 0.0


def parse_message(message: str | bytes) -> Event:
    """An :class:`Event` from what the websocket gave: JSON text, or a preview behind a big-endian header."""
    now = time.monotonic()
    if isinstance(message, str):
        content = json.loads(message)
        return Event(content["type"], content.get("data") or {}, received_s=now)
    (kind,) = struct.unpack(">I", message[:4])
    if kind == PREVIEW_IMAGE:
        return Event("preview", {"image_type": "image/png" if message[7] == 2 else "image/jpeg"}, message[8:], now)
    if kind == PREVIEW_IMAGE_WITH_METADATA:
        (length,) = struct.unpack(">I", message[4:8])
        return Event("preview", json.loads(message[8 : 8 + length]), message[8 + length :], now)
    return Event(f"binary_{kind}", {}, message[4:], now)


class EventCollector:
    """Keeps every message of one websocket connection, in a thread of its own, until closed."""

    def __init__(self, url: str, client_id: str, on_event: Callable[[Event], None] | None = None):
        self.events: list[Event] = []
        self._on_event = on_event
        self._socket = websocket.create_connection(f"{url.replace('http', 'ws', 1)}/ws?clientId={client_id}", timeout=30)
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        while True:
            try:
                message = self._socket.recv()
            except (OSError, websocket.WebSocketException):
                return
            if not message:
                return
            event = parse_message(message)
            self.events.append(event)
            if self._on_event:
                self._on_event(event)

    def of(self, *kinds: str) -> list[Event]:
        """The messages of these kinds so far, in order."""
        return [event for event in self.events if event.kind in kinds]

    def wait_for(self, condition: Callable[[Event], bool], timeout_s: float = 60) -> Event:
        """The first message, past or coming, for which ``condition`` holds.

        Raises:
            TimeoutError: none came in time.
        """
        deadline = time.monotonic() + timeout_s
        seen = 0
        while time.monotonic() < deadline:
            while seen < len(self.events):
                if condition(self.events[seen]):
                    return self.events[seen]
                seen += 1
            time.sleep(0.02)
        raise TimeoutError(f"no such message in {timeout_s} s; got {sorted({event.kind for event in self.events})}")

    def close(self) -> None:
        self._socket.close()
        self._thread.join(timeout=5)

    def __enter__(self) -> "EventCollector":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ComfyClient:
    """ComfyUI's HTTP interface."""

    def __init__(self, url: str):
        self.url = url
        self.client_id = uuid.uuid4().hex

    def request(self, path: str, body: Any = None, *, headers: dict[str, str] | None = None, timeout_s: float = 60) -> Any:
        """GET, or POST when there is a body (bytes as they are, anything else as JSON); the parsed answer, bytes if it is not JSON.

        Raises:
            urllib.error.HTTPError: the server answered with an error.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers or {"Content-Type": "application/json"})
        # Without proxies: the server is on this machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s) as answer:
            content = answer.read()
            return json.loads(content) if content and "json" in answer.headers.get("Content-Type", "") else content

    def object_info(self, node_id: str = "") -> dict[str, Any]:
        """The schemas of all nodes, or of one."""
        return self.request(f"/object_info/{node_id}" if node_id else "/object_info")

    def queue(self, prompt: dict[str, Any], *, workflow: dict[str, Any] | None = None) -> str:
        """Queue an API-format prompt and return its id. ``workflow`` is what the frontend sends along to be saved in outputs.

        Raises:
            PromptRejected: the prompt is not valid.
        """
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        try:
            return self.request("/prompt", {"prompt": prompt, "client_id": self.client_id, "extra_data": extra})["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(json.loads(error.read())) from None

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """A finished prompt's entry (``status``, ``outputs``), or None while it waits or runs."""
        return self.request(f"/history/{prompt_id}").get(prompt_id)

    def wait(self, prompt_id: str, timeout_s: float = 300) -> dict[str, Any]:
        """The prompt's history entry, once it ended: with success, an error, or an interrupt (``status.status_str`` tells).

        Raises:
            TimeoutError: it did not end in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            entry = self.history(prompt_id)
            if entry:
                return entry
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt_id} did not end within {timeout_s} s")

    def run(self, prompt: dict[str, Any], *, timeout_s: float = 300, workflow: dict[str, Any] | None = None) -> dict[str, Any]:
        """Queue a prompt and wait for its success; the history entry.

        Raises:
            PromptRejected: the prompt is not valid.
            PromptFailed: it ended with an error or was interrupted.
        """
        entry = self.wait(self.queue(prompt, workflow=workflow), timeout_s)
        if entry["status"]["status_str"] != "success":
            raise PromptFailed(entry)
        return entry

    def listen(self, on_event: Callable[[Event], None] | None = None) -> EventCollector:
        """Collect this client's websocket messages, from now until the collector is closed. One at a time: a second replaces the first."""
        return EventCollector(self.url, self.client_id, on_event)

    def interrupt(self) -> None:
        """Stop the running prompt, as the Cancel button does."""
        self.request("/interrupt", {})

    def free(self, *, unload_models: bool = True, free_memory: bool = False) -> None:
        """What "Unload Models" (and, with ``free_memory``, "Free model and node cache") does. Takes effect a moment later."""
        self.request("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def upload(self, picture: Path, name: str | None = None) -> str:
        """Put a picture into the input folder; returns the name LoadImage knows it by."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name or picture.name}"\r\n\r\n'
        overwrite = f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{boundary}--\r\n'
        body = head.encode() + picture.read_bytes() + overwrite.encode()
        answer = self.request("/upload/image", body, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"})
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else answer["name"]
