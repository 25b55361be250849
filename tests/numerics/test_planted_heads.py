"""Heads that were built by hand are told for what they are, and the useless one comes last."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitmar.analysis.head_types import CRITERIA, DEAD, OTHER, HeadType, classify, classify_heads
from bitmar.analysis.heads import ablation, check_rankings, existing_heads, loss_without, measure_heads, ranked
from bitmar.analysis.lofit import Fit, edits_of, select_heads, tune_biases
from bitmar.analysis.surgery import Surgery, edit_parameters
from bitmar.head_names import HeadName, parse_heads
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from tests.support.batches import caption_batch, filled_memory, small_model
from tests.support.planted import (
    CURRENT,
    EVEN,
    INDUCTION,
    PREVIOUS,
    SINK,
    USELESS,
    planted_model,
    repeated_batch,
)

ENCODER = ("encoder",)


@pytest.fixture(scope="module")
def planted() -> tuple[BitMar, MemoryState]:
    model = planted_model()
    return model, MemoryState.empty(model.config.memory_size, model.config.episode_dim)


@pytest.fixture(scope="module")
def types(planted: tuple[BitMar, MemoryState]) -> dict[HeadName, HeadType]:
    found = classify_heads(*planted, [repeated_batch(seed=seed) for seed in range(2)], lambda token: f"w{token}")
    return {head.head: head for head in found}


def test_each_planted_head_is_told_for_what_it_is(types: dict[HeadName, HeadType]) -> None:
    expected = {
        PREVIOUS: "previous token",
        SINK: "first token (sink)",
        INDUCTION: "induction",
        CURRENT: "current token",
        EVEN: OTHER,
        USELESS: OTHER,
    }
    assert {head: types[head].type for head in expected} == expected, {h: dict(types[h].numbers) for h in expected}
    assert types[EVEN].dead == ("uniform",)
    assert "no variation over inputs" in types[SINK].dead, "it hands on the same token whatever the text"
    assert types[PREVIOUS].dead == types[INDUCTION].dead == types[CURRENT].dead == ()


def test_the_useless_head_comes_last_by_gate_gradient(planted: tuple[BitMar, MemoryState]) -> None:
    figures = measure_heads(*planted, [repeated_batch(seed=seed) for seed in range(3)])
    order = ranked({"encoder": figures.importance["encoder"]})
    assert order[-1] == USELESS
    assert figures.importance["encoder"][USELESS.layer, USELESS.head] == 0
    assert figures.importance["encoder"][order[-2].layer, order[-2].head] > 0
    assert order[0] == INDUCTION, "half of the text can be foretold by it alone"


@pytest.mark.slow
def test_the_useless_head_comes_last_by_lofit(planted: tuple[BitMar, MemoryState]) -> None:
    model, memory = planted
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = [repeated_batch(seed=seed) for seed in range(4)]
    selection = select_heads(model, memory, batches, Fit(steps=60, rate=2e-2))
    order = ranked({"encoder": selection.importance(model)["encoder"]})
    assert order[-1] == USELESS
    assert selection.scales[USELESS].norm() < 0.1 * selection.scales[order[-2]].norm()
    assert np.mean(selection.losses[-8:]) < np.mean(selection.losses[:8])
    tuned = tune_biases(model, memory, batches, order[:3], Fit(steps=40, rate=2e-2))
    assert set(tuned.offsets) == set(order[:3])
    assert np.mean(tuned.losses[-8:]) < np.mean(tuned.losses[:8])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.requires_grad
        assert p.grad is None


def test_taking_out_the_induction_head_costs_what_it_earned(planted: tuple[BitMar, MemoryState]) -> None:
    model, memory = planted
    batches = [repeated_batch(seed=seed) for seed in range(3)]
    whole = loss_without(model, memory, batches, [])
    assert loss_without(model, memory, batches, [INDUCTION]) > whole + 0.3
    assert loss_without(model, memory, batches, [USELESS]) == pytest.approx(whole, abs=1e-6)
    order = ranked({"encoder": measure_heads(model, memory, batches).importance["encoder"]})
    check = check_rankings(model, memory, batches, {"gate gradient": order, "reversed": order[::-1]}, 0.1, draws=5)
    assert check.heads == 1
    assert check.top["gate gradient"] == check.bottom["reversed"] > max(check.whole, np.mean(check.random))
    assert check.bottom["gate gradient"] == pytest.approx(check.whole, abs=1e-6)


def test_rankings_of_different_heads_are_not_compared(planted: tuple[BitMar, MemoryState]) -> None:
    with pytest.raises(ValueError, match="different heads"):
        check_rankings(*planted, [repeated_batch()], {"a": [INDUCTION], "b": [SINK]}, 0.1, draws=1)


def test_lofit_hands_on_one_plus_a_times_z_and_z_plus_v() -> None:
    torch.manual_seed(0)
    model = BitMar(small_model(quantization=False)).eval()
    batch, memory = caption_batch(), filled_memory(model.config)
    heads = existing_heads(model.config)
    width = {head: model.config.width if head.kind == "memory" else 16 for head in heads}
    vectors = {head: 0.3 * torch.randn(width[head]) for head in heads[:3]}
    for multiplies in (True, False):
        for head, edits in ((head, edits_of(model, vectors, multiplies)[head.kind][head.layer]) for head in heads):
            z = torch.randn(2, len(edits.factor), 5, width[head])
            vector = vectors.get(head, torch.zeros(width[head]))
            expected = z[:, head.head] * (1 + vector) if multiplies else z[:, head.head] + vector
            torch.testing.assert_close(edits(z)[:, head.head], expected)
    nothing = {head: torch.zeros(width[head]) for head in heads}
    shown = model(batch, memory, edits=edits_of(model, nothing, True)).loss
    torch.testing.assert_close(shown, model(batch, memory).loss, rtol=1e-5, atol=1e-5)


def test_gate_gradient_is_what_finite_differences_say() -> None:
    """Per sample: |d mean token loss / d gate| by central differences, of a model without rounding."""
    torch.manual_seed(0)
    model = BitMar(small_model(quantization=False, vision_quantization=False)).eval()
    batch, memory, step = caption_batch(4, 8), filled_memory(model.config), 0.03
    figures = measure_heads(model, memory, [batch])
    for head in existing_heads(model.config):
        losses = []
        for factor in (1 + step, 1 - step):
            edits = ablation(model, [])
            edits[head.kind][head.layer].factor[head.head] = factor
            losses.append(model(batch, memory, edits=edits).token_losses.sum(1))
        slope = ((losses[0] - losses[1]) / (2 * step)).abs() / batch.token_mask.sum(1)
        found = figures.importance[head.kind][head.layer, head.head]
        assert found == pytest.approx(float(slope.mean()), rel=2e-2, abs=2e-5), head


def test_pruned_heads_have_no_figures_and_are_in_no_ranking() -> None:
    torch.manual_seed(0)
    whole = BitMar(small_model(quantization=False)).eval()
    gone = parse_heads("encoder.L1H0,cross_modal.L0H1")
    weights = {name: p.detach() for name, p in whole.named_parameters()}
    config, (cut,) = edit_parameters(whole.config, [weights], Surgery(prune=gone), seed=0)
    model = BitMar(config).eval()
    model.load_state_dict(cut)
    batch, memory = caption_batch(), filled_memory(config)
    figures = measure_heads(model, memory, [batch])
    assert np.isnan(figures.importance["encoder"]).tolist() == [[False, False], [True, False]]
    order = ranked(figures.importance)
    assert not set(gone) & set(order)
    assert sorted(order) == sorted(existing_heads(config))
    assert loss_without(model, memory, [batch], order[:2]) != pytest.approx(figures.loss, abs=1e-7)
    selection = select_heads(model, memory, [batch], Fit(steps=2))
    assert set(selection.scales) == set(order)
    assert {t.head for t in classify_heads(model, memory, [batch], str)} == set(order)


def test_thresholds_decide_and_the_first_criterion_wins() -> None:
    for criterion in CRITERIA:
        kind = criterion.kinds[0]
        assert classify({criterion.number: criterion.threshold}, kind) == (criterion.name, ())
        assert classify({criterion.number: criterion.threshold - 1e-6}, kind) == (OTHER, ())
    every = {criterion.number: 9.0 for criterion in CRITERIA}
    assert classify(every, "encoder")[0] == CRITERIA[0].name
    assert classify({"vision": 0.5, "first": 0.9}, "cross_modal")[0] == "vision-grounded"
    for name, (number, least, _) in DEAD.items():
        assert classify({number: least}, "encoder")[1] == (name,)
    assert classify({}, "decoder") == (OTHER, ())


def test_ties_are_ranked_by_name() -> None:
    table = {"encoder": np.array([[1.0, np.nan], [2.0, 1.0]]), "decoder": np.array([[1.0]])}
    assert list(map(str, ranked(table))) == ["encoder.L1H0", "decoder.L0H0", "encoder.L0H0", "encoder.L1H1"]
