"""Where the files of a set lie: names -> files of this machine, from a folder or from a server.

A file is fetched before it is used and released after, so that a store that keeps copies knows which are in use.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote, urlsplit

import xxhash

from shards import transfer
from shards.cache import NO_ROOM, Cache, NoRoom
from shards.transfer import PACKAGES, Retry, StoreError

__all__ = ["CacheOptions", "LocalStore", "NoRoom", "RemoteStore", "Store", "StoreError", "is_remote", "open_store"]

SCHEME = re.compile(r"(pipe|file):|([a-z][a-z0-9+.-]*):(?:[^/]*:)?//", re.IGNORECASE)  # also fsspec's "a::b://"
POLL_S = 0.05  # how often a process looks whether the one that downloads has finished


@dataclass(frozen=True)
class CacheOptions:
    """Where the files of remote sets are kept, and how patiently they are fetched."""

    directory: Path | None = None  # None: the user's cache folder
    limit_bytes: int | None = None  # of all files in the folder together
    attempts: int = 6
    back_off_s: float = 1.0  # before the second attempt; doubles, up to half a minute
    timeout_s: float = 60.0  # for a server's next bytes
    room_wait_s: float = 300.0  # until other processes let go of what fills the folder

    def folder(self) -> Path:
        """The folder, `bitmar` in the user's cache folder by default."""
        if self.directory is not None:
            return self.directory
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitmar"


class Store(Protocol):
    """The files of one set. `location` is printable."""

    location: str

    def read(self, name: str) -> bytes:
        """A small file, whole. Raises StoreError."""
        ...

    def fetch(self, name: str, size: int, xxh3_128: str) -> Path:
        """A file of this machine of `size` bytes, in use until it is released as often.

        Raises StoreError, and NoRoom where it could be had if less were in use.
        """
        ...

    def release(self, name: str) -> None:
        """Note that a fetched file is no longer in use."""
        ...

    def close(self) -> None:
        """Release everything; the store is not used again."""
        ...


def is_remote(location: str) -> bool:
    """Whether a location names a server or another scheme than file:, which open_store may refuse."""
    scheme = _scheme(location)
    return scheme is not None and scheme != "file"


def open_store(location: str, cache: CacheOptions = CacheOptions()) -> Store:
    """The store of a folder (a path or a file: URL) or of a URL. Raises StoreError for what cannot be read."""
    scheme = _scheme(location)
    if scheme is None:
        return LocalStore(Path(location))
    if scheme == "pipe":
        raise StoreError("data.shards: pipe: commands are never run: give a folder or a URL")
    if scheme != "file" and scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in sorted(PACKAGES))
        raise StoreError(f"data.shards: {scheme}: cannot be read: give a folder, file: or one of {known}")
    _refuse_secrets(location, scheme)
    if scheme == "file":
        return LocalStore(Path(unquote(urlsplit(location).path)))
    return RemoteStore(location.rstrip("/"), scheme, cache)


class LocalStore:
    """A folder: files are used where they lie. Their content is checked a sample at a time by who reads them."""

    def __init__(self, directory: Path) -> None:
        self.location, self._directory = str(directory), directory

    def read(self, name: str) -> bytes:
        """A small file, whole. Raises StoreError."""
        path = os.path.join(self.location, _plain(name))
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; make shards with tools/make_shards.py") from None

    def fetch(self, name: str, size: int, xxh3_128: str) -> Path:
        """The file where it lies. Raises StoreError when it is missing or has another size."""
        path = self._directory / _plain(name)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise StoreError(f"shard file {path}: {error.strerror}: make the shards again") from None
        if found != size:
            raise StoreError(
                f"shard file {path} is truncated or changed: {found} bytes, the manifest says {size}: "
                "make the shards again"
            )
        return path

    def release(self, name: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is kept."""


@dataclass
class _Pin:
    """A file in use here, as often as `count` says."""

    path: Path
    descriptor: int
    count: int = 1


@dataclass
class RemoteStore:
    """Files below a URL, kept in a folder that the node's processes share. Shared by threads."""

    location: str
    scheme: str
    options: CacheOptions
    _pins: dict[str, _Pin] = field(default_factory=dict, repr=False)
    _verified: set[Path] = field(default_factory=set, repr=False)
    # Taken again by its own thread: garbage collection may release a file at any moment, in the middle of fetch too.
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        options = self.options
        self._retry = Retry(options.attempts, options.back_off_s, options.timeout_s)
        self._source = transfer.connect(self.scheme, options.timeout_s)
        self._cache = Cache(options.folder(), options.limit_bytes)

    def read(self, name: str) -> bytes:
        """A small file, whole; asked for anew each time. Raises StoreError."""
        return transfer.read(self._source, self._url(name), self._retry, self._stop)

    def fetch(self, name: str, size: int, xxh3_128: str) -> Path:
        """The file in the cache, of that size and checksum; downloaded where it is not there yet.

        Raises StoreError naming the URL, or the cache where it cannot hold the file; NoRoom while too much is in use.
        """
        url = self._url(name)
        path = self._cache.path(name, size, xxh3_128)
        with self._lock:
            pin = self._pins.get(name)
            if pin is not None:
                pin.count += 1
                return pin.path
        try:
            descriptor = self._obtain(url, path, size, xxh3_128)
        except OSError as error:
            in_use = error.errno in NO_ROOM and self._cache.holds_files()  # what was not has been evicted
            kind = NoRoom if in_use else StoreError
            raise kind(
                f"cache {self._cache.directory}: {error.strerror or error} (for {url}): make room there, or give "
                "data.cache_directory a folder on a local disk"
            ) from None
        with self._lock:
            pin = self._pins.get(name)
            if pin is not None:  # another thread was faster
                os.close(descriptor)
                pin.count += 1
            else:
                self._pins[name] = _Pin(path, descriptor)
        return path

    def release(self, name: str) -> None:
        """Note that a fetched file is no longer in use; once released as often as fetched it may be evicted."""
        with self._lock:
            pin = self._pins.get(name)
            if pin is None:
                return  # the store was closed before
            pin.count -= 1
            if pin.count:
                return
            del self._pins[name]
        os.close(pin.descriptor)

    def close(self) -> None:
        """Release everything, end transfers under way and the connections."""
        self._stop.set()
        with self._lock:
            pins, self._pins = self._pins, {}
        for pin in pins.values():
            os.close(pin.descriptor)
        self._source.close()

    def _url(self, name: str) -> str:
        if self._stop.is_set():
            raise StoreError(f"{self.location} was closed")
        return f"{self.location}/{quote(_plain(name)) if self.scheme in ('http', 'https') else _plain(name)}"

    def _obtain(self, url: str, path: Path, size: int, xxh3_128: str) -> int:
        """The descriptor that pins the verified file."""
        while True:
            with self._cache.locked():
                descriptor = self._cache.pin(path, size)
                ours = None if descriptor is not None else self._cache.start(path, size)
            if descriptor is not None:
                if path in self._verified or _checksum(descriptor) == xxh3_128:
                    self._verified.add(path)
                    return descriptor
                self._discard(descriptor, path)  # damaged on this disk: whoever comes next downloads it
            elif ours is not None:
                if self._fill(ours, url, path, size, xxh3_128):
                    return ours
                os.close(ours)  # somebody emptied the cache by hand meanwhile
            elif self._stop.wait(POLL_S):  # another process or thread downloads it
                raise StoreError(f"{url}: stopped while another process downloaded it")

    def _fill(self, descriptor: int, url: str, path: Path, size: int, xxh3_128: str) -> bool:
        """Download into the part that the descriptor holds; it then pins the finished file.

        False where the part is no longer in the cache.
        """
        try:
            for last in (False, True):
                self._download(descriptor, url, path, size)
                found = _checksum(descriptor)
                if found == xxh3_128:
                    break
                os.ftruncate(descriptor, 0)
                if last:
                    raise StoreError(
                        f"{url}: its checksum is {found}, the manifest says {xxh3_128}: the set there is damaged"
                    )
            with self._cache.locked():
                finished = self._cache.finish(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        if finished:
            self._verified.add(path)
        return finished

    def _download(self, descriptor: int, url: str, path: Path, size: int) -> None:
        with open(descriptor, "r+b", buffering=0, closefd=False) as file:
            while True:
                try:
                    transfer.download(self._source, url, file, size, self._retry, self._stop)
                    os.fsync(descriptor)
                    return
                except OSError as error:
                    if error.errno not in NO_ROOM:
                        raise
                    missing = size - file.seek(0, os.SEEK_END)
                    with self._cache.locked():
                        if self._cache.evict(missing, keep=self._cache.part(path)) == 0:
                            file.truncate(0)
                            raise

    def _discard(self, descriptor: int, path: Path) -> None:
        with self._cache.locked():
            same = path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
            if same:
                path.unlink()
        os.close(descriptor)


def _checksum(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _scheme(location: str) -> str | None:
    """The scheme of a location in lower case, None for a path."""
    found = SCHEME.match(location)
    return (found[1] or found[2]).lower() if found else None


def _refuse_secrets(location: str, scheme: str) -> None:
    """Raises StoreError for URLs that carry, or may carry, a secret; the message does not repeat the URL."""
    try:
        parts = urlsplit(location)
        named = parts.port is not None  # raises ValueError for a password that is cut at its "/"
    except ValueError:
        raise StoreError(f"data.shards: the {scheme}: URL has no valid host and port") from None
    where = "AWS's own environment or config file" if scheme == "s3" else "the environment or ~/.netrc"
    if "@" in parts.netloc or (named and scheme in ("s3", "gs")):
        raise StoreError(f"data.shards: {scheme}: URLs with credentials are refused: put them into {where}")
    if parts.query or parts.fragment or location.endswith(("?", "#")):
        raise StoreError(
            f"data.shards: {scheme}: URLs with a query or fragment are refused (signed URLs carry secrets there): "
            f"give the folder's plain URL, and credentials in {where}"
        )
    if scheme == "file" and parts.netloc not in ("", "localhost"):
        raise StoreError("data.shards: file: URLs name a folder of this machine: file:///folder")
    if scheme != "file" and not parts.netloc:
        raise StoreError(f"data.shards: the {scheme}: URL names no {'bucket' if scheme in ('s3', 'gs') else 'host'}")


def _plain(name: str) -> str:
    """The name, when it is one of a file in the folder itself. Raises StoreError."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise StoreError(f"file name {name!r} of the manifest is refused: it must be a plain name")
    return name
