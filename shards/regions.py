"""Stretches of files, read in pieces: a map of the file, or reads at offsets where another machine may shrink it.

A mapped file that shrinks kills its process; a read that comes back short is an error that names the file.
"""

from __future__ import annotations

import mmap
import operator
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from shards.record import DataError

SHARED_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "fuse", "9p", "ceph", "beegfs", "afs", "glusterfs")


class MappedRegion:
    """A region of a mapped file; `data` holds all of it."""

    def __init__(self, data: memoryview) -> None:
        self.data = data

    def __getitem__(self, where: slice) -> memoryview:
        return self.data[where]

    def items(self, dtype: np.dtype) -> np.ndarray:
        """dtype [n]: the region as items, without a copy."""
        return np.frombuffer(self.data, dtype)

    def blocks(self, size: int) -> np.ndarray:
        """void [n] of `size` bytes each: block i is bytes i : i + size, without a copy."""
        return np.ndarray(max(0, len(self.data) - size + 1), f"V{size}", self.data, strides=(1,))


class FileRegion:
    """A region of an open file."""

    def __init__(self, path: Path, descriptor: int, start: int) -> None:
        self._path, self._descriptor, self._start = path, descriptor, start

    def __getitem__(self, where: slice) -> bytes:
        """The bytes of [begin:stop]. Raises DataError where some are missing."""
        data = os.pread(self._descriptor, where.stop - where.start, self._start + where.start)
        if len(data) != where.stop - where.start:
            raise DataError(f"{self._path} is truncated: get it again")
        return data


Region = MappedRegion | FileRegion


def join(regions: Sequence[Region], begins: Sequence[int], stops: Sequence[int]) -> bytearray:
    """The bytes of begins[i] : stops[i] of regions[i], one run after the other."""
    return bytearray().join(map(operator.getitem, regions, map(slice, begins, stops)))


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
