"""The episodic memory against loops that follow its description word by word."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmar.model.memory import RIDGE, Episodes, MemoryState, commit, grow_older, read, write
from tests.support.batches import small_model


def random_state(slots: int, width: int, written: int, images: int, seed: int) -> MemoryState:
    g = torch.Generator().manual_seed(seed)
    state = MemoryState.empty(slots, width)
    state.keys[:written] = torch.randn(written, width, generator=g)
    state.values[:written] = torch.randn(written, width, generator=g)
    state.age[:written] = torch.randint(0, 50, (written,), generator=g)
    state.image_ids[:written] = torch.randint(1, images + 1, (written,), generator=g)
    state.written[:written] = True
    return state


def reference_read_attention(state: MemoryState, query: torch.Tensor, reader: int, sharpness: float) -> torch.Tensor:
    logits = {}
    for k in range(len(state.age)):
        if state.written[k] and not (reader != 0 and state.image_ids[k] == reader):
            cosine = float(query @ state.keys[k] / (query.norm() * state.keys[k].norm()))
            logits[k] = sharpness * cosine
    total = 1.0 + sum(math.exp(v) for v in logits.values())  # 1 = exp(0), the null slot
    value = torch.zeros_like(query)
    for k, v in logits.items():
        value += math.exp(v) / total * state.values[k]
    return value


def reference_read_larimar(state: MemoryState, query: torch.Tensor, reader: int) -> torch.Tensor:
    """w = q M^+ by torch's own ridge solution on the allowed rows only."""
    allowed = [k for k in range(len(state.age)) if state.written[k] and not (reader and state.image_ids[k] == reader)]
    if not allowed:
        return torch.zeros_like(query)
    keys = torch.nn.functional.normalize(state.keys[allowed].double(), dim=-1)
    q = torch.nn.functional.normalize(query.double(), dim=-1)
    augmented = torch.cat([keys.T, math.sqrt(RIDGE) * torch.eye(len(allowed), dtype=torch.float64)])
    target = torch.cat([q, torch.zeros(len(allowed), dtype=torch.float64)])
    weights = torch.linalg.lstsq(augmented, target[:, None]).solution[:, 0]
    return (weights @ state.values[allowed].double()).float()


@settings(max_examples=40)
@given(
    slots=st.sampled_from([1, 5, 37]),
    fill=st.floats(0, 1),
    reader=st.integers(0, 4),
    seed=st.integers(0, 10**6),
    addressing=st.sampled_from(["attention", "larimar"]),
)
def test_read_equals_reference(slots: int, fill: float, reader: int, seed: int, addressing: str) -> None:
    state = random_state(slots, 8, round(fill * slots), 4, seed)
    query = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed + 1))
    value, weights = read(state, query, torch.tensor([reader, 0]), 3.0, addressing)  # type: ignore[arg-type]
    for b, who in enumerate((reader, 0)):
        for t in range(3):
            if addressing == "attention":
                expected = reference_read_attention(state, query[b, t], who, 3.0)
            else:
                expected = reference_read_larimar(state, query[b, t], who)
            # least squares in fp32 at a condition number of up to slots / RIDGE
            tolerance = 1e-5 if addressing == "attention" else 2e-3
            torch.testing.assert_close(value[b, t], expected, rtol=tolerance, atol=tolerance)
        forbidden = ~state.written | ((state.image_ids == who) & (who != 0))
        assert (weights[b][:, forbidden] == 0).all()


def test_least_squares_is_larimars_read_of_larimars_direct_write() -> None:
    """W = Z M0^+, M = W^+ Z, w = z M^+, z_r = w M gives the projection of z on the episodes, as ours does."""
    g = torch.Generator().manual_seed(0)
    episodes = torch.nn.functional.normalize(torch.randn(5, 16, generator=g, dtype=torch.float64), dim=-1)
    prior = torch.randn(9, 16, generator=g, dtype=torch.float64)
    memory = torch.linalg.pinv(episodes @ torch.linalg.pinv(prior)) @ episodes
    z = torch.randn(16, generator=g, dtype=torch.float64)
    theirs = z @ torch.linalg.pinv(memory) @ memory
    state = MemoryState.empty(5, 16)
    state.keys[:], state.values[:], state.written[:] = episodes.float(), episodes.float(), True
    ours, _ = read(state, z.float()[None, None], torch.tensor([0]), 1.0, "larimar")
    torch.testing.assert_close(ours[0, 0].double() * z.norm(), theirs, rtol=2e-2, atol=2e-3)  # the ridge term


def reference_write(
    state: MemoryState, keys: torch.Tensor, values: torch.Tensor, ids: list[int], alpha: float, match: float
) -> MemoryState:
    slots = len(state.age)
    k, v, image = state.keys.clone(), state.values.clone(), state.image_ids.clone()
    written, age = state.written.clone(), state.age.clone()
    fresh: list[int] = []  # slots in the order of this call's writes
    for n, own in enumerate(ids):
        cosines = {
            s: float(torch.nn.functional.cosine_similarity(keys[n], k[s], dim=0))
            for s in range(slots)
            if written[s] and own != 0 and image[s] == own
        }
        slot = max(cosines, key=lambda s: cosines[s]) if cosines else -1
        if cosines and cosines[slot] >= match:
            k[slot] = (1 - alpha) * k[slot] + alpha * keys[n]
            v[slot] = (1 - alpha) * v[slot] + alpha * values[n]
        else:
            unwritten = [s for s in range(slots) if not written[s]]
            old = [s for s in range(slots) if s not in fresh]
            if unwritten:
                slot = unwritten[0]
            elif old:
                slot = max(old, key=lambda s: int(age[s]))
            else:
                slot = fresh[0]
            k[slot], v[slot], image[slot], written[slot] = keys[n], values[n], own, True
        if slot in fresh:
            fresh.remove(slot)
        fresh.append(slot)
    age[fresh] = 0
    return dataclasses.replace(state, keys=k, values=v, image_ids=image, written=written, age=age)


@settings(max_examples=80)
@given(
    slots=st.sampled_from([1, 3, 37]),
    fill=st.floats(0, 1),
    count=st.integers(0, 12),
    images=st.integers(1, 6),
    alpha=st.sampled_from([0.1, 0.5, 1.0]),
    match=st.sampled_from([-1.0, 0.2, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_write_equals_reference(
    slots: int, fill: float, count: int, images: int, alpha: float, match: float, seed: int
) -> None:
    """More episodes than slots, one slot, repeated images, images already there."""
    state = random_state(slots, 8, round(fill * slots), images, seed)
    g = torch.Generator().manual_seed(seed + 1)
    keys, values = torch.randn(count, 8, generator=g), torch.randn(count, 8, generator=g)
    ids = torch.randint(0, images + 1, (count,), generator=g).tolist()
    got, report = write(state, keys, values, ids, alpha, match)
    expected = reference_write(state, keys, values, ids, alpha, match)
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(got.tensors()[name], tensor, rtol=1e-5, atol=1e-6)
    assert len(report.slots) == count
    new = int(got.written.sum() - state.written.sum())
    assert report.blends + report.evictions + new == count


def test_write_is_differentiable_and_leaves_its_input_alone() -> None:
    state = random_state(3, 8, 3, 2, 0)
    before = {k: v.clone() for k, v in state.tensors().items()}
    keys, values = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    after, _ = write(state, keys, values, [1, 2, 3, 1, 1], 0.3, 0.0)
    (after.keys.sum() + after.values.square().sum()).backward()
    assert keys.grad is not None
    assert keys.grad.abs().sum() > 0
    assert all(torch.equal(before[k], v) for k, v in state.tensors().items())


def test_reads_that_matter_keep_a_slot_young() -> None:
    state = random_state(4, 8, 3, 2, 0)
    state.age[:3] = torch.tensor([5, 6, 7])
    mass = torch.tensor([10.0, 0.1, 0.0, 0.0], dtype=torch.float64)
    older = grow_older(state, mass)
    assert older.age.tolist() == [0, 7, 8, 0]
    assert older.usage.tolist() == mass.tolist()


def episodes(count: int, seed: int = 0) -> Episodes:
    g = torch.Generator().manual_seed(seed)
    surprise = torch.rand(count, generator=g)
    surprise[count // 2] = float("-inf")
    return Episodes(
        surprise=surprise,
        rows=torch.randperm(count, generator=g),
        image_ids=torch.arange(1, count + 1),
        keys=torch.randn(count, 16, generator=g),
        values=torch.randn(count, 16, generator=g),
    )


def test_the_most_surprising_are_written_ties_by_position() -> None:
    some = dataclasses.replace(
        episodes(5), surprise=torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), rows=torch.tensor([0, 9, 4, 1, 6])
    )
    assert some.best(4).rows.tolist() == [4, 6, 9, 1]


@pytest.mark.parametrize("slots", [1, 2, 37])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_commit_does_not_depend_on_how_episodes_are_split(slots: int, noise: float) -> None:
    config = small_model(memory_size=slots, writes_per_step=4, memory_noise=noise)
    state, mass = MemoryState.empty(slots, 16), torch.zeros(slots, dtype=torch.float64)
    whole = episodes(10)
    halves = [
        Episodes(*(getattr(whole, f.name)[s] for f in dataclasses.fields(whole))) for s in (slice(5), slice(5, 10))
    ]
    joined = Episodes.join([half.best(4) for half in reversed(halves)])
    one, report = commit(state, whole, mass, config, seed=1, step=3)
    two, _ = commit(state, joined, mass, config, seed=1, step=3)
    assert all(torch.equal(one.tensors()[name], two.tensors()[name]) for name in one.tensors())
    assert len(report.slots) == 4
    other, _ = commit(state, whole, mass, config, seed=1, step=4)
    assert torch.equal(one.keys, other.keys) == (noise == 0.0)


def test_rows_without_an_image_are_never_written() -> None:
    config = small_model(memory_size=5, writes_per_step=4)
    nothing = dataclasses.replace(episodes(6), surprise=torch.full((6,), float("-inf")))
    state, report = commit(MemoryState.empty(5, 16), nothing, torch.zeros(5, dtype=torch.float64), config, 0, 0)
    assert report.slots == ()
    assert not state.written.any()
