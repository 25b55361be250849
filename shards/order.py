"""Which rows a step trains: pure functions of (seed, phase, position, lengths, global batch size).

A record of n tokens has L = n + 1 *positions*: inputs [bos, t1..tn], targets [t1..tn, eos]. A *span* is a
run of positions of one record; a *row* is one sequence of the batch, made of spans. A pair row is one caption
(a piece of it where it is longer than a row); a text row is cut from the permuted records laid end to end.
Every position of a stream is trained exactly once an epoch.

Symbols: G rows of a global batch, R row_tokens, N samples, S spans.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BUCKET_BATCHES = 8  # a length bucket holds at least this many global batches
MODALITIES = ("pairs", "text")


@dataclass(frozen=True)
class PhaseSpec:
    """What a phase trains on and for how long: exactly one of epochs, words, steps.

    mix: weights by "pairs", "text" or a source's name. Weights count in phases given in steps; otherwise
    each epoch holds all batches of all streams, and the weights must be equal.
    """

    name: str
    mix: Mapping[str, float]
    epochs: float | None = None
    words: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the phase, the field and its value."""
        given = {"epochs": self.epochs, "words": self.words, "steps": self.steps}
        lengths = {name: value for name, value in given.items() if value is not None}
        if len(lengths) != 1:
            raise ValueError(f"phase {self.name!r} needs exactly one of epochs, words, steps, got {lengths or 'none'}")
        (name, length), *_ = lengths.items()
        if not 0 < length < float("inf"):
            raise ValueError(f"phase {self.name!r}: {name} must be > 0, got {length}")
        if not self.mix or not all(0 < weight < float("inf") for weight in self.mix.values()):
            raise ValueError(f"phase {self.name!r}: mix needs weights > 0, got {dict(self.mix)}")
        if self.steps is None and len(set(self.mix.values())) > 1:
            raise ValueError(
                f"phase {self.name!r}: mix {dict(self.mix)} has unequal weights, which count only when the length "
                f"is given in steps; in {name} the streams follow their sizes: make the weights equal"
            )


@dataclass(frozen=True)
class Lengths:
    """What order knows of the data: N samples in a fixed order.

    tokens, words: int [N]; source: int [N] into `sources`, each (name, modality).
    words_before(samples, counts): int64, the words that begin in the first `counts` tokens of `samples`.
    """

    sources: tuple[tuple[str, str], ...]
    tokens: np.ndarray
    words: np.ndarray
    source: np.ndarray
    words_before: Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class GlobalBatchPlan:
    """One global batch: row i holds spans row_offsets[i] : row_offsets[i + 1]; a row without spans is masked.

    samples int64 [S], starts int64 [S] (first position), lengths int64 [S] (positions); row_tokens T is the
    longest row of the whole global batch, so that shapes do not depend on the world.
    """

    modality: str
    stream: str
    row_tokens: int
    row_offsets: np.ndarray
    samples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def chunk_rows(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut records of `lengths` positions into rows: (record, start, length), int64, in record order."""
    pieces = -(-lengths // row_tokens)
    record = np.repeat(np.arange(len(lengths)), pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = (np.arange(len(record)) - first) * row_tokens
    return record, start, np.minimum(lengths[record] - start, row_tokens)


def length_buckets(lengths: np.ndarray, global_batch: int) -> np.ndarray:
    """int64 [max length + 1]: the bucket of each length.

    Adjacent lengths are merged until a bucket holds at least 8 global batches; what is left over joins the
    last bucket.
    """
    counts = np.bincount(lengths)
    bucket_of = np.zeros(len(counts), dtype=np.int64)
    bucket, held = 0, 0
    for length, count in enumerate(counts.tolist()):
        bucket_of[length] = bucket
        held += count
        if held >= BUCKET_BATCHES * global_batch:
            bucket, held = bucket + 1, 0
    if held < BUCKET_BATCHES * global_batch and bucket > 0:
        bucket_of[bucket_of == bucket] = bucket - 1
    return bucket_of


def pair_batches(lengths: np.ndarray, global_batch: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [batches, G]: an epoch of rows of `lengths`, -1 where a batch is filled up.

    Rows are permuted, cut into batches within their length bucket, and the batches shuffled.
    """
    bucket_of = length_buckets(lengths, global_batch)
    rows = rng.permutation(len(lengths))
    buckets = bucket_of[lengths[rows]]
    rows = rows[np.argsort(buckets, kind="stable")]
    sizes = np.bincount(buckets)
    batches = -(-sizes // global_batch)
    before = np.repeat((np.cumsum(batches) - batches) * global_batch - (np.cumsum(sizes) - sizes), sizes)
    table = np.full(int(batches.sum()) * global_batch, -1, dtype=np.int64)
    table[np.arange(len(rows)) + before] = rows
    return rng.permutation(table.reshape(-1, global_batch))


@dataclass(frozen=True)
class _PairEpoch:
    table: np.ndarray  # int64 [batches, G] into the stream's rows, -1 = masked
    words: np.ndarray  # int64 [batches]


@dataclass(frozen=True)
class _TextEpoch:
    samples: np.ndarray  # int64 [n]: permuted samples
    ends: np.ndarray  # int64 [n]: the position after each, laid end to end
    words: np.ndarray  # int64 [batches]


class Stream:
    """The samples one key of a mix stands for, and its epochs' batches."""

    def __init__(self, name: str, modality: str, samples: np.ndarray, data: Lengths, *, shape: tuple[int, int]) -> None:
        """`samples` int64 [n] into `data`; `shape` is (global batch, row tokens)."""
        self.name, self.modality, self._samples, self._data = name, modality, samples, data
        self._global_batch, self._row_tokens = shape
        positions = data.tokens[samples].astype(np.int64) + 1
        self.words = int(data.words[samples].sum(dtype=np.int64))
        self.sources = [data.sources[i][0] for i in np.unique(data.source[samples])]
        if modality == "pairs":
            record, self._starts, self._lengths = chunk_rows(positions, self._row_tokens)
            self._row_samples = samples[record]
            self._row_words = self._words_of_rows()
            buckets = length_buckets(self._lengths, self._global_batch)[self._lengths]
            self.batches = int((-(-np.bincount(buckets) // self._global_batch)).sum())
        else:
            self.batches = -(-int(positions.sum()) // (self._row_tokens * self._global_batch))

    def _words_of_rows(self) -> np.ndarray:
        """int64: the words that begin in each pair row."""
        samples, starts, data = self._row_samples, self._starts, self._data
        words = data.words[samples].astype(np.int64)
        cut = np.flatnonzero(self._lengths < data.tokens[samples].astype(np.int64) + 1)
        ends = np.minimum(starts + self._lengths, data.tokens[samples])
        words[cut] = data.words_before(samples[cut], ends[cut]) - data.words_before(samples[cut], starts[cut])
        return words

    def epoch(self, rng: np.random.Generator) -> _PairEpoch | _TextEpoch:
        """The plan of an epoch that `rng` draws."""
        if self.modality == "pairs":
            table = pair_batches(self._lengths, self._global_batch, rng)
            words = np.where(table >= 0, self._row_words[table], 0).sum(axis=1)
            return _PairEpoch(table, words)
        samples = rng.permutation(self._samples)
        ends = np.cumsum(self._data.tokens[samples].astype(np.int64) + 1)
        return _TextEpoch(samples, ends, self._text_words(samples, ends))

    def _text_words(self, samples: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """int64 [batches]: the words that begin in each batch of records laid end to end."""
        tokens = self._data.tokens[samples].astype(np.int64)
        cuts = np.arange(1, self.batches) * (self._row_tokens * self._global_batch)
        at = np.searchsorted(ends, cuts, side="right")
        inside = cuts - (ends[at] - tokens[at] - 1)
        before = np.concatenate([[0], np.cumsum(self._data.words[samples], dtype=np.int64)])
        passed = before[at] + self._data.words_before(samples[at], np.minimum(inside, tokens[at]))
        return np.diff(np.concatenate([[0], passed, before[-1:]]))

    def batch(self, epoch: _PairEpoch | _TextEpoch, number: int) -> GlobalBatchPlan:
        """Global batch `number` of an epoch's plan."""
        if isinstance(epoch, _PairEpoch):
            rows = epoch.table[number]
            kept = rows[rows >= 0]
            offsets = np.concatenate([[0], np.cumsum(rows >= 0)])
            return self._plan(offsets, self._row_samples[kept], self._starts[kept], self._lengths[kept])
        return self._text_batch(epoch, number)

    def _text_batch(self, epoch: _TextEpoch, number: int) -> GlobalBatchPlan:
        width = self._row_tokens
        low = number * width * self._global_batch
        high = min(low + width * self._global_batch, int(epoch.ends[-1]))
        first = int(np.searchsorted(epoch.ends, low, side="right"))
        last = int(np.searchsorted(epoch.ends, high, side="left"))
        record_ends = epoch.ends[first : last + 1]
        cuts = np.arange(low, high, width)
        begins = np.union1d(cuts, record_ends[record_ends < high])
        lengths = np.diff(np.append(begins, high))
        at = np.searchsorted(epoch.ends, begins, side="right")
        samples = epoch.samples[at]
        starts = begins - (epoch.ends[at] - self._data.tokens[samples] - 1)
        borders = low + np.arange(self._global_batch + 1) * width
        return self._plan(np.searchsorted(begins, borders, side="left"), samples, starts, lengths)

    def _plan(
        self, offsets: np.ndarray, samples: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> GlobalBatchPlan:
        sums = np.concatenate([[0], np.cumsum(lengths)])[offsets]
        return GlobalBatchPlan(
            self.modality, self.name, int(np.diff(sums).max()), offsets.astype(np.int64), samples, starts, lengths
        )


@dataclass(frozen=True)
class _Phase:
    """A resolved phase: its streams, steps, and for phases in steps the drawn stream of each step."""

    spec: PhaseSpec
    streams: tuple[str, ...]
    steps: int
    draws: np.ndarray | None  # uint8 [steps]
    nth: np.ndarray | None  # int64 [steps]: how often the step's stream was drawn before


class Order:
    """The rows of every step of every phase. Holds at most one epoch's plan a stream."""

    def __init__(
        self, data: Lengths, phases: Sequence[PhaseSpec], *, seed: int, global_batch: int, row_tokens: int
    ) -> None:
        """Raises ValueError naming the number, or the mix key that fits no source."""
        for name, value, least in (("seed", seed, 0), ("global_batch", global_batch, 1), ("row_tokens", row_tokens, 2)):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self._data, self._seed = data, seed
        self.global_batch, self.row_tokens = global_batch, row_tokens
        self._streams: dict[str, Stream] = {}
        self._epochs: dict[str, tuple[tuple[int, int], _PairEpoch | _TextEpoch]] = {}
        self._schedules: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}
        self._phases = [self._resolve(number, spec) for number, spec in enumerate(phases)]

    def steps(self, phase: int) -> int:
        """Optimizer steps of a phase."""
        return self._phases[phase].steps

    def batch(self, phase: int, step: int) -> GlobalBatchPlan:
        """The global batch of a step. Raises IndexError past the phase's end."""
        if not 0 <= step < self.steps(phase):
            raise IndexError(f"phase {phase} has {self.steps(phase)} steps, asked for step {step}")
        resolved = self._phases[phase]
        if resolved.draws is not None and resolved.nth is not None:
            stream = self._streams[resolved.streams[int(resolved.draws[step])]]
            epoch, number = divmod(int(resolved.nth[step]), stream.batches)
        else:
            epoch, at = divmod(step, self._epoch_steps(resolved.streams))
            draws, nth = self._schedule(phase, resolved.streams, epoch)
            stream, number = self._streams[resolved.streams[int(draws[at])]], int(nth[at])
        return stream.batch(self._epoch(phase, stream, epoch), number)

    def passes(self) -> dict[str, int]:
        """How often at most a sample of each source is trained: over all phases, begun epochs count whole."""
        total = {name: 0 for name, _ in self._data.sources}
        for phase in range(len(self._phases)):
            for stream, batches in self._drawn(phase).items():
                for source in self._streams[stream].sources:
                    total[source] += -(-batches // self._streams[stream].batches)
        return total

    def words(self, phase: int) -> int:
        """The words a phase trains, each counted in the row that holds its first token."""
        total = 0
        for name, batches in self._drawn(phase).items():
            stream = self._streams[name]
            epochs, rest = divmod(batches, stream.batches)
            total += epochs * stream.words
            if rest:
                total += int(self._epoch(phase, stream, epochs).words[:rest].sum())
        return total

    def _resolve(self, phase: int, spec: PhaseSpec) -> _Phase:
        """Open the streams of a phase's mix and work out its steps."""
        names = tuple(sorted(spec.mix))
        taken: dict[str, str] = {}
        for name in names:
            for source in self._stream(spec, name).sources:
                if source in taken:
                    raise ValueError(
                        f"phase {spec.name!r}: mix names {source!r} twice ({taken[source]!r} and {name!r})"
                    )
                taken[source] = name
        if spec.steps is not None:
            weights = np.array([spec.mix[name] for name in names], dtype=np.float64)
            rng = self._rng(phase, "", 0)
            draws = rng.choice(len(names), size=spec.steps, p=weights / weights.sum()).astype(np.uint8)
            return _Phase(spec, names, spec.steps, draws, _occurrence(draws))
        if spec.epochs is not None:
            steps = max(1, round(spec.epochs * self._epoch_steps(names)))
        else:
            steps = self._steps_of_words(phase, names, spec)
        return _Phase(spec, names, steps, None, None)

    def _steps_of_words(self, phase: int, names: Sequence[str], spec: PhaseSpec) -> int:
        """Steps until the next batch would pass the phase's words."""
        words = spec.words or 0
        epochs, rest = divmod(words, sum(self._streams[name].words for name in names))
        draws, nth = self._schedule(phase, names, epochs)
        per_step = np.zeros(len(draws), np.int64)
        for number, name in enumerate(names):
            here = draws == number
            per_step[here] = self._epoch(phase, self._streams[name], epochs).words[nth[here]]
        steps = epochs * len(draws) + int(np.searchsorted(np.cumsum(per_step), rest, side="right"))
        if steps == 0:
            raise ValueError(
                f"phase {spec.name!r}: words {words} is less than its first global batch holds "
                f"({int(per_step[0])}): raise words or shrink the global batch"
            )
        return steps

    def _stream(self, spec: PhaseSpec, name: str) -> Stream:
        if name not in self._streams:
            kinds = [source if name not in MODALITIES else kind for source, kind in self._data.sources]
            wanted = [number for number, kind in enumerate(kinds) if kind == name]
            samples = np.flatnonzero(np.isin(self._data.source, wanted))
            if not len(samples):
                known = sorted({part for source in self._data.sources for part in source})
                raise ValueError(
                    f"phase {spec.name!r}: mix names {name!r}, but the shards hold only {', '.join(known)}"
                )
            modality = self._data.sources[wanted[0]][1]
            shape = (self.global_batch, self.row_tokens)
            self._streams[name] = Stream(name, modality, samples, self._data, shape=shape)
        return self._streams[name]

    def _rng(self, phase: int, stream: str, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, phase, zlib.crc32(stream.encode()), epoch])

    def _epoch(self, phase: int, stream: Stream, epoch: int) -> _PairEpoch | _TextEpoch:
        held = self._epochs.get(stream.name)
        if held is None or held[0] != (phase, epoch):
            held = ((phase, epoch), stream.epoch(self._rng(phase, stream.name, epoch)))
            self._epochs[stream.name] = held
        return held[1]

    def _epoch_steps(self, streams: Sequence[str]) -> int:
        return sum(self._streams[name].batches for name in streams)

    def _schedule(self, phase: int, streams: Sequence[str], epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(stream of each step, its batch number) of one epoch of a phase given in epochs or words."""
        held = self._schedules.get(phase)
        if held is None or held[0] != epoch:
            sizes = [self._streams[name].batches for name in streams]
            draws = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)
            draws = self._rng(phase, "", epoch).permutation(draws)
            held = (epoch, draws, _occurrence(draws))
            self._schedules = {phase: held}
        return held[1], held[2]

    def _drawn(self, phase: int) -> dict[str, int]:
        """Batches drawn of each stream over a whole phase."""
        resolved = self._phases[phase]
        if resolved.draws is not None:
            counts = np.bincount(resolved.draws, minlength=len(resolved.streams))
            return dict(zip(resolved.streams, counts.tolist(), strict=True))
        epochs, rest = divmod(resolved.steps, self._epoch_steps(resolved.streams))
        partial = np.zeros(len(resolved.streams), np.int64)
        if rest:
            partial = np.bincount(
                self._schedule(phase, resolved.streams, epochs)[0][:rest], minlength=len(resolved.streams)
            )
        return {
            name: epochs * self._streams[name].batches + int(extra)
            for name, extra in zip(resolved.streams, partial, strict=True)
        }


def _occurrence(draws: np.ndarray) -> np.ndarray:
    """int64: for each element, how often its value occurred before."""
    order = np.argsort(draws, kind="stable")
    counts = np.bincount(draws)
    nth = np.empty(len(draws), dtype=np.int64)
    nth[order] = np.arange(len(draws)) - np.repeat(np.cumsum(counts) - counts, counts)
    return nth
