"""A set of shards, opened: manifest, the counts of its splits, and shards as they are needed.

Symbols: N samples of a shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import resource
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards.corpus import Corpus, ShardLengths
from shards.index import RAW_DTYPES, UNREADABLE, ShardReader, count_sources, load_columns, read_index
from shards.record import VECTOR_SIZE, DataError
from shards.regions import MappedRegion
from shards.store import CacheOptions, NoRoom, Store, is_remote, open_store
from shards.writer import MANIFEST, parse_manifest

DAMAGE_CEILING = 1e-4
FILES_PER_SHARD, SPARE_FILES = 4, 256
MAX_OPEN = 256
ROOM_POLL_S = 0.05  # how often it is looked whether other processes have let go of what fills the cache
TABLE = ("first_token", "stop_token", "words", "image_id", "vector_offset", "source")  # columns of OpenShard.table


class OpenShard:
    """One open shard, which of its samples are damaged, and what gathering rows looks up."""

    __slots__ = ("__weakref__", "blocks", "damaged", "lost", "reader", "table", "tokens", "vector_bytes")

    def __init__(self, reader: ShardReader, damaged: frozenset[int], numbers: Mapping[str, int]) -> None:
        """lost: bool [N], the same as `damaged`; table: int64 [N, 6], the columns of TABLE; numbers: of the sources
        by name.

        vector_bytes: the size of each vector, 0 where they are not raw. tokens [K] and blocks (a vector from each
        byte of the tar on) are maps of the files, None where the files are read at offsets.
        """
        self.reader, self.damaged = reader, damaged
        columns = reader.columns
        kinds = np.unique(columns["vector_kind"])
        raw = RAW_DTYPES.get(int(kinds[0])) if len(kinds) == 1 else None
        self.vector_bytes = VECTOR_SIZE * raw.itemsize if raw else 0
        self.lost = np.zeros(len(reader), np.bool_)
        self.lost[list(damaged)] = True
        offsets = columns["token_offsets"]
        names = [name.decode("utf-8", "replace") for name in columns["sources"].tolist()]
        source = np.array([numbers[name] for name in names], np.int64)[columns["source"]]
        rest = (columns[name].astype(np.int64) for name in TABLE[2:-1])
        self.table = np.stack([offsets[:-1], offsets[1:], *rest, source], axis=1)
        tokens, data = reader.token_bytes, reader.data
        self.tokens = tokens.items(reader.token_dtype) if isinstance(tokens, MappedRegion) else None
        self.blocks = data.blocks(self.vector_bytes) if isinstance(data, MappedRegion) and raw else None

    def words_of(self, start: int, stop: int) -> int:
        """The words that begin in tokens start : stop of the shard."""
        return int(np.frombuffer(self.reader.word_start_bytes[start:stop], np.uint8).sum(dtype=np.int64))


class Readers:
    """Open shards, the least recently used let go when too many, or too large for the cache; each is verified when
    first opened.

    Shared by threads. A shard that is let go is closed, and no longer pinned in the store, once nobody uses it.
    """

    def __init__(self, store: Store, manifest: dict[str, Any], damage_ceiling: float, room_wait_s: float) -> None:
        self._store, self._entries = store, manifest["shards"]
        self._tokenizer = manifest["tokenizer"]["sha256"]
        self._sources = {source["name"]: number for number, source in enumerate(manifest["sources"])}
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._busy: dict[int, threading.Lock] = {}
        self._damaged: dict[int, frozenset[int]] = {}
        self._lock = threading.Lock()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = max(8, min(MAX_OPEN, (files - SPARE_FILES) // FILES_PER_SHARD))
        self._ceiling, self._room_wait_s = damage_ceiling, room_wait_s
        self.damaged: list[tuple[str, str]] = []  # (shard, key) of every damaged sample found

    def keep(self, shards: int) -> None:
        """Hold at most so many shards open."""
        self._limit = max(1, min(self._limit, shards))

    def get(self, shard: int, *, keep: Container[int] = (), waits: bool = True) -> OpenShard:
        """The open shard of a number. Raises DataError when it cannot be had or does not fit its index.

        Where the cache is full, shards not of `keep` are let go for it, and other processes waited for unless not
        `waits`: then NoRoom.
        """
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened
            busy = self._busy.setdefault(shard, threading.Lock())
        with busy:
            with self._lock:
                opened = self._open.get(shard)
            if opened is None:
                opened = self._fetch(shard, keep, waits)
                with self._lock:
                    self._open[shard] = opened
                    while len(self._open) > self._limit:
                        self._open.popitem(last=False)
            return opened

    def columns(self, shard: int) -> dict[str, np.ndarray]:
        """The columns of a shard's index, from memory where the shard is open. Raises DataError."""
        with self._lock:
            opened = self._open.get(shard)
        if opened is not None:
            return opened.reader.columns
        with self.index(shard) as path:
            return read_index(path)

    @contextmanager
    def index(self, shard: int) -> Iterator[Path]:
        """The index file of a shard; the tar is not needed. Raises DataError."""
        index = self._entries[shard]["index"]
        path = self._bring(index)
        try:
            yield path
        finally:
            self._store.release(index["file"])

    def check_damage(self, met: Iterable[tuple[str, str]] = ()) -> None:
        """Raises DataError when more samples are damaged, here or `met` elsewhere, than may be (one always may)."""
        with self._lock:
            found = sorted({*self.damaged, *met})
        total = sum(entry["samples"] for entry in self._entries) if found else 0
        if len(found) > max(1, self._ceiling * total):
            listed = ", ".join(f"{key} in {tar}" for tar, key in found[:3])
            raise DataError(
                f"{len(found)} of {total} samples are damaged (first: {listed}), more than "
                f"data.damage_ceiling {self._ceiling:g} of them: make the shards again"
            )

    def close(self) -> None:
        """Let every shard go."""
        with self._lock:
            self._open.clear()

    def _bring(self, part: dict[str, Any], keep: Container[int] = (), waits: bool = True) -> Path:
        """A file of the set, pinned in the store."""
        give_up = time.monotonic() + (self._room_wait_s if waits else 0)
        while True:
            try:
                return self._store.fetch(part["file"], part["bytes"], part["xxh3_128"])
            except NoRoom:
                if not self._let_one_go(keep):
                    if time.monotonic() >= give_up:
                        raise
                    time.sleep(ROOM_POLL_S)

    def _let_one_go(self, keep: Container[int]) -> bool:
        """Whether a shard was still open that is not of `keep`."""
        with self._lock:
            shard = next((shard for shard in self._open if shard not in keep), None)
            let_go = None if shard is None else self._open.pop(shard)
        return let_go is not None

    def _fetch(self, shard: int, keep: Container[int], waits: bool) -> OpenShard:
        entry = self._entries[shard]
        pinned: list[str] = []
        try:
            paths = []
            for part in (entry, entry["index"]):
                paths.append(self._bring(part, keep, waits))
                pinned.append(part["file"])
            reader = ShardReader(paths[0], self._tokenizer, paths[1])
            opened = OpenShard(reader, self._verify(shard, reader), self._sources)
        except BaseException:
            _let_go(self._store, pinned)
            raise
        weakref.finalize(opened, _let_go, self._store, pinned).atexit = False
        return opened

    def _verify(self, shard: int, reader: ShardReader) -> frozenset[int]:
        """The damaged samples of a shard; found out once a run."""
        known = self._damaged.get(shard)
        if known is None:
            known = frozenset(reader.damaged().tolist())
            keys = [(self._entries[shard]["file"], reader.key(sample)) for sample in sorted(known)]
            with self._lock:
                self._damaged[shard] = known
                self.damaged += keys
        return known


def _let_go(store: Store, names: list[str]) -> None:
    for name in names:
        store.release(name)


@dataclass(frozen=True)
class ShardSet:
    """An opened set: its manifest, and its shards as they are needed."""

    location: str
    manifest: dict[str, Any]
    vocab_size: int
    tokenizer_hash: str
    tokenizer: str = field(repr=False, compare=False)  # its file
    generated: bool
    vector_size: int
    remote: bool
    cache_bytes: int | None  # what the cache may hold, where there is one
    readers: Readers = field(repr=False, compare=False)
    store: Store = field(repr=False, compare=False)
    length_counts: np.ndarray = field(repr=False, compare=False)  # int32 [M, 4]: shard, source, tokens, samples

    @classmethod
    def open(
        cls,
        location: str | Path,
        cache: CacheOptions | None = None,
        *,
        damage_ceiling: float = DAMAGE_CEILING,
    ) -> ShardSet:
        """Open a folder or URL; raises DataError when it is missing, foreign or damaged.

        Local tars and indexes are checked for their sizes now; checksums when a shard is first used. `cache`: where
        the files of a URL are kept.
        """
        remote = is_remote(str(location))
        cache = cache or CacheOptions()
        store = open_store(str(location), cache)
        manifest = parse_manifest(store.read(MANIFEST), f"{store.location}/{MANIFEST}")
        tokenizer = manifest["tokenizer"]
        tokenizer_file = _read_checked(store, tokenizer["file"], tokenizer["sha256"]).decode("utf-8")
        lengths = _read_checked(store, manifest["lengths"]["file"], manifest["lengths"]["sha256"])
        for entry in () if remote else manifest["shards"]:
            for part in (entry, entry["index"]):
                store.fetch(part["file"], part["bytes"], part["xxh3_128"])
                store.release(part["file"])
        readers = Readers(store, manifest, damage_ceiling, cache.room_wait_s)
        return cls(
            store.location,
            manifest,
            tokenizer["vocab_size"],
            tokenizer["sha256"],
            tokenizer_file,
            manifest["generated"],
            manifest["vector_size"],
            remote,
            cache.limit_bytes if remote else None,
            readers,
            store,
            _length_counts(lengths, manifest, store.location),
        )

    @property
    def source_names(self) -> tuple[str, ...]:
        """By the numbers that rows give their sources."""
        return tuple(source["name"] for source in self.manifest["sources"])

    @property
    def validated(self) -> tuple[Literal["pairs", "text"], ...]:
        """The modalities of which samples are held out."""
        held = {s["modality"] for s in self.manifest["shards"] if s["split"] == "validation" and s["samples"] > 0}
        return tuple(modality for modality in ("pairs", "text") if modality in held)

    @property
    def identity(self) -> str:
        """A hash of the manifest: equal sets have equal ones."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @property
    def shard_bytes(self) -> np.ndarray:
        """int64 [shards]: the bytes of each shard and its index."""
        return np.array([e["bytes"] + e["index"]["bytes"] for e in self.manifest["shards"]], np.int64)

    def samples(self, split: str, modality: str) -> int:
        """Samples of a modality in a split."""
        held = (s for s in self.manifest["shards"] if s["split"] == split and s["modality"] == modality)
        return sum(s["samples"] for s in held)

    def words(self, split: str) -> int:
        """Words of a split, "train" or "validation"."""
        return self.manifest["totals"][split]["words"]

    def corpus(self, split: str) -> Corpus:
        """The counts of a split."""
        sources = tuple((source["name"], source["modality"]) for source in self.manifest["sources"])
        number = {name: at for at, (name, _) in enumerate(sources)}
        entries = [
            (shard, number[name], part["samples"], part["words"], part["tokens"])
            for shard, entry in enumerate(self.manifest["shards"])
            if entry["split"] == split
            for name, part in sorted(entry["sources"].items())
        ]
        columns = np.array(entries, dtype=np.int64).reshape(-1, 5)
        code = np.full((len(self.manifest["shards"]), len(sources)), -1, np.int32)
        code[columns[:, 0], columns[:, 1]] = np.arange(len(columns))
        entry = code[self.length_counts[:, 0], self.length_counts[:, 1]]
        here = entry >= 0
        counts = np.stack([entry[here], self.length_counts[here, 2], self.length_counts[here, 3]], axis=1)
        shard, source, samples, words, tokens = columns.T
        return Corpus(
            sources, shard, source, samples, words, tokens, counts, lambda shard: self._lengths(shard, number)
        )

    def _lengths(self, shard: int, number: dict[str, int]) -> ShardLengths:
        columns = self.readers.columns(shard)
        names = [name.decode("utf-8", "replace") for name in columns["sources"].tolist()]
        offsets, words, source = (columns[name] for name in ("token_offsets", "words", "source"))
        entry = self.manifest["shards"][shard]
        if count_sources(names, source, np.diff(offsets), words) != entry["sources"]:
            raise DataError(
                f"index {entry['index']['file']} does not hold the samples, words and tokens that the manifest counts: "
                "make the shards again"
            )
        sources = np.array([number[name] for name in names], dtype=np.int64)[source]

        def words_before(samples: np.ndarray, counts: np.ndarray) -> np.ndarray:
            with self.readers.index(shard) as path:
                starts = load_columns(path, ["word_starts"])["word_starts"]
            before = np.concatenate([[0], np.cumsum(starts, dtype=np.int64)])
            return before[offsets[samples] + counts] - before[offsets[samples]]

        return ShardLengths(np.diff(offsets), words, sources, words_before)


def _read_checked(store: Store, name: str, sha256: str) -> bytes:
    """A small file of the set; raises DataError when it is not the manifest's."""
    data = store.read(name)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{store.location}/{name} is not the one of the manifest: make the shards again")
    return data


def _length_counts(data: bytes, manifest: dict[str, Any], location: str) -> np.ndarray:
    """int32 [M, 4] of the bytes of lengths.npy; raises DataError when they do not fit the manifest."""
    name = f"{location}/{manifest['lengths']['file']}"
    try:
        counts = np.load(io.BytesIO(data), allow_pickle=False)
    except UNREADABLE as error:
        raise DataError(f"{name} is damaged ({error}): make the shards again") from None
    shards = manifest["shards"]
    if counts.ndim != 2 or counts.shape[1] != 4 or counts.dtype != np.int32 or (counts < 0).any():
        raise DataError(f"{name} is not a table of lengths: make the shards again")
    if counts[:, 1].max(initial=0) >= len(manifest["sources"]):
        raise DataError(f"{name} counts a source that the manifest lacks: make the shards again")
    held = np.bincount(counts[:, 0], counts[:, 3], minlength=len(shards)).astype(np.int64)
    if held.tolist() != [entry["samples"] for entry in shards]:
        raise DataError(f"{name} does not count the samples that the manifest counts: make the shards again")
    return counts
