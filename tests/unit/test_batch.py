"""Batches from the loader's rows."""

from __future__ import annotations

import numpy as np
import torch

from bitmar.batch import IGNORE, Batch
from shards.rows import Rows


def test_a_batch_knows_which_positions_are_trained() -> None:
    """Row by row, padding and masked rows left out."""
    targets = np.array([[5, 6, IGNORE], [7, IGNORE, IGNORE], [IGNORE, IGNORE, IGNORE], [1, 2, 3]])
    whole = np.zeros(4, dtype=np.int64)
    rows = Rows(
        tokens=targets.clip(0),
        targets=targets,
        segments=(targets != IGNORE).astype(np.int32),
        positions=np.zeros((4, 3), dtype=np.int32),
        vision=np.zeros((4, 8), dtype=np.float16),
        has_vision=np.ones(4, dtype=bool),
        image_ids=whole,
        sources=whole,
        words=whole,
        rows=whole,
        valid=np.array([True, True, False, True]),
        packed=False,
        slots=1,
        modality="pairs",
    )
    batch = Batch.from_rows(rows)
    assert batch.trained is not None
    assert batch.trained.tolist() == [0, 1, 3, 9, 10, 11]
    assert (batch.targets.flatten()[batch.trained] != IGNORE).all()
    assert torch.equal(batch.targets, torch.from_numpy(targets))
