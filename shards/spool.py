"""The texts of one raw source laid on disk one after the other, so that any of them is found at once.

Captions lie in one JSON list and text in an archive, which can only be read from their beginnings. `X.texts` holds the
UTF-8 of all records, `X.ends` where each ends (int64), and `X.json`, written last, their number and what is unusable.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shards.raw import Rejected


def write_spool(path: Path, batches: Iterable[Sequence[str | Rejected]]) -> None:
    """Lay records out at `path` unless they are there already.

    An unusable record takes up no bytes; its reason is kept.
    """
    if path.with_suffix(".json").exists():
        return
    done, end, faults = 0, 0, {}
    with path.with_suffix(".texts").open("wb") as texts, path.with_suffix(".ends").open("wb") as ends:
        for batch in batches:
            faults |= {at: one.reason for at, one in enumerate(batch, done) if isinstance(one, Rejected)}
            strings = ["" if isinstance(one, Rejected) else one for one in batch]
            joined = "".join(strings)
            data = joined.encode("utf-8")
            ascii_only = len(data) == len(joined)
            sizes = np.fromiter(map(len, strings if ascii_only else map(str.encode, strings)), np.int64, len(batch))
            texts.write(data)
            (end + np.cumsum(sizes)).tofile(ends)
            end += len(data)
            done += len(batch)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"records": done, "faults": faults}))
    os.replace(part, path.with_suffix(".json"))


class Spool:
    """The texts of a source, opened. Where they end is mapped; they are read, since what is mapped counts as memory."""

    def __init__(self, path: Path) -> None:
        about = json.loads(path.with_suffix(".json").read_text())
        self.faults: dict[int, str] = {int(number): reason for number, reason in about["faults"].items()}
        self._ends = _mapped(path.with_suffix(".ends"), np.int64)
        self._texts = os.open(path.with_suffix(".texts"), os.O_RDONLY)
        weakref.finalize(self, os.close, self._texts)

    def __len__(self) -> int:
        return len(self._ends)

    def texts(self, rows: np.ndarray) -> list[bytes]:
        """The texts of `rows`, UTF-8; empty where a record is unusable."""
        stops = self._ends[rows].tolist()
        starts = np.where(rows > 0, self._ends[rows - 1], 0).tolist()
        return [os.pread(self._texts, stop - start, start) for start, stop in zip(starts, stops, strict=True)]


def _mapped(path: Path, kind: type) -> np.ndarray:
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)


class Spools:
    """Spools under one numbering: the records of each follow those of the one before."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._spools = [Spool(path) for path in paths]
        self.begins = np.cumsum([0, *map(len, self._spools)])

    def __len__(self) -> int:
        return int(self.begins[-1])

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """int64: the number of the spool that each row lies in."""
        return np.searchsorted(self.begins, rows, side="right") - 1

    def texts(self, rows: np.ndarray) -> list[bytes]:
        """The texts of `rows`, UTF-8; empty where a record is unusable."""
        source = self.sources(rows)
        present = np.unique(source).tolist()
        if len(present) == 1:
            return self._spools[present[0]].texts(rows - self.begins[present[0]])
        out = [b""] * len(rows)
        for number in present:
            places = np.flatnonzero(source == number)
            found = self._spools[number].texts(rows[places] - self.begins[number])
            for place, text in zip(places.tolist(), found, strict=True):
                out[place] = text
        return out

    def faults(self, rows: np.ndarray) -> dict[int, str]:
        """Place in `rows` -> why that record is unusable."""
        found = {}
        source = self.sources(rows)
        for number, spool in enumerate(self._spools):
            if spool.faults:
                places = np.flatnonzero(source == number)
                inside = (rows[places] - self.begins[number]).tolist()
                reasons = zip(places.tolist(), map(spool.faults.get, inside), strict=True)
                found |= {place: reason for place, reason in reasons if reason is not None}
        return found
