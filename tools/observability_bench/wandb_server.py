"""Stand-ins of a wandb server on the loopback interface: of no use (nobody listens, it never answers, or answers 500),
or one that takes what the real client sends and keeps it, until it is told to be of no use."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Useless = Literal["closed", "hangs", "500"]
ENTITY, DATE = "team", "2026-01-01T00:00:00Z"


@dataclass
class WandbServer:
    """Where it is, the paths that it was asked for, and what it keeps where it answers."""

    url: str = ""
    kind: Useless | Literal["answers"] = "answers"
    asked: list[str] = field(default_factory=list)
    operations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # of GraphQL: (name, variables)
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # rows by the run's id
    uploads: dict[str, int] = field(default_factory=dict)  # bytes by the file's name
    stopped: bool = False  # whether the run's page has been asked to stop it
    close: Callable[[], None] = lambda: None  # stop listening
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def turn(self, kind: Useless) -> None:
        """Be of no use from now on."""
        self.kind = kind
        if kind == "closed":
            self.close()

    def variables(self, operation: str) -> list[dict[str, Any]]:
        """What was asked with an operation, in order."""
        with self._lock:
            return [variables for name, variables in self.operations if name == operation]

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """Keep what is sent; returns the answer."""
        with self._lock:
            if path == "/graphql":
                asked = json.loads(body)
                found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                name, variables = found[1] if found else "", asked.get("variables") or {}
                self.operations.append((name, variables))
                return {"data": self._data(name, variables)}
            if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
                rows = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                self.history.setdefault(stream[1], []).extend(json.loads(row) for row in rows)
                return {"stopped": self.stopped}
            if path.startswith("/upload/"):
                self.uploads[path.removeprefix("/upload/")] = len(body)
            return {}

    def _data(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        project: dict[str, Any] = {"id": "p", "name": "bitmar", "internalId": "p1"}
        project |= {"entity": {"id": "e", "name": ENTITY}, "entityName": ENTITY, "createdAt": DATE}
        project |= {"isBenchmark": False, "user": None}
        if name == "Viewer":
            return {"viewer": {"id": "u", "entity": ENTITY, "username": "someone", "flags": "{}"}}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": self._bucket(variables["name"])}}
        if name == "UpsertBucket":
            shown = {"displayName": variables.get("displayName"), "historyLineCount": 0, "project": project}
            bucket = {"id": "b", "name": variables.get("name"), "config": "{}", **shown}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "view" in name.lower() and "spec" in variables:
            kept = {"displayName": variables["displayName"], "description": "", "spec": variables["spec"]}
            dates = {"createdAt": DATE, "updatedAt": DATE}
            return {"upsertView": {"view": {"id": "v1", "name": "v", "project": project, **kept, **dates}}}
        page = {"endCursor": None, "hasNextPage": False}
        return {"project": project, "models": {"edges": [{"node": project, "cursor": ""}], "pageInfo": page}}

    def _bucket(self, run_id: str) -> dict[str, Any] | None:
        """What a resume is told of the run; None where there is none yet."""
        if run_id not in self.history:
            return None
        rows = self.history[run_id]
        counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]"}
        about = {"id": "b", "name": run_id, "displayName": run_id, "tags": [], "wandbConfig": '{"t": 1}'}
        return {**about, **counts, **tails, "summaryMetrics": json.dumps(rows[-1]), "config": "{}"}


@contextmanager
def wandb_server(kind: Useless | Literal["answers"]) -> Iterator[WandbServer]:
    """Serve as `kind` says; WANDB_BASE_URL leads there."""
    if kind == "closed":
        with socket.socket() as probe:  # bound, and never listening: every connection is refused
            probe.bind(("127.0.0.1", 0))
            yield WandbServer(f"http://127.0.0.1:{probe.getsockname()[1]}", kind)
        return
    served, ended = WandbServer(kind=kind), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            served.asked.append(self.path)
            kind = served.kind
            if kind == "hangs":
                ended.wait()
            if kind in ("hangs", "closed"):
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = json.dumps(served.answer(self.path, body)).encode() if kind == "answers" else b""
            self.send_response(200 if kind == "answers" else 500)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = answer

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # the client has gone
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Threads(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

    with Threads(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

        def close() -> None:
            server.shutdown()
            server.server_close()

        served.close = close
        try:
            yield served
        finally:
            ended.set()
            server.shutdown()
