"""Samples -> shards and their indexes, and the manifest of a set of them.

Symbols: N samples, V width of a vision vector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from isal import isal_zlib

from shards.index import NO_VECTOR, PLAIN_TEXT, RAW_DTYPES, Counted, IndexBuilder, Members, index_path
from shards.record import BLOCK_BYTES, VECTOR_DTYPES, VECTOR_SIZE, DataError, Samples, tar_members
from shards.tokenizer import TextTokenizer

FORMAT = "bitmar-shards/3"
MANIFEST, TOKENIZER, REJECTED, LENGTHS = "manifest.json", "tokenizer.json", "rejected.jsonl", "lengths.npy"
SPLITS = ("train", "validation")
MODALITIES = ("pairs", "text")
COUNTS = ("samples", "words", "tokens")
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


@dataclass(frozen=True)
class Labels:
    """What a shard holds, as its name and its manifest entry say."""

    modality: str
    split: str
    number: int

    @property
    def file(self) -> str:
        return f"{self.modality}-{self.split}-{self.number:05d}.tar"


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard: its manifest entry, and int64 [M, 3] (source in sorted order, tokens, samples)."""

    entry: dict[str, Any]
    lengths: np.ndarray


class ShardWriter:
    """Writes one shard and its index."""

    def __init__(self, directory: Path, labels: Labels, tokenizer: TextTokenizer) -> None:
        self._path, self._labels = directory / labels.file, labels
        self._builder = IndexBuilder(tokenizer)
        self._stream = self._path.open("wb", buffering=0)
        self._checksum, self._bytes = xxhash.xxh3_128(), 0

    def __len__(self) -> int:
        return len(self._builder)

    def add(self, samples: Samples, ids: np.ndarray, names: tuple[str, ...], source: np.ndarray) -> None:
        """Append samples with their image ids int64 [N] (0 for text) and sources int64 [N] into `names`."""
        data, text_at, vector_at = tar_members(samples)
        size = len(samples.texts)
        kind, vector_bytes = NO_VECTOR, 0
        crcs = map(isal_zlib.crc32, samples.texts)
        if samples.vectors is not None:
            kind = next(kind for kind, dtype in RAW_DTYPES.items() if dtype == samples.vectors.dtype)
            vector_bytes = samples.vectors.dtype.itemsize * VECTOR_SIZE
            crcs = map(isal_zlib.crc32, samples.vectors, crcs)
        columns = {
            "text_offset": self._bytes + text_at,
            "text_size": np.fromiter(map(len, samples.texts), np.int64, size),
            "text_kind": np.full(size, PLAIN_TEXT),
            "vector_offset": np.where(vector_at < 0, -1, self._bytes + vector_at),
            "vector_size": np.full(size, vector_bytes),
            "vector_kind": np.full(size, kind),
            "crc32": np.fromiter(crcs, np.int64, size),
            "image_id": ids,
        }
        present, columns["source"] = np.unique(source, return_inverse=True)
        texts = [text.decode("utf-8") for text in samples.texts]
        sources: list[str] = [names[number] for number in present.tolist()]
        self._builder.add(Members(samples.keys, texts, sources, columns))
        self._write(data.data)

    def close(self) -> WrittenShard | None:
        """Finish the shard: tar trailer, index, entry. None, and no file, when it holds no sample."""
        if not len(self._builder):
            self._stream.close()
            self._path.unlink()
            return None
        end = -(-(self._bytes + 2 * BLOCK_BYTES) // RECORD_BYTES) * RECORD_BYTES
        self._write(memoryview(bytes(end - self._bytes)))
        self._stream.close()
        counted = self._builder.write(index_path(self._path), self._bytes)
        return describe(self._path, self._labels, counted, self._checksum.hexdigest())

    def _write(self, data: memoryview) -> None:
        self._checksum.update(data)
        self._bytes += len(data)
        while len(data):
            data = data[self._stream.write(data) :]


def describe(tar: Path, labels: Labels, counted: Counted, xxh3_128: str) -> WrittenShard:
    """The manifest entry of a tar whose index lies beside it."""
    index = index_path(tar)
    return WrittenShard(
        {
            "file": tar.name,
            "bytes": tar.stat().st_size,
            "xxh3_128": xxh3_128,
            "index": {"file": index.name, "bytes": index.stat().st_size, "xxh3_128": file_checksum(index)},
            **{name: counted.total(name) for name in COUNTS},
            "modality": labels.modality,
            "split": labels.split,
            "sources": counted.sources,
        },
        counted.lengths,
    )


def file_checksum(path: Path) -> str:
    """The 128-bit XXH3 of a file, hexadecimal: it finds damage as SHA-256 does, in a tenth of the time."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(directory: Path, shards: Sequence[WrittenShard], about: dict[str, Any]) -> dict[str, Any]:
    """Write `manifest.json` and `lengths.npy` of `shards`; `about`: the entries that do not follow from them."""
    kinds = {name: shard.entry["modality"] for shard in shards for name in shard.entry["sources"]}
    sources = [{"name": name, "modality": kinds[name]} for name in sorted(kinds)]
    number = {source["name"]: at for at, source in enumerate(sources)}
    rows = [np.zeros((0, 4), np.int64)]
    totals = {split: dict.fromkeys((*COUNTS, "bytes"), 0) for split in SPLITS}
    for at, shard in enumerate(shards):
        place = np.array([number[name] for name in sorted(shard.entry["sources"])], np.int64)
        source, tokens, samples = shard.lengths.T
        rows.append(np.stack([np.full(len(source), at), place[source], tokens, samples], axis=1))
        for name, value in totals[shard.entry["split"]].items():
            totals[shard.entry["split"]][name] = value + shard.entry[name]
    table = np.concatenate(rows)
    table = table[np.lexsort(table.T[::-1])].astype("<i4")
    path = directory / LENGTHS
    np.save(path, table, allow_pickle=False)
    manifest = {
        "format": FORMAT,
        **about,
        "vector_size": VECTOR_SIZE,
        "totals": totals,
        "sources": sources,
        "lengths": {"file": LENGTHS, "bytes": path.stat().st_size, "sha256": file_sha256(path)},
        "shards": [shard.entry for shard in shards],
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a shard directory; raises DataError when it is missing, damaged or foreign."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; make shards with tools/make_shards.py --raw RAW --out {directory}"
        ) from None
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """A manifest that holds all it promises; raises DataError, which names `where`, for anything else."""
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is damaged ({error}): make the shards again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{where} is not a manifest of format {FORMAT}: make the shards again")
    problem = _fault(manifest, _SHAPE, "")
    if problem is None:
        known = {source["name"]: source["modality"] for source in manifest["sources"]}
        for entry in manifest["shards"]:
            odd = [name for name in entry["sources"] if known.get(name) != entry["modality"]]
            if odd:
                problem = f"shard {entry['file']} holds source {odd[0]!r}, which sources do not list"
            for name in COUNTS:
                if sum(part[name] for part in entry["sources"].values()) != entry[name]:
                    problem = f"the {name} of shard {entry['file']} are not the sum over its sources"
    if problem is not None:
        raise DataError(f"{where} is damaged ({problem}): make the shards again")
    return manifest


class _Name(str):
    """In a shape: a plain file name."""


_FILE = {"file": _Name(), "bytes": 0, "xxh3_128": ""}
_COUNTED = dict.fromkeys(COUNTS, 0)
# what each value must look like: a type's example, one of several strings, [items], {"*": values of any key}
_SHAPE: dict[str, Any] = {
    "generated": False,
    "fingerprint": "",
    "tokenizer": {"file": _Name(), "sha256": "", "vocab_size": 0},
    "vector_size": 0,
    "totals": {split: {**_COUNTED, "bytes": 0} for split in SPLITS},
    "sources": [{"name": "", "modality": MODALITIES}],
    "lengths": {"file": _Name(), "bytes": 0, "sha256": ""},
    "shards": [
        {**_FILE, "index": _FILE, **_COUNTED, "modality": MODALITIES, "split": SPLITS, "sources": {"*": _COUNTED}}
    ],
}


def _fault(value: Any, shape: Any, path: str) -> str | None:
    """What does not fit a shape, None when all does."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{path or 'it'} is no object"
        wanted = dict.fromkeys(value, shape["*"]) if "*" in shape else shape
        for key, inner in wanted.items():
            if key not in value:
                return f"{path}{key} is missing"
            if problem := _fault(value[key], inner, f"{path}{key}."):
                return problem
        return None
    name = path.rstrip(".")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        return next((p for at, item in enumerate(value) if (p := _fault(item, shape[0], f"{name}[{at}]."))), None)
    if isinstance(shape, tuple):
        fits = isinstance(value, str) and value in shape
        return None if fits else f"{name} is {value!r}, not one of {', '.join(shape)}"
    plain = type(value) is (str if isinstance(shape, _Name) else type(shape))
    if not plain or (type(value) is int and value < 0):
        return f"{name} is {value!r}"
    if (
        isinstance(value, str)
        and isinstance(shape, _Name)
        and (not value or value.startswith(".") or not {"/", "\0"}.isdisjoint(value))
    ):
        return f"{name} {value!r} is no plain file name"
    return None
