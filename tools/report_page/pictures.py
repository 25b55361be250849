"""The PNG files of a run that go into its report: the newest of each name, as far as there is room."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("plots", "attention_analysis")
MAX_RUN_BYTES = 12 * 2**20  # of pictures of one run on a page
_BEGIN, _END = b"\x89PNG\r\n\x1a\n", b"IEND\xae\x42\x60\x82"
_MOMENT = re.compile(r"[_-]?(?:step|epoch)[_-]?(\d+)")  # what tells pictures of one kind apart


@dataclass(frozen=True)
class Picture:
    """A PNG: its path in the run's folder without step or epoch, its path, its content in base64."""

    kind: str
    name: str
    content: str


@dataclass(frozen=True)
class Album:
    """A run's pictures, and what was left out: older ones (a number), damaged ones and those without room (names)."""

    pictures: tuple[Picture, ...] = ()
    older: int = 0
    damaged: tuple[str, ...] = ()
    no_room: tuple[str, ...] = ()


def read_album(folder: Path, most: int = MAX_RUN_BYTES) -> Album:
    """The newest PNG of each kind in a run's folders of pictures, of `most` bytes together; the small ones first."""
    newest: dict[str, tuple[int, Path]] = {}
    older = 0
    for path in sorted(file for name in FOLDERS for file in (folder / name).rglob("*.png") if file.is_file()):
        name = path.relative_to(folder).as_posix()
        numbers = _MOMENT.findall(name)
        kind, moment = _MOMENT.sub("", name), int(numbers[-1]) if numbers else 0
        older += kind in newest
        if kind not in newest or moment >= newest[kind][0]:
            newest[kind] = moment, path
    taken: dict[str, Picture] = {}
    damaged, no_room, room = [], [], most
    by_size = sorted((path.stat().st_size, kind, path) for kind, (_, path) in newest.items())
    for size, kind, path in by_size:
        name = path.relative_to(folder).as_posix()
        if size > room:
            no_room.append(name)
            continue
        content = path.read_bytes()
        if not (content.startswith(_BEGIN) and content.endswith(_END)):
            damaged.append(name)
            continue
        room -= size
        taken[kind] = Picture(kind, name, base64.b64encode(content).decode())
    return Album(tuple(taken[kind] for kind in newest if kind in taken), older, tuple(damaged), tuple(sorted(no_room)))
