"""What order knows of the data: counts of every shard, and the lengths inside a shard once it is asked for.

A record of n tokens has L = n + 1 *positions*: inputs [bos, t1..tn], targets [t1..tn, eos]. A *span* is a
run of positions of one record; a *row* is one sequence of the batch, made of spans.

Symbols: E (shard, source) pairs, M distinct (shard, source, tokens), N samples of a shard, S spans of a plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

PAIRS, TEXT = "pairs", "text"
MODALITIES = (PAIRS, TEXT)


@dataclass(frozen=True)
class ShardLengths:
    """The samples of one shard: tokens, words and source (into `Corpus.sources`), each int [N].

    words_before(samples, counts): int64, the words that begin in the first `counts` tokens of `samples`.
    """

    tokens: np.ndarray
    words: np.ndarray
    source: np.ndarray
    words_before: Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Corpus:
    """The counts of a split. Memory grows with the shards, not with their samples.

    sources: (name, modality) each. Entry e tells of the samples of source[e] in shard[e]: samples, words and
    tokens, int64 [E]. counts int32 [M, 3]: (entry, tokens of a sample, samples of that many). `open` reads a shard.
    """

    sources: tuple[tuple[str, str], ...]
    shard: np.ndarray
    source: np.ndarray
    samples: np.ndarray
    words: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    open: Callable[[int], ShardLengths]

    def chosen(self, name: str) -> np.ndarray:
        """int64: the numbers of the sources that `name` stands for: "pairs", "text" or a source's own name."""
        fits = [i for i, (source, modality) in enumerate(self.sources) if name in (source, modality)]
        return np.array(fits, dtype=np.int64)

    def partitions(self, modality: str, count: int) -> list[np.ndarray]:
        """The shards of a modality in `count` parts of nearly equal positions, each sorted.

        Raises ValueError when there are fewer shards than parts.
        """
        kinds = np.array([kind == modality for _, kind in self.sources], dtype=np.bool_)
        here = kinds[self.source]
        shards, entry = np.unique(self.shard[here], return_inverse=True)
        if len(shards) < count:
            raise ValueError(
                f"partitions {count} need at least as many shards of {modality}, but there are {len(shards)}: "
                "convert with fewer --samples-per-shard or lower data.partitions"
            )
        if count == 1:
            return [shards]
        positions = np.bincount(entry, (self.tokens + self.samples)[here], minlength=len(shards))
        loads = [(0.0, part) for part in range(count)]
        parts: list[list[int]] = [[] for _ in range(count)]
        for at in np.argsort(-positions, kind="stable").tolist():
            load, part = heapq.heappop(loads)
            parts[part].append(int(shards[at]))
            heapq.heappush(loads, (load + float(positions[at]), part))
        return [np.array(sorted(part), dtype=np.int64) for part in parts]


@dataclass(frozen=True)
class RowPlan:
    """Rows of one global batch: row i holds spans row_offsets[i] : row_offsets[i + 1]; one without is masked.

    Each span int64 [S]: shards, samples (within the shard), starts (first position), lengths (positions).
    row_tokens is the longest row that the global batch may hold, so that shapes do not depend on the world.
    packed: a row may hold several records. slots: how many captions a row of the stream holds at most (pairs).
    """

    modality: str
    stream: str
    packed: bool
    row_tokens: int
    row_offsets: np.ndarray
    shards: np.ndarray
    samples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    slots: int = 1


def joined(plans: Sequence[RowPlan]) -> RowPlan:
    """The rows of plans of one global batch, one after the other."""
    first, *others = plans
    if not others:
        return first
    spans = {
        name: np.concatenate([getattr(plan, name) for plan in plans])
        for name in ("shards", "samples", "starts", "lengths")
    }
    per_row = np.concatenate([np.diff(plan.row_offsets) for plan in plans])
    return replace(first, row_offsets=np.concatenate([[0], np.cumsum(per_row)]), **spans)


def chunk_rows(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut records of `lengths` positions into rows: (record, start, length), int64, in record order."""
    pieces = -(-lengths // row_tokens)
    record = np.repeat(np.arange(len(lengths)), pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = (np.arange(len(record)) - first) * row_tokens
    return record, start, np.minimum(lengths[record] - start, row_tokens)
