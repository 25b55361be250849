"""Order + index -> micro-batches of numpy arrays, with a state of two integers.

Symbols: B rows of a micro-batch, T positions, V width of a vision vector, G rows of a global batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shards.dataset import ShardSet, Split
from shards.order import GlobalBatchPlan, Order, PhaseSpec, chunk_rows
from shards.record import DataError
from shards.rows import Rows, build_rows

__all__ = ["Loader", "LoaderState", "PhaseSpec", "Rows", "ShardSet", "ValidationSet"]

PHASE_SHIFT = 40


@dataclass(frozen=True)
class LoaderState:
    """Where training stands: the phase, and the optimizer step inside it."""

    phase: int
    position: int


class Loader:
    """The training rows of one rank, an optimizer step at a time."""

    def __init__(
        self,
        shards: ShardSet,
        phases: Sequence[PhaseSpec],
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        row_tokens: int,
        rank: int,
        world: int,
        state: LoaderState = LoaderState(0, 0),
        prefetch: int = 2,
    ) -> None:
        """Raises ValueError naming the numbers that do not fit."""
        if micro_batch < 1 or world < 1 or global_batch < 1 or global_batch % (micro_batch * world):
            raise ValueError(
                f"global_batch {global_batch} must be a multiple of micro_batch {micro_batch} x world {world}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
        self._split = Split(shards, "train")
        self._readers = shards.readers
        self.order = Order(self._split.lengths, phases, seed=seed, global_batch=global_batch, row_tokens=row_tokens)
        self._phases = len(phases)
        if not 0 <= state.phase <= self._phases or state.position < 0:
            raise ValueError(f"{state} lies outside of the {self._phases} phases")
        if state.phase < self._phases and state.position > self.order.steps(state.phase):
            raise ValueError(f"{state} lies past the phase's {self.order.steps(state.phase)} steps")
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._rank, self._world, self._state, self._prefetch = rank, world, state, prefetch
        self._wait_seconds = 0.0

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer waited for the last item."""
        return self._wait_seconds

    @property
    def damaged(self) -> list[tuple[str, str]]:
        """(shard, key) of the damaged samples met so far."""
        return list(self._readers.damaged)

    def step_rows(self, state: LoaderState) -> list[Rows]:
        """This rank's micro-batches of one optimizer step.

        Micro-batch k of rank r holds rows (k * world + r) * micro_batch onwards of the global batch.
        """
        plan = self.order.batch(state.phase, state.position)
        base = (state.phase << PHASE_SHIFT) | (state.position * self._global_batch)
        stride = self._world * self._micro_batch
        return [
            build_rows(self._split, plan, first + self._rank * self._micro_batch, self._micro_batch, base)
            for first in range(0, self._global_batch, stride)
        ]

    def _states(self) -> Iterator[LoaderState]:
        for phase in range(self._state.phase, self._phases):
            start = self._state.position if phase == self._state.phase else 0
            for position in range(start, self.order.steps(phase)):
                yield LoaderState(phase, position)

    def _produce(self, items: queue.Queue, stop: threading.Event) -> None:
        """The prefetch thread: puts (state, rows), then None; or the exception that ended it."""
        last: object = None
        try:
            for state in self._states():
                item = (state, self.step_rows(state))
                if not _put(items, item, stop):
                    return
        except BaseException as error:  # re-raised in the consumer, whatever it is
            last = error
        _put(items, last, stop)

    def __iter__(self) -> Iterator[tuple[LoaderState, list[Rows]]]:
        """Yield (the state before the step, this rank's micro-batches) for each step that is left."""
        items: queue.Queue = queue.Queue(maxsize=max(1, self._prefetch))
        stop = threading.Event()
        thread = threading.Thread(target=self._produce, args=(items, stop), name="prefetch", daemon=True)
        thread.start()
        try:
            while True:
                began = time.perf_counter()
                item = items.get()
                self._wait_seconds = time.perf_counter() - began
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()


def _put(items: queue.Queue, item: object, stop: threading.Event) -> bool:
    """Put unless the consumer is gone; False when it is."""
    while not stop.is_set():
        try:
            items.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


class ValidationSet:
    """Fixed rows of the validation split, one record a row (cut where longer), sorted by length."""

    def __init__(
        self,
        shards: ShardSet,
        *,
        modality: Literal["pairs", "text"],
        micro_batch: int,
        row_tokens: int,
        max_samples: int,
        rank: int,
        world: int,
    ) -> None:
        """Choose at most `max_samples` samples by the hash of their content; damaged ones are left out.

        Raises DataError when the split holds none of the modality, ValueError on numbers that do not fit.
        """
        for name, value in (("micro_batch", micro_batch), ("max_samples", max_samples), ("world", world)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if row_tokens < 2 or not 0 <= rank < world:
            raise ValueError(f"row_tokens must be >= 2 and 0 <= rank < world, got {row_tokens}, {rank}, {world}")
        self._split = Split(shards, "validation", modality)
        self._modality, self._micro_batch, self._rank, self._world = modality, micro_batch, rank, world
        whole = np.setdiff1d(np.arange(len(self._split)), self._split.damaged())
        if not len(whole):
            raise DataError(
                f"the validation split holds no {modality}: make the shards with a larger --validation-fraction"
            )
        rank_of = _mixed(self._split.column("crc32")[whole])
        chosen = np.sort(whole[np.lexsort((whole, rank_of))[:max_samples]])
        self._ids = self._split.column("image_id")
        positions = self._split.lengths.tokens[chosen].astype(np.int64) + 1
        by_length = np.argsort(positions, kind="stable")
        self._samples = chosen[by_length]
        record, starts, lengths = chunk_rows(positions[by_length], row_tokens)
        order = np.argsort(lengths, kind="stable")
        self._row_samples, self._starts, self._lengths = (
            self._samples[record][order],
            starts[order],
            lengths[order],
        )

    def __len__(self) -> int:
        """Micro-batches of this rank, the same number on every rank."""
        return -(-len(self._row_samples) // (self._micro_batch * self._world))

    @property
    def samples(self) -> int:
        """How many samples were chosen."""
        return len(self._samples)

    def batches(self, vision: Literal["right", "permuted"] = "right") -> Iterator[Rows]:
        """Yield this rank's micro-batches.

        vision "permuted": each caption gets the vector of another chosen sample, never one of the same
        image; image_ids stay the caption's own. Raises DataError when one image has more than half of the
        chosen samples, or for text.
        """
        partner = self._permutation() if vision == "permuted" else None
        group = self._micro_batch * self._world
        for start in range(0, len(self._row_samples), group):
            here = slice(start, start + group)
            lengths = self._lengths[here]
            offsets = np.minimum(np.arange(group + 1), len(lengths))
            plan = GlobalBatchPlan(
                self._modality,
                "validation",
                int(lengths.max()),
                offsets,
                self._row_samples[here],
                self._starts[here],
                lengths,
            )
            first = self._rank * self._micro_batch
            rows = build_rows(self._split, plan, first, self._micro_batch, start)
            if partner is not None:
                for row in np.flatnonzero(rows.valid).tolist():
                    other = partner[int(plan.samples[plan.row_offsets[first + row]])]
                    reader, local, _ = self._split.reader(other)
                    reader.copy_vector(local, rows.vision[row])
            yield rows

    def _permutation(self) -> dict[int, int]:
        """sample -> the sample whose vector it gets: sorted by image id, rotated by the largest group."""
        if self._modality != "pairs":
            raise DataError("permuted vision needs pairs: text has no vectors")
        ids = self._ids[self._samples]
        order = self._samples[np.argsort(ids, kind="stable")]
        most = int(np.unique(ids, return_counts=True)[1].max())
        if 2 * most > len(order):
            raise DataError(
                f"vision cannot be permuted: one image has {most} of the {len(order)} validation captions, more "
                "than half: use more validation samples"
            )
        return dict(zip(order.tolist(), np.roll(order, -most).tolist(), strict=True))


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64: a fixed hash (splitmix64) of each value."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
