"""Where the files of a set lie: names -> files of this machine.

A file is fetched before it is used and released after, so that a store that keeps copies knows which are in use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from shards.record import DataError


class StoreError(DataError):
    """A file of a set cannot be had; the message names it and what would do."""


class Store(Protocol):
    """The files of one set. `location` is printable."""

    location: str

    def read(self, name: str) -> bytes:
        """A small file, whole. Raises StoreError."""
        ...

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """A file of this machine of `size` bytes, in use until it is released as often. Raises StoreError."""
        ...

    def release(self, name: str) -> None:
        """Note that a fetched file is no longer in use."""
        ...


class LocalStore:
    """A folder: files are used where they lie. Their content is checked a sample at a time by who reads them."""

    def __init__(self, directory: Path) -> None:
        self.location, self._directory = str(directory), directory

    def read(self, name: str) -> bytes:
        """A small file, whole. Raises StoreError."""
        try:
            return (self._directory / name).read_bytes()
        except OSError as error:
            raise StoreError(
                f"{self._directory / name}: {error.strerror}; make shards with tools/make_shards.py"
            ) from None

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """The file where it lies. Raises StoreError when it is missing or has another size."""
        path = self._directory / name
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


def open_store(location: str) -> Store:
    """The store of a folder, given as a path or a file: URL. Raises StoreError for anything else."""
    scheme, colon, _ = location.partition(":")
    if not colon or "/" in scheme:
        return LocalStore(Path(location))
    if scheme == "file":
        return LocalStore(Path(unquote(urlsplit(location).path)))
    raise StoreError(f"data.shards: {scheme}: is no folder that can be read: copy the shards to this machine")
