"""Stretches of files, read in pieces: a map of the file, or reads at offsets where another machine may shrink it.

A mapped file that shrinks kills its process; a read that comes back short is an error that names the file.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil

from shards.record import DataError

SHARED_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "fuse", "9p", "ceph", "beegfs", "afs", "glusterfs")


class Region(Protocol):
    """Bytes start : start + size of a file; offsets count from its start. Raises DataError where bytes are missing."""

    def __getitem__(self, where: slice, /) -> bytes | memoryview:
        """The bytes of [begin:stop]."""
        ...

    def blocks(self, begins: np.ndarray, size: int) -> np.ndarray:
        """void [n] of `size` bytes each: those from each of `begins` int64 [n] onwards."""
        ...

    def runs(self, begins: np.ndarray, counts: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """dtype [sum of counts]: counts[i] items from item begins[i] onwards, one run after the other."""
        ...


class MappedRegion:
    """A region of a mapped file."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __getitem__(self, where: slice) -> memoryview:
        return self._data[where]

    def blocks(self, begins: np.ndarray, size: int) -> np.ndarray:
        if not len(begins):
            return np.zeros(0, f"V{size}")
        every = np.ndarray(len(self._data) - size + 1, f"V{size}", self._data, strides=(1,))  # overlapping, no copy
        return every[begins]

    def runs(self, begins: np.ndarray, counts: np.ndarray, dtype: np.dtype) -> np.ndarray:
        before = np.cumsum(counts) - counts
        at = np.repeat(begins - before, counts)
        at += np.arange(len(at))
        return np.frombuffer(self._data, dtype)[at]


class FileRegion:
    """A region of an open file."""

    def __init__(self, path: Path, descriptor: int, start: int) -> None:
        self._path, self._descriptor, self._start = path, descriptor, start

    def __getitem__(self, where: slice) -> bytes:
        data = os.pread(self._descriptor, where.stop - where.start, self._start + where.start)
        if len(data) != where.stop - where.start:
            raise self._short()
        return data

    def blocks(self, begins: np.ndarray, size: int) -> np.ndarray:
        out = np.empty((len(begins), size), np.uint8)
        for row, begin in zip(out, begins.tolist(), strict=True):
            if os.preadv(self._descriptor, [row.data], self._start + begin) != size:
                raise self._short()
        return out.view(f"V{size}").reshape(-1)

    def runs(self, begins: np.ndarray, counts: np.ndarray, dtype: np.dtype) -> np.ndarray:
        places = zip((begins * dtype.itemsize).tolist(), ((begins + counts) * dtype.itemsize).tolist(), strict=True)
        return np.frombuffer(b"".join([self[begin:stop] for begin, stop in places]), dtype)

    def _short(self) -> DataError:
        return DataError(f"{self._path} is truncated: get it again")


def is_shared(path: Path) -> bool:
    """Whether a file lies on a file system that other machines write to."""
    resolved = str(path.resolve())
    mounts = [m for m in psutil.disk_partitions(all=True) if resolved.startswith(m.mountpoint.rstrip("/") + "/")]
    kind = max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else ""
    return kind.startswith(SHARED_FILE_SYSTEMS)


def open_region(owner: object, path: Path, start: int, size: int, *, shared: bool) -> Region:
    """Bytes start : start + size of a file, closed with `owner`. Raises DataError when the file is shorter."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: get it again") from None
    if os.fstat(descriptor).st_size < start + size:
        os.close(descriptor)
        raise DataError(f"{path} is truncated: get it again")
    if shared:
        weakref.finalize(owner, os.close, descriptor)
        return FileRegion(path, descriptor, start)
    try:
        if size == 0:
            return MappedRegion(memoryview(b""))
        return MappedRegion(memoryview(mmap.mmap(descriptor, start + size, access=mmap.ACCESS_READ))[start:])
    finally:
        os.close(descriptor)  # the map keeps one of its own
