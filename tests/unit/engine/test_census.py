"""The sums of a census do not depend on how the numbers are cut: into fragments of ranks, and into chunks, of
which short ones are joined."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitmar.config import COMPONENTS
from bitmar.engine import census
from bitmar.engine.census import SAMPLE, Matrix, Watched, gradient_sums, ternary_sums, update_sums
from bitmar.engine.fragments import Fragment

CPU = torch.device("cpu")
SIZES = {"encoder.a": 700, "encoder.b": 90, "memory.c": 333, "vision.norm": 17}
MATRICES = [
    *(Matrix("encoder.a.q", "encoder", "encoder.a", 0, 400), Matrix("encoder.a.k", "encoder", "encoder.a", 400, 700)),
    *(Matrix("encoder.b", "encoder", "encoder.b", 0, 90), Matrix("memory.c", "memory", "memory.c", 0, 333)),
]
RATES = {"encoder.a": (1e-2, 0.1), "encoder.b": (1e-2, 0.0), "memory.c": (0.0, 0.0), "vision.norm": (1e-2, 0.0)}
BETAS, EPS, STEP = (0.9, 0.95), 1e-8, 7


def numbers(seed: int) -> dict[str, dict[str, Tensor]]:
    """Whole parameters: gradient, weight and moments."""
    g = torch.Generator().manual_seed(seed)
    kinds = ("gradient", "model", "exp_avg", "exp_avg_sq")
    drawn = {name: {kind: torch.randn(size, generator=g) for kind in kinds} for name, size in SIZES.items()}
    for tensors in drawn.values():
        tensors["exp_avg_sq"].square_()
    return drawn


def cut(whole: dict[str, dict[str, Tensor]], at: float) -> list[list[Fragment]]:
    """The fragments of two ranks, the first of which holds a share `at` of each parameter."""
    ranks: list[list[Fragment]] = [[], []]
    for name, tensors in whole.items():
        middle = round(SIZES[name] * at)
        for rank, (first, last) in enumerate(((0, middle), (middle, SIZES[name]))):
            if first < last:
                ranks[rank].append(Fragment(name, first, {kind: t[first:last] for kind, t in tensors.items()}))
    return ranks


def in_one_place(fragments: list[Fragment]) -> Iterator[Fragment]:
    """The fragments one after the other in memory that is used again, as those that lie on NVMe."""
    places = {kind: torch.empty(max(SIZES.values())) for kind in ("gradient", "model", "exp_avg", "exp_avg_sq")}
    for fragment in fragments:
        held = {kind: places[kind][: len(numbers)].copy_(numbers) for kind, numbers in fragment.tensors.items()}
        yield Fragment(fragment.name, fragment.start, held)
        for place in places.values():
            place.fill_(torch.nan)


@settings(max_examples=40)
@given(at=st.floats(0, 1), chunk=st.integers(1, 50), short=st.floats(0, 1), seed=st.integers(0, 99))
def test_sums_over_ranks_are_those_of_the_whole_parameters(at: float, chunk: int, short: float, seed: int) -> None:
    whole = numbers(seed)
    scales = torch.rand(len(MATRICES), generator=torch.Generator().manual_seed(seed)) + 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(census, "CHUNK_OF_A_CPU", chunk * SAMPLE)
        patch.setattr(census, "SHORT_OF_A_CPU", int(short * chunk * SAMPLE))
        ranks = cut(whole, at)
        gradients = [gradient_sums(in_one_place(rank), CPU) for rank in ranks]
        updates = sum(update_sums(in_one_place(rank), RATES, BETAS, EPS, STEP, CPU) for rank in ranks)
        watched = [Watched(), Watched()]
        ternary = sum(ternary_sums(r, MATRICES, scales, w)[0] for r, w in zip(ranks, watched, strict=True))
        for tensors in whole.values():
            tensors["model"].neg_()  # every value but 0 changes
        flips = sum(ternary_sums(r, MATRICES, scales, w)[1] for r, w in zip(ranks, watched, strict=True))
    assert isinstance(updates, Tensor)
    assert isinstance(ternary, Tensor)
    assert isinstance(flips, Tensor)
    for row, component in enumerate(COMPONENTS):
        mine = [name for name in SIZES if name.startswith(f"{component}.")]
        of = {kind: [whole[name][kind].double() for name in mine] for kind in ("gradient", "model")}
        g = torch.cat(of["gradient"]) if mine else torch.zeros(1)
        summed = sum(table[row] for table, _ in gradients)
        assert isinstance(summed, Tensor)
        assert sum(float(sizes[row]) for _, sizes in gradients) == sum(SIZES[name] for name in mine)
        torch.testing.assert_close(summed[:2], torch.stack([g.sum(), g.square().sum()]).double(), rtol=1e-5, atol=1e-4)
        assert max(float(table[row, 2]) for table, _ in gradients) == g.abs().max().item()
        torch.testing.assert_close(updates[row], plain_update(whole, mine), rtol=1e-5, atol=1e-12)
    values = [
        -(whole[m.parameter]["model"][m.start : m.stop] / s).round().clamp(-1, 1)
        for m, s in zip(MATRICES, scales, strict=True)
    ]
    expected = [[len(v), int((v == 0).sum()), int((v == 1).sum())] for v in values]
    assert ternary.tolist() == expected
    seen = {m.component: [0, 0] for m in MATRICES}
    for m, v in zip(MATRICES, values, strict=True):
        seen[m.component][0] += int((v[::SAMPLE] != 0).sum())
        seen[m.component][1] += len(v[::SAMPLE])
    assert {c: flips[COMPONENTS.index(c)].int().tolist() for c in seen} == seen


def plain_update(whole: dict[str, dict[str, Tensor]], names: list[str]) -> Tensor:
    """(squares of the update, of the weights after it) by one step of AdamW done backwards, fp64."""
    changed = torch.zeros(2, dtype=torch.float64)
    for name in names:
        # the weights were negated for the flips since: both sums are of those before
        weight, mean, square = (whole[name][kind].double() for kind in ("model", "exp_avg", "exp_avg_sq"))
        weight, (rate, decay) = -weight, RATES[name]
        ascent = rate * (mean / (1 - BETAS[0] ** STEP)) / ((square / (1 - BETAS[1] ** STEP)).sqrt() + EPS)
        before = (weight + ascent) / (1 - rate * decay)
        changed += torch.stack([(weight - before).square().sum(), weight.square().sum()])
    return changed


def test_numbers_that_are_not_finite_are_counted() -> None:
    whole = numbers(1)
    whole["encoder.a"]["gradient"][[3, 500]] = torch.tensor([torch.nan, torch.inf])
    whole["memory.c"]["gradient"][7] = -torch.inf
    table, _ = gradient_sums(cut(whole, 1.0)[0], CPU)
    assert table[:, 3].tolist() == [{"encoder": 2.0, "memory": 1.0}.get(name, 0.0) for name in COMPONENTS]
    assert table[COMPONENTS.index("encoder"), 2].isnan()
    assert table[COMPONENTS.index("memory"), 2].isinf()
