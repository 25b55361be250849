"""The rows of a global batch as numpy arrays.

Symbols: B rows of a micro-batch, T positions, S image slots of a row, V width of a vision vector, X spans.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.corpus import PAIRS, RowPlan
from shards.dataset import OpenShard
from shards.record import VECTOR_SIZE
from shards.tokenizer import BOS, EOS

IGNORED = -100


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
            self.words[row],
            self.rows[row],
            self.valid[row],
            self.packed,
            self.slots,
            self.modality,
        )


@dataclass(frozen=True)
class _Group:
    """The whole spans of a plan that lie in one shard: samples, and where they read tokens, each int64 [n]."""

    opened: OpenShard
    here: slice  # of the spans of all groups
    samples: np.ndarray
    begins: np.ndarray
    stops: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """A column of the index."""
        return self.opened.reader.columns[name][self.samples]


@dataclass(frozen=True)
class _Spans:
    """The whole spans of a plan, shard after shard."""

    order: np.ndarray  # int64 [X]: which spans of the plan
    starts: np.ndarray  # int64 [X]: first position
    lengths: np.ndarray  # int64 [X]: positions
    ends: np.ndarray  # bool [X]: whether the record ends in the span, so that eos is its last target
    groups: list[_Group]

    def column(self, name: str) -> np.ndarray:
        """A column of the index of each span's sample, [X]."""
        return _joined([group.column(name) for group in self.groups])

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """(the tokens that the spans read, one span after the other; how many each reads): no specials."""
        runs = []
        for group in self.groups:
            reader = group.opened.reader
            runs.append(reader.token_bytes.runs(group.begins, group.stops - group.begins, reader.token_dtype))
        return _joined(runs), _joined([group.stops - group.begins for group in self.groups])

    def words(self) -> np.ndarray:
        """The words that begin in each span, [X]."""
        words = self.column("words")
        cut = (self.starts > 0) | ~self.ends
        for group in self.groups if cut.any() else ():
            for at in np.flatnonzero(cut[group.here]).tolist():
                span = group.here.start + at
                begin = int(group.begins[at]) + int(self.starts[span] > 0)
                words[span] = group.opened.words_of(begin, int(group.stops[at]))
        return words


def build_rows(find: Callable[[int], OpenShard], plan: RowPlan, positions: np.ndarray) -> Rows:
    """The rows of a plan as arrays; `positions` int64 [B] are their global positions.

    A damaged sample is masked: targets -100, no vision, no words. Raises DataError where a shard cannot be read.
    """
    size, pairs = len(plan.row_offsets) - 1, plan.modality == PAIRS
    per_row = plan.row_offsets[1:] - plan.row_offsets[:-1]
    most = int(per_row.max())
    row, segment, column = _places(plan, per_row, most)
    slots = max(1, most) if pairs else 1
    spans = _look_up(find, plan)
    row, segment, column = row[spans.order], segment[spans.order], column[spans.order]
    slot = row * slots + segment if slots > 1 else row
    rows = Rows(
        *_lay_out(spans, (size, plan.row_tokens), row * plan.row_tokens + column, segment + 1),
        vision=_vision(spans, slot, size * slots) if pairs else np.zeros((size, VECTOR_SIZE), np.float16),
        has_vision=np.zeros(size * slots, np.bool_),
        image_ids=np.zeros(size * slots, np.int64),
        words=np.zeros(size, np.int64),
        rows=positions,
        valid=np.zeros(size, np.bool_),
        packed=most > 1,
        slots=slots,
        modality=plan.modality,
    )
    rows.valid[row] = True
    if most > 1:
        np.add.at(rows.words, row, spans.words())
    else:
        rows.words[row] = spans.words()
    if pairs:
        rows.has_vision[slot] = True
        rows.image_ids[slot] = spans.column("image_id")
    return rows


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


def _look_up(find: Callable[[int], OpenShard], plan: RowPlan) -> _Spans:
    """Find the spans in their shards, leaving out those whose sample is damaged."""
    order = np.argsort(plan.shards, kind="stable")
    shards = plan.shards[order]
    cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(order)]
    kept, ends, groups, count = [], [], [], 0
    for first, stop in itertools.pairwise(cuts if len(order) else []):
        opened, here = find(int(shards[first])), order[first:stop]
        samples = plan.samples[here]
        if opened.damaged:
            whole = ~opened.lost[samples]
            here, samples = here[whole], samples[whole]
        starts, offsets = plan.starts[here], opened.reader.columns["token_offsets"]
        low, high = offsets[samples], offsets[samples + 1]
        stops = low + starts + plan.lengths[here]
        kept.append(here)
        ends.append(stops > high)
        begins = low + starts - (starts > 0)  # the first input of a later piece is the last target before it
        groups.append(_Group(opened, slice(count, count + len(here)), samples, begins, np.minimum(stops, high)))
        count += len(here)
    order = _joined(kept)
    return _Spans(order, plan.starts[order], plan.lengths[order], _joined(ends).astype(np.bool_), groups)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


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
    read, counts = spans.tokens()
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
    sizes = {group.opened.vector_bytes for group in spans.groups}
    dtype = np.dtype(f"<f{sizes.pop() // VECTOR_SIZE}") if len(sizes) == 1 and 0 not in sizes else np.dtype("<f4")
    out = (np.empty if len(slot) == size else np.zeros)((size, VECTOR_SIZE), dtype)
    for group in spans.groups:
        reader, width = group.opened.reader, group.opened.vector_bytes
        to = slot[group.here]
        if width == out[0].nbytes:
            out.view(f"V{width}")[to, 0] = reader.data.blocks(group.column("vector_offset"), width)
        else:
            for place, sample in zip(to.tolist(), group.samples.tolist(), strict=True):
                out[place] = reader.vector(sample)
    return out
