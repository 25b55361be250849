"""Where a conversion grows: a folder beside the one to be made, which it becomes when it is whole.

    .OUT.part/set/        finished shards, later the whole of OUT
    .OUT.part/state/      identity.json, locks, a file a finished block, and a folder a part for what only it needs

Several parts may work here at once, also from several machines that share the file system; one part only once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shards.record import DataError


@dataclass(frozen=True)
class Part:
    """One machine's share of a conversion: part `number` of `count`, from 1."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        """Raises DataError naming the numbers."""
        if not 1 <= self.number <= self.count:
            raise DataError(f"--part {self} must be from 1/{self.count} to {self.count}/{self.count}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """Of "i/n". Raises DataError."""
        number, slash, count = text.partition("/")
        if not slash or not number.isdecimal() or not count.isdecimal() or int(count) < 1:
            raise DataError(f"--part must be i/n, such as 1/4 for the first of four, got {text!r}")
        return cls(int(number), int(count))


WHOLE = Part()


@dataclass(frozen=True)
class Workplace:
    """The folders of one part at work."""

    out: Path
    set: Path
    state: Path
    own: Path

    def block(self, modality: str, number: int) -> Path:
        """The file that says that a block is finished."""
        return self.state / f"block-{modality}-{number:05d}.json"

    def publish(self) -> None:
        """Make the set OUT, in place of what is there, and clear the rest away."""
        sync(self.set)
        old = self.out.with_name(f".{self.out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            os.rename(self.out, old)
        os.rename(self.set, self.out)
        sync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)
        self.remove()

    def remove(self) -> None:
        """Give everything up."""
        shutil.rmtree(self.state.parent, ignore_errors=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Of several parts that have finished, let one after the other look whether it is the last."""
        with ExitStack() as locks:
            with suppress(FileNotFoundError):  # the last one has cleared this folder away
                fcntl.flock(locks.enter_context(_opened(self.state / "finish.lock")), fcntl.LOCK_EX)
            yield


@contextmanager
def working(out: Path, fingerprint: str, part: Part, resume: bool) -> Iterator[Workplace]:
    """The workplace of a part, held while it works; what it finished is kept for `resume`, other parts' always.

    Raises DataError when another conversion works here.
    """
    base = out.with_name(f".{out.name}.part")
    own = base / "state" / f"part-{part.number}-of-{part.count}"
    place = Workplace(out, base / "set", base / "state", own)
    busy = DataError(f"another conversion is writing to {out}: wait for it to end")
    identity = json.dumps({"fingerprint": fingerprint, "parts": part.count})
    with ExitStack() as locks:
        place.state.mkdir(parents=True, exist_ok=True)
        lock = locks.enter_context(_opened(place.state / "lock"))
        if _try(lock, fcntl.LOCK_EX):
            same = _read(place.state / "identity.json") == identity
            if not same or (part.count == 1 and not resume):
                _clear(place)
            (place.state / "identity.json").write_text(identity)
            place.set.mkdir(exist_ok=True)
        if not _try(lock, fcntl.LOCK_SH) or _read(place.state / "identity.json") != identity:
            raise busy  # at work, or just ended and gone with its folder
        mine = locks.enter_context(_opened(own.with_suffix(".lock")))
        if not _try(mine, fcntl.LOCK_EX):
            raise busy if part.count == 1 else DataError(f"part {part} of {out} is at work already: start each once")
        if not resume:
            shutil.rmtree(own, ignore_errors=True)
        own.mkdir(exist_ok=True)
        yield place


def _clear(place: Workplace) -> None:
    """Empty a workplace that another conversion, or an earlier try, left behind; the lock that is held stays."""
    shutil.rmtree(place.set, ignore_errors=True)
    for leftover in place.state.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != "lock":
            leftover.unlink()


def sync(path: Path, *, forget: bool = False) -> None:
    """Have the disk hold a file, or the names in a folder.

    forget: memory need not hold it too, so that it goes on to hold what is still to be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
