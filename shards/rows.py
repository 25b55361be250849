"""The rows of a global batch as numpy arrays.

Symbols: B rows of a micro-batch, T positions, V width of a vision vector, G rows of a global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.dataset import Split
from shards.order import GlobalBatchPlan
from shards.record import VECTOR_SIZE
from shards.tokenizer import BOS, EOS

IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """One micro-batch: B rows of T positions."""

    tokens: np.ndarray  # int64 [B, T]: inputs, 0 where padded
    targets: np.ndarray  # int64 [B, T]: next tokens, -100 where padded or masked
    segments: np.ndarray  # int32 [B, T]: 1, 2, ... per record in the row, 0 = padding
    positions: np.ndarray  # int32 [B, T]: restart at each record
    vision: np.ndarray  # float32 [B, V]: zeros where none
    has_vision: np.ndarray  # bool [B]
    image_ids: np.ndarray  # int64 [B]: 0 = none
    words: np.ndarray  # int64 [B]: words whose first token is a target of the row
    rows: np.ndarray  # int64 [B]: (phase << 40) | (step * G + index in the global batch)
    valid: np.ndarray  # bool [B]: False where all targets are -100 (filler, damaged)
    packed: bool  # a row holds more than one record: attention needs the segments
    modality: str


def build_rows(split: Split, plan: GlobalBatchPlan, first: int, count: int, row_base: int) -> Rows:
    """Rows first : first + count of a global batch as arrays.

    row_base: the global position of the batch's row 0. A damaged sample is masked: targets -100, no
    vision, no words.
    """
    size, width = count, plan.row_tokens
    rows = Rows(
        tokens=np.zeros((size, width), np.int64),
        targets=np.full((size, width), IGNORED, np.int64),
        segments=np.zeros((size, width), np.int32),
        positions=np.zeros((size, width), np.int32),
        vision=np.zeros((size, VECTOR_SIZE), np.float32),
        has_vision=np.zeros(size, np.bool_),
        image_ids=np.zeros(size, np.int64),
        words=np.zeros(size, np.int64),
        rows=row_base + np.arange(first, first + size, dtype=np.int64),
        valid=np.zeros(size, np.bool_),
        packed=bool((np.diff(plan.row_offsets[first : first + size + 1]) > 1).any()),
        modality=plan.modality,
    )
    offsets = plan.row_offsets.tolist()
    for row in range(size):
        low, high = offsets[first + row], offsets[first + row + 1]
        at = 0
        for segment, span in enumerate(range(low, high), 1):
            length = int(plan.lengths[span])
            _fill(split, rows, row, (int(plan.samples[span]), int(plan.starts[span]), length), at, segment)
            at += length
    return rows


def _fill(split: Split, rows: Rows, row: int, span: tuple[int, int, int], at: int, segment: int) -> None:
    """Write one span (sample, start, length) into `row` from position `at` on."""
    sample, start, length = span
    reader, local, whole = split.reader(sample)
    if not whole:
        return
    here = slice(at, at + length)
    tokens = reader.sample_tokens(local)
    stop = start + length
    inputs, targets = rows.tokens[row, here], rows.targets[row, here]
    if start == 0:
        inputs[0] = BOS
        inputs[1:] = tokens[: stop - 1]
    else:
        inputs[:] = tokens[start - 1 : stop - 1]
    if stop == len(tokens) + 1:
        targets[:-1] = tokens[start:]
        targets[-1] = EOS
    else:
        targets[:] = tokens[start:stop]
    rows.segments[row, here] = segment
    rows.positions[row, here] = np.arange(length, dtype=np.int32)
    if length == len(tokens) + 1:
        rows.words[row] += reader.words[local]
    else:
        rows.words[row] += reader.sample_word_starts(local)[start:stop].sum(dtype=np.int64)
    rows.valid[row] = True
    if rows.modality == "pairs":
        rows.has_vision[row] = reader.copy_vector(local, rows.vision[row])
        rows.image_ids[row] = reader.image_id[local]
