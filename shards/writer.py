"""Records -> shards and their indexes, in a directory that appears whole or not at all.

Symbols: N samples, V width of a vision vector.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.index import IndexBuilder, Members, index_path
from shards.record import (
    VECTOR_DTYPES,
    DataError,
    Sample,
    npy_header,
    padding,
    tar_header,
    to_members,
)
from shards.tokenizer import TextTokenizer

FORMAT = "bitmar-shards/1"
MANIFEST, TOKENIZER, REJECTED = "manifest.json", "tokenizer.json", "rejected.jsonl"
RECORD_BYTES = 10_240


@dataclass(frozen=True)
class Options:
    """What a conversion may be told; the same raw files and options give the same bytes."""

    vocab_size: int | None = None
    tokenizer: Path | None = None
    samples_per_shard: int = 10_000
    validation_fraction: float = 0.05
    vector_dtype: str = "float16"
    max_reject_fraction: float = 0.001
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        """Raises DataError naming the option and its value."""
        checks = {
            "--samples-per-shard": (self.samples_per_shard, self.samples_per_shard >= 1, ">= 1"),
            "--validation-fraction": (
                self.validation_fraction,
                0 <= self.validation_fraction < 1,
                "from 0 to below 1",
            ),
            "--vector-dtype": (self.vector_dtype, self.vector_dtype in VECTOR_DTYPES, "float16 or float32"),
            "--max-reject-fraction": (
                self.max_reject_fraction,
                0 <= self.max_reject_fraction <= 1,
                "from 0 to 1",
            ),
            "--shuffle-seed": (self.shuffle_seed, self.shuffle_seed >= 0, ">= 0"),
        }
        for name, (value, fine, wanted) in checks.items():
            if not fine:
                raise DataError(f"{name} must be {wanted}, got {value}")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise DataError("--tokenizer and --vocab-size exclude each other: the file has its own size")


class ShardWriter:
    """Writes the samples of one source and split into shards of at most `samples_per_shard`."""

    def __init__(self, directory: Path, labels: dict[str, str], tokenizer: TextTokenizer, options: Options) -> None:
        """`labels`: source, modality and split, as they stand in the manifest."""
        self._directory, self._labels, self._tokenizer = directory, labels, tokenizer
        self._limit = options.samples_per_shard
        self._dtype = VECTOR_DTYPES[options.vector_dtype]
        self._npy_header_bytes = len(npy_header(self._dtype))
        self._builder: IndexBuilder | None = None
        self.entries: list[dict[str, Any]] = []

    def add(self, samples: Sequence[Sample], ids: Sequence[int]) -> None:
        """Append samples (`ids`: their image ids, 0 for text)."""
        done = 0
        while done < len(samples):
            if self._builder is None:
                self._open()
            assert self._builder is not None  # _open made it
            take = min(len(samples) - done, self._limit - len(self._builder))
            self._append(samples[done : done + take], ids[done : done + take], self._builder)
            done += take
            if len(self._builder) == self._limit:
                self.close()

    def close(self) -> None:
        """Finish the open shard, if there is one: tar trailer, index, manifest entry."""
        if self._builder is None:
            return
        end = -(-(self._bytes + 1024) // RECORD_BYTES) * RECORD_BYTES
        self._write(bytes(end - self._bytes))
        self._stream.close()
        counts = self._builder.write(self._path)
        self.entries.append(
            {
                "file": self._path.name,
                "index": index_path(self._path).name,
                "bytes": self._bytes,
                "sha256": self._sha.hexdigest(),
                **counts,
                **self._labels,
            }
        )
        self._builder = None

    def _open(self) -> None:
        name = f"{self._labels['source']}-{self._labels['split']}-{len(self.entries):05d}.tar"
        self._path = self._directory / name
        self._stream = self._path.open("wb")
        self._sha, self._bytes = hashlib.sha256(), 0
        self._builder = IndexBuilder(self._tokenizer)

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sha.update(data)
        self._bytes += len(data)

    def _append(self, samples: Sequence[Sample], ids: Sequence[int], builder: IndexBuilder) -> None:
        pieces: list[bytes] = []
        rows: list[tuple[int, int, int, int, int]] = []
        at = self._bytes
        for sample in samples:
            members = to_members(sample, self._dtype)
            text = members[0][1]
            crc, vector_at, vector_bytes = zlib.crc32(text), -1, 0
            text_at = at + 512
            for name, payload in members:
                pieces += [tar_header(name, len(payload)), payload, padding(len(payload))]
                at += 512 + -(-len(payload) // 512) * 512
            if sample.vector is not None:
                raw = members[1][1]
                vector_at = at + self._npy_header_bytes - -(-len(raw) // 512) * 512
                crc = zlib.crc32(memoryview(raw)[self._npy_header_bytes :], crc)
                vector_bytes = self._dtype.itemsize
            rows.append((text_at, len(text), vector_at, vector_bytes, crc))
        self._write(b"".join(pieces))
        names = ("text_offset", "text_size", "vector_offset", "vector_bytes", "crc32")
        columns: dict[str, Sequence[int]] = dict(zip(names, zip(*rows, strict=True), strict=True))
        columns["image_id"] = ids
        builder.add(Members([s.key for s in samples], [s.text for s in samples], columns))


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A locked directory beside `out` that takes its place when the block ends well, else is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.mkdir(exist_ok=True)
    lock = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another conversion is writing to {out}: wait for it to end") from None
        try:
            for leftover in part.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield part
            old = out.with_name(f".{out.name}.old")
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(out, old)
            os.rename(part, out)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(lock)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a shard directory; raises DataError when it is missing, damaged or foreign."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; make shards with tools/make_shards.py --raw RAW --out {directory}"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): make the shards again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of format {FORMAT}: make the shards again")
    return manifest
