"""One block of a conversion: the records of a division, read, examined, and written as a shard of each split.

Symbols: N records asked for, V width of a vision vector.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shards.division import Division
from shards.raw import Rejected, VectorFile, read_vectors
from shards.record import VECTOR_DTYPES, Samples, image_ids, sample_key, text_ids
from shards.spool import Spools
from shards.tokenizer import TextTokenizer
from shards.writer import SPLITS, Labels, Options, ShardWriter

BATCH = 1024
FLOAT16_MOST = 65504.0
ID_RANGE = 2.0**64
UNUSABLE, TRAIN, VALIDATION = range(3)


@dataclass(frozen=True)
class Sources:
    """The raw sources of one modality under one numbering of their records; `parts` are empty for text."""

    modality: str
    names: tuple[str, ...]
    spools: tuple[Path, ...]
    parts: tuple[VectorFile, ...]


@dataclass(frozen=True)
class Work:
    """What every block of a conversion needs to know. `build`: where shards grow; `target`: where they move to."""

    options: Options
    tokenizer: Path
    build: Path
    target: Path


@dataclass(frozen=True)
class Examined:
    """N records read and examined. fate int64 [N]: UNUSABLE, TRAIN or VALIDATION.

    vectors [N, V] in the stored dtype, ids int64 [N] of the images (None and 0 for text). rounding: by how much storing
    them changes a usable vector at most.
    """

    texts: list[bytes]
    vectors: np.ndarray | None
    ids: np.ndarray
    fate: np.ndarray
    faults: dict[int, str]
    rounding: float


@dataclass(frozen=True)
class Block:
    """A finished block: manifest entries of its shards with their lengths, and what was left out."""

    shards: list[dict[str, Any]]
    lengths: list[list[list[int]]]
    rejected: list[dict[str, Any]]
    rounding: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Block:
        return cls(**json.loads(text))


def in_validation(ids: np.ndarray, fraction: float) -> np.ndarray:
    """bool [N]: which ids (int64 hashes) belong to the validation split; equal ids never part."""
    return ids.view(np.uint64) < np.uint64(min(fraction * ID_RANGE, ID_RANGE - 2048))


def examine(sources: Sources, spools: Spools, rows: np.ndarray, options: Options, rounding: float = 0.0) -> Examined:
    """Read the records of `rows` int64 [N] and decide what becomes of each; `rounding`: the largest so far."""
    texts, faults = spools.texts(rows), spools.faults(rows)
    vectors = None
    if sources.parts:
        raw = read_vectors(sources.parts, rows)
        vectors, found = _stored(raw, VECTOR_DTYPES[options.vector_dtype])
        faults = found | faults
        split_ids = ids = image_ids(vectors if vectors.dtype.itemsize == 2 else raw)
        rounding = rounding_error(raw, vectors, faults, rounding)
    else:
        split_ids, ids = text_ids(texts), np.zeros(len(rows), np.int64)
    fate = np.where(in_validation(split_ids, options.validation_fraction), VALIDATION, TRAIN)
    fate[list(faults)] = UNUSABLE
    return Examined(texts, vectors, ids, fate, faults, rounding)


def _stored(raw: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, dict[int, str]]:
    """Vectors float32 [N, V] in the stored dtype, and the rows that it cannot hold."""
    with np.errstate(over="ignore", invalid="ignore"):
        vectors = raw.astype(dtype, copy=False)
    most = float(np.finfo(dtype).max)
    if raw.max() <= most and raw.min() >= -most:  # never so with a NaN
        return vectors, {}
    faults = {}
    for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
        whole = bool(np.isfinite(raw[row]).all())
        faults[row] = (
            "vector overflows float16: use --vector-dtype float32" if whole else "vector holds NaN or infinity"
        )
    return vectors, faults


def rounding_error(raw: np.ndarray, vectors: np.ndarray, faults: Collection[int], known: float) -> float:
    """The largest |raw - stored| of the rows [N, V] that are not among `faults`, at least `known`.

    A number below 2^k has a float16 error of at most 2^(k - 12), half a unit in its last place of 11 bits, and of at
    most 2^-25 where it is subnormal: numbers too small to have a larger error than is known are not looked at.
    """
    if raw.dtype == vectors.dtype:
        return known
    if faults:
        usable = np.setdiff1d(np.arange(len(raw)), list(faults))
        raw, vectors = raw[usable], vectors[usable]
    if known >= 2.0**-25:
        least = np.float16(min(2.0 ** (math.floor(math.log2(known)) + 12), FLOAT16_MOST)).view(np.uint16)
        large = np.flatnonzero(vectors.reshape(-1).view(np.uint16) << 1 >= least << 1)  # the sign shifted out
        raw, vectors = raw.reshape(-1)[large], vectors.reshape(-1)[large]
    return float(np.abs(raw - vectors.astype(np.float32)).max(initial=known))


def scan(sources: Sources, rows: range, options: Options) -> tuple[np.ndarray, int, Counter[tuple[str, str]]]:
    """(fate uint8 [N], words of the train split, faults by source and kind) of consecutive records."""
    spools, fates, words, faults = Spools(sources.spools), [], 0, Counter[tuple[str, str]]()
    for low in range(rows.start, rows.stop, BATCH):
        here = np.arange(low, min(low + BATCH, rows.stop))
        found = examine(sources, spools, here, options)
        fates.append(found.fate.astype(np.uint8))
        trained = [found.texts[at].decode("utf-8") for at in np.flatnonzero(found.fate == TRAIN).tolist()]
        words += sum(len(text.split()) for text in trained)
        for at, reason in found.faults.items():
            faults[sources.names[int(spools.sources(here[at]))], kind_of(reason)] += 1
    return np.concatenate(fates), words, faults


def kind_of(reason: str) -> str:
    """The reason for a rejection without what differs from record to record."""
    return "not UTF-8" if reason.startswith("line ") else reason


def build_block(work: Work, sources: Sources, division: Division, number: int) -> Block:
    """Write the shards of a block; they appear in `work.target` when they are whole."""
    spools, tokenizer = Spools(sources.spools), _tokenizer(work.tokenizer)
    records = division.block(number)
    folder = work.build / f"{sources.modality}-{number}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    writers = [ShardWriter(folder, Labels(sources.modality, split, number), tokenizer) for split in SPLITS]
    rejected, rounding = [], 0.0
    for low in range(0, len(records), BATCH):
        rows = records[low : low + BATCH]
        found = examine(sources, spools, rows, work.options, rounding)
        source = spools.sources(rows)
        inside = (rows - spools.begins[source]).tolist()
        places = [(sources.names[at], row) for at, row in zip(source.tolist(), inside, strict=True)]
        for fate, writer in zip((TRAIN, VALIDATION), writers, strict=True):
            _add(writer, found, np.flatnonzero(found.fate == fate), places, sources.names, source)
        rejected += [asdict(Rejected(*places[at], reason)) for at, reason in sorted(found.faults.items())]
        rounding = found.rounding
    written = [shard for writer in writers if (shard := writer.close()) is not None]
    for shard in written:
        for part in (shard.entry["index"], shard.entry):
            os.replace(folder / part["file"], work.target / part["file"])
    folder.rmdir()
    return Block([s.entry for s in written], [s.lengths.tolist() for s in written], rejected, rounding)


def _add(
    writer: ShardWriter,
    found: Examined,
    chosen: np.ndarray,
    places: list[tuple[str, int]],
    names: tuple[str, ...],
    source: np.ndarray,
) -> None:
    if not len(chosen):
        return
    keys = [sample_key(*places[at]) for at in chosen.tolist()]
    texts = [found.texts[at] for at in chosen.tolist()]
    vectors = None if found.vectors is None else found.vectors[chosen]
    writer.add(Samples(keys, texts, vectors), found.ids[chosen], names, source[chosen])


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of the conversion at work; loaded, and its memory of words filled, once a process."""
    return TextTokenizer(path)
