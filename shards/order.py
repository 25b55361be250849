"""Which rows a step trains: pure functions of (seed, phase, position, counts and lengths, shape of a batch).

The world's size is no part of it: a rank asks for its slice of a global batch. A phase mixes streams; which stream a
step reads is drawn beforehand, so that step n is found without those before it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shards.bins import CaptionStream
from shards.buckets import BucketStream
from shards.corpus import PAIRS, Corpus, RowPlan
from shards.packing import PackedStream
from shards.streams import EpochKey, Shape, Stream

MARK_STEPS = 4096  # how often a schedule notes its counts


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


class _Schedule:
    """Which stream each step reads, and how many batches of it came before."""

    def __init__(self, draws: np.ndarray, streams: int) -> None:
        """draws: uint8 [steps], each a stream's number."""
        self._draws = draws
        blocks = np.arange(len(draws)) // MARK_STEPS
        counts = np.bincount(blocks * streams + draws, minlength=(len(draws) // MARK_STEPS + 1) * streams)
        counts = counts.reshape(-1, streams)
        self._marks = np.cumsum(counts, axis=0) - counts

    def counts(self, step: int) -> np.ndarray:
        """int64 [streams]: the batches of each stream in the first `step` steps."""
        block = min(step // MARK_STEPS, len(self._marks) - 1)
        since = self._draws[block * MARK_STEPS : step]
        return self._marks[block] + np.bincount(since, minlength=self._marks.shape[1])

    def at(self, step: int) -> tuple[int, int]:
        """(stream, how many of its batches came before) of a step."""
        stream = int(self._draws[step])
        return stream, int(self.counts(step)[stream])


@dataclass(frozen=True)
class _Phase:
    """A resolved phase; `schedule` is that of all its steps where the length is given in steps."""

    streams: tuple[Stream, ...]
    steps: int
    schedule: _Schedule | None


class Order:
    """The rows of every step of every phase."""

    def __init__(
        self, corpus: Corpus, phases: Sequence[PhaseSpec], *, seed: int, shape: Shape, pack_captions: bool = False
    ) -> None:
        """pack_captions: several captions a row instead of length buckets.

        Raises ValueError naming the number, or the mix key that fits no source.
        """
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self._corpus, self._seed, self.shape, self._pack_captions = corpus, seed, shape, pack_captions
        self._streams: dict[str, Stream] = {}
        self._schedules: dict[int, tuple[int, _Schedule]] = {}
        self._phases: list[_Phase] = []
        for number, spec in enumerate(phases):
            self._phases.append(self._resolve(number, spec))

    def steps(self, phase: int) -> int:
        """Optimizer steps of a phase."""
        return self._phases[phase].steps

    def plan(self, phase: int, step: int, first: int, count: int) -> RowPlan:
        """Rows first : first + count of the global batch of a step. Raises IndexError past the phase's end."""
        stream, key, number = self._locate(phase, step)
        return stream.plan(key, number, first, count)

    def ahead(self, phase: int, step: int, first: int, count: int) -> list[int]:
        """The shards that rows first : first + count need in the windows of a step and right after them.

        Those of every stream of the phase, since the next step may read another; the windows of now come first.
        """
        parts = range(first // self.shape.share, (first + count - 1) // self.shape.share + 1)
        now: list[int] = []
        after: list[int] = []
        for stream, key, number in self._places(phase, step):
            for partition in parts:
                window = stream.window_of(key, number, partition)
                now += stream.shards_of(key, partition, window).tolist()
                following = stream.shards_of(key, partition, window + 1)
                if not len(following):
                    following = stream.shards_of(EpochKey(key.seed, key.phase, key.epoch + 1), partition, 0)
                after += following.tolist()
        return now + after

    def window_bytes(self, shard_bytes: np.ndarray, partitions: int) -> int:
        """The most bytes that the windows of a step take in so many partitions; shard_bytes int64 [shards]."""
        return max(
            sum(stream.window_bytes(shard_bytes, partitions) for stream in phase.streams) for phase in self._phases
        )

    def passes(self) -> dict[str, int]:
        """How often at most a sample of each source is trained: over all phases, begun epochs count whole."""
        total = {name: 0 for name, _ in self._corpus.sources}
        for phase, resolved in enumerate(self._phases):
            for stream, batches in zip(resolved.streams, self._drawn(phase), strict=True):
                for source in stream.sources:
                    total[source] += -(-batches // stream.batches)
        return total

    def epochs(self, phase: int) -> float:
        """How often a phase reads the source that it reads most often."""
        streams = self._phases[phase].streams
        return max(batches / stream.batches for stream, batches in zip(streams, self._drawn(phase), strict=True))

    def words(self, phase: int) -> int:
        """The words a phase trains, each counted in the row that holds its first token."""
        total = 0
        for stream, batches in zip(self._phases[phase].streams, self._drawn(phase), strict=True):
            epochs, rest = divmod(batches, stream.batches)
            total += epochs * stream.words
            if rest:
                total += stream.words_before(EpochKey(self._seed, phase, epochs), rest)
        return total

    def _places(self, phase: int, step: int) -> Iterator[tuple[Stream, EpochKey, int]]:
        """(stream, epoch, batch of that epoch) of each stream of a phase: the batch that is read now or next."""
        resolved = self._phases[phase]
        if resolved.schedule is not None:
            epoch, drawn = 0, resolved.schedule.counts(step)
        else:
            epoch, at = divmod(step, _epoch_steps(resolved.streams))
            drawn = self._schedule(phase, resolved.streams, epoch).counts(at)
        for stream, batches in zip(resolved.streams, drawn.tolist(), strict=True):
            if resolved.schedule is not None:
                epoch, batches = divmod(batches, stream.batches)
            yield stream, EpochKey(self._seed, phase, epoch), min(batches, stream.batches - 1)

    def _locate(self, phase: int, step: int) -> tuple[Stream, EpochKey, int]:
        """(stream, epoch, batch of that epoch) of a step."""
        if not 0 <= step < self.steps(phase):
            raise IndexError(f"phase {phase} has {self.steps(phase)} steps, asked for step {step}")
        resolved = self._phases[phase]
        if resolved.schedule is not None:
            chosen, drawn = resolved.schedule.at(step)
            stream = resolved.streams[chosen]
            epoch, number = divmod(drawn, stream.batches)
        else:
            epoch, at = divmod(step, _epoch_steps(resolved.streams))
            chosen, number = self._schedule(phase, resolved.streams, epoch).at(at)
            stream = resolved.streams[chosen]
        return stream, EpochKey(self._seed, phase, epoch), number

    def _resolve(self, phase: int, spec: PhaseSpec) -> _Phase:
        """Open the streams of a phase's mix and work out its steps."""
        names = sorted(spec.mix)
        streams = tuple(self._stream(spec, name) for name in names)
        taken: dict[str, str] = {}
        for stream in streams:
            for source in stream.sources:
                if source in taken:
                    raise ValueError(
                        f"phase {spec.name!r}: mix names {source!r} twice ({taken[source]!r} and {stream.name!r})"
                    )
                taken[source] = stream.name
        if spec.steps is not None:
            weights = np.array([spec.mix[name] for name in names], dtype=np.float64)
            rng = self._rng(phase, 0)
            draws = rng.choice(len(names), size=spec.steps, p=weights / weights.sum()).astype(np.uint8)
            return _Phase(streams, spec.steps, _Schedule(draws, len(names)))
        if spec.epochs is not None:
            return _Phase(streams, max(1, round(spec.epochs * _epoch_steps(streams))), None)
        return _Phase(streams, self._steps_of_words(phase, streams, spec), None)

    def _steps_of_words(self, phase: int, streams: Sequence[Stream], spec: PhaseSpec) -> int:
        """Steps until the next batch would pass the phase's words."""
        words = spec.words or 0
        epochs, rest = divmod(words, sum(stream.words for stream in streams))
        schedule, key = self._schedule(phase, streams, epochs), EpochKey(self._seed, phase, epochs)

        def trained(steps: int) -> int:
            drawn = schedule.counts(steps).tolist()
            return sum(s.words_before(key, n) if n else 0 for s, n in zip(streams, drawn, strict=True))

        low, high = 0, _epoch_steps(streams) - 1  # the words of a whole epoch are more than the rest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if trained(middle) <= rest else (low, middle - 1)
        steps = epochs * _epoch_steps(streams) + low
        if steps == 0:
            raise ValueError(
                f"phase {spec.name!r}: words {words} is less than its first global batch holds ({trained(1)}): "
                "raise words or shrink the global batch"
            )
        return steps

    def _stream(self, spec: PhaseSpec, name: str) -> Stream:
        if name not in self._streams:
            numbers = self._corpus.chosen(name)
            if not len(numbers):
                known = sorted({part for source in self._corpus.sources for part in source})
                raise ValueError(
                    f"phase {spec.name!r}: mix names {name!r}, but the shards hold only {', '.join(known)}"
                )
            captions = CaptionStream if self._pack_captions else BucketStream
            kind = captions if self._corpus.sources[int(numbers[0])][1] == PAIRS else PackedStream
            self._streams[name] = kind(name, self._corpus, self.shape)
        return self._streams[name]

    def _rng(self, phase: int, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, phase, zlib.crc32(b""), epoch])

    def _schedule(self, phase: int, streams: Sequence[Stream], epoch: int) -> _Schedule:
        """The schedule of one epoch of a phase given in epochs or words."""
        held = self._schedules.get(phase)
        if held is None or held[0] != epoch:
            sizes = [stream.batches for stream in streams]
            draws = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)
            if len(sizes) > 1:
                draws = self._rng(phase, epoch).permutation(draws)
            held = (epoch, _Schedule(draws, len(sizes)))
            self._schedules = {phase: held}
        return held[1]

    def _drawn(self, phase: int) -> list[int]:
        """Batches drawn of each stream over a whole phase."""
        resolved = self._phases[phase]
        if resolved.schedule is not None:
            return resolved.schedule.counts(resolved.steps).tolist()
        epochs, rest = divmod(resolved.steps, _epoch_steps(resolved.streams))
        partial = np.zeros(len(resolved.streams), np.int64)
        if rest:
            partial = self._schedule(phase, resolved.streams, epochs).counts(rest)
        return [epochs * s.batches + int(n) for s, n in zip(resolved.streams, partial, strict=True)]


def _epoch_steps(streams: Sequence[Stream]) -> int:
    return sum(stream.batches for stream in streams)
