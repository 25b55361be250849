"""Small models and batches made up for tests: captions with images, or packed text rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from bitmar.batch import IGNORE, Batch, Packing
from bitmar.config import ModelConfig
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState, write
from shards.rows import Rows

VOCABULARY = 97


def small_model(**changes: object) -> ModelConfig:
    """A BitMar of a few thousand parameters with every part in place."""
    values: dict[str, object] = dict(
        vocab_size=VOCABULARY,
        width=32,
        heads=2,
        ffn_width=48,
        encoder_layers=2,
        decoder_layers=2,
        vision_layers=1,
        fusion_layers=1,
        vision_tokens=3,
        vision_encoder_dim=24,
        vision_hidden_size=16,
        vision_latent_size=20,
        text_latent_size=20,
        memory_size=7,
        episode_dim=16,
        writes_per_step=3,
        recall_group=2,
        contrastive_group=4,
    )
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def caption_batch(rows: int = 8, length: int = 12, seed: int = 0, first_row: int = 0, images: int = 6) -> Batch:
    """Captions of unequal length; images repeat, and the last row is a masked filler when rows > 4."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (rows,), generator=g)
    lengths[0] = length
    valid = torch.ones(rows, dtype=torch.bool)
    if rows > 4:
        valid[-1] = False
    inside = (torch.arange(length) < lengths[:, None]) & valid[:, None]
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=g) * inside
    targets = torch.randint(3, VOCABULARY, (rows, length), generator=g).masked_fill(~inside, IGNORE)
    image = torch.randint(0, images, (rows,), generator=g)
    table = torch.randn(images, 24, generator=torch.Generator().manual_seed(99))
    return Batch(
        tokens=tokens,
        targets=targets,
        segments=inside.int(),
        positions=(torch.arange(length) * inside).int(),
        vision=table[image] * valid[:, None],
        has_vision=valid.clone(),
        image_ids=(image + 1) * valid,
        words=lengths * valid,
        rows=torch.arange(first_row, first_row + rows),
        valid=valid,
        packed=False,
    )


def text_batch(rows: int = 8, length: int = 12, seed: int = 0, first_row: int = 0) -> Batch:
    """Packed rows: three records each, no image."""
    g = torch.Generator().manual_seed(seed)
    segments = torch.sort(torch.randint(1, 4, (rows, length), generator=g), dim=1).values
    starts = torch.cat([torch.ones(rows, 1, dtype=torch.bool), segments[:, 1:] != segments[:, :-1]], dim=1)
    index = torch.arange(length).expand(rows, length)
    begin = torch.where(starts, index, 0).cummax(1).values
    return Batch(
        tokens=torch.randint(3, VOCABULARY, (rows, length), generator=g),
        targets=torch.randint(3, VOCABULARY, (rows, length), generator=g),
        segments=segments.int(),
        positions=(index - begin).int(),
        vision=torch.zeros(rows, 24),
        has_vision=torch.zeros(rows, dtype=torch.bool),
        image_ids=torch.zeros(rows, dtype=torch.int64),
        words=torch.full((rows,), length),
        rows=torch.arange(first_row, first_row + rows),
        valid=torch.ones(rows, dtype=torch.bool),
        packed=True,
    )


def packed_captions(batch: Batch, rows: list[list[int]], length: int, slots: int) -> Batch:
    """The captions `rows[i]` of an unpacked batch in row i of a packed one, in order; a row without any is masked."""
    shape = (len(rows), length)
    tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
    segments, positions = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    for row, captions in enumerate(rows):
        filled = 0
        for slot, caption in enumerate(captions):
            count = int(batch.segments[caption].sum())
            here = slice(filled, filled + count)
            tokens[row, here], targets[row, here] = batch.tokens[caption, :count], batch.targets[caption, :count]
            segments[row, here], positions[row, here] = slot + 1, torch.arange(count, dtype=torch.int32)
            filled += count
    chosen = torch.tensor([caption for captions in rows for caption in captions] or [0])
    held = any(rows)
    return Batch(
        tokens=tokens,
        targets=targets,
        segments=segments,
        positions=positions,
        vision=batch.vision[chosen],
        has_vision=batch.has_vision[chosen] & held,
        image_ids=batch.image_ids[chosen] * held,
        words=torch.tensor([int(batch.words[captions].sum()) for captions in rows]),
        rows=torch.arange(len(rows)),
        valid=torch.tensor([bool(captions) for captions in rows]),
        packed=True,
        packing=Packing.of(segments.numpy(), slots),
    )


def filled_memory(config: ModelConfig) -> MemoryState:
    """With episodes of other images in all slots but two."""
    g = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(config.memory_size - 2, config.episode_dim, generator=g) for _ in range(2))
    empty = MemoryState.empty(config.memory_size, config.episode_dim)
    return write(empty, keys, values, [100 + i for i in range(len(keys))], 0.3, 0.5)[0]


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Rows start to stop of a batch."""
    parts = {
        name: value[start:stop] for name, value in vars(batch).items() if name not in ("packed", "packing", "trained")
    }
    return batch.replace(**parts)


def logits_of(model: BitMar, batch: Batch, memory: MemoryState, recall: bool = False) -> torch.Tensor:
    """[B, T, V]"""
    logits = model(batch, memory, recall, logits=True).logits
    assert logits is not None
    return logits


def rows_of(batch: Batch, sources: list[int]) -> Rows:
    """A batch as the loader gives it."""
    fields = {f.name for f in dataclasses.fields(Rows)}
    arrays = {name: value.numpy() for name, value in vars(batch).items() if name in fields and name != "packed"}
    modality = "pairs" if batch.has_vision.any() else "text"
    return Rows(**arrays, sources=np.array(sources), packed=batch.packed, slots=1, modality=modality)
