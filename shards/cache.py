"""A folder of downloaded files that the processes of a node share: one download each, a limit in bytes.

Files are named HASH-SIZE-NAME by their contents, and HASH-SIZE-NAME.part while they come in. Who uses a file holds a
shared flock on it, who fills a part an exclusive one; the kernel drops both with the process. Files change hands
(are found, made, renamed, evicted) only under the folder's own lock, which nobody holds for long.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.transfer import StoreError

LOCK = "lock"
ENTRY = re.compile(r"[0-9a-f]{16}-(\d+)-.+")
PART = ".part"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class NoRoom(StoreError):
    """The limit, or the disk, leaves no room as long as other files are in use."""


@dataclass(frozen=True)
class Entry:
    """A file of the folder; a part counts as the whole it becomes."""

    path: Path
    size: int
    missing: int  # bytes that a part still lacks
    used_ns: int


@dataclass(frozen=True)
class Cache:
    """The folder, and the bytes its files may take together (None: any)."""

    directory: Path
    limit_bytes: int | None

    def path(self, name: str, size: int, xxh3_128: str) -> Path:
        """Where a file of these contents lies once it is here."""
        return self.directory / f"{xxh3_128[:16]}-{size}-{name}"

    def part(self, path: Path) -> Path:
        """Where the file grows while it is downloaded."""
        return path.with_name(path.name + PART)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder, which is made where it is not there (somebody may empty it by hand)."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def pin(self, path: Path, size: int) -> int | None:
        """A descriptor that keeps the file from eviction until closed; None where it is not here whole.

        Under the folder's lock.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_size != size:
            os.unlink(path)
            os.close(descriptor)
            return None
        os.utime(path)
        return descriptor

    def start(self, path: Path, size: int) -> int | None:
        """A descriptor of the file's part, ours alone to fill; None while another fills it.

        Makes room first; raises NoRoom where the limit, and OSError where the disk, leaves none, before anything is
        downloaded. Under the folder's lock.
        """
        part = self.part(path)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        try:
            self._make_room(part, path.name, size)
        except BaseException:
            os.unlink(part)
            os.close(descriptor)
            raise
        return descriptor

    def finish(self, descriptor: int, path: Path) -> bool:
        """Give a filled part its name; the descriptor pins it from here on. Under the folder's lock.

        False where the part was removed by hand, and another's may lie in its place.
        """
        part = self.part(path)
        try:
            ours = os.path.samestat(part.stat(), os.fstat(descriptor))
        except FileNotFoundError:
            ours = False
        if ours:
            os.rename(part, path)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return ours

    def evict(self, wanted: int, keep: Path | None = None) -> int:
        """Remove unused files, least recently used first, until `wanted` bytes are free: the bytes freed.

        `keep` is not touched. Under the folder's lock.
        """
        freed = 0
        for entry in sorted(self._entries(), key=lambda entry: entry.used_ns):
            if freed >= wanted:
                break
            if entry.path != keep and _remove_unused(entry.path):
                freed += entry.size
        return freed

    def holds_files(self) -> bool:
        """Whether files lie here, whole or in part."""
        return next(self._entries(), None) is not None

    def _make_room(self, part: Path, name: str, size: int) -> None:
        others = [entry for entry in self._entries() if entry.path != part]
        if self.limit_bytes is not None:
            taken = sum(entry.size for entry in others)
            excess = taken + size - self.limit_bytes
            freed = self.evict(excess, part)
            if freed < excess:
                kind = NoRoom if freed < taken else StoreError
                raise kind(
                    f"cache {self.directory}: its limit of {self.limit_bytes} bytes (data.cache_gib) is too small: "
                    f"{taken - freed} are in use and {size} are wanted for {name}; a limit of {taken - freed + size} "
                    "bytes would do"
                )
        disk = os.statvfs(self.directory)
        wanted = size - part.stat().st_size + sum(entry.missing for entry in others)
        excess = wanted - disk.f_bavail * disk.f_frsize
        if self.evict(excess, part) < excess:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _entries(self) -> Iterator[Entry]:
        with os.scandir(self.directory) as found:
            for item in found:
                match = ENTRY.fullmatch(item.name)
                if match is None:
                    continue
                with contextlib.suppress(FileNotFoundError):  # somebody empties the folder by hand
                    status, size = item.stat(), int(match[1])
                    yield Entry(Path(item.path), size, max(0, size - status.st_size), status.st_mtime_ns)


def _remove_unused(path: Path) -> bool:
    """Whether the file is gone: nobody used it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
