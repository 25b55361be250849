"""A directory of shards, opened: manifest, indexes and the samples of its splits.

Symbols: N samples of a split.
"""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.index import ShardReader, check_header, index_path, load_array
from shards.order import Lengths
from shards.record import DataError
from shards.writer import TOKENIZER, read_manifest

DAMAGE_CEILING = 10_000  # at most one damaged sample in so many (but one is always borne)
MAPS_PER_SHARD = 3
SPARE_FILES = 256


class _Readers:
    """Open shards, the least recently used closed when too many; each shard's checksums are verified once.

    Shared by the prefetch thread and the validation sets, hence the lock.
    """

    def __init__(self, directory: Path, entries: Sequence[dict[str, Any]], tokenizer_hash: str) -> None:
        self._directory, self._entries, self._hash = directory, entries, tokenizer_hash
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._bad: dict[int, frozenset[int]] = {}
        self._lock = threading.RLock()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = max(8, (files - SPARE_FILES) // MAPS_PER_SHARD)
        self.damaged: list[tuple[str, str]] = []

    def get(self, shard: int) -> ShardReader:
        """The open reader of a shard."""
        with self._lock:
            reader = self._open.get(shard)
            if reader is None:
                reader = ShardReader(self._directory / self._entries[shard]["file"], self._hash)
                self._open[shard] = reader
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return reader

    def bad(self, shard: int) -> frozenset[int]:
        """The damaged samples of a shard, verified at the first call.

        Raises DataError when more than 1 in 10,000 samples of the set (and more than one) are damaged.
        """
        with self._lock:
            if shard not in self._bad:
                reader = self.get(shard)
                found = reader.damaged().tolist()
                self._bad[shard] = frozenset(found)
                name = self._entries[shard]["file"]
                self.damaged += [(name, reader.key(sample)) for sample in found]
            self._check_ceiling()
            return self._bad[shard]

    def _check_ceiling(self) -> None:
        total = sum(entry["samples"] for entry in self._entries) if self.damaged else 0
        if len(self.damaged) > max(1, total // DAMAGE_CEILING):
            listed = ", ".join(f"{key} in {tar}" for tar, key in self.damaged[:3])
            raise DataError(
                f"{len(self.damaged)} of {total} samples are damaged (first: {listed}), more than 1 in "
                f"{DAMAGE_CEILING}: make the shards again"
            )


@dataclass(frozen=True)
class ShardSet:
    """An opened shard directory: manifest, and indexes mapped as they are needed."""

    directory: Path
    manifest: dict[str, Any]
    vocab_size: int
    tokenizer_hash: str
    generated: bool
    vector_size: int
    readers: _Readers = field(repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path, verify: bool = True) -> ShardSet:
        """Open `directory`; raises DataError when it is missing, foreign or damaged.

        verify: check now that every tar's size and index match. Checksums are verified when a shard is
        first used.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        if not (directory / TOKENIZER).is_file():
            raise DataError(f"{directory / TOKENIZER} is missing: make the shards again")
        tokenizer = manifest["tokenizer"]
        if verify:
            for entry in manifest["shards"]:
                path = directory / entry["file"]
                check_header(path, tokenizer["sha256"])
                header = load_array(index_path(path), "header")
                told = (entry["bytes"], entry["samples"], entry["tokens"])
                if tuple(header[1:4].tolist()) != told:
                    raise DataError(
                        f"index {index_path(path).name} says (bytes, samples, tokens) = "
                        f"{tuple(header[1:4].tolist())}, the manifest {told}: make the shards again"
                    )
        readers = _Readers(directory, manifest["shards"], tokenizer["sha256"])
        return cls(
            directory,
            manifest,
            tokenizer["vocab_size"],
            tokenizer["sha256"],
            manifest["generated"],
            manifest["vector_size"],
            readers,
        )

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.directory / TOKENIZER

    def words(self, split: str) -> int:
        """Words of a split, "train" or "validation"."""
        return self.manifest["totals"][split]["words"]


class Split:
    """The samples of one split (and modality): global sample numbers, their lengths and their bytes."""

    def __init__(self, shards: ShardSet, split: str, modality: str | None = None) -> None:
        entries = [
            (number, entry)
            for number, entry in enumerate(shards.manifest["shards"])
            if entry["split"] == split and modality in (None, entry["modality"])
        ]
        self._readers = shards.readers
        self._shards = np.array([number for number, _ in entries], dtype=np.int64)
        counts = np.array([entry["samples"] for _, entry in entries], dtype=np.int64)
        self.borders = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        sources = sorted({(entry["source"], entry["modality"]) for _, entry in entries})
        numbers = [sources.index((entry["source"], entry["modality"])) for _, entry in entries]
        directories = [index_path(shards.directory / entry["file"]) for _, entry in entries]
        self.lengths = Lengths(
            tuple(sources),
            _joined([np.diff(load_array(d, "token_offsets")) for d in directories]),
            _joined([load_array(d, "words") for d in directories]),
            np.repeat(np.array(numbers, dtype=np.int64), counts),
            self._words_before,
        )

    def __len__(self) -> int:
        return int(self.borders[-1])

    def column(self, name: str) -> np.ndarray:
        """One per-sample column of the indexes over all samples."""
        readers = (self._readers.get(int(shard)) for shard in self._shards)
        return np.concatenate([np.zeros(0, np.int64), *[reader.columns[name] for reader in readers]])

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, sample within it)."""
        at = int(np.searchsorted(self.borders, sample, side="right")) - 1
        return int(self._shards[at]), sample - int(self.borders[at])

    def reader(self, sample: int) -> tuple[ShardReader, int, bool]:
        """(reader, sample within it, whether it is whole); verifies its shard at first."""
        shard, local = self.locate(sample)
        return self._readers.get(shard), local, local not in self._readers.bad(shard)

    def damaged(self) -> np.ndarray:
        """int64: the damaged samples of the split; verifies all its shards."""
        found = [
            int(border) + sample
            for shard, border in zip(self._shards.tolist(), self.borders[:-1], strict=True)
            for sample in sorted(self._readers.bad(shard))
        ]
        return np.array(found, dtype=np.int64)

    def _words_before(self, samples: np.ndarray, counts: np.ndarray) -> np.ndarray:
        out = np.empty(len(samples), dtype=np.int64)
        for at, (sample, count) in enumerate(zip(samples.tolist(), counts.tolist(), strict=True)):
            shard, local = self.locate(sample)
            out[at] = self._readers.get(shard).sample_word_starts(local)[:count].sum(dtype=np.int64)
        return out


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
