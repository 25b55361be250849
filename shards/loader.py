"""Order + index -> micro-batches of numpy arrays, with a state of two integers.

Symbols: B rows of a micro-batch, T positions, V width of a vision vector, G rows of a global batch.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shards.corpus import PAIRS, RowPlan, chunk_rows, joined
from shards.dataset import Readers, ShardSet
from shards.index import ShardReader
from shards.order import Order, PhaseSpec
from shards.record import DataError
from shards.rows import Rows, build_rows
from shards.store import CacheOptions
from shards.streams import Shape

__all__ = ["CacheOptions", "Loader", "LoaderState", "PhaseSpec", "Rows", "Shape", "ShardSet", "ValidationSet"]

PHASE_SHIFT = 40
STOP_WAIT_S = 10.0
DOWNLOADS = 4  # at a time; verifying holds the interpreter, so one thread does where nothing is downloaded
CANDIDATES = 4  # validation samples are chosen among so many times their number
GOOD_WINDOWS = 3  # in the cache: the one that is read, the one before, in which rows waited, and the one after
HELD_WINDOWS = 4  # the one that is read, the one after, and those that rows waited in


@dataclass(frozen=True)
class LoaderState:
    """Where training stands: the phase, and the optimizer step inside it."""

    phase: int
    position: int


@dataclass(frozen=True)
class RankSlice:
    """A rank's share of a global batch, by micro-batches.

    Without partitions micro-batch k of rank r holds rows (k * world + r) * micro_batch onwards, so that neighbouring
    ranks hold neighbouring rows. With partitions a rank's rows are one run, so that they come from its node's shards.
    """

    rank: int
    world: int
    micro_batch: int

    def runs(self, shape: Shape) -> list[tuple[int, int]]:
        """(first row, rows) of each run of neighbouring rows. Raises ValueError naming the numbers that do not fit."""
        together = self.micro_batch * self.world
        if self.micro_batch < 1 or self.world < 1 or shape.global_batch % together:
            raise ValueError(
                f"global_batch {shape.global_batch} must be a multiple of micro_batch {self.micro_batch} x "
                f"world {self.world}"
            )
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank must be from 0 to {self.world - 1}, got {self.rank}")
        if shape.partitions == 1 and self.world > 1:
            firsts = range(self.rank * self.micro_batch, shape.global_batch, together)
            return [(first, self.micro_batch) for first in firsts]
        share = shape.global_batch // self.world
        return [(self.rank * share, share)]


class Ahead:
    """Daemon threads that open shards before they are needed; what fails is tried again by who needs it.

    They let shards go only where those are not wanted, so that a cache too small for the next windows keeps what is
    read now.
    """

    def __init__(self, readers: Readers, threads: int) -> None:
        self._readers = readers
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._asked: frozenset[int] = frozenset()
        self._opened: set[int] = set()
        self._threads = [threading.Thread(target=self._open, name="ahead", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def want(self, shards: list[int]) -> None:
        """Ask for the shards of the windows that are read now and next."""
        asked = frozenset(shards)
        if asked != self._asked:
            self._asked = asked
            self._opened &= asked
            for shard in dict.fromkeys(shards):
                if shard not in self._opened:
                    self._wanted.put(shard)

    def close(self) -> None:
        """Let the threads end after the shard they are at."""
        self._asked = frozenset()
        for _ in self._threads:
            self._wanted.put(None)

    def _open(self) -> None:
        while (shard := self._wanted.get()) is not None:
            asked = self._asked
            if shard in asked:
                with contextlib.suppress(DataError):
                    self._readers.get(shard, keep=asked, waits=False)
                    self._opened.add(shard)


def check_cache(shards: ShardSet, order: Order, partitions: int) -> None:
    """Raises ValueError where the cache cannot hold the windows that a node reads `partitions` of at a time.

    A smaller one would download every shard anew at nearly every step.
    """
    if shards.cache_bytes is None:
        return
    needed = max(order.window_bytes(shards.shard_bytes, partitions), int(shards.shard_bytes.max(initial=0)))
    if needed > shards.cache_bytes:
        raise ValueError(
            f"data.cache_gib {_gib(shards.cache_bytes)} is too small: the windows of data.window_shards "
            f"{order.shape.window_shards} shards that are read at a time take {_gib(needed)}: give "
            f"{_gib(GOOD_WINDOWS * needed)}, or lower data.window_shards"
        )


def _gib(size: int) -> str:
    """Bytes in GiB, rounded up."""
    return f"{math.ceil(size / 2**30 * 1e6) / 1e6:g}"


class Loader:
    """The training rows of one rank, an optimizer step at a time."""

    def __init__(
        self,
        shards: ShardSet,
        phases: Sequence[PhaseSpec],
        *,
        seed: int,
        shape: Shape,
        micro_batch: int,
        rank: int,
        world: int,
        state: LoaderState = LoaderState(0, 0),
        prefetch: int = 2,
        pack_captions: bool = False,
        node_ranks: int = 1,
    ) -> None:
        """node_ranks: ranks that share the cache. Raises ValueError naming the numbers that do not fit."""
        self._runs = RankSlice(rank, world, micro_batch).runs(shape)
        self._micro_batch, self._prefetch, self._state = micro_batch, prefetch, state
        self._readers, self._remote = shards.readers, shards.remote
        self.order = Order(shards.corpus("train"), phases, seed=seed, shape=shape, pack_captions=pack_captions)
        self._phases = len(phases)
        if not 0 <= state.phase <= self._phases or state.position < 0:
            raise ValueError(f"{state} lies outside of the {self._phases} phases")
        if state.phase < self._phases and state.position > self.order.steps(state.phase):
            raise ValueError(f"{state} lies past the phase's {self.order.steps(state.phase)} steps")
        check_cache(shards, self.order, -(-shape.partitions * min(node_ranks, world) // world))
        own = -(-shape.partitions // world)  # the partitions that this rank reads
        self._readers.keep(HELD_WINDOWS * shape.window_shards * own * max(len(p.mix) for p in phases))
        self._wait_seconds = 0.0

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer waited for the last item."""
        return self._wait_seconds

    @property
    def damaged(self) -> list[tuple[str, str]]:
        """(shard, key) of the damaged samples in the shards opened so far."""
        return list(self._readers.damaged)

    def step_rows(self, state: LoaderState) -> list[Rows]:
        """This rank's micro-batches of one optimizer step. Raises DataError where data is missing or too damaged."""
        base = (state.phase << PHASE_SHIFT) | (state.position * self.order.shape.global_batch)
        runs = [self.order.plan(state.phase, state.position, first, count) for first, count in self._runs]
        positions = np.concatenate([np.arange(base + first, base + first + count) for first, count in self._runs])
        rows = build_rows(self._readers.get, joined(runs), positions)
        self._readers.check_damage()
        return rows.split(self._micro_batch)

    def _states(self) -> Iterator[LoaderState]:
        for phase in range(self._state.phase, self._phases):
            start = self._state.position if phase == self._state.phase else 0
            for position in range(start, self.order.steps(phase)):
                yield LoaderState(phase, position)

    def _produce(self, items: queue.Queue, stop: threading.Event, ahead: Ahead) -> None:
        """The prefetch thread: puts (state, rows), then None; or the exception that ended it."""
        last: object = None
        first, count = self._runs[0][0], sum(self._runs[-1]) - self._runs[0][0]
        try:
            for state in self._states():
                ahead.want(self.order.ahead(state.phase, state.position, first, count))
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
        ahead = Ahead(self._readers, DOWNLOADS if self._remote else 1)
        thread = threading.Thread(target=self._produce, args=(items, stop, ahead), name="prefetch", daemon=True)
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
            ahead.close()
            thread.join(STOP_WAIT_S)  # a download that hangs is left to its time limit


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
        even: Literal["rows", "positions"] = "rows",
    ) -> None:
        """Choose at most `max_samples` samples by the hash of their content; damaged ones are left out.

        even: what the ranks share evenly. "rows": `micro_batch` rows each. "positions", for passes whose slowest rank
        the others wait for: of every micro_batch x world rows, runs of which the largest (rows x longest row) is as
        small as can be; a rank then has any number of rows, or a masked one where it has none.

        Raises DataError when the split holds none of the modality, ValueError on numbers that do not fit.
        """
        for name, value in (("micro_batch", micro_batch), ("max_samples", max_samples), ("world", world)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if row_tokens < 2 or not 0 <= rank < world:
            raise ValueError(f"row_tokens must be >= 2 and 0 <= rank < world, got {row_tokens}, {rank}, {world}")
        if even not in ("rows", "positions"):
            raise ValueError(f'even must be "rows" or "positions", got {even!r}')
        self._readers, self._modality = shards.readers, modality
        self._micro_batch, self._rank, self._world, self._even = micro_batch, rank, world, even
        candidates = _candidates(shards, modality, CANDIDATES * max_samples)
        if not len(candidates.shard):
            raise DataError(
                f"the validation split holds no {modality}: make the shards with a larger --validation-fraction"
            )
        by_hash = np.lexsort((candidates.sample, candidates.shard, _mixed(candidates.crc32)))[:max_samples]
        by_place = by_hash[np.lexsort((candidates.sample[by_hash], candidates.shard[by_hash]))]
        by_length = by_place[np.argsort(candidates.positions[by_place], kind="stable")]
        self._chosen = candidates.take(by_length)
        record, starts, lengths = chunk_rows(self._chosen.positions, row_tokens)
        order = np.argsort(lengths, kind="stable")
        self._record, self._starts, self._lengths = record[order], starts[order], lengths[order]

    def __len__(self) -> int:
        """Micro-batches of this rank, the same number on every rank."""
        return -(-len(self._record) // (self._micro_batch * self._world))

    @property
    def rows(self) -> int:
        """How many rows they are, of all ranks."""
        return len(self._record)

    @property
    def samples(self) -> int:
        """How many samples were chosen."""
        return len(self._chosen.shard)

    @property
    def sample_of_row(self) -> np.ndarray:
        """int64 [rows]: the number of each row's sample among the chosen; a long one has several rows."""
        return self._record

    @property
    def image_ids(self) -> np.ndarray:
        """int64 [samples]: the image of each chosen sample, 0 where none."""
        return self._chosen.image_id

    @property
    def is_permutable(self) -> bool:
        """Whether each caption can get the vector of another image: none has more than half of the chosen samples."""
        return self._modality == PAIRS and 2 * self._most_of_an_image <= self.samples

    @property
    def _most_of_an_image(self) -> int:
        return int(np.unique(self._chosen.image_id, return_counts=True)[1].max())

    def text(self, chosen: int) -> str:
        """The text of a chosen sample."""
        return self._reader(chosen).text(int(self._chosen.sample[chosen]))

    def tokens(self, chosen: int) -> np.ndarray:
        """The tokens of a chosen sample, without specials."""
        return self._reader(chosen).sample_tokens(int(self._chosen.sample[chosen]))

    def vector(self, chosen: int) -> np.ndarray | None:
        """The vector of a chosen sample, float32 [V]; None where it has none."""
        return self._reader(chosen).vector(int(self._chosen.sample[chosen]))

    def _reader(self, chosen: int) -> ShardReader:
        return self._readers.get(int(self._chosen.shard[chosen])).reader

    def batches(self, vision: Literal["right", "permuted"] = "right") -> Iterator[Rows]:
        """Yield this rank's micro-batches.

        vision "permuted": each caption gets the vector of another chosen sample, never one of the same
        image; image_ids stay the caption's own. Raises DataError when one image has more than half of the
        chosen samples, or for text.
        """
        partner = self._permutation() if vision == "permuted" else None
        group = self._micro_batch * self._world
        for start in range(0, len(self._record), group):
            here, size = self._own_of(start)
            longest = int(self._lengths[here].max(initial=1))  # of its own rows: with even rows the same in any world
            record = self._record[here]
            offsets = np.minimum(np.arange(size + 1), len(record))
            columns = (self._chosen.shard[record], self._chosen.sample[record], self._starts[here], self._lengths[here])
            plan = RowPlan(self._modality, "validation", False, longest, offsets, *columns)
            rows = build_rows(self._readers.get, plan, np.arange(here.start, here.start + size))
            if partner is not None:
                for row in np.flatnonzero(rows.valid).tolist():
                    other = int(partner[record[row]])
                    rows.vision[row] = self.vector(other)
            yield rows

    def _own_of(self, start: int) -> tuple[slice, int]:
        """(this rank's part of the micro-batches of all ranks that begin at row `start`, rows of its micro-batch)"""
        if self._even == "rows":
            first = start + self._rank * self._micro_batch
            return slice(first, first + self._micro_batch), self._micro_batch
        ends = [0, *even_ends(self._lengths[start : start + self._micro_batch * self._world], self._world)]
        first, last = start + ends[self._rank], start + ends[self._rank + 1]
        return slice(first, last), max(1, last - first)  # a pass on every rank, also where there is no row

    def _permutation(self) -> np.ndarray:
        """int64: for each chosen sample the one whose vector it gets: by image id, rotated by the largest group."""
        if self._modality != PAIRS:
            raise DataError("permuted vision needs pairs: text has no vectors")
        order, most = np.argsort(self._chosen.image_id, kind="stable"), self._most_of_an_image
        if not self.is_permutable:
            raise DataError(
                f"vision cannot be permuted: one image has {most} of the {len(order)} validation captions, more "
                "than half: use more validation samples"
            )
        partner = np.empty_like(order)
        partner[order] = np.roll(order, -most)
        return partner


def even_ends(lengths: np.ndarray, parts: int) -> list[int]:
    """Where each of `parts` runs of rows ends, the largest run as small as can be: its rows times its longest one.

    lengths: int64 [n], n > 0, rising. The last runs may be empty.
    """

    def ends_within(most: int) -> list[int]:
        ends, begin = list[int](), 0
        for end, length in enumerate(lengths.tolist()):
            if (end + 1 - begin) * length > most:
                ends.append(end)
                begin = end
        return [*ends, len(lengths)]

    sizes = range(int(lengths[-1]), len(lengths) * int(lengths[-1]) + 1)
    ends = ends_within(sizes[bisect_left(sizes, True, key=lambda most: len(ends_within(most)) <= parts)])
    return ends + [len(lengths)] * (parts - len(ends))


@dataclass(frozen=True)
class _Samples:
    """Samples by shard and number in it, with their positions, content hash and image, each [n]."""

    shard: np.ndarray
    sample: np.ndarray
    positions: np.ndarray
    crc32: np.ndarray
    image_id: np.ndarray

    def take(self, which: np.ndarray) -> _Samples:
        return _Samples(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


def _candidates(shards: ShardSet, modality: str, enough: int) -> _Samples:
    """Whole samples of validation shards in a fixed mixed order, until there are `enough`: not every shard is read."""
    entries = shards.manifest["shards"]
    fits = [i for i, e in enumerate(entries) if e["split"] == "validation" and e["modality"] == modality]
    parts: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int64),) * 5]
    held = 0
    for at in np.argsort(_mixed(np.array(fits, np.uint64)), kind="stable").tolist():
        if held >= enough:
            break
        part = _whole_samples(shards.readers, fits[at])
        parts.append(part)
        held += len(part[0])
    shards.readers.check_damage()
    return _Samples(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _whole_samples(readers: Readers, shard: int) -> tuple[np.ndarray, ...]:
    """(shard, sample, positions, crc32, image id) of the samples of a shard that are not damaged, each [n]."""
    opened = readers.get(shard)
    columns = opened.reader.columns
    whole = np.setdiff1d(np.arange(len(opened.reader)), sorted(opened.damaged)).astype(np.int64)
    positions = np.diff(columns["token_offsets"])[whole] + 1
    return np.full(len(whole), shard), whole, positions, columns["crc32"][whole], columns["image_id"][whole]


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64: a fixed hash (splitmix64) of each value."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
