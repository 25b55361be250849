"""Captions packed whole: each row of a window holds several of one shard, cut only where longer than a row.

How many rows a shard gives follows from its counts of lengths alone, so any batch of an epoch is found without those
before it; which captions share a row is drawn anew each epoch.

Symbols: C partitions, W windows of a partition, T row_tokens, R rows of a window, X captions (pieces) of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.corpus import Corpus, RowPlan, chunk_rows
from shards.streams import HELD_EPOCHS, HELD_WINDOWS, WINDOW_ORDER, EpochKey, Held, Shape, Stream

Template = tuple[tuple[int, ...], int]  # the lengths of a row's captions, and how many rows are so


def pack_lengths(lengths: list[int], counts: list[int], width: int) -> list[Template]:
    """Rows of `width` positions that hold `counts[i]` captions of `lengths[i]`, each from 1 to `width`.

    Done on the histogram, so that its time grows with the distinct lengths (after Krell et al. 2021,
    arXiv 2107.02027): a row takes the longest caption that still fits, again and again, but none that leaves space
    which no caption fills; rows alike are made at once.
    """
    left = dict(zip(lengths, counts, strict=True))
    held = sum(1 << length for length, count in left.items() if count)  # bit n: captions of length n are left
    templates: list[Template] = []
    while held:
        row = _row(left, held, width)
        uses = {length: row.count(length) for length in row}
        rows = min(left[length] // used for length, used in uses.items())
        for length, used in uses.items():
            left[length] -= used * rows
            if not left[length]:
                held ^= 1 << length
        templates.append((tuple(row), rows))
    return templates


def _row(left: dict[int, int], held: int, space: int) -> list[int]:
    """The lengths of the next row, longest first; those of `left` that are not 0 are the bits of `held`."""
    row: list[int] = []
    while fitting := held & ((2 << space) - 1):
        shortest = (held & -held).bit_length() - 1
        longest = length = fitting.bit_length() - 1
        while not (space == length or held >> (space - length) & 1 or space - length >= 2 * shortest):
            fitting ^= 1 << length
            length = fitting.bit_length() - 1
            if length < 0:  # whichever is taken leaves space
                length = longest
                break
        row.append(length)
        space -= length
        if row.count(length) == left[length]:
            held ^= 1 << length
    return row


@dataclass(frozen=True)
class _Window:
    """The rows of a window in their order: row i holds spans offsets[i] : offsets[i + 1], each int64 [X]."""

    offsets: np.ndarray  # int64 [R + 1]
    shards: np.ndarray
    samples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class CaptionStream(Stream):
    """Rows of at most T positions; each partition fills its share of a global batch from its own rows in order."""

    packed = True

    def __init__(self, name: str, corpus: Corpus, shape: Shape) -> None:
        super().__init__(name, corpus, shape)
        rows = np.concatenate([np.stack(part, axis=1) for part in self.rows_of_lengths()])
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        shards, begins = np.unique(rows[:, 0], return_index=True)
        self._shard_rows = np.zeros(int(corpus.shard.max()) + 1, np.int64)
        self.slots = 1
        for shard, part in zip(shards.tolist(), np.split(rows[:, 1:], begins[1:]), strict=True):
            templates = _templates(part, shape.row_tokens)
            self._shard_rows[shard] = sum(count for _, count in templates)
            self.slots = max(self.slots, *(len(row) for row, _ in templates))
        self._held = np.array([int(self._shard_rows[part].sum()) for part in self._parts])
        self.batches = int(-(-self._held.max() // shape.share))
        self._epochs: Held[EpochKey, list[np.ndarray]] = Held(HELD_EPOCHS)
        self._made: Held[tuple[EpochKey, int, int], _Window] = Held(HELD_WINDOWS)

    def plan(self, key: EpochKey, number: int, first: int, count: int) -> RowPlan:
        share, width = self._shape.share, self._shape.row_tokens
        columns: list[np.ndarray] = [np.zeros((4, 0), np.int64)]
        counts: list[np.ndarray] = []
        for partition in range(first // share, -(-(first + count) // share)):
            low = max(first - partition * share, 0)
            high = min(first + count - partition * share, share)
            per_row, found = self._rows(key, partition, number * share + low, number * share + high)
            counts.append(np.pad(per_row, (0, high - low - len(per_row))))
            columns.append(found)
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        shards, samples, starts, lengths = np.concatenate(columns, axis=1)
        return RowPlan(
            self.modality, self.name, True, width, offsets, shards, samples, starts, lengths, slots=self.slots
        )

    def words_before(self, key: EpochKey, number: int) -> int:
        per_shard = self._by_shard(self._corpus.words)
        total = 0
        for c, before in enumerate(self._epoch(key)):
            upto = min(number * self._shape.share, int(self._held[c]))
            window = self._window_at(before, upto)
            total += int(self._cumulative(self._shard_orders(key)[c], per_shard)[window])
            made = self._window(key, c, window)
            here = slice(0, int(made.offsets[upto - int(before[window])]))
            spans = made.shards[here], made.samples[here]
            starts, ends = made.starts[here], made.starts[here] + made.lengths[here]
            total += int((self._cut_words(*spans, ends) - self._cut_words(*spans, starts)).sum())
        return total

    def window_of(self, key: EpochKey, number: int, partition: int) -> int:
        last = min((number + 1) * self._shape.share, int(self._held[partition])) - 1
        return self._window_at(self._epoch(key)[partition], last)

    def _rows(self, key: EpochKey, partition: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """(captions of each row, their (shard, sample, start, length) int64 [4, X]) of rows low : high."""
        before = self._epoch(key)[partition]
        high = min(high, int(self._held[partition]))
        counts, found = [np.zeros(0, np.int64)], [np.zeros((4, 0), np.int64)]
        while low < high:
            window = self._window_at(before, low)
            base, stop = int(before[window]), min(high, int(before[window + 1]))
            made = self._window(key, partition, window)
            offsets = made.offsets[low - base : stop - base + 1]
            here = slice(int(offsets[0]), int(offsets[-1]))
            counts.append(np.diff(offsets))
            found.append(np.stack([made.shards[here], made.samples[here], made.starts[here], made.lengths[here]]))
            low = stop
        return np.concatenate(counts), np.concatenate(found, axis=1)

    def _epoch(self, key: EpochKey) -> list[np.ndarray]:
        """int64 [W + 1] for each partition: the rows before each window."""
        held = self._epochs.get(key)
        if held is not None:
            return held
        return self._epochs.put(key, [self._cumulative(o, self._shard_rows) for o in self._shard_orders(key)])

    def _window_at(self, before: np.ndarray, row: int) -> int:
        return min(max(int(np.searchsorted(before, row, side="right")), 1), self._windows) - 1

    def _window(self, key: EpochKey, partition: int, window: int) -> _Window:
        held = self._made.get((key, partition, window))
        if held is not None:
            return held
        rng = self._rng(key, WINDOW_ORDER, partition, window)
        parts, per_row = [np.zeros((4, 0), np.int64)], [np.zeros(0, np.int64)]
        for shard in self.shards_of(key, partition, window).tolist():
            samples, positions = self._samples(shard)
            counts, columns = _fill(samples, positions, self._shape.row_tokens, rng)
            parts.append(np.concatenate([np.full((1, columns.shape[1]), shard), columns]))
            per_row.append(counts)
        columns, counts = np.concatenate(parts, axis=1), np.concatenate(per_row)
        mixed = rng.permutation(len(counts))
        begins = (np.cumsum(counts) - counts)[mixed]
        counts = counts[mixed]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        moved = columns[:, np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], counts)]
        return self._made.put((key, partition, window), _Window(offsets, *moved))


def _templates(rows: np.ndarray, width: int) -> list[Template]:
    """The rows of captions given as int64 [_, 2]: (length, how many)."""
    lengths, where = np.unique(rows[:, 0], return_inverse=True)
    counts = np.bincount(where, rows[:, 1]).astype(np.int64)
    return pack_lengths(lengths.tolist(), counts.tolist(), width)


def _fill(
    samples: np.ndarray, positions: np.ndarray, width: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(captions of each row, (sample, start, length) int64 [3, X]) of a shard, captions drawn by their lengths."""
    record, starts, lengths = chunk_rows(positions, width)
    templates = _templates(np.stack([lengths, np.ones_like(lengths)], axis=1), width)
    wanted = np.concatenate([np.tile(row, count) for row, count in templates])  # a length for each place
    counts = np.concatenate([np.full(count, len(row)) for row, count in templates])
    mixed = rng.permutation(len(record))
    chosen = np.empty(len(record), np.int64)
    chosen[np.argsort(wanted, kind="stable")] = mixed[np.argsort(lengths[mixed], kind="stable")]
    return counts, np.stack([samples[record[chosen]], starts[chosen], lengths[chosen]]).astype(np.int64)
