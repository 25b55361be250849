"""Packed captions: each gives what it gives alone, none sees another, and empty slots do nothing."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitmar.batch import Batch, Packing
from bitmar.engine.world import World
from bitmar.losses import compute_losses, loss_counts
from bitmar.model.bitmar import BitMar, Outputs
from bitmar.model.memory import Episodes, MemoryState
from tests.support.batches import VOCABULARY, caption_batch, logits_of, packed_captions, small_model

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
ALL = {"lm", "contrastive", "recall"}
CAPTIONS = 12
LENGTH = 8  # of the longest caption
ROWS = [[3, 0, 7], [1], [4, 5, 2, 6], [8, 10], [], [9, 11], [], []]


def one_a_row() -> Batch:
    """Captions of unequal lengths, one a row, each of them counted."""
    batch = caption_batch(rows=CAPTIONS + 1, length=LENGTH, seed=2)
    parts = {name: value[:CAPTIONS] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return batch.replace(**parts)


def ordered(batch: Batch, rows: list[list[int]]) -> Batch:
    """The captions of `rows` one a row, in that order."""
    order = [caption for row in rows for caption in row]
    return batch.replace(**{name: value[order] for name, value in vars(batch).items() if isinstance(value, Tensor)})


def build(addressing: str = "attention", quantization: bool = False, **changes: object) -> tuple[BitMar, MemoryState]:
    """A model with open gates and a full memory that holds episodes of the captions' own images too."""
    config = small_model(memory_addressing=addressing, quantization=quantization, **changes)
    torch.manual_seed(3)
    model = BitMar(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(5.0)
    state = MemoryState.empty(config.memory_size, config.episode_dim)
    memory = dataclasses.replace(
        state,
        keys=torch.randn(state.keys.shape),
        values=torch.randn(state.keys.shape),
        image_ids=torch.tensor([1, 2, 3, 90, 91, 92, 93]),
        written=torch.ones_like(state.written),
    )
    return model, memory


def token_logits(outputs: Outputs, batch: Batch) -> Tensor:
    """The logits of each caption's tokens, caption after caption."""
    assert outputs.logits is not None
    return outputs.logits[batch.segments > 0]


@pytest.mark.parametrize("addressing", ["attention", "larimar"])
@pytest.mark.parametrize("group", [2, 4])
def test_losses_and_gradients_are_those_of_the_same_captions_one_a_row(addressing: str, group: int) -> None:
    """Within 2e-5 of the largest, in fp32. Captions before a block's end are a multiple of the group: equal groups."""
    model, memory = build(addressing, contrastive_group=group, recall_group=group)
    batch = one_a_row()
    rows = [[3, 0, 7], [1], [4, 5, 2, 6], [8, 10, 9, 11]] if group == 4 else [[3, 0, 7], [1], [4, 5, 2], [6, 8, 10]]
    sides = []
    for side in (packed_captions(batch, rows, 4 * LENGTH, slots=5), ordered(batch, rows)):
        groups = side.groups(group)
        outputs = model(side, memory, recall=True, logits=True)
        losses = compute_losses(outputs, side, ALONE, model.config, ALL)
        model.zero_grad()
        torch.stack([*losses.sums.values(), 0.1 * outputs.side_sum()]).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        sides.append((outputs, losses, gradients, token_logits(outputs, side), loss_counts(side), groups))
    (packed, losses, gradients, logits, counts, groups), (alone, *expected) = sides
    assert torch.equal(groups, expected[-1]), "the two sides compare other captions"
    close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5)
    close(logits, expected[2])
    for name in ("text_latent", "vision_latent", "keys", "episodes", "recalled"):
        close(getattr(packed, name), getattr(alone, name))
    torch.testing.assert_close(packed.read_mass, alone.read_mass, rtol=1e-5, atol=1e-6)
    close(losses.surprise, expected[0].surprise)
    assert {n: int(c) for n, c in counts.items()} == {n: int(c) for n, c in expected[3].items()}
    for name, total in losses.sums.items():
        close(total, expected[0].sums[name])
    top = max(float(g.abs().max()) for g in expected[1].values())
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert float((gradient - expected[1][name]).abs().max()) < 2e-5 * top, name


@pytest.mark.parametrize("quantization", [True, False], ids=["rounded", "exact"])
@pytest.mark.parametrize("addressing", ["attention", "larimar"])
def test_a_caption_changes_no_other_of_its_row(addressing: str, quantization: bool) -> None:
    """Its tokens, its vector, its image id: bit for bit the same logits, latents and episodes of all others."""
    model, memory = build(addressing, quantization)
    batch = packed_captions(one_a_row(), ROWS, 32, slots=5)
    before = model(batch, memory, logits=True)
    assert before.logits is not None
    for n, (row, slot) in enumerate((r, s) for r, captions in enumerate(ROWS) for s in range(len(captions))):
        mine = torch.zeros_like(batch.segments, dtype=torch.bool)
        mine[row] = batch.segments[row] == slot + 1
        vision, ids = batch.vision.clone(), batch.image_ids.clone()
        vision[n] += 1.0
        ids[n] = 90
        changes = {
            "tokens": torch.where(mine, (batch.tokens + 1) % VOCABULARY, batch.tokens),
            "vision": vision,
            "image_ids": ids,
        }
        for name, change in changes.items():
            after = model(batch.replace(**{name: change}), memory, logits=True)
            assert after.logits is not None
            others = (batch.segments > 0) & ~mine
            assert torch.equal(before.logits[others], after.logits[others]), (name, row, slot)
            assert not torch.equal(before.logits[mine], after.logits[mine]), (name, row, slot)
            for field in ("text_latent", "vision_latent", "keys", "episodes"):
                one, other = getattr(before, field).clone(), getattr(after, field).clone()
                one[n] = other[n] = 0
                assert torch.equal(one, other), (name, field)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("recall", [False, True], ids=["plain", "recall"])
def test_a_token_changes_no_earlier_logit_of_its_row(training: bool, recall: bool) -> None:
    model, memory = build("attention", quantization=True, dropout=0.2)
    model.train(training)
    batch = packed_captions(one_a_row(), ROWS, 32, slots=5)
    before = logits_of(model, batch, memory, recall)
    real = batch.segments > 0
    for j in range(int(real.sum(1).max())):
        tokens = batch.tokens.clone()
        tokens[:, j] = (tokens[:, j] + 1) % VOCABULARY
        after = logits_of(model, batch.replace(tokens=tokens), memory, recall)
        assert torch.equal(before[:, :j][real[:, :j]], after[:, :j][real[:, :j]]), f"token {j} changed an earlier logit"
        assert not torch.equal(before[:, j], after[:, j]), f"token {j} changed nothing: the test proves nothing"


def test_a_reader_never_receives_its_own_images_episode() -> None:
    model, memory = build()
    batch = packed_captions(one_a_row(), ROWS, 32, slots=5)
    image = next(i for i in batch.image_ids.tolist() if i in memory.image_ids.tolist())
    hidden = memory.image_ids == image
    changed = dataclasses.replace(memory, values=memory.values + 10.0 * hidden[:, None])
    before, after = (logits_of(model, batch, m)[batch.segments > 0] for m in (memory, changed))
    assert batch.packing is not None
    own = (batch.image_ids == image).repeat_interleave(batch.packing.lengths)
    assert torch.equal(before[own], after[own])
    assert not torch.equal(before[~own], after[~own])


def test_empty_slots_and_rows_do_nothing() -> None:
    """A batch without captions, and rows without any: finite, no loss, no read, no episode, no gradient of a loss."""
    model, memory = build(quantization=True)
    batch = packed_captions(one_a_row(), [[], [], [], []], 6, slots=3)
    outputs = model(batch, memory, recall=True)
    losses = compute_losses(outputs, batch, ALONE, model.config, ALL)
    assert all(float(total.detach()) == 0.0 for total in losses.sums.values())
    assert not outputs.read_mass.any()
    assert int(batch.samples) == 0
    assert torch.isneginf(losses.surprise).all()
    (torch.stack(list(losses.sums.values())).sum() + 0.0 * outputs.side_sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    full = packed_captions(one_a_row(), ROWS[:4], 32, slots=5)
    padded = packed_captions(one_a_row(), [*ROWS[:4], [], [], [], []], 32, slots=5)
    one, other = (compute_losses(model(b, memory, True), b, ALONE, model.config, ALL).sums for b in (full, padded))
    for name, total in one.items():
        torch.testing.assert_close(total, other[name], rtol=1e-6, atol=0)


def test_captions_are_counted_and_numbered() -> None:
    batch = packed_captions(one_a_row(), ROWS, 32, slots=5)
    assert int(batch.samples) == CAPTIONS
    places = [5 * row + slot for row, captions in enumerate(ROWS) for slot in range(len(captions))]
    assert batch.captions.tolist() == places
    assert batch.groups(4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1], [10, 11, -1, -1]]


def test_ranks_offer_equally_many_episodes() -> None:
    few = Episodes(torch.ones(2), torch.arange(2), torch.ones(2, dtype=torch.int64), torch.ones(2, 4), torch.ones(2, 4))
    filled = few.filled(5)
    assert len(filled.rows) == 5
    assert torch.isneginf(filled.surprise[2:]).all()
    assert torch.equal(filled.keys[:2], few.keys)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 7), max_size=5), min_size=1, max_size=6),
    st.integers(0, 4),
    st.integers(0, 3),
)
def test_packing_moves_each_position_there_and_back(rows: list[list[int]], pad: int, more: int) -> None:
    """Any layout, empty slots too: apart() gives each caption's positions and 0 past its end, together() undoes it."""
    width = max(1, max(sum(row) for row in rows) + pad)
    slots = max(1, max(len(row) for row in rows) + more)
    segments = torch.zeros(len(rows), width, dtype=torch.int32)
    for i, row in enumerate(rows):
        ends = torch.tensor([0, *row]).cumsum(0).tolist()
        for slot, (begin, end) in enumerate(pairwise(ends)):
            segments[i, begin:end] = slot + 1
    packing, real = Packing.of(segments.numpy(), slots), segments > 0
    lengths = [length for row in rows for length in row if length]
    assert packing.lengths.tolist() == (lengths or [0])
    places = [i * slots + slot for i, row in enumerate(rows) for slot, length in enumerate(row) if length]
    assert packing.places.tolist() == (places or [0])
    x = torch.randn(len(rows), width, 3, requires_grad=True)
    apart = packing.apart(x)
    assert not apart[~packing.inside].any()
    assert torch.equal(packing.together(apart), x * real[..., None])
    standing = torch.cat(packing.split_captions(torch.arange(len(packing.places))))
    of_tokens = list(x[real].split(lengths))
    for n, taken in zip(standing.tolist(), (c for chunk in packing.split(apart) for c in chunk), strict=True):
        length = int(packing.lengths[n])
        assert not taken[length:].any()
        assert length == 0 or torch.equal(taken[:length], of_tokens[n])
    expected = torch.stack([part.sum(0) for part in of_tokens]) if lengths else torch.zeros(1, 3)
    torch.testing.assert_close(packing.total(x), expected)
    (apart * (1 + torch.rand_like(apart))).sum().backward()
    assert x.grad is not None
    assert not x.grad[~real].any()
    assert (x.grad[real] >= 1).all()
