"""A local HTTP server that misbehaves on request, for tests of downloads."""

import hashlib
import re
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Drop:
    """Send this many bytes of the body, then cut the connection."""

    after: int


@dataclass(frozen=True)
class Status:
    """Answer with this status and no body."""

    code: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """Send these bytes in place of an answer, then a piece every so many seconds, without end."""

    start: bytes
    piece: bytes = b""
    pause: float = 0.0


@dataclass
class FlakyServer:
    """Serves ``files`` (address path without the leading slash -> content) and a ``folder``.

    Args:
        ranges: honour Range requests.
        check_if_range: compare If-Range with the ETag, as a server must; a careless one does not.
        etags: send an ETag.
        unavailable_every, drop_every: every so many requests, counted over all files, the answer is
            503, or the connection is cut in the middle of the body.

    ``plan[path]`` is a queue of Drop, Status and Raw, used up one by one before the file is served.
    ``requests`` lists (path, Range header or None) in order of arrival.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    folder: Path | None = None
    ranges: bool = True
    check_if_range: bool = True
    etags: bool = True
    unavailable_every: int = 0
    drop_every: int = 0
    plan: dict[str, deque[Drop | Status | Raw]] = field(default_factory=lambda: defaultdict(deque))
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> "FlakyServer":
        handler = type("Handler", (_Handler,), {"world": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.base = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *exception: object) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, path: str) -> str:
        return f"{self.base}/{path}"

    def content(self, path: str) -> bytes | None:
        there = self.folder is not None and (self.folder / path).is_file()
        return self.files.get(path, (self.folder / path).read_bytes() if there else None)

    def behaviour(self, path: str, asked: str | None, size: int) -> Drop | Status | Raw | None:
        with self.lock:
            self.requests.append((path, asked))
            number = len(self.requests)
            if self.plan[path]:
                return self.plan[path].popleft()
        if self.unavailable_every and number % self.unavailable_every == 0:
            return Status(503, {"Retry-After": "0"})
        return Drop(size // 2) if self.drop_every and number % self.drop_every == 0 else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: FlakyServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        content = self.world.content(path)
        asked = self.headers.get("Range")
        behaviour = self.world.behaviour(path, asked, len(content or b""))
        if isinstance(behaviour, Status):
            return self._reply(behaviour.code, b"", behaviour.headers)
        if isinstance(behaviour, Raw):
            return self._send(behaviour)
        if content is None:
            return self._reply(404, b"", {})
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        headers = {"ETag": etag} if self.world.etags else {}
        status, start, size = 200, 0, len(content)
        unchanged = self.headers.get("If-Range") in (None, etag) or not self.world.check_if_range
        if asked and self.world.ranges and unchanged:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= size:
                return self._reply(416, b"", {"Content-Range": f"bytes */{size}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        cut = behaviour.after if isinstance(behaviour, Drop) else None
        return self._reply(status, content[start:], headers, cut)

    def _send(self, raw: Raw) -> None:
        self.close_connection = True
        try:
            self.wfile.write(raw.start)
            while raw.piece and not self.world.closed.wait(raw.pause):
                self.wfile.write(raw.piece)
        except OSError:
            pass  # the client has gone

    def _reply(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass
