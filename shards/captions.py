"""A JSON list of captions, read as a stream: memory does not grow with the file.

An element is a string or an object with "caption"; what else it may be is told to whoever reads.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.record import DataError

CHUNK_BYTES = 1 << 20
MAX_ELEMENT_CHARACTERS = 1 << 24
MAX_ALONE = 1 << 12
SPACE = re.compile(r"[ \t\n\r]*")
STRINGS = re.compile(r'(?>[ \t\n\r]*"[^"\\]*+(?:\\.[^"\\]*+)*+"[ \t\n\r]*,)++', re.DOTALL)
ENDS = frozenset(" \t\n\r,]")  # after anything else, or nothing, a number may go on
_scan = json.JSONDecoder().scan_once  # pyright: ignore[reportAttributeAccessIssue]


class _Text:
    """The characters of a UTF-8 file that are not yet parsed."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("rb")
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.ended = False
        self.text, self.at = "", 0

    def close(self) -> None:
        self._stream.close()

    def more(self) -> None:
        """Take in at least as many characters again as are here; raises UnicodeDecodeError."""
        data = self._stream.read(max(CHUNK_BYTES, len(self.text) - self.at))
        self.ended = not data
        self.text, self.at = self.text[self.at :] + self._decode(data, final=self.ended), 0

    def next(self) -> str:
        """The next character that is no space, not taken; "" at the end."""
        while True:
            found = SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def strings(self) -> list[Any]:
        """Take the strings that begin here, with the comma after each: what lists mostly hold, parsed at one go."""
        found = STRINGS.match(self.text, self.at)
        if found is None:
            return []
        try:
            values = json.loads(f"[{found[0][:-1]}]")
        except json.JSONDecodeError:
            return []  # value() tells which one
        self.at = found.end()
        return values

    def value(self) -> Any:
        """Take the JSON value that begins here, of which what follows it is known too. Raises ValueError."""
        while True:
            try:
                value, end = _scan(self.text, self.at)
            except (json.JSONDecodeError, StopIteration) as error:
                if self.ended or len(self.text) - self.at > MAX_ELEMENT_CHARACTERS:
                    told = error.msg if isinstance(error, json.JSONDecodeError) else "no JSON value"
                    raise ValueError(told) from None
            else:
                if self.ended or self.text[end : end + 1] in ENDS or end - self.at > MAX_ELEMENT_CHARACTERS:
                    self.at = end
                    return value
            self.more()


def read_captions(path: Path) -> Iterator[list[str | None]]:
    """Yield the captions of a JSON list's elements, None where one has none, some thousands at a time.

    Raises DataError when the file cannot be read, is no JSON list, or is damaged after what was yielded.
    """
    try:
        text = _Text(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    try:
        for values in _elements(text, path):
            yield values if set(map(type, values)) == {str} else list(map(_caption, values))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not valid JSON ({error}): get the file again") from None
    finally:
        text.close()


def _caption(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("caption")
    return value if isinstance(value, str) else None


def _elements(text: _Text, path: Path) -> Iterator[list[Any]]:
    first = text.next()
    if first != "[":
        found = type(text.value()).__name__
        raise DataError(f'{path}: expected a JSON list of strings or of {{"caption": ...}} objects, found {found}')
    text.at += 1
    if text.next() == "]":
        raise DataError(f"{path} holds no captions: the list is empty")
    number, alone = 0, []  # alone: elements parsed one by one
    while True:
        if not text.next():
            raise ValueError(f"it ends after {number} elements")
        strings = text.strings()
        if alone and (strings or len(alone) == MAX_ALONE):
            yield alone
            alone = []
        if strings:
            yield strings
            number += len(strings)
            continue
        number += 1
        try:
            value = text.value()
        except ValueError as error:
            raise ValueError(f"element {number}: {error}") from None
        alone.append(value)
        separator = text.next()
        text.at += 1
        if separator == "]":
            break
        if separator != ",":
            raise ValueError(f"no comma after element {number}" if separator else f"it ends after {number} elements")
    if text.next():
        raise ValueError("something follows the list")
    yield alone
