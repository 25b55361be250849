"""A real HTTP server of files that breaks off, lies and changes as a test asks, and records what it sent."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer."""

    status: int | None = None  # answer this instead
    cut: int | None = None  # send so many bytes of the body and hang up
    hold: int | None = None  # send so many bytes of the body and wait until the test goes on
    declare: int | None = None  # this Content-Length instead of the right one
    then: Served | None = None  # what the file is from here on


@dataclass
class Served:
    """A file, as the server has it now."""

    data: bytes
    tag: str | None = '"1"'  # None: no ETag
    date: str | None = None  # Last-Modified
    ranges: bool = True
    if_range: bool = True  # False: ranges are sent without looking at If-Range
    chunked: bool = False  # as packed on the way: no length, no ranges
    faults: list[Fault] = field(default_factory=list)  # of the next answers, one each


@dataclass
class Answer:
    """What the server sent."""

    path: str
    range: str | None
    if_range: str | None
    status: int = 0
    sent: int = 0  # bytes of the body


@dataclass
class FileServer:
    """`files` by path, without a leading "/"; /to/PATH redirects to /PATH."""

    port: int
    files: dict[str, Served] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    holding: threading.Event = field(default_factory=threading.Event)  # set once an answer is held
    go_on: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"


@contextmanager
def file_server() -> Iterator[FileServer]:
    """A server on a free port of loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        state = FileServer(server.server_address[1])
        server.state = state  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield state
        finally:
            state.go_on.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        state: FileServer = self.server.state  # type: ignore[attr-defined]
        path = self.path.partition("?")[0].removeprefix("/")
        answer = Answer(self.path, self.headers["Range"], self.headers["If-Range"])
        state.answers.append(answer)
        if path.startswith("to/"):
            self._head(answer, 302, {"Location": "/" + self.path.removeprefix("/to/"), "Content-Length": "0"})
            return
        served = state.files.get(path)
        fault = served.faults.pop(0) if served is not None and served.faults else Fault()
        if served is None or fault.status is not None:
            self._head(answer, fault.status or 404, {"Content-Length": "0"})
            return
        if fault.then is not None:
            state.files[path] = fault.then
        with suppress(ConnectionError):  # the client is gone
            self._send(state, served, fault, answer)

    def _send(self, state: FileServer, served: Served, fault: Fault, answer: Answer) -> None:
        start, told = 0, {"ETag": served.tag, "Last-Modified": served.date}
        headers = {name: value for name, value in told.items() if value is not None}
        asked = re.fullmatch(r"bytes=(\d+)-", answer.range or "")
        same = answer.if_range in (None, served.tag, served.date) or not served.if_range
        if asked and same and served.ranges and not served.chunked:
            start = int(asked[1])
            if start >= len(served.data):
                headers |= {"Content-Range": f"bytes */{len(served.data)}", "Content-Length": "0"}
                self._head(answer, 416, headers)
                return
            headers["Content-Range"] = f"bytes {start}-{len(served.data) - 1}/{len(served.data)}"
        body = memoryview(served.data)[start:]
        if served.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(len(body) if fault.declare is None else fault.declare)
        self._head(answer, 206 if "Content-Range" in headers else 200, headers)
        end = len(body) if fault.cut is None else fault.cut
        for first in range(0, end, CHUNK_BYTES):
            if fault.hold is not None and first >= fault.hold and not state.go_on.is_set():
                state.holding.set()
                state.go_on.wait()
            piece = body[first : min(first + CHUNK_BYTES, end)]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if served.chunked else piece)
            answer.sent += len(piece)
        if fault.cut is not None or fault.declare is not None:
            self.close_connection = True
        elif served.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _head(self, answer: Answer, status: int, headers: dict[str, str]) -> None:
        answer.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""
