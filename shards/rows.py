"""The rows of a global batch as numpy arrays.

Symbols: B rows of a micro-batch, T positions, S image slots of a row, V width of a vision vector, X spans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
        parts = []
        for start in range(0, len(self.rows), size):
            row = slice(start, start + size)
            slot = slice(start * self.slots, (start + size) * self.slots)
            by_row = {name: getattr(self, name)[row] for name in PER_ROW}
            by_slot = {name: getattr(self, name)[slot] for name in PER_SLOT}
            parts.append(replace(self, **by_row, **by_slot))
        return parts


class _Gathered:
    """The bytes and numbers of the whole spans of a plan, in its order."""

    __slots__ = ("image_ids", "skipped", "token_bytes", "tokens", "unended", "vectors", "words")

    def __init__(self) -> None:
        self.skipped: list[int] = []  # the spans of the plan that are damaged
        self.unended: list[int] = []  # those that do not end with eos
        self.tokens: list[bytes | memoryview] = []  # each span's tokens, with no specials
        self.token_bytes = 2
        self.words: list[int] = []
        self.image_ids: list[int] = []
        self.vectors: list[bytes | memoryview | np.ndarray] = []  # bytes as stored, or decoded


PER_ROW = ("tokens", "targets", "segments", "positions", "words", "rows", "valid")
PER_SLOT = ("vision", "has_vision", "image_ids")


def build_rows(find: Callable[[int], OpenShard], plan: RowPlan, positions: np.ndarray) -> Rows:
    """The rows of a plan as arrays; `positions` int64 [B] are their global positions.

    A damaged sample is masked: targets -100, no vision, no words. Raises DataError where a shard cannot be read.
    """
    size, pairs = len(plan.row_offsets) - 1, plan.modality == PAIRS
    per_row = plan.row_offsets[1:] - plan.row_offsets[:-1]
    most = int(per_row.max())
    row, segment, column = _places(plan, per_row, most)
    slots = plan.slots
    got = _gather(find, plan)
    begins, lengths, ends = plan.starts == 0, plan.lengths, np.ones(len(row), np.bool_)
    ends[got.unended] = False
    if got.skipped:
        parts = (row, segment, column, begins, lengths, ends)
        row, segment, column, begins, lengths, ends = (np.delete(part, got.skipped) for part in parts)
    slot = row * slots + segment if slots > 1 else row
    rows = Rows(
        *_lay_out(got, (size, plan.row_tokens), row * plan.row_tokens + column, lengths, segment + 1, begins, ends),
        vision=_vision(got, slot, size * slots) if pairs else np.zeros((size, VECTOR_SIZE), np.float16),
        has_vision=np.zeros(size * slots, np.bool_),
        image_ids=np.zeros(size * slots, np.int64),
        words=np.zeros(size, np.int64),
        rows=positions,
        valid=np.zeros(size, np.bool_),
        packed=slots > 1 or most > 1,
        slots=slots,
        modality=plan.modality,
    )
    rows.valid[row] = True
    if most > 1:
        np.add.at(rows.words, row, got.words)
    else:
        rows.words[row] = got.words
    if pairs:
        rows.has_vision[slot] = True
        rows.image_ids[slot] = got.image_ids
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


def _gather(find: Callable[[int], OpenShard], plan: RowPlan) -> _Gathered:
    """Look every span up: the one loop over spans, so it does as little as it can."""
    got = _Gathered()
    add_tokens, add_words, add_image_id, add_vector = (
        column.append for column in (got.tokens, got.words, got.image_ids, got.vectors)
    )
    pairs = plan.modality == PAIRS
    met: dict[int, tuple] = {}
    spans = zip(plan.shards.tolist(), plan.samples.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True)
    for number, (shard, sample, start, length) in enumerate(spans):
        if shard not in met:
            opened = find(shard)
            met[shard] = (opened, *opened.parts)
        opened, damaged, offsets, width, tokens, words, image_id, vector_offset, vector_bytes, data = met[shard]
        if sample in damaged:
            got.skipped.append(number)
            continue
        low, high = offsets[sample], offsets[sample + 1]
        if start == 0 and length > high - low:
            add_tokens(tokens[low * width : high * width])
            add_words(words[sample])
        else:
            stop = low + start + length
            if stop <= high:
                got.unended.append(number)
            stop = min(stop, high)
            add_tokens(tokens[(low + start - (start > 0)) * width : stop * width])
            add_words(opened.words_of(low + start, stop))
        if pairs:
            add_image_id(image_id[sample])
            place = vector_offset[sample]
            add_vector(data[place : place + vector_bytes] if vector_bytes else opened.reader.vector(sample))
        got.token_bytes = width
    return got


def _lay_out(
    got: _Gathered,
    shape: tuple[int, int],
    places: np.ndarray,
    lengths: np.ndarray,
    segments: np.ndarray,
    begins: np.ndarray,
    ends: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, segments, positions) [B, T] with spans of `lengths` positions at flat `places`.

    A span of n positions reads n + 1 tokens, specials included: its inputs are all but the last, its targets all
    but the first.
    """
    size = shape[0] * shape[1]
    tokens, targets = np.zeros(size, np.int64), np.full(size, IGNORED, np.int64)
    of_row, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
    if len(lengths):
        stops = np.cumsum(lengths + 1)
        firsts = stops - lengths - 1
        specials = firsts[begins], stops[ends] - 1
        read = np.empty(int(stops[-1]), np.int64)
        ordinary = np.ones(len(read), np.bool_)
        for special, token in zip(specials, (BOS, EOS), strict=True):
            read[special] = token
            ordinary[special] = False
        read[ordinary] = np.frombuffer(b"".join(got.tokens), f"<u{got.token_bytes}")
        span = np.repeat(np.arange(len(lengths)), lengths)
        source = np.arange(len(span)) + span  # each span before reads one token more than it has positions
        inside = source - firsts[span]
        to = inside + places[span]
        tokens[to], targets[to] = read[source], read[source + 1]
        of_row[to], positions[to] = segments[span], inside
    return tokens.reshape(shape), targets.reshape(shape), of_row.reshape(shape), positions.reshape(shape)


def _vision(got: _Gathered, slot: np.ndarray, size: int) -> np.ndarray:
    """float16 or float32 [size, V]: the vectors at their slots, in the dtype they are stored in."""
    raw = [vector for vector in got.vectors if isinstance(vector, bytes | memoryview)]
    sizes = {len(vector) // VECTOR_SIZE for vector in raw}
    if len(raw) == len(got.vectors) and len(sizes) == 1:
        vectors = np.frombuffer(bytearray().join(raw), f"<f{sizes.pop()}").reshape(-1, VECTOR_SIZE)
        if len(vectors) == size:
            return vectors
    else:
        vectors = np.zeros((len(got.vectors), VECTOR_SIZE), np.float32)
        for at, vector in enumerate(got.vectors):
            decoded = isinstance(vector, np.ndarray)
            vectors[at] = vector if decoded else np.frombuffer(vector, f"<f{len(vector) // VECTOR_SIZE}")
    out = np.zeros((size, VECTOR_SIZE), vectors.dtype)
    out[slot] = vectors
    return out
