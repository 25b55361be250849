"""No label leak: a token changes no logit before it, and no reader receives its own image's episode."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch

from bitmar.batch import Batch
from bitmar.config import ModelConfig
from bitmar.engine.world import World
from bitmar.losses import compute_losses
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from tests.support.batches import VOCABULARY, caption_batch, logits_of, small_model, text_batch

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def full_memory(config: ModelConfig, image_ids: list[int] | None = None) -> MemoryState:
    g = torch.Generator().manual_seed(5)
    slots, width = config.memory_size, config.episode_dim
    empty = MemoryState.empty(slots, width)
    ids = torch.tensor(image_ids) if image_ids else torch.arange(100, 100 + slots)
    return dataclasses.replace(
        empty,
        keys=torch.randn(slots, width, generator=g),
        values=torch.randn(slots, width, generator=g),
        image_ids=ids,
        written=torch.ones(slots, dtype=torch.bool),
    )


def open_gates(model: BitMar) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(5.0)


def trained(model: BitMar, memory: MemoryState) -> BitMar:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for seed in range(5):
        for batch in (caption_batch(seed=seed), text_batch(seed=seed)):
            losses = compute_losses(
                model(batch, memory, recall=True), batch, ALONE, model.config, {"contrastive", "recall"}
            )
            optimizer.zero_grad()
            torch.stack(list(losses.sums.values())).sum().backward()
            optimizer.step()
    return model


@functools.cache
def built(addressing: str, state: str, dropout: float) -> tuple[BitMar, MemoryState]:
    config = small_model(memory_addressing=addressing, dropout=dropout)
    torch.manual_seed(3)
    model, memory = BitMar(config), full_memory(config)
    if state == "trained":
        trained(model, memory)
    open_gates(model)
    return model, memory


def build(addressing: str, state: str, dropout: float = 0.0) -> tuple[BitMar, MemoryState]:
    """The caller's own copy: a training serves all tests."""
    return copy.deepcopy(built(addressing, state, dropout))


def batch_of(kind: str) -> Batch:
    return text_batch(seed=4) if kind == "packed" else caption_batch(seed=4)


@pytest.mark.parametrize("kind", ["captions", "packed"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("state", [pytest.param("fresh", marks=pytest.mark.slow), "trained"])
@pytest.mark.parametrize("addressing", ["attention", "larimar"])
@pytest.mark.parametrize("recall", [False, True], ids=["plain", "recall"])
def test_a_token_changes_no_earlier_logit(addressing: str, state: str, training: bool, kind: str, recall: bool) -> None:
    model, memory = build(addressing, state, dropout=0.2)
    model.train(training)
    batch = batch_of(kind)
    before = logits_of(model, batch, memory, recall)
    for j in range(batch.tokens.shape[1]):
        tokens = batch.tokens.clone()
        tokens[:, j] = (tokens[:, j] + 1) % VOCABULARY
        after = logits_of(model, batch.replace(tokens=tokens), memory, recall)
        assert torch.equal(before[:, :j], after[:, :j]), f"token {j} changed an earlier logit"
        assert not torch.equal(before[:, j:], after[:, j:]), f"token {j} changed nothing: the test proves nothing"


@pytest.mark.parametrize("make", [caption_batch, text_batch])
@pytest.mark.parametrize("j", [1, 100, 171])
def test_long_rows_leak_nothing_either(make, j: int) -> None:
    """Longer than one block of the attention kernels."""
    model, memory = build("attention", "fresh")
    batch = make(rows=2, length=200)
    before = logits_of(model, batch, memory)
    tokens = batch.tokens.clone()
    tokens[:, j] = (tokens[:, j] + 1) % VOCABULARY
    after = logits_of(model, batch.replace(tokens=tokens), memory)
    assert torch.equal(before[:, :j], after[:, :j])
    assert not torch.equal(before[:, j], after[:, j])


@pytest.mark.parametrize("addressing", ["attention", "larimar"])
def test_bf16_leaks_nothing_either(addressing: str) -> None:
    model, memory = build(addressing, "fresh")
    model.compute_dtype = torch.bfloat16
    batch = caption_batch(seed=4)
    before = logits_of(model, batch, memory)
    for j in (1, 5, 9):
        tokens = batch.tokens.clone()
        tokens[:, j] = (tokens[:, j] + 1) % VOCABULARY
        assert torch.equal(before[:, :j], logits_of(model, batch.replace(tokens=tokens), memory)[:, :j])


def test_records_of_a_packed_row_do_not_see_each_other() -> None:
    model, memory = build("attention", "trained")
    batch = text_batch(seed=4)
    before = logits_of(model, batch, memory)
    first = batch.segments == 1
    tokens = torch.where(first, (batch.tokens + 1) % VOCABULARY, batch.tokens)
    after = logits_of(model, batch.replace(tokens=tokens), memory)
    assert torch.equal(before[~first], after[~first])
    assert not torch.equal(before[first], after[first])


def test_a_record_gives_the_same_logits_packed_and_alone() -> None:
    model, memory = build("attention", "trained")
    batch = text_batch(rows=1, length=16, seed=4)
    together = logits_of(model, batch, memory)[0]
    for segment in batch.segments[0].unique().tolist():
        inside = batch.segments[0] == segment
        count = int(inside.sum())
        alone = text_batch(rows=1, length=count).replace(
            tokens=batch.tokens[:, inside],
            targets=batch.targets[:, inside],
            segments=torch.ones(1, count, dtype=torch.int32),
            positions=torch.arange(count, dtype=torch.int32)[None],
            packed=False,
        )
        torch.testing.assert_close(logits_of(model, alone, memory)[0], together[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("addressing", ["attention", "larimar"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_reader_never_receives_its_own_images_episode(addressing: str, training: bool) -> None:
    model, _ = build(addressing, "trained")
    model.train(training)
    batch = caption_batch(seed=4)
    reader = int(batch.image_ids[0])
    memory = full_memory(model.config, [reader, 900, reader, 901, 902, 903, 904])
    changed = dataclasses.replace(memory, values=memory.values.clone(), keys=memory.keys.clone())
    changed.values[[0, 2]] += 10.0
    changed.keys[[0, 2]] *= -3.0
    before, after = logits_of(model, batch, memory), logits_of(model, batch, changed)
    own = batch.image_ids == reader
    assert torch.equal(before[own], after[own])
    others = batch.valid & ~own
    assert not torch.equal(before[others], after[others])


@pytest.mark.parametrize("addressing", ["attention", "larimar"])
def test_the_right_image_matters_and_no_image_is_no_image(addressing: str) -> None:
    model, memory = build(addressing, "fresh")
    batch = caption_batch(seed=4)
    moved = batch.replace(vision=batch.vision.roll(1, 0))
    assert not torch.equal(logits_of(model, batch, memory), logits_of(model, moved, memory))
    blind = batch.replace(has_vision=torch.zeros_like(batch.has_vision))
    moved = blind.replace(vision=batch.vision.roll(1, 0))
    assert torch.equal(logits_of(model, blind, memory), logits_of(model, moved, memory))
