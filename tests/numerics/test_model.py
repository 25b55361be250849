"""BitMar as a whole: first loss, activation checkpointing, dropout, sizes of the recipes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from bitmar.batch import IGNORE
from bitmar.config import load_config
from bitmar.engine.world import World
from bitmar.losses import compute_losses, loss_counts
from bitmar.model.bitmar import BitMar, parameter_counts
from bitmar.model.blocks import Dropout
from bitmar.model.memory import MemoryState
from bitmar.model.quantize import BitLinear
from tests.support.batches import caption_batch, logits_of, slice_batch, small_model, text_batch

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
RECIPES = Path("launch/recipes")
PARAMETERS = {  # of the recipes, by component
    "demo": (2_363_876, 524_288, 620_832, 465_952, 65_794, 82_562, 604_448),
    "bitmar-14m": (13_685_124, 4_194_304, 3_841_152, 1_282_432, 262_658, 328_962, 3_775_616),
    "bitmar-120m": (125_907_717, 12_582_912, 43_084_032, 12_989_696, 4_721_667, 2_952_962, 49_576_448),
    "bitmar-700m": (768_591_621, 25_165_824, 341_024_256, 39_543_040, 18_880_515, 4_133_378, 339_844_608),
}


def test_every_recipe_is_held_to_its_size() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(PARAMETERS)
    for name, (total, *components) in PARAMETERS.items():
        with torch.device("meta"):
            counts = parameter_counts(BitMar(load_config(RECIPES / f"{name}.yaml").model))
        assert list(counts.values()) == components, name
        assert sum(components) == total, name


@pytest.mark.parametrize("name", ["demo", "bitmar-14m"])
def test_first_loss_lies_next_to_ln_v(name: str) -> None:
    config = load_config(RECIPES / f"{name}.yaml").model
    torch.manual_seed(1)
    g = torch.Generator().manual_seed(0)
    small = caption_batch(rows=16, length=20)
    batch = small.replace(
        tokens=torch.randint(3, config.vocab_size, small.tokens.shape, generator=g),
        targets=torch.randint(3, config.vocab_size, small.tokens.shape, generator=g),
        vision=torch.randn(16, config.vision_encoder_dim, generator=g),
    )
    with torch.no_grad():
        outputs = BitMar(config)(batch, MemoryState.empty(config.memory_size, config.episode_dim))
        losses = compute_losses(outputs, batch, ALONE, config, {"lm"})
    loss = float(losses.sums["lm"] / loss_counts(batch)["lm"])
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.05)


@pytest.mark.parametrize("kind", [caption_batch, text_batch])
def test_activation_checkpointing_changes_no_bit(kind) -> None:
    batch, results = kind(), []
    for recompute in (False, True):
        config = small_model(dropout=0.1)
        torch.manual_seed(0)
        model = BitMar(config, seed=3, activation_checkpointing=recompute)
        memory = MemoryState.empty(config.memory_size, config.episode_dim)
        before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
        outputs = model(batch, memory, recall=True, logits=True)
        losses = compute_losses(outputs, batch, ALONE, config, {"contrastive", "recall"})
        torch.stack(list(losses.sums.values())).sum().backward()
        assert all(torch.equal(before[name], tensor) for name, tensor in memory.tensors().items())
        results.append((outputs.logits, outputs.read_mass, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(*[r[2] for r in results], strict=True)
    )


def test_trained_layers_have_three_values() -> None:
    """After training, each quantised layer computes with -1, 0 and 1 times its scale, and all three occur."""
    config = small_model()
    torch.manual_seed(0)
    model, memory = BitMar(config), MemoryState.empty(config.memory_size, config.episode_dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for seed in range(5):
        batch = caption_batch(seed=seed)
        losses = compute_losses(model(batch, memory, recall=True), batch, ALONE, config, {"contrastive", "recall"})
        optimizer.zero_grad()
        torch.stack(list(losses.sums.values())).sum().backward()
        optimizer.step()
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    assert len(layers) > 20
    for layer in layers:
        values, scale = layer.ternary_weight()
        assert values.unique().tolist() == [-1.0, 0.0, 1.0]
        identity = torch.eye(layer.weight.shape[1])  # one feature at 127, the others at 0: read the weight back
        torch.testing.assert_close(layer(identity), (values * scale).T)


def test_dropout_follows_the_row_not_the_batch() -> None:
    batch = caption_batch()
    config = small_model(dropout=0.3)
    torch.manual_seed(0)
    model = BitMar(config, seed=3)
    memory = MemoryState.empty(config.memory_size, config.episode_dim)
    whole = logits_of(model, batch, memory)
    parts = torch.cat([logits_of(model, slice_batch(batch, s, s + 4), memory) for s in (0, 4)])
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    other = batch.replace(rows=batch.rows + 1000)
    assert not torch.allclose(whole, logits_of(model, other, memory))
    model.eval()
    assert torch.equal(logits_of(model, batch, memory), logits_of(model, other, memory))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    dropout = Dropout(0.25, seed=7, rows=torch.arange(64))
    x = torch.ones(64, 20, 32)
    out = dropout(x, site=3)
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(out, dropout(x, site=4))
    assert len({tuple((row == 0).flatten().tolist()) for row in out}) == 64  # no two rows share a mask


@pytest.mark.parametrize("addressing", ["attention", "larimar"])
def test_a_micro_batch_of_masked_rows_adds_nothing(addressing: str) -> None:
    config = small_model(memory_addressing=addressing)
    model, batch = BitMar(config), caption_batch()
    nobody = torch.zeros_like(batch.valid)
    batch = batch.replace(
        tokens=torch.zeros_like(batch.tokens),
        targets=torch.full_like(batch.targets, IGNORE),
        segments=torch.zeros_like(batch.segments),
        vision=torch.zeros_like(batch.vision),
        has_vision=nobody,
        image_ids=torch.zeros_like(batch.image_ids),
        valid=nobody,
    )
    outputs = model(batch, MemoryState.empty(config.memory_size, config.episode_dim), recall=True)
    losses = compute_losses(outputs, batch, ALONE, config, {"contrastive", "recall"})
    assert all(float(total.detach()) == 0 for total in losses.sums.values())
    assert torch.isneginf(losses.surprise).all()
    torch.stack([*losses.sums.values(), 0.0 * outputs.side_sum()]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter.grad)), name


@pytest.mark.parametrize("slots", [1, 3, 37])
def test_any_number_of_slots_works(slots: int) -> None:
    config = small_model(memory_size=slots, recall_group=4)
    model, batch = BitMar(config), caption_batch()
    outputs = model(batch, MemoryState.empty(slots, config.episode_dim), recall=True)
    losses = compute_losses(outputs, batch, ALONE, config, {"contrastive", "recall"})
    assert all(torch.isfinite(total) for total in losses.sums.values())


@pytest.mark.parametrize("addressing", ["attention", "larimar"])
def test_bf16_trains_with_a_memory_of_like_keys(addressing: str) -> None:
    """Addresses and losses are fp32 whatever the products are; like keys make the least squares ill-conditioned."""
    config = small_model(memory_size=32, episode_dim=32, memory_addressing=addressing)
    torch.manual_seed(0)
    model, batch = BitMar(config, compute_dtype=torch.bfloat16), caption_batch()
    memory = MemoryState.empty(32, 32)
    memory.keys[:] = torch.randn(1, 32) + 0.1 * torch.randn(32, 32)
    memory.values[:] = torch.randn(32, 32)
    memory.written[:] = True
    outputs = model(batch, memory, recall=True)
    assert outputs.recalled is not None
    assert outputs.recalled.dtype == outputs.episodes.dtype == outputs.keys.dtype == torch.float32
    losses = compute_losses(outputs, batch, ALONE, config, {"contrastive", "recall"})
    torch.stack([*losses.sums.values(), 0.0 * outputs.side_sum()]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.dtype == torch.float32, name
    exact = BitMar(config)
    exact.load_state_dict(model.state_dict())
    reference = compute_losses(exact(batch, memory, recall=True), batch, ALONE, config, {"contrastive", "recall"})
    for name, total in losses.sums.items():
        assert float(total.detach()) == pytest.approx(float(reference.sums[name].detach()), rel=0.05), name


def test_first_loss_holds_at_the_widest_recipe() -> None:
    """Width 1536 and 16,384 entries with few layers: there a tied table starts at 29 nats without its factor."""
    config = load_config(RECIPES / "bitmar-700m.yaml").model
    config = dataclasses.replace(config, encoder_layers=1, decoder_layers=1, ffn_width=512)
    torch.manual_seed(1)
    small = caption_batch(rows=4, length=8)
    batch = small.replace(vision=torch.randn(4, config.vision_encoder_dim))
    with torch.no_grad():
        outputs = BitMar(config)(batch, MemoryState.empty(config.memory_size, config.episode_dim))
        losses = compute_losses(outputs, batch, ALONE, config, {"lm"})
    loss = float(losses.sums["lm"] / loss_counts(batch)["lm"])
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.05)
