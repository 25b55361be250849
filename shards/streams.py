"""The samples that one key of a mix stands for, in the order of an epoch: shards, windows, batches.

An epoch permutes the shards of each partition, cuts them into windows, and permutes the samples inside a
window. Counts of rows (or positions) a window follow from the shards' counts alone, so any batch of an epoch is
found without going through those before it, and only the windows that a batch touches are ever opened.

Symbols: G rows of a global batch, C partitions (each gives G / C consecutive rows), W windows of a partition.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from shards.corpus import Corpus, RowPlan

HELD_EPOCHS, HELD_WINDOWS = 2, 6
COUNTS_AT_ONCE = 1 << 16  # so that memory does not grow with all of them
Key = TypeVar("Key")
Value = TypeVar("Value")
SHARD_ORDER, WINDOW_ORDER, BATCH_ORDER = range(3)  # tags of the random streams


@dataclass(frozen=True)
class Shape:
    """What batches look like: rows of a global batch, positions of a row, partitions, shards of a window."""

    global_batch: int
    row_tokens: int
    partitions: int = 1
    window_shards: int = 16

    def __post_init__(self) -> None:
        """Raises ValueError naming the number."""
        for name, least in (("global_batch", 1), ("row_tokens", 2), ("partitions", 1), ("window_shards", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.global_batch % self.partitions:
            raise ValueError(f"global_batch {self.global_batch} must be a multiple of partitions {self.partitions}")

    @property
    def share(self) -> int:
        """Rows of a global batch that come from one partition."""
        return self.global_batch // self.partitions


@dataclass(frozen=True)
class EpochKey:
    """Names an epoch: it decides every random draw."""

    seed: int
    phase: int
    epoch: int


class Held(Generic[Key, Value]):
    """The last few values made, by key."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> Value:
        self._values[key] = value
        if len(self._values) > self._limit:
            self._values.popitem(last=False)
        return value


class Stream(ABC):
    """Batches of the samples of some sources of one modality."""

    batches: int  # global batches of an epoch, the same for every epoch
    packed: bool

    def __init__(self, name: str, corpus: Corpus, shape: Shape) -> None:
        """`name`: "pairs", "text" or a source. Raises ValueError where partitions do not fit."""
        self.name, self._corpus, self._shape = name, corpus, shape
        self._numbers = corpus.chosen(name)
        self.modality = corpus.sources[int(self._numbers[0])][1]
        self.sources = [corpus.sources[i][0] for i in self._numbers.tolist()]
        self._entries = np.flatnonzero(np.isin(corpus.source, self._numbers))
        self.words = int(corpus.words[self._entries].sum())
        holding = np.unique(corpus.shard[self._entries])
        parts = corpus.partitions(self.modality, shape.partitions)
        self._parts = [part[np.isin(part, holding)] for part in parts]
        self._orders: Held[EpochKey, list[np.ndarray]] = Held(HELD_EPOCHS)
        self._windows = max(1, *(-(-len(part) // shape.window_shards) for part in self._parts))

    @abstractmethod
    def plan(self, key: EpochKey, number: int, first: int, count: int) -> RowPlan:
        """Rows first : first + count of global batch `number` of an epoch."""

    @abstractmethod
    def words_before(self, key: EpochKey, number: int) -> int:
        """The words that the first `number` batches of an epoch train; opens a few windows."""

    @abstractmethod
    def window_of(self, key: EpochKey, number: int, partition: int) -> int:
        """The window that a batch reads last."""

    def shards_of(self, key: EpochKey, partition: int, window: int) -> np.ndarray:
        """int64: the shards of a window of an epoch, none past the last."""
        size = self._shape.window_shards
        return self._shard_orders(key)[partition][window * size : (window + 1) * size]

    def window_bytes(self, shard_bytes: np.ndarray, partitions: int) -> int:
        """The most bytes that a window takes in so many partitions; shard_bytes int64 [shards]."""
        largest = [int(np.sort(shard_bytes[part])[-self._shape.window_shards :].sum()) for part in self._parts]
        return sum(sorted(largest)[-partitions:])

    def _shard_orders(self, key: EpochKey) -> list[np.ndarray]:
        """The shards of each partition in the epoch's order."""
        held = self._orders.get(key)
        if held is not None:
            return held
        return self._orders.put(key, [self._rng(key, SHARD_ORDER, c).permutation(p) for c, p in enumerate(self._parts)])

    def _rng(self, key: EpochKey, *tags: int) -> np.random.Generator:
        return np.random.default_rng([key.seed, key.phase, zlib.crc32(self.name.encode()), key.epoch, *tags])

    def rows_of_lengths(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(shards, row lengths, rows) int [_] each, from the counts of tokens alone; a part at a time."""
        wanted = np.zeros(len(self._corpus.source), np.bool_)
        wanted[self._entries] = True
        for low in range(0, len(self._corpus.counts), COUNTS_AT_ONCE):
            counts = self._corpus.counts[low : low + COUNTS_AT_ONCE]
            entry, tokens, samples = counts[wanted[counts[:, 0]]].T
            whole, rest = np.divmod(tokens + 1, self._shape.row_tokens)
            for lengths, rows in (
                (np.full_like(rest, self._shape.row_tokens), whole * samples.astype(np.int64)),
                (rest, samples),
            ):
                some = (lengths > 0) & (rows > 0)
                yield self._corpus.shard[entry[some]], lengths[some], rows[some]

    def _by_shard(self, values: np.ndarray) -> np.ndarray:
        """int64 [highest shard + 1]: a per-entry count summed over the stream's entries of each shard."""
        size = int(self._corpus.shard.max()) + 1
        sums = np.bincount(self._corpus.shard[self._entries], values[self._entries], minlength=size)
        return sums.astype(np.int64)

    def _cumulative(self, order: np.ndarray, per_shard: np.ndarray) -> np.ndarray:
        """int64 [W + 1, ...]: sums of `per_shard` over the windows before each, of shards in `order`."""
        size, sums = self._shape.window_shards, np.zeros((self._windows + 1, *per_shard.shape[1:]), np.int64)
        for window in range(-(-len(order) // size)):
            sums[window + 1] = per_shard[order[window * size : (window + 1) * size]].sum(axis=0)
        return np.cumsum(sums, axis=0, out=sums)

    def _samples(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample numbers, their positions) of the stream's samples in a shard, int64."""
        lengths = self._corpus.open(shard)
        mine = np.flatnonzero(np.isin(lengths.source, self._numbers))
        return mine, lengths.tokens[mine].astype(np.int64) + 1

    def _cut_words(self, shards: np.ndarray, samples: np.ndarray, upto: np.ndarray) -> np.ndarray:
        """int64: the words that begin in the first `upto` tokens of each sample; all of them past its end."""
        out = np.zeros(len(shards), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            lengths = self._corpus.open(shard)
            words = lengths.words[samples[here]].astype(np.int64)
            cut = np.flatnonzero(upto[here] < lengths.tokens[samples[here]])
            words[cut] = lengths.words_before(samples[here][cut], upto[here][cut])
            out[here] = words
        return out
