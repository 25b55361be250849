"""Captions in length buckets: full batches within a bucket, and what the buckets have left laid end to end.

Symbols: G rows of a global batch, C partitions, W windows of a partition, K length buckets, n batches of a window.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from shards.corpus import Corpus, RowPlan, chunk_rows
from shards.streams import BATCH_ORDER, HELD_EPOCHS, HELD_WINDOWS, WINDOW_ORDER, EpochKey, Held, Shape, Stream

MANY_BUCKETS = 32  # buckets are cut about so fine where their batches span windows anyway
_NONE = np.zeros(1, np.int64)
_NO = np.zeros(0, np.int64)
_Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # shards, samples, starts, lengths of rows


@dataclass(frozen=True)
class _Window:
    """The rows of a window, bucket after bucket: each int64 [rows]; begins int64 [K]: a bucket's first row."""

    shards: np.ndarray
    samples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    begins: np.ndarray


@dataclass(frozen=True)
class _BucketEpoch:
    """before int64 [C, W + 1, K]: a partition's rows of a bucket before a window. ready int64 [W + 1, K]: the full
    batches of a bucket that all partitions have before a window. begins int64 [W + 1]: batches before a window."""

    before: np.ndarray
    ready: np.ndarray
    begins: np.ndarray


def length_buckets(rows: np.ndarray, least: int) -> np.ndarray:
    """int64 [longest + 1]: the bucket of each length, of int64 [longest + 1] how many rows have it.

    Adjacent lengths are merged until a bucket holds `least` rows; what is left over joins the last bucket.
    """
    bucket_of = np.zeros(len(rows), dtype=np.int64)
    bucket, held = 0, 0
    for length, count in enumerate(rows.tolist()):
        bucket_of[length] = bucket
        held += count
        if held >= least:
            bucket, held = bucket + 1, 0
    if held < least and bucket > 0:
        bucket_of[bucket_of == bucket] = bucket - 1
    return bucket_of


class BucketStream(Stream):
    """Captions, one a row (pieces where longer than a row), in batches of nearly equal length.

    The rows of a bucket, window after window, are cut into full batches; a batch is trained in the window that
    completes it. What the buckets have left at the end of the epoch is laid end to end, short rows first.
    """

    packed = False

    def __init__(self, name: str, corpus: Corpus, shape: Shape) -> None:
        super().__init__(name, corpus, shape)
        total = np.zeros(shape.row_tokens + 1, np.int64)
        for _, lengths, rows in self.rows_of_lengths():
            np.add.at(total, lengths, rows)
        filled = shape.global_batch * self._windows  # a batch of each bucket in every window
        self._bucket_of = length_buckets(total, max(shape.global_batch, min(filled, int(total.sum()) // MANY_BUCKETS)))
        self._buckets = int(self._bucket_of.max()) + 1
        present = np.flatnonzero(total)
        self._longest = np.zeros(self._buckets, dtype=np.int64)
        np.maximum.at(self._longest, self._bucket_of[present], present)
        self._shard_rows = np.zeros((int(corpus.shard.max()) + 1, self._buckets), np.int32)
        for shards, lengths, rows in self.rows_of_lengths():
            np.add.at(self._shard_rows, (shards, self._bucket_of[lengths]), rows)
        held = np.array([self._shard_rows[part].sum(axis=0, dtype=np.int64) for part in self._parts])
        self._full = (held // shape.share).min(axis=0)
        self._left = np.cumsum(held - self._full * shape.share, axis=1)  # int64 [C, K]
        self._full_batches = int(self._full.sum())
        self.batches = self._full_batches + int(-(-self._left[:, -1].max() // shape.share))
        self._epochs: Held[EpochKey, _BucketEpoch] = Held(HELD_EPOCHS)
        self._made: Held[tuple[EpochKey, int, int], _Window] = Held(HELD_WINDOWS)
        self._mixed: Held[tuple[EpochKey, int], tuple[np.ndarray, np.ndarray]] = Held(HELD_WINDOWS)
        self._words: Held[tuple[EpochKey, int], np.ndarray] = Held(HELD_WINDOWS)

    def plan(self, key: EpochKey, number: int, first: int, count: int) -> RowPlan:
        epoch = self._epoch(key)
        window = self._window_at(epoch, number)
        batch = number - int(epoch.begins[window])
        bucket, nth = (int(values[batch]) for values in self._batches(key, window))
        columns, held = [], []
        for low, high in self._by_partition(first, first + count):
            found = self._rows(key, bucket, nth, low, high)
            columns += found
            filled = sum(len(part[0]) for part in found)
            held.append(np.minimum(np.arange(1, high - low + 1), filled))
        for before, after in itertools.pairwise(range(len(held))):
            held[after] += held[before][-1]
        longest = int(self._longest[bucket]) if bucket < self._buckets else self._longest_left(nth)
        offsets = np.concatenate([_NONE, *held])
        rows = columns[0] if len(columns) == 1 else [np.concatenate(c) for c in zip(*columns, strict=True)] or [_NO] * 4
        shards, samples, starts, lengths = rows
        return RowPlan(self.modality, self.name, False, longest, offsets, shards, samples, starts, lengths)

    def words_before(self, key: EpochKey, number: int) -> int:
        epoch = self._epoch(key)
        window = self._window_at(epoch, number)
        words = self._words.get((key, window))
        if words is None:
            words = self._words.put((key, window), self._window_words(key, window))
        return int(words[number - int(epoch.begins[window])])

    def _window_words(self, key: EpochKey, window: int) -> np.ndarray:
        """int64 [n + 1]: the words that the epoch trains before each batch of a window, and after its last."""
        epoch, share = self._epoch(key), self._shape.share
        per_shard = self._by_shard(self._corpus.words)
        total = 0
        for c, order in enumerate(self._shard_orders(key)):
            total += int(self._cumulative(order, per_shard)[window])
            for bucket in range(self._buckets):  # rows that wait for a later batch to be full
                waiting = int(epoch.ready[window, bucket]) * share, int(epoch.before[c, window, bucket])
                total -= self._words_of(self._run(key, c, bucket, *waiting))
        words = np.zeros(len(self._batches(key, window)[0]), np.int64)
        for batch, (bucket, nth) in enumerate(zip(*(v.tolist() for v in self._batches(key, window)), strict=True)):
            for low, high in self._by_partition(0, self._shape.global_batch):
                words[batch] += self._words_of(self._rows(key, bucket, nth, low, high))
        return total + np.concatenate([_NONE, np.cumsum(words)])

    def window_of(self, key: EpochKey, number: int, partition: int) -> int:
        return self._window_at(self._epoch(key), number)

    def _epoch(self, key: EpochKey) -> _BucketEpoch:
        held = self._epochs.get(key)
        if held is not None:
            return held
        before = np.stack([self._cumulative(order, self._shard_rows) for order in self._shard_orders(key)])
        ready = np.minimum((before // self._shape.share).min(axis=0), self._full)
        begins = ready.sum(axis=1)
        begins[-1] = self.batches  # what is left over is trained in the last window
        return self._epochs.put(key, _BucketEpoch(before, ready, begins))

    def _window_at(self, epoch: _BucketEpoch, number: int) -> int:
        return min(int(np.searchsorted(epoch.begins, number, side="right")), self._windows) - 1

    def _batches(self, key: EpochKey, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, how many batches of it came before), int64 [n] each; bucket K is what is left over."""
        held = self._mixed.get((key, window))
        if held is not None:
            return held
        epoch = self._epoch(key)
        low, counts = epoch.ready[window], epoch.ready[window + 1] - epoch.ready[window]
        if window == self._windows - 1:
            low, counts = np.append(low, 0), np.append(counts, self.batches - self._full_batches)
        bucket = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(bucket)) - np.repeat(np.cumsum(counts) - counts - low, counts)
        mixed = self._rng(key, BATCH_ORDER, window).permutation(len(bucket))
        return self._mixed.put((key, window), (bucket[mixed], nth[mixed]))

    def _by_partition(self, first: int, stop: int) -> list[tuple[int, int]]:
        """The rows first : stop of a batch, cut where a partition's share ends."""
        share = self._shape.share
        cuts = [first, *range((first // share + 1) * share, stop, share), stop]
        return list(itertools.pairwise(cuts))

    def _rows(self, key: EpochKey, bucket: int, nth: int, first: int, stop: int) -> list[_Columns]:
        """Rows first : stop of a batch, all of one partition; fewer where the epoch has no more."""
        share = self._shape.share
        partition = first // share
        low, high = (position - partition * share + nth * share for position in (first, stop))
        if bucket < self._buckets:
            return self._run(key, partition, bucket, low, high)
        begins = np.concatenate([_NONE, self._left[partition]])
        found: list[_Columns] = []
        for b in range(self._buckets):  # short rows first
            start, end = max(low, int(begins[b])), min(high, int(begins[b + 1]))
            shift = int(self._full[b]) * share - int(begins[b])
            found += self._run(key, partition, b, start + shift, end + shift)
        return found

    def _run(self, key: EpochKey, partition: int, bucket: int, low: int, high: int) -> list[_Columns]:
        """Rows low : high of a partition's bucket, (shards, samples, starts, lengths) of each window they lie in."""
        found: list[_Columns] = []
        before = self._epoch(key).before[partition, :, bucket]
        while low < high:
            window = int(np.searchsorted(before, low, side="right")) - 1
            stop, base = min(high, int(before[window + 1])), int(before[window])
            made = self._window(key, partition, window)
            begin = int(made.begins[bucket]) - base
            here = slice(begin + low, begin + stop)
            found.append((made.shards[here], made.samples[here], made.starts[here], made.lengths[here]))
            low = stop
        return found

    def _longest_left(self, nth: int) -> int:
        """The longest row that the nth batch of what is left over may hold, in any partition."""
        low = nth * self._shape.share
        last = np.minimum(low + self._shape.share, self._left[:, -1]) - 1
        bucket = (self._left <= last[:, None]).sum(axis=1)
        return int(self._longest[bucket[last >= low]].max())

    def _window(self, key: EpochKey, partition: int, window: int) -> _Window:
        held = self._made.get((key, partition, window))
        if held is not None:
            return held
        parts = []
        for shard in self.shards_of(key, partition, window).tolist():
            samples, positions = self._samples(shard)
            record, starts, lengths = chunk_rows(positions, self._shape.row_tokens)
            parts.append((np.full(len(record), shard), samples[record], starts, lengths))
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        mixed = self._rng(key, WINDOW_ORDER, partition, window).permutation(len(columns[0]))
        buckets = self._bucket_of[columns[3][mixed]]
        mixed = mixed[np.argsort(buckets, kind="stable")]
        counts = np.bincount(buckets, minlength=self._buckets)
        rows = [column[mixed].astype(np.int64) for column in columns]
        made = _Window(rows[0], rows[1], rows[2], rows[3], np.cumsum(counts) - counts)
        return self._made.put((key, partition, window), made)

    def _words_of(self, rows: list[_Columns]) -> int:
        """The words that begin in rows."""
        total = 0
        for shards, samples, starts, lengths in rows:
            words = self._cut_words(shards, samples, starts + lengths) - self._cut_words(shards, samples, starts)
            total += int(words.sum())
        return total
