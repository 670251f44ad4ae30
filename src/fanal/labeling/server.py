"""The page on which a person labels samples: served to this machine alone, to whoever knows the token."""

from __future__ import annotations

import hmac
import io
import json
import re
import secrets
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from fanal import pictures
from fanal.errors import FanalError, reason
from fanal.labeling.labels import KEYS, Labels, Samples

__all__ = ["HOST", "LabelServer"]

HOST = "127.0.0.1"

_OPEN, _UNSURE = -2, -1
_MOST_BYTES = 4096  # of a request's body
_IMAGE = re.compile(r"image/(\d{1,9})\.png", re.ASCII)
_FILES = {
    "": ("page.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LabelServer(ThreadingHTTPServer):
    """Serves a run's samples at `url`, which holds a random token, and stores the labels that come back.

    Args:
        samples: what is labeled.
        labels: where the labels go.
        port: port on this machine; 0 takes a free one.
        show_risk: whether the page tells the risk; without it, it says nothing but the picture.

    Raises:
        FanalError: the port is taken, or there is no risk to show.
    """

    daemon_threads = True
    request_queue_size = 128  # five by default: more clicks and pictures at one moment would be refused

    def __init__(self, samples: Samples, labels: Labels, *, port: int = 0, show_risk: bool = False) -> None:
        if show_risk and samples.risk is None:
            raise FanalError(f"{samples.folder} holds no risk of {samples.tensor}: leave --show-risk out")
        self.samples, self.labels, self.show_risk = samples, labels, show_risk
        self.token, self.lock = secrets.token_urlsafe(16), threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise FanalError(f"cannot serve on port {port}: {reason(error)}; try another --port") from error
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def state(self) -> dict[str, Any]:
        """Return what the page starts with; samples are known to it by their place in the order alone."""
        labels = self.labels
        state: dict[str, Any] = {
            "run": self.samples.folder.absolute().name,
            "classes": labels.taxonomy.classes,
            "keys": KEYS[: len(labels.taxonomy.classes)],
            "labels": [self.code(sample) for sample in labels.order],
        }
        if self.show_risk and self.samples.risk is not None:
            state["risks"] = [float(self.samples.risk[sample]) for sample in labels.order]
        return state

    def code(self, sample: int) -> int:
        """Return a sample's class, -1 for "unsure", -2 for no label."""
        if sample not in self.labels.codes:
            return _OPEN
        code = self.labels.codes[sample]
        return _UNSURE if code is None else code

    def image(self, position: int) -> bytes:
        """Return the picture of the sample at a place in the order, as PNG."""
        sample, buffer = self.labels.order[position], io.BytesIO()
        pictures.single(self.samples.x, sample).save(buffer, "PNG")
        return buffer.getvalue()

    def label(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Store one label.

        Raises:
            FanalError: there is no such place or class, or the label cannot be saved.
        """
        if body.keys() != {"position", "code"}:
            raise FanalError(f"a label is a position and a code, got {', '.join(sorted(body))[:80] or 'nothing'}")
        position = body["position"]
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < self.labels.count:
            raise FanalError(f"the positions are 0 to {self.labels.count - 1}, got {position!r:.40}")
        with self.lock:
            self.labels.set(self.labels.order[position], body["code"])
            return {"labeled": len(self.labels.codes)}

    def undo(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Take the last label back; say which place it was of, and what that has now.

        Raises:
            FanalError: the body is not empty, or the labels cannot be saved.
        """
        if body:
            raise FanalError("undo takes nothing")
        with self.lock:
            sample = self.labels.undo()
            position = None if sample is None else self.labels.order.index(sample)
            return {"position": position, "code": None if sample is None else self.code(sample)}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing when a browser goes away in the middle."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: LabelServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def version_string(self) -> str:
        return "fanal"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text") else kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if status >= 400:  # what is left of a refused body must not be read as the next request
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, value: Mapping[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _refuse(self, status: int, why: str) -> None:
        self._answer({"error": why}, status)

    def _route(self) -> str | None:
        """The part of the address behind the token; None, and an answer, where the request is not the page's."""
        if self.headers.get("Host") not in self.server.hosts:  # a name that someone points at this machine
            self._refuse(403, "this page is served to this machine alone")
            return None
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc not in self.server.hosts:
            self._refuse(403, "this page takes requests from itself alone")
            return None
        token, slash, rest = urlsplit(self.path).path.lstrip("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(404, "there is nothing here: use the whole address that fanal label printed")
            return None
        return rest

    def do_GET(self) -> None:
        """Answer with the page, its parts, the state, or a picture."""
        rest = self._route()
        if rest is None:
            return
        image = _IMAGE.fullmatch(rest)
        if rest in _FILES:
            name, kind = _FILES[rest]
            self._send(200, (resources.files("fanal.labeling") / name).read_bytes(), kind)
        elif rest == "state":
            self._answer(self.server.state())
        elif image and int(image[1]) < self.server.labels.count:
            self._send(200, self.server.image(int(image[1])), "image/png")
        else:
            self._refuse(404, "there is no such page")

    def do_POST(self) -> None:
        """Store a label or take one back."""
        rest = self._route()
        if rest is None:
            return
        act = {"label": self.server.label, "undo": self.server.undo}.get(rest)
        if act is None:
            self._refuse(404, "there is no such page")
            return
        try:
            body = self._body()
        except ValueError as error:
            self._refuse(400, str(error))
            return
        try:
            self._answer(act(body))
        except FanalError as error:
            self._refuse(500 if isinstance(error.__cause__, OSError) else 400, str(error))

    def _body(self) -> dict[str, Any]:
        """The JSON object of a request.

        Raises:
            ValueError: it is none, or larger than any of the page's.
        """
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json":
            raise ValueError("the body must be application/json")
        if not re.fullmatch(r"\d{1,6}", length, re.ASCII) or int(length) > _MOST_BYTES:
            raise ValueError(f"the body must have a length of at most {_MOST_BYTES} bytes")
        try:
            value = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError("the body must be a JSON object")
        return value
