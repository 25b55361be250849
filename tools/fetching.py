"""Downloads into a folder: resumed, checked and remembered, one run at a time for each file.

DIR/NAME             whole files only
DIR/fetched.json     bytes and sha256 of each, so that a later run can check
DIR/.fetch/          locks; NAME.part with NAME.part.json, the state of the file at the server that it belongs to;
                     NAME.wrong, what failed its check; zips while they are unpacked
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from shards import transfer
from shards.record import DataError
from shards.transfer import Retry, Source, StoreError, Version
from shards.workplace import sync
from tools.file_list import FETCHED, SHA256, RemoteFile

WORK = ".fetch"
PART = ".part"
BLOCK_BYTES = 1 << 20
BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)

Report = Callable[[str, int, int | None, str], None]  # (stage, done, total, unit), as Bars.report


@dataclass(frozen=True)
class Contents:
    """What a file holds."""

    bytes: int
    sha256: str


class Folder:
    """A folder to download into."""

    def __init__(self, directory: Path, source: Source, retry: Retry, report: Report) -> None:
        self._directory, self._work = directory, directory / WORK
        self._source, self._retry, self._report = source, retry, report
        self._work.mkdir(parents=True, exist_ok=True)

    def fetch(self, file: RemoteFile, where: Path, verify: bool = False) -> str:
        """Have a file in the folder, whole and checked; returns a line that says how it came.

        verify: read a file again that is already there. `where`: the list, for messages. Raises DataError, and OSError
        for the disk.
        """
        with self._alone(file.name):
            if (self._directory / file.name).exists():
                return self._check(file, verify)
            part = self._work / (file.name + PART)
            if file.url is not None:
                found = self._download(file, file.url, part)
            elif file.zip_url is not None:
                found = self._from_zip(file, file.zip_url, part)
            else:
                hint = f"look at {file.page} and put it" if file.page else "put it"
                raise DataError(f"{file.name}: {where} has no address for it: {hint} under {file.name}.url there")
            return self._finish(file, part, found)

    def zip_of(self, url: str) -> Path:
        """Where a zip lies from its download until its files are unpacked."""
        return self._work / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.zip"

    def _check(self, file: RemoteFile, verify: bool) -> str:
        """Compare a file that is there with the list and with what was remembered of it."""
        path, kept = self._directory / file.name, self._remembered().get(file.name)
        size = path.stat().st_size
        wanted = file.bytes if file.bytes is not None else kept and kept.bytes
        if wanted is not None and size != wanted:
            raise self._set_aside(file.name, path, f"{size} bytes, expected {wanted}")
        found = kept if kept is not None and not verify else Contents(size, self._sha256(file.name, path))
        self._compare(file, path, found, kept)
        if kept is None:
            self._remember(file.name, found)
            if file.sha256 is None:
                return f"{file.name}: already here, not compared with anything; {_told(found)} remembered"
        return f"{file.name}: already here"

    def _finish(self, file: RemoteFile, part: Path, found: Contents) -> str:
        """Give a whole part its name; remembered first, so that what has its name is always known."""
        kept = self._remembered().get(file.name)
        self._compare(file, part, found, kept)
        self._remember(file.name, found)
        os.replace(part, self._directory / file.name)
        sync(self._directory)
        _state(part).unlink(missing_ok=True)
        compared = "as listed" if file.sha256 else "as remembered" if kept else f"remembered in {FETCHED}"
        return f"{file.name}: {_told(found)} ({compared})"

    def _compare(self, file: RemoteFile, path: Path, found: Contents, kept: Contents | None) -> None:
        """Raises DataError where a file is another one than the list says, or than came before; it is set aside."""
        if file.bytes is not None and found.bytes != file.bytes:
            raise self._set_aside(file.name, path, f"{found.bytes} bytes, the list says {file.bytes}")
        wanted, who = (file.sha256, "the list") if file.sha256 else (kept and kept.sha256, self._directory / FETCHED)
        if wanted and found.sha256 != wanted:
            raise self._set_aside(file.name, path, f"its sha256 is {found.sha256}, {who} says {wanted}")

    def _set_aside(self, name: str, path: Path, why: str) -> DataError:
        wrong = self._work / f"{name}.wrong"
        os.replace(path, wrong)
        _state(self._work / (name + PART)).unlink(missing_ok=True)
        return DataError(f"{name}: {why}; moved to {wrong}: the same command downloads it again")

    def _download(self, file: RemoteFile, url: str, part: Path) -> Contents:
        """Complete a part from its address. What an earlier run left is trusted once only."""
        kept = self._remembered().get(file.name)
        size = file.bytes if file.bytes is not None else kept and kept.bytes
        wanted = file.sha256 or (kept and kept.sha256)
        with _part(part, url) as (stream, version):
            resumed = stream.seek(0, os.SEEK_END) > 0
            self._transfer(file.name, url, part, stream, version, size)
            found = Contents(part.stat().st_size, self._sha256(file.name, part))
            if wanted and found.sha256 != wanted and resumed:
                stream.truncate(0)
                self._transfer(file.name, url, part, stream, version, size)
                found = Contents(part.stat().st_size, self._sha256(file.name, part))
        return found

    def _transfer(self, name: str, url: str, part: Path, stream: IO[bytes], version: Version, size: int | None) -> None:
        noted = replace(version)

        def report(have: int) -> None:
            nonlocal noted
            if version != noted:  # noted after its first bytes are here, in place of the earlier ones
                os.fsync(stream.fileno())
                _write_json(_state(part), {"url": url, **asdict(version)})
                noted = replace(version)
            self._report(f"downloading {name}", have, size if size is not None else version.size, "bytes")

        try:
            transfer.download(self._source, url, stream, size, self._retry, threading.Event(), report, version)
        except StoreError as error:
            raise DataError(f"{name}: {error}") from None
        os.fsync(stream.fileno())

    def _from_zip(self, file: RemoteFile, url: str, part: Path) -> Contents:
        """Unpack a file from the zip that holds it, which is downloaded where it is not here yet."""
        archive = self.zip_of(url)
        with self._alone(archive.name):
            if not archive.exists():
                incoming = archive.with_name(archive.name + PART)
                with _part(incoming, url) as (stream, version):
                    self._transfer(f"the zip with {file.name}", url, incoming, stream, version, None)
                if not zipfile.is_zipfile(incoming):
                    raise self._set_aside(archive.name, incoming, f"{transfer.printable(url)} sent no whole zip")
                os.replace(incoming, archive)
                _state(incoming).unlink(missing_ok=True)
            try:
                return self._unpack(file, archive, part)
            except BAD_ZIP as error:
                raise self._set_aside(archive.name, archive, f"the zip with {file.name} is damaged ({error})") from None

    def _unpack(self, file: RemoteFile, archive: Path, part: Path) -> Contents:
        """Raises what zipfile does, and DataError where the zip does not hold the file as listed; the zip stays."""
        digest, done, advice = hashlib.sha256(), 0, f"; correct the list, or remove {archive} to download it again"
        _state(part).unlink(missing_ok=True)
        with zipfile.ZipFile(archive) as opened:
            members = [entry for entry in opened.infolist() if entry.filename.rpartition("/")[2] == file.name]
            if len(members) != 1:
                names = ", ".join(sorted(entry.filename for entry in opened.infolist())[:12])
                raise DataError(f"{file.name}: the zip holds it {len(members)} times, not once; it has {names}{advice}")
            with opened.open(members[0]) as inside, part.open("wb") as stream:
                while block := inside.read(BLOCK_BYTES):
                    stream.write(block)
                    digest.update(block)
                    done += len(block)
                    self._report(f"unpacking {file.name}", done, members[0].file_size, "bytes")
                stream.flush()
                os.fsync(stream.fileno())
        found, kept = Contents(done, digest.hexdigest()), self._remembered().get(file.name)
        wanted = file.sha256 or (kept and kept.sha256)
        if wanted and found.sha256 != wanted:
            part.unlink()
            raise DataError(f"{file.name}: its sha256 in the zip is {found.sha256}, expected {wanted}{advice}")
        return found

    def _sha256(self, name: str, path: Path) -> str:
        digest, done, size = hashlib.sha256(), 0, path.stat().st_size
        with path.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
                done += len(block)
                self._report(f"checking {name}", done, size, "bytes")
        return digest.hexdigest()

    def _remembered(self) -> dict[str, Contents]:
        """What fetched.json says. Raises DataError when it is damaged."""
        path = self._directory / FETCHED
        try:
            return {name: _contents(entry) for name, entry in json.loads(path.read_bytes()).items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DataError(f"{path} is damaged: remove it; what is here is then read anew") from None

    def _remember(self, name: str, found: Contents) -> None:
        with (self._work / "fetched.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            every = {**self._remembered(), name: found}
            _write_json(self._directory / FETCHED, {name: asdict(every[name]) for name in sorted(every)})

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Hold the lock of a file, which the kernel drops with the process. Raises DataError when another has it."""
        with (self._work / f"{name}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{name}: another run downloads it into {self._directory}: wait for it") from None
            yield


@contextmanager
def _part(path: Path, url: str) -> Iterator[tuple[IO[bytes], Version]]:
    """A part, open for update, and the version its bytes belong to; emptied where that is not known."""
    version = _version(path, url)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with open(descriptor, "r+b", buffering=0) as stream:
        if version.validator is None:
            stream.truncate(0)
        yield stream, version


def _version(part: Path, url: str) -> Version:
    try:
        state = json.loads(_state(part).read_bytes())
        if state["url"] == url and isinstance(state["validator"], str) and state["validator"].isprintable():
            return Version(state["validator"], int(state["size"]) if state["size"] is not None else None)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass  # then the part is of no use
    return Version()


def _state(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _contents(entry: dict[str, object]) -> Contents:
    size, sha256 = entry["bytes"], entry["sha256"]
    if not isinstance(size, int) or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise ValueError
    return Contents(size, sha256)


def _told(found: Contents) -> str:
    return f"{found.bytes} bytes, sha256 {found.sha256}"


def _write_json(path: Path, value: object) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
