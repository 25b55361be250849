"""What a forward pass shows of its attention heads, and the gates on them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitmar.model.bitmar import HEAD_KINDS, BitMar
from tests.support.batches import make_batch, make_memory, small_model


def test_shown_heads_change_nothing_but_the_order_of_sums() -> None:
    model, batch, memory = BitMar(small_model()), make_batch(), make_memory()
    plain, shown = model(batch, memory), model(batch, memory, heads=True)
    assert not plain.heads
    torch.testing.assert_close(shown.token_losses, plain.token_losses, atol=1e-4, rtol=1e-4)
