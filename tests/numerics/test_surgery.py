"""Surgery on heads: a pruned model computes what the masked one does, and only what was named is changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmar.analysis.surgery import Surgery, edit_parameters, edited_model, head_slices
from bitmar.batch import Batch
from bitmar.config import ConfigError, ModelConfig
from bitmar.head_names import HeadName, parse_head, parse_heads
from bitmar.model.attention import HeadEdit
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from tests.support.batches import caption_batch, filled_memory, packed_captions, small_model, text_batch

HEADS, WIDTH = 4, 8  # a head's width
PRUNED = parse_heads("encoder.L0H1,encoder.L0H2,encoder.L1H0,decoder.L1H3,cross_modal.L0H2")


def config(**changes: Any) -> ModelConfig:
    return small_model(width=HEADS * WIDTH, heads=HEADS, fusion_layers=2, **changes)


def trained_like(model: ModelConfig, seed: int = 3) -> BitMar:
    """First weights pushed about, so that scales and norms differ from layer to layer."""
    torch.manual_seed(seed)
    built = BitMar(model).eval()
    with torch.no_grad():
        for p in built.parameters():
            p.mul_(1 + 0.5 * torch.rand(p.shape)).add_(0.05 * torch.randn(p.shape))
    return built


def parameters(model: BitMar) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rebuilt(model: ModelConfig, weights: dict[str, torch.Tensor]) -> BitMar:
    built = BitMar(model).eval()
    built.load_state_dict(weights)
    return built


def logits(model: BitMar, batch: Batch, memory: MemoryState, **how: Any) -> torch.Tensor:
    found = model(batch, memory, logits=True, **how).logits
    assert found is not None
    return found.detach()


def batches() -> list[Batch]:
    captions = caption_batch(6, 12)
    return [captions, text_batch(4, 12), packed_captions(captions, [[0, 1], [2], [3, 4]], 36, 2)]


@pytest.mark.parametrize("quantized", [True, False])
def test_a_pruned_model_equals_the_masked_one(quantized: bool) -> None:
    whole = trained_like(config(quantization=quantized, vision_quantization=quantized))
    masked, kept = edit_parameters(whole.config, [parameters(whole)], Surgery(mask=PRUNED), seed=1)
    pruned, cut = edit_parameters(whole.config, [parameters(whole)], Surgery(prune=PRUNED), seed=1)
    memory = filled_memory(whole.config)
    for batch in batches():
        expected = logits(rebuilt(masked, kept[0]), batch, memory)
        torch.testing.assert_close(logits(rebuilt(pruned, cut[0]), batch, memory), expected, rtol=0, atol=1e-6)
        assert (expected - logits(whole, batch, memory)).abs().max() > 1e-3, "the heads did something"


def test_a_masked_head_is_one_whose_output_is_zero() -> None:
    whole = trained_like(config())
    masked, kept = edit_parameters(whole.config, [parameters(whole)], Surgery(mask=PRUNED), seed=1)
    batch, memory = caption_batch(6, 12), filled_memory(whole.config)
    edits = {
        kind: [HeadEdit(torch.ones(HEADS, 1)) for _ in range(layers)]
        for kind, layers in (("encoder", 2), ("decoder", 2), ("cross_modal", 2))
    }
    for head in PRUNED:
        edits[head.kind][head.layer].factor[head.head] = 0.0
    shown = logits(whole, batch, memory, edits=edits)
    torch.testing.assert_close(logits(rebuilt(masked, kept[0]), batch, memory), shown, rtol=0, atol=1e-5)


def test_a_pruned_model_has_fewer_parameters_by_the_right_number() -> None:
    whole = trained_like(config())
    _, (cut,) = edit_parameters(whole.config, [parameters(whole)], Surgery(prune=PRUNED), seed=1)
    each = 4 * WIDTH * whole.config.width + WIDTH  # query, key, value, output; the sub-norm's gains
    before, after = (sum(p.numel() for p in held.values()) for held in (parameters(whole), cut))
    assert before - after == len(PRUNED) * each


def test_pruning_twice_is_pruning_at_once() -> None:
    whole = trained_like(config())
    first, states = edit_parameters(whole.config, [parameters(whole)], Surgery(prune=PRUNED[:1]), seed=1)
    second, (twice,) = edit_parameters(first, states, Surgery(prune=PRUNED[1:]), seed=1)
    at_once, (once,) = edit_parameters(whole.config, [parameters(whole)], Surgery(prune=PRUNED), seed=1)
    assert second.pruned_heads[0].heads == at_once.pruned_heads[0].heads
    assert all(torch.equal(twice[name], once[name]) for name in once)
    batch, memory = caption_batch(6, 12), filled_memory(whole.config)
    expected = logits(rebuilt(at_once, once), batch, memory)
    torch.testing.assert_close(logits(rebuilt(second, twice), batch, memory), expected, rtol=0, atol=1e-6)


names = st.builds(
    HeadName, st.sampled_from(["encoder", "decoder", "cross_modal"]), st.integers(0, 1), st.integers(0, 3)
)


@settings(max_examples=20)
@given(st.sets(names, min_size=1, max_size=5))
def test_a_reset_touches_its_heads_alone(heads: set[HeadName]) -> None:
    whole = trained_like(config())
    weights = parameters(whole)
    moments = {name: torch.randn_like(p) for name, p in weights.items()}
    same, (reset, cleared) = edit_parameters(whole.config, [weights, moments], Surgery(reset=tuple(heads)), seed=5)
    assert same == whole.config
    torch.manual_seed(5)
    fresh = parameters(BitMar(whole.config, 5))
    for name, before in weights.items():
        mine = torch.zeros_like(before, dtype=torch.bool)
        for head in heads:
            for part, dim, own in head_slices(whole, head):
                if part == name:
                    mine.index_fill_(dim, own, True)
        assert torch.equal(reset[name], torch.where(mine, fresh[name], before))
        assert torch.equal(cleared[name], torch.where(mine, 0.0, moments[name]))


def test_masking_clears_the_moments_of_its_heads_and_no_weight() -> None:
    whole = trained_like(config())
    weights = parameters(whole)
    ones = {name: torch.ones_like(p) for name, p in weights.items()}
    _, (kept, cleared) = edit_parameters(whole.config, [weights, ones], Surgery(mask=PRUNED[:1]), seed=1)
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    zeros = sum(int((x == 0).sum()) for x in cleared.values())
    assert zeros == 4 * WIDTH * whole.config.width + WIDTH


def test_what_a_pruned_model_shows_stands_under_the_heads_old_numbers() -> None:
    whole = trained_like(config())
    pruned, (cut,) = edit_parameters(whole.config, [parameters(whole)], Surgery(prune=PRUNED), seed=1)
    shown = rebuilt(pruned, cut)(caption_batch(6, 12), filled_memory(pruned), heads=True).heads
    assert [heads.numbers for heads in shown["encoder"]] == [(0, 3), (1, 2, 3)]
    assert [heads.numbers for heads in shown["cross_modal"]] == [(0, 1, 3), (0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("surgery", "words"),
    [
        (Surgery(prune=parse_heads("encoder.L0H0,encoder.L0H1,encoder.L0H2,encoder.L0H3")), "encoder.L0 would have no"),
        (Surgery(prune=parse_heads("encoder.L7H0")), "no head encoder.L7H0: encoder attention has 2 layers"),
        (Surgery(reset=parse_heads("decoder.L0H4")), "H0 to H3"),
        (Surgery(prune=parse_heads("memory.L0H0")), "memory"),
        (Surgery(prune=PRUNED[:1], mask=PRUNED[:1]), "two operations"),
    ],
)
def test_what_cannot_be_done_is_refused(surgery: Surgery, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        edited_model(config(), surgery)


def test_a_pruned_head_is_gone() -> None:
    pruned = edited_model(config(), Surgery(prune=PRUNED))
    with pytest.raises(ConfigError, match="was pruned before"):
        edited_model(pruned, Surgery(reset=PRUNED[:1]))
    masked = edited_model(config(), Surgery(mask=PRUNED[:2]))
    both = edited_model(masked, Surgery(prune=PRUNED[:1]))
    assert both.masked_heads == (str(PRUNED[1]),)


@pytest.mark.parametrize("text", ["L2", "H3", "encoder.H2L1", "vision.L0H0", "", "encoder.L-1H0"])
def test_names_of_heads_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="names no head"):
        parse_head(text, None if text.startswith("L") else "encoder")


def test_a_name_without_a_kind_takes_the_one_that_is_given() -> None:
    assert parse_heads("L2H3, decoder.L0H1", "encoder") == (HeadName("encoder", 2, 3), HeadName("decoder", 0, 1))


def test_a_masked_memory_is_not_read() -> None:
    whole = trained_like(config())
    silent = dataclasses.replace(whole.config, masked_heads=("memory.L0H0",))
    batch, full = caption_batch(6, 12), filled_memory(whole.config)
    empty = MemoryState.empty(whole.config.memory_size, whole.config.episode_dim)
    model = rebuilt(silent, parameters(whole))
    torch.testing.assert_close(logits(model, batch, full), logits(model, batch, empty), rtol=0, atol=1e-6)
    assert (logits(whole, batch, full) - logits(whole, batch, empty)).abs().max() > 1e-4
