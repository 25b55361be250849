"""The loss of the output head, a block at a time, against torch's cross-entropy of all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmar.batch import IGNORE
from bitmar.model import head
from bitmar.model.head import token_losses

VOCABULARY, WIDTH = 37, 8


def inputs(positions: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, table, targets, a fifth of which count for nothing."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(positions, WIDTH, generator=generator), torch.randn(37, WIDTH, generator=generator)
    targets = torch.randint(0, VOCABULARY, (positions,), generator=generator)
    targets[torch.rand(positions, generator=generator) < 0.2] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def a_thread(block: int) -> int:
    """Logits of a thread that let blocks of so many positions be."""
    return -(-block * VOCABULARY // torch.get_num_threads())


@settings(max_examples=60)
@given(
    positions=st.integers(1, 50), block=st.integers(1, 60), factor=st.floats(-3, 3, width=32), seed=st.integers(0, 99)
)
def test_any_blocks_give_what_all_logits_give(positions: int, block: int, factor: float, seed: int) -> None:
    hidden, weight, targets = inputs(positions, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "BLOCK_LOGITS_A_THREAD", a_thread(block))
        losses = token_losses(hidden, weight, targets, entropy=True)
        gradients = torch.autograd.grad(factor * losses.total, (hidden, weight))
        with torch.no_grad():
            alone = token_losses(hidden, weight, targets, entropy=True)
    logits = F.linear(hidden, weight)
    each = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    expected = torch.autograd.grad(factor * each.sum(), (hidden, weight))
    torch.testing.assert_close(losses.each, each.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.total, each.sum(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(losses.hits, (logits.argmax(1) == targets))
    entropy = torch.special.entr(logits.detach().double().softmax(1)).sum(1)[targets != IGNORE].sum().float()
    for found in (losses.entropy, alone.entropy):
        torch.testing.assert_close(found, entropy, rtol=1e-5, atol=1e-4)


def test_the_blocks_are_alike_and_keep_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "BLOCK_LOGITS_A_THREAD", a_thread(10))
    weight = torch.zeros(VOCABULARY, WIDTH)
    for positions in range(1, 60):
        sizes = [block.stop - block.start for block in head._blocks(positions, head._block(positions, weight, 1))]
        assert sum(sizes) == positions
        assert max(sizes) <= 10
        assert len(sizes) == -(-positions // 10)
        assert max(sizes) - sizes[-1] < len(sizes)


def test_without_a_gradient_the_losses_are_the_same() -> None:
    hidden, weight, targets = inputs(20, seed=1)
    with_gradient = token_losses(hidden, weight, targets)
    with torch.no_grad():
        without = token_losses(hidden, weight, targets)
    assert with_gradient.total.requires_grad
    assert not with_gradient.each.requires_grad
    assert not without.total.requires_grad
    assert all(torch.equal(mine, other) for mine, other in zip(with_gradient, without, strict=True))


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    hidden, weight, targets = torch.full((2, 1), 1e4), torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([2, 0])
    losses = token_losses(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert losses.each.tolist() == [2e4, 0.0]
    losses.total.backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [2.0, 0.0]


def test_in_bf16_the_softmax_and_the_sums_stay_in_fp32() -> None:
    """As torch's own cross-entropy under autocast, whose logits are bf16 too."""
    hidden, weight, targets = inputs(50, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        losses = token_losses(hidden, weight, targets, entropy=True)
        logits = F.linear(hidden, weight)
        each = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    assert losses.each.dtype == torch.float32
    entropy = torch.special.entr(logits.detach().double().softmax(1)).sum(1)[targets != IGNORE].sum().float()
    torch.testing.assert_close(losses.entropy, entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(losses.each, each, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(losses.total, (hidden, weight))
    theirs = torch.autograd.grad(each.sum(), (hidden, weight))
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.01


def test_no_position_is_no_loss() -> None:
    losses = token_losses(torch.zeros(0, WIDTH), torch.zeros(VOCABULARY, WIDTH), torch.zeros(0, dtype=torch.int64))
    assert float(losses.total) == 0
    assert losses.each.shape == losses.hits.shape == (0,)
