"""The rows of a global batch as numpy arrays.

Symbols: B rows of a micro-batch, T positions, S image slots of a row, V width of a vision vector, X spans.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from shards.corpus import PAIRS, RowPlan
from shards.dataset import TABLE, OpenShard
from shards.record import VECTOR_SIZE
from shards.regions import join
from shards.store import NoRoom
from shards.tokenizer import BOS, EOS

IGNORED = -100
DENSE = 8  # spans a shard
PER_POSITION = ("tokens", "targets", "segments", "positions")
PER_SLOT = ("vision", "has_vision", "image_ids", "sources")


@dataclass(frozen=True)
class Rows:
    """One micro-batch: B rows of T positions. Image slot s of row i is element i * S + s, of segment s + 1."""

    tokens: np.ndarray  # int64 [B, T]: inputs, 0 where padded
    targets: np.ndarray  # int64 [B, T]: next tokens, -100 where padded or masked
    segments: np.ndarray  # int32 [B, T]: 1, 2, ... per record in the row, 0 = padding
    positions: np.ndarray  # int32 [B, T]: restart at each record
    vision: np.ndarray  # float16 or float32 [B * S, V], as stored: zeros where none
    has_vision: np.ndarray  # bool [B * S]
    image_ids: np.ndarray  # int64 [B * S]: 0 = none
    sources: (
        np.ndarray
    )  # int64 [B * S]: number of the source in the manifest, of a row of text that of one of its records
    words: np.ndarray  # int64 [B]: words whose first token is a target of the row
    rows: np.ndarray  # int64 [B]: (phase << 40) | (step * G + index in the global batch)
    valid: np.ndarray  # bool [B]: False where all targets are -100 (filler, damaged)
    packed: bool  # a row holds more than one record: attention needs the segments
    slots: int  # S: captions a row; 1 for text
    modality: str

    @property
    def samples(self) -> int:
        """What counts as a sample: a caption, or a row of text."""
        return int((self.has_vision if self.slots > 1 else self.valid).sum())

    def split(self, size: int) -> list[Rows]:
        """Micro-batches of `size` rows, which share this one's memory."""
        return [self._part(start, start + size) for start in range(0, len(self.rows), size)]

    def _part(self, start: int, stop: int) -> Rows:
        row, slot = slice(start, stop), slice(start * self.slots, stop * self.slots)
        return Rows(
            self.tokens[row],
            self.targets[row],
            self.segments[row],
            self.positions[row],
            self.vision[slot],
            self.has_vision[slot],
            self.image_ids[slot],
            self.sources[slot],
            self.words[row],
            self.rows[row],
            self.valid[row],
            self.packed,
            self.slots,
            self.modality,
        )


@dataclass(frozen=True)
class _Spans:
    """The whole spans of a plan, shard after shard: each int64 [X], ends bool [X]."""

    order: np.ndarray  # which spans of the plan
    samples: np.ndarray
    starts: np.ndarray  # first position
    lengths: np.ndarray  # positions
    begins: np.ndarray  # of the tokens that are read, in the shard
    stops: np.ndarray
    ends: np.ndarray  # whether the record ends in the span, so that eos is its last target
    words: np.ndarray
    image_ids: np.ndarray
    sources: np.ndarray
    vectors: np.ndarray  # where the vector begins in the tar
    groups: list[tuple[OpenShard, slice]]  # the spans of each shard

    @property
    def dense(self) -> bool:
        """Whether a shard has so many spans that they are quicker taken together than one by one."""
        return len(self.order) >= DENSE * len(self.groups)


class Find(Protocol):
    """Opens shards, as Readers.get does."""

    def __call__(self, shard: int, *, waits: bool = True) -> OpenShard: ...


def build_rows(find: Find, plan: RowPlan, positions: np.ndarray) -> Rows:
    """The rows of a plan as arrays; `positions` int64 [B] are their global positions.

    A damaged sample is masked: targets -100, no vision, no words. Where the cache cannot hold all shards of the plan
    they are read some at a time. Raises DataError where a shard cannot be read.
    """
    rows, done = _build(find, plan, positions, 0)
    while done < len(plan.shards):
        more, done = _build(find, plan, positions, done)
        rows = _merged(rows, more)
    return rows


def _merged(rows: Rows, more: Rows) -> Rows:
    """The spans of both, which lie at different places."""
    rows = replace(rows, vision=rows.vision.astype(np.result_type(rows.vision, more.vision), copy=False))
    for names, there in ((PER_POSITION, more.segments > 0), (PER_SLOT, more.has_vision)):
        for name in names:
            getattr(rows, name)[there] = getattr(more, name)[there]
    if rows.modality != PAIRS:
        new = more.valid & ~rows.valid
        rows.sources[new] = more.sources[new]
    return replace(rows, words=rows.words + more.words, valid=rows.valid | more.valid)


def _build(find: Find, plan: RowPlan, positions: np.ndarray, begin: int) -> tuple[Rows, int]:
    """(rows that hold the spans from `begin` on, by shard, up to where the cache is full; where that is)."""
    size, pairs = len(plan.row_offsets) - 1, plan.modality == PAIRS
    per_row = plan.row_offsets[1:] - plan.row_offsets[:-1]
    most = int(per_row.max())
    row, segment, column = _places(plan, per_row, most)
    slots = plan.slots
    spans, done = _look_up(find, plan, begin)
    row, segment, column = row[spans.order], segment[spans.order], column[spans.order]
    slot = row * slots + segment if slots > 1 else row
    rows = Rows(
        *_lay_out(spans, (size, plan.row_tokens), row * plan.row_tokens + column, segment + 1),
        vision=_vision(spans, slot, size * slots) if pairs else np.zeros((size, VECTOR_SIZE), np.float16),
        has_vision=np.zeros(size * slots, np.bool_),
        image_ids=np.zeros(size * slots, np.int64),
        sources=np.zeros(size * slots, np.int64),
        words=np.zeros(size, np.int64),
        rows=positions,
        valid=np.zeros(size, np.bool_),
        packed=slots > 1 or most > 1,
        slots=slots,
        modality=plan.modality,
    )
    rows.valid[row] = True
    if most > 1:
        np.add.at(rows.words, row, spans.words)
    else:
        rows.words[row] = spans.words
    if pairs:
        rows.has_vision[slot] = True
        rows.image_ids[slot] = spans.image_ids
        rows.sources[slot] = spans.sources
    else:
        rows.sources[row[::-1]] = spans.sources[::-1]
    return rows, done


def _places(plan: RowPlan, per_row: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, place among the spans of its row, first position in it) of each span, int64 [X]."""
    if most <= 1:
        row = np.flatnonzero(per_row)
        nothing = np.zeros(len(row), np.int64)
        return row, nothing, nothing
    row = np.repeat(np.arange(len(per_row)), per_row)
    segment = np.arange(len(row)) - plan.row_offsets[row]
    begin = np.cumsum(plan.lengths) - plan.lengths
    return row, segment, begin - begin[plan.row_offsets[row]]


def _look_up(find: Find, plan: RowPlan, begin: int) -> tuple[_Spans, int]:
    """Find spans in their shards, leaving out those whose sample is damaged; how many are done, by shard."""
    order = np.argsort(plan.shards, kind="stable")[begin:]
    shards, samples = plan.shards[order], plan.samples[order]
    cuts = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(order)]
    kept, found, groups, count, done = [order[:0]], [np.zeros((0, len(TABLE)), np.int64)], [], 0, 0
    for first, stop in itertools.pairwise(cuts) if len(order) else ():
        try:
            opened = find(int(shards[first]), waits=done == 0)
        except NoRoom:
            if done == 0:
                raise
            break
        here, mine, done = order[first:stop], samples[first:stop], stop
        if opened.damaged:
            whole = ~opened.lost[mine]
            here, mine = here[whole], mine[whole]
        kept.append(here)
        found.append(opened.table[mine])
        groups.append((opened, slice(count, count + len(here))))
        count += len(here)
    order = np.concatenate(kept)
    low, high, words, image_ids, vectors, sources = np.concatenate(found).T
    starts, lengths = plan.starts[order], plan.lengths[order]
    stops = low + starts + lengths
    ends, stops = stops > high, np.minimum(stops, high)
    begins = low + starts - (starts > 0)  # the first input of a later piece is the last target before it
    spans = _Spans(
        order, plan.samples[order], starts, lengths, begins, stops, ends, words, image_ids, sources, vectors, groups
    )
    _count_words(spans)
    return spans, begin + done


def _count_words(spans: _Spans) -> None:
    """Put in the words of spans that hold only a piece of their record."""
    cut = (spans.starts > 0) | ~spans.ends
    for opened, here in spans.groups if cut.any() else ():
        for at in (np.flatnonzero(cut[here]) + here.start).tolist():
            begin = int(spans.begins[at]) + int(spans.starts[at] > 0)
            spans.words[at] = opened.words_of(begin, int(spans.stops[at]))


def _tokens(spans: _Spans, counts: np.ndarray) -> np.ndarray:
    """The tokens that the spans read, `counts` [X] of each, one span after the other: no specials."""
    parts = [(opened.tokens, here) for opened, here in spans.groups if opened.tokens is not None]
    if spans.dense and len(parts) == len(spans.groups):
        upto = np.concatenate([[0], np.cumsum(counts)])
        at = np.repeat(spans.begins - upto[:-1], counts)
        at += np.arange(len(at))
        runs = [tokens[at[upto[here.start] : upto[here.stop]]] for tokens, here in parts]
        return np.concatenate(runs) if runs else at
    runs = []
    for opened, here in spans.groups:
        width = opened.reader.token_dtype.itemsize
        begins, stops = (spans.begins[here] * width).tolist(), (spans.stops[here] * width).tolist()
        read = join([opened.reader.token_bytes] * len(begins), begins, stops)
        runs.append(np.frombuffer(read, opened.reader.token_dtype))
    return np.concatenate(runs)


def _lay_out(
    spans: _Spans, shape: tuple[int, int], places: np.ndarray, segments: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, segments, positions) [B, T] with the spans at flat `places`.

    A span of n positions reads n + 1 tokens, specials included: its inputs are all but the last, its targets all
    but the first.
    """
    size = shape[0] * shape[1]
    inputs, targets = np.zeros(size, np.int64), np.full(size, IGNORED, np.int64)
    of_row, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
    lengths, begins, ends = spans.lengths, spans.starts == 0, spans.ends
    counts = spans.stops - spans.begins
    read = _tokens(spans, counts)
    upto = np.cumsum(counts)
    to = np.repeat(places + begins - (upto - counts), counts)  # where each token is an input; it is the target before
    to += np.arange(len(to))
    if begins.all() and ends.all():
        inputs[to] = targets[to - 1] = read
    else:
        is_input, is_target = np.ones(len(to), np.bool_), np.ones(len(to), np.bool_)
        is_input[upto[~ends] - 1] = False
        is_target[(upto - counts)[~begins]] = False
        inputs[to[is_input]], targets[to[is_target] - 1] = read[is_input], read[is_target]
    inputs[places[begins]] = BOS
    targets[(places + lengths - 1)[ends]] = EOS
    before = np.cumsum(lengths) - lengths
    inside = np.arange(int(lengths.sum())) - np.repeat(before, lengths)
    at = inside + np.repeat(places, lengths)
    of_row[at], positions[at] = np.repeat(segments, lengths), inside
    return inputs.reshape(shape), targets.reshape(shape), of_row.reshape(shape), positions.reshape(shape)


def _vision(spans: _Spans, slot: np.ndarray, size: int) -> np.ndarray:
    """float16 or float32 [size, V]: the vectors at their slots, in the dtype they are stored in where all agree."""
    widths = {opened.vector_bytes for opened, _ in spans.groups}
    width = widths.pop() if len(widths) == 1 else 0
    dtype = np.dtype(f"<f{width // VECTOR_SIZE}" if width else "<f4")
    out = (np.empty if len(slot) == size else np.zeros)((size, VECTOR_SIZE), dtype)
    mapped = [(opened.blocks, here) for opened, here in spans.groups if opened.blocks is not None]
    if width and spans.dense and len(mapped) == len(spans.groups):
        to = out.view(f"V{width}")[:, 0]
        for blocks, here in mapped:
            to[slot[here]] = blocks[spans.vectors[here]]
    elif width:
        regions = [opened.reader.data for opened, here in spans.groups for _ in range(here.start, here.stop)]
        read = join(regions, spans.vectors.tolist(), (spans.vectors + width).tolist())
        out[slot] = np.frombuffer(read, dtype).reshape(-1, VECTOR_SIZE)
    else:
        for opened, here in spans.groups:
            for place, sample in zip(slot[here].tolist(), spans.samples[here].tolist(), strict=True):
                out[place] = opened.reader.vector(sample)
    return out
