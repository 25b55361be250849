"""Records packed: laid end to end in the order of an epoch, and cut into rows.

Symbols: C partitions, W windows of a partition, R row_tokens, N samples of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.corpus import Corpus, RowPlan
from shards.streams import HELD_EPOCHS, HELD_WINDOWS, WINDOW_ORDER, EpochKey, Held, Shape, Stream


@dataclass(frozen=True)
class _Window:
    """The samples of a window in their order: each int64 [N]; ends: positions up to each one's end."""

    shards: np.ndarray
    samples: np.ndarray
    positions: np.ndarray
    ends: np.ndarray


class PackedStream(Stream):
    """Rows of R positions; each partition fills its share of a global batch from a tape of its own."""

    packed = True

    def __init__(self, name: str, corpus: Corpus, shape: Shape) -> None:
        super().__init__(name, corpus, shape)
        self._shard_positions = self._by_shard(corpus.tokens + corpus.samples)
        self._ends = np.array([int(self._shard_positions[part].sum()) for part in self._parts])
        self._step = shape.share * shape.row_tokens
        self.batches = int(-(-self._ends.max() // self._step))
        self._epochs: Held[EpochKey, list[np.ndarray]] = Held(HELD_EPOCHS)
        self._made: Held[tuple[EpochKey, int, int], _Window] = Held(HELD_WINDOWS)

    def plan(self, key: EpochKey, number: int, first: int, count: int) -> RowPlan:
        share, width = self._shape.share, self._shape.row_tokens
        spans: list[np.ndarray] = []
        offsets, filled = [np.zeros(1, np.int64)], 0
        for partition in range(first // share, -(-(first + count) // share)):
            rows = slice(max(first - partition * share, 0), min(first + count - partition * share, share))
            cuts = np.minimum(number * self._step + np.arange(rows.start, rows.stop + 1) * width, self._ends[partition])
            begins, found = self._spans(key, partition, int(cuts[0]), int(cuts[-1]))
            spans.append(found)
            offsets.append(filled + np.searchsorted(begins, cuts[1:], side="left"))
            filled += len(begins)
        shards, samples, starts, lengths = np.concatenate(spans, axis=1)
        longest = int(np.clip(self._ends - number * self._step, 0, width).max())
        row_offsets = np.concatenate(offsets)
        return RowPlan(self.modality, self.name, True, longest, row_offsets, shards, samples, starts, lengths)

    def words_before(self, key: EpochKey, number: int) -> int:
        per_shard = self._by_shard(self._corpus.words)
        total = 0
        for c, before in enumerate(self._epoch(key)):
            upto = min(number * self._step, int(self._ends[c]))
            window = self._window_at(before, upto)
            total += int(self._cumulative(self._shard_orders(key)[c], per_shard)[window])
            made, inside = self._window(key, c, window), upto - int(before[window])
            tokens = np.clip(inside - (made.ends - made.positions), 0, made.positions)
            begun = tokens > 0
            total += int(self._cut_words(made.shards[begun], made.samples[begun], tokens[begun]).sum())
        return total

    def window_of(self, key: EpochKey, number: int, partition: int) -> int:
        last = min((number + 1) * self._step, int(self._ends[partition])) - 1
        return self._window_at(self._epoch(key)[partition], last)

    def _spans(self, key: EpochKey, partition: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """(where on the tape each span begins, its (shard, sample, start, length) int64 [4, S]) of [low, high)."""
        width, before = self._shape.row_tokens, self._epoch(key)[partition]
        begins, spans = [np.zeros(0, np.int64)], [np.zeros((4, 0), np.int64)]
        while low < high:
            window = self._window_at(before, low)
            stop, base = min(high, int(before[window + 1])), int(before[window])
            made = self._window(key, partition, window)
            ends = made.ends + base
            inner = ends[np.searchsorted(ends, low, side="right") : np.searchsorted(ends, stop, side="left")]
            rows = np.arange(low + -low % width, stop, width)  # a row begins at every multiple of its width
            here = np.union1d(np.append(rows, inner), [low])
            at = np.searchsorted(ends, here, side="right")
            starts = here - (ends[at] - made.positions[at])
            lengths = np.diff(np.append(here, stop))
            begins.append(here)
            spans.append(np.stack([made.shards[at], made.samples[at], starts, lengths]))
            low = stop
        return np.concatenate(begins), np.concatenate(spans, axis=1)

    def _epoch(self, key: EpochKey) -> list[np.ndarray]:
        """int64 [W + 1] for each partition: the positions before each window."""
        held = self._epochs.get(key)
        if held is not None:
            return held
        return self._epochs.put(key, [self._cumulative(o, self._shard_positions) for o in self._shard_orders(key)])

    def _window_at(self, before: np.ndarray, position: int) -> int:
        return min(max(int(np.searchsorted(before, position, side="right")), 1), self._windows) - 1

    def _window(self, key: EpochKey, partition: int, window: int) -> _Window:
        held = self._made.get((key, partition, window))
        if held is not None:
            return held
        parts = []
        for shard in self.shards_of(key, partition, window).tolist():
            samples, positions = self._samples(shard)
            parts.append((np.full(len(samples), shard), samples, positions))
        empty = (np.zeros(0, np.int64),) * 3  # a partition that has fewer windows than others
        columns = [np.concatenate(column) for column in zip(empty, *parts, strict=True)]
        mixed = self._rng(key, WINDOW_ORDER, partition, window).permutation(len(columns[0]))
        shards, samples, positions = (column[mixed] for column in columns)
        return self._made.put((key, partition, window), _Window(shards, samples, positions, np.cumsum(positions)))
