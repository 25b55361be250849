"""Bytes of a URL over HTTP(S) and from object stores (through fsspec), with retries, ranges and clear errors.

Errors name the URL and a status, never what a library printed: redirects and proxies put secrets into such texts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast
from urllib.parse import urlsplit

from shards.record import DataError

PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}  # what a scheme needs besides fsspec
RANGE_BYTES = 8 << 20
PARALLEL_RANGES = 4
CHUNK_BYTES = 1 << 20
MAX_BACK_OFF_S = 30.0
SLOWEST_BYTES_S = 1024  # a server that sends less is as good as one that sends nothing
SLOWEST_RANGE_BYTES_S = 64 << 10  # of one of PARALLEL_RANGES, which count for nothing until they are whole
PASSING = (408, 425, 429)  # client errors that another attempt may cure


class StoreError(DataError):
    """A file of a set cannot be had: missing, refused, broken off for good, or no room for it."""


class Broken(Exception):
    """A transfer failed in a way that another attempt may cure; `restart`: what is here cannot be continued."""

    def __init__(self, text: str, restart: bool = False) -> None:
        super().__init__(text)
        self.restart = restart


@dataclass(frozen=True)
class Retry:
    """How often to try without progress, how long to wait in between, and how long for a server's answer."""

    attempts: int
    back_off_s: float
    timeout_s: float


@dataclass
class Version:
    """Which state of a file at a server the bytes here belong to, as its last answer said (HTTP only).

    A transfer that knows a version goes on only where the file there is still the same, else from the start.
    """

    validator: str | None = None  # a strong ETag, or a date
    size: int | None = None


class Source(Protocol):
    """A kind of server."""

    def chunks(
        self, url: str, start: int, size: int | None, version: Version | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) in order, from `start` on, or from 0 where the server ignores ranges.

        size: bytes the file must have, None where not known. version: of the bytes before `start`; updated.
        Raises Broken and StoreError.
        """
        ...

    def close(self) -> None: ...


def printable(url: str) -> str:
    """The URL without what may be secret: user, password, query and fragment."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def connect(scheme: str, timeout_s: float) -> Source:
    """A client for the servers of a scheme of PACKAGES. Raises StoreError when its package is not installed."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}  # its own session, which close() may end
    if scheme == "s3":
        # One attempt a call, and no size asked first: retries are counted here, in one place.
        limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"total_max_attempts": 1}}
        options |= {"config_kwargs": limits, "max_concurrency": 1}
    elif scheme in ("http", "https"):
        options["client_kwargs"] = {"trust_env": True}  # proxies and .netrc, as curl does
    try:
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError:
        raise StoreError(
            f"{scheme}:// addresses need the package {PACKAGES[scheme]}: pip install {PACKAGES[scheme]}"
        ) from None
    if scheme in ("http", "https"):
        return _Http(filesystem, timeout_s)
    if scheme == "s3":
        filesystem.retries = 1
    else:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks; what fails is told here
    return _Objects(filesystem, scheme, timeout_s)


def download(
    source: Source,
    url: str,
    file: IO[bytes],
    size: int | None,
    retry: Retry,
    stop: threading.Event,
    report: Callable[[int], None] = lambda _: None,
    version: Version | None = None,
) -> None:
    """Complete `file` (unbuffered, open for update) from `url`, going on from the bytes it holds.

    size: bytes the whole has, None where not known. Attempts count anew after RANGE_BYTES of progress. `stop` ends
    it early; `report` is told the bytes here so far; `version` is that of the bytes, before and after. Raises
    StoreError, and OSError for the file itself.
    """
    have = file.seek(0, os.SEEK_END)
    if size is not None and have > size:
        have = 0
    file.truncate(have)
    failures, furthest = 0, have
    while size is None or have < size:
        try:
            for offset, data in source.chunks(url, have, size, version):
                if offset != have:
                    have = offset
                    file.truncate(have)
                if size is not None and have + len(data) > size:
                    raise Broken(f"sends more than the {size} bytes expected", restart=True)
                _write(file, have, data)
                have += len(data)
                report(have)
                if stop.is_set():
                    raise StoreError(f"{printable(url)}: stopped after {have} bytes")
            if size is None or have == size:
                return
            raise Broken(f"cut off after {have} of {size} bytes")
        except Broken as error:
            if have - furthest >= RANGE_BYTES:
                failures, furthest = 0, have
            if error.restart:
                have = 0
                file.truncate(0)
            failures += 1
            wait(url, error, failures, retry, stop)


def read(source: Source, url: str, retry: Retry, stop: threading.Event) -> bytes:
    """A small file, whole. Raises StoreError."""
    failures = 0
    while True:
        try:
            return b"".join(data for _, data in source.chunks(url, 0, None))
        except Broken as error:
            failures += 1
            wait(url, error, failures, retry, stop)


def wait(url: str, error: Broken, failures: int, retry: Retry, stop: threading.Event) -> None:
    """Back off before another attempt, with jitter. Raises StoreError when there is none left, or on `stop`."""
    if failures >= retry.attempts:
        raise StoreError(f"{printable(url)}: {error} (attempt {failures}, the last)") from None
    pause_s = min(retry.back_off_s * 2 ** (failures - 1), MAX_BACK_OFF_S)
    if stop.wait(pause_s * random.uniform(0.5, 1.0)):
        raise StoreError(f"{printable(url)}: stopped while waiting to try again ({error})") from None


def _write(file: IO[bytes], offset: int, data: bytes) -> None:
    file.seek(offset)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]  # an unbuffered file may take a part only


def refusal(status: int) -> str | None:
    """Why an HTTP status ends the matter, None where another attempt may help."""
    if status in (401, 403):
        return f"refused (HTTP {status}): check the credentials, or whether the file may be read"
    if status in (404, 410):
        return f"no such file (HTTP {status}): check the address, and that the set is complete there"
    if status >= 500 or status in PASSING:
        return None
    return f"unexpected answer (HTTP {status}): check the address"


class _Http:
    """One GET for all that is missing; read in the caller's thread, awaited in fsspec's."""

    def __init__(self, filesystem: Any, timeout_s: float) -> None:
        self._filesystem, self._timeout_s = filesystem, timeout_s

    def chunks(
        self, url: str, start: int, size: int | None, version: Version | None = None
    ) -> Iterator[tuple[int, bytes]]:
        import aiohttp
        from fsspec.asyn import sync

        loop = self._filesystem.loop
        if version is not None and version.validator is None:
            start = 0  # nothing tells whether the file there is still the same
        try:
            response: Any = sync(loop, self._get, url, start, version)
            try:
                offset = _first_byte(response, url, start, size)
                if version is not None:
                    _note_version(response, version, start, offset)
                while offset is not None and (data := self._next(response)):
                    yield offset, data
                    offset += len(data)
            finally:
                loop.call_soon_threadsafe(response.close)
        except TimeoutError:
            raise Broken(f"no answer within {self._timeout_s:g} s") from None
        except StoreError:
            raise
        except (aiohttp.ClientConnectorCertificateError, aiohttp.TooManyRedirects, ValueError) as error:
            raise StoreError(f"{printable(url)}: cannot be read ({type(error).__name__})") from None
        except aiohttp.ClientConnectorError as error:
            raise Broken(f"cannot connect ({error.strerror or type(error).__name__})") from None
        except aiohttp.ClientError as error:
            raise Broken(f"connection broke ({type(error).__name__})") from None

    def _next(self, response: Any) -> bytes:
        from fsspec.asyn import sync

        return cast(bytes, sync(self._filesystem.loop, _read_chunk, response, self._timeout_s))

    async def _get(self, url: str, start: int, version: Version | None) -> Any:
        import aiohttp

        session = await self._filesystem.set_session()
        options = dict(self._filesystem.kwargs)
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if version is not None and version.validator is not None:
                headers["If-Range"] = version.validator
        limits = aiohttp.ClientTimeout(total=None, connect=self._timeout_s, sock_read=self._timeout_s)
        async with asyncio.timeout(2 * self._timeout_s):  # headers may come a byte at a time
            return await session.get(self._filesystem.encode_url(url), headers=headers, timeout=limits, **options)

    def close(self) -> None:
        from fsspec.asyn import sync

        session, self._filesystem._session = self._filesystem._session, None
        if session is not None:
            sync(self._filesystem.loop, session.close)


async def _read_chunk(response: Any, timeout_s: float) -> bytes:
    """Up to CHUNK_BYTES or a little more; fewer at a break, which the next call then raises, or when time is up.

    Raises Broken for a server that only trickles.
    """
    import aiohttp

    parts, got = [], 0
    try:
        async with asyncio.timeout(timeout_s) as limit:
            while got < CHUNK_BYTES and (data := await response.content.readany()):
                parts.append(data)
                got += len(data)
    except (TimeoutError, aiohttp.ClientError):
        if not parts:
            raise
        if limit.expired() and got < SLOWEST_BYTES_S * timeout_s:
            raise Broken(f"too slow: {got} bytes in {timeout_s:g} s") from None
    return b"".join(parts)


def _first_byte(response: Any, url: str, start: int, size: int | None) -> int | None:
    """The offset at which the body of an answer begins, None where nothing is missing."""
    headers = response.headers
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", "").strip())
    total = int(found[2]) if found and found[2] != "*" else None
    if response.status == 416 and size is None and total == start:
        return None
    if response.status == 416:
        raise Broken(f"the file there ends before byte {start}", restart=True)
    if response.status == 200:
        if "Content-Encoding" not in headers:
            total = response.content_length
    elif response.status != 206:
        reason = refusal(response.status)
        if reason:
            raise StoreError(f"{printable(url)}: {reason}")
        raise Broken(f"the server fails (HTTP {response.status})")
    elif not found or found[1] is None or int(found[1]) != start:
        raise Broken("the server sends another range than asked for", restart=True)
    if size is not None and total is not None and total != size:
        raise Broken(f"the server has {total} bytes, expected {size}", restart=True)
    return start if response.status == 206 else 0


def _note_version(response: Any, version: Version, start: int, offset: int | None) -> None:
    """Keep what an answer says of the file's state. Raises Broken where it is not the one of the bytes here."""
    tag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified")
    validator = tag if re.fullmatch(r'"[^"]*"', tag) else date
    size = response.content_length if response.status == 200 and "Content-Encoding" not in response.headers else None
    if offset == 0:
        version.validator, version.size = validator, size
        return
    found = response.headers.get("Content-Range", "").rpartition("/")[2]
    size = int(found) if found.isdecimal() else None
    if (validator is not None and validator != version.validator) or (
        size is not None and version.size is not None and size != version.size
    ):  # a server that takes ranges without looking at If-Range
        raise Broken(f"the file there changed after byte {start} was here", restart=True)


class _Objects:
    """Object stores: several ranges at once, since one connection is slower than a disk."""

    def __init__(self, filesystem: Any, scheme: str, timeout_s: float) -> None:
        self._filesystem, self._scheme, self._timeout_s = filesystem, scheme, timeout_s

    def chunks(
        self, url: str, start: int, size: int | None, version: Version | None = None
    ) -> Iterator[tuple[int, bytes]]:
        if size is None:
            yield 0, self._bytes(url, self._get(url, [(None, None)])[0])
            return
        while start < size:
            stop = min(start + PARALLEL_RANGES * RANGE_BYTES, size)
            ranges = [(first, min(first + RANGE_BYTES, stop)) for first in range(start, stop, RANGE_BYTES)]
            for (first, last), got in zip(ranges, self._get(url, ranges), strict=True):
                data = self._bytes(url, got)  # what came before a broken range is kept
                yield first, data
                if len(data) != last - first:
                    raise Broken(f"sent {len(data)} bytes where {last - first} were asked for")
            start = stop

    def _get(self, url: str, ranges: Sequence[tuple[int | None, int | None]]) -> list[bytes | BaseException]:
        """Ranges of a file, asked for at once; each as bytes or as what went wrong."""
        from fsspec.asyn import sync

        async def bounded(start: int | None, stop: int | None) -> bytes:
            # The client's own limit is for the next bytes, which a server that trickles never passes.
            wanted = RANGE_BYTES if start is None or stop is None else stop - start
            async with asyncio.timeout(2 * self._timeout_s + wanted / SLOWEST_RANGE_BYTES_S):
                return await self._filesystem._cat_file(url, start=start, end=stop)

        async def gather() -> list[Any]:
            return await asyncio.gather(*(bounded(*each) for each in ranges), return_exceptions=True)

        return cast("list[bytes | BaseException]", sync(self._filesystem.loop, gather))

    def _bytes(self, url: str, got: bytes | BaseException) -> bytes:
        if isinstance(got, bytes):
            return got
        if not isinstance(got, self._families()):
            raise got
        broken = self._explain(got)
        raise broken if isinstance(broken, Broken) else StoreError(f"{printable(url)}: {broken}")

    def _families(self) -> tuple[type[Exception], ...]:
        import aiohttp

        common = (OSError, asyncio.TimeoutError, aiohttp.ClientError)
        if self._scheme == "s3":
            from botocore.exceptions import BotoCoreError, ClientError

            return (*common, BotoCoreError, ClientError)
        from gcsfs.retry import HttpError  # pyright: ignore[reportMissingImports]
        from google.auth.exceptions import GoogleAuthError  # pyright: ignore[reportMissingImports]

        return (*common, HttpError, GoogleAuthError)

    def _explain(self, error: Exception) -> Broken | str:
        """Broken where another attempt may help, else why not."""
        answer = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
        code = answer.get("Error", {}).get("Code", "") if isinstance(answer, dict) else ""
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
        status = status or getattr(error, "code", None)
        if isinstance(error, FileNotFoundError):
            status = 404
        elif isinstance(error, PermissionError):
            status = status or 403
        name = str(code or type(error).__name__)
        if isinstance(status, int) and status >= 400 and status != 416:
            reason = refusal(status)
            return f"{reason} ({name})" if reason else Broken(f"the server fails (HTTP {status}, {name})")
        if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"):
            return f"no credentials ({name}): set them as the cloud's own tools expect (environment or its config file)"
        if name in ("ParamValidationError", "InvalidEndpointConfigurationError", "NoRegionError"):
            return f"cannot be asked for ({name}): check the address"
        return Broken(f"the transfer broke ({name})", restart=status == 416)

    def close(self) -> None:
        """Nothing: fsspec ends the session when the file system goes."""
