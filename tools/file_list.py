"""A YAML list of files to download: names, addresses, sizes and checksums, each checked with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from shards.record import DataError

FETCHED = "fetched.json"  # the name of what a download remembers, so of no file
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")
FLAGS = re.compile(r"(?:\w{1,16}=\w{0,5}(?:&|$))*")  # such as "zip=" or "download=1": too short for a secret


@dataclass(frozen=True)
class RemoteFile:
    """A file to download. None: not known, or not so."""

    name: str
    url: str | None = None  # its own address
    zip_url: str | None = None  # the address of a zip that holds a file of this name
    bytes: int | None = None
    sha256: str | None = None
    page: str | None = None  # where people find it
    by_name: bool = False  # downloaded only when its name is given


KEYS = tuple(field.name for field in fields(RemoteFile) if field.name != "name")


@dataclass(frozen=True)
class FileList:
    """The files of a YAML list, in its order."""

    path: Path
    files: tuple[RemoteFile, ...]

    def choose(self, names: Sequence[str]) -> list[RemoteFile]:
        """The files of these names, or all that are not by_name. Raises DataError for a name that is not there."""
        known = {file.name: file for file in self.files}
        for name in names:
            if name not in known:
                raise DataError(f"{self.path} has no file {name!r}; it has {', '.join(known)}")
        return [known[name] for name in dict.fromkeys(names)] or [file for file in self.files if not file.by_name]


def read_file_list(path: Path) -> FileList:
    """Read a list. Raises DataError naming the file, the line and what would do."""
    try:
        return parse_file_list(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: name a list of files with --files") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start})") from None


def parse_file_list(text: str, path: Path) -> FileList:
    """The list that a YAML text holds; `path` is for messages. Raises DataError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise DataError(f"{path} is empty: write NAME: {{url: ADDRESS}} for each file")
    files = []
    for name, node in _entries(root, f"{path}, line 1: the list", path):
        where = f"{path}, line {node.start_mark.line + 1}: {name}"
        if not PLAIN_NAME.fullmatch(name) or name == FETCHED:
            raise DataError(f"{where} is no name for a file: use letters, digits, '_', '-' and '.'")
        files.append(_file(name, node, where, path))
    return FileList(path, tuple(files))


def _file(name: str, node: yaml.Node, where: str, path: Path) -> RemoteFile:
    values: dict[str, Any] = {}
    for key, value in _entries(node, where, path):
        place = f"{path}, line {value.start_mark.line + 1}: {name}.{key}"
        if key not in KEYS:
            raise DataError(f"{place} is not known: the keys are {', '.join(KEYS)}")
        found = _scalar(value, place)
        if found is not None:
            values[key] = CHECKS[key](found, place)
    return RemoteFile(name, **values)


def _entries(node: yaml.Node, where: str, path: Path) -> Iterator[tuple[str, yaml.Node]]:
    """(key, value) of a mapping; `where` names it. Raises DataError for what is none, and for keys given twice."""
    if not isinstance(node, yaml.MappingNode):
        raise DataError(f"{where} must be a mapping, such as {{url: ADDRESS}}")
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise DataError(f"{path}, line {key.start_mark.line + 1}: a name must be a plain word")
        if key.value in seen:
            raise DataError(f"{path}, line {key.start_mark.line + 1}: {key.value} is there twice")
        seen.add(key.value)
        yield key.value, value


def _scalar(node: yaml.Node, place: str) -> object:
    if not isinstance(node, yaml.ScalarNode):
        raise DataError(f"{place} must be a single value")
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError):
        raise DataError(f"{place}: {node.value!r} is no value") from None


def _address(value: object, place: str) -> str:
    """A http(s) address without credentials; the message does not repeat what may be secret."""
    if not isinstance(value, str) or re.search(r"[\s\x00-\x1f]", value):
        raise DataError(f"{place} must be an address such as https://host/file, or null")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port  # raises ValueError for a password that is cut at its "/"
    except ValueError:
        raise DataError(f"{place} has no valid host and port") from None
    if "@" in parts.netloc:
        raise DataError(f"{place}: addresses with credentials are refused: put them into ~/.netrc")
    if parts.scheme not in ("http", "https") or not host:
        raise DataError(f"{place} must begin with https:// or http:// and name a host")
    if parts.fragment or not FLAGS.fullmatch(parts.query):
        raise DataError(
            f"{place}: queries are refused but for short flags such as ?download=1 (signed addresses carry secrets "
            "there): give the file's plain address"
        )
    return value


def _bytes(value: object, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{place} must be a number of bytes, or null, got {value!r}")
    return value


def _sha256(value: object, place: str) -> str:
    if not isinstance(value, str) or not SHA256.fullmatch(value):
        raise DataError(f"{place} must be 64 hexadecimal digits in lower case (in quotes), or null, got {value!r}")
    return value


def _flag(value: object, place: str) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"{place} must be true or false, got {value!r}")
    return value


CHECKS = {
    "url": _address,
    "zip_url": _address,
    "bytes": _bytes,
    "sha256": _sha256,
    "page": _address,
    "by_name": _flag,
}
