"""The three losses against loops over rows and tokens; sums and counts add up over any split."""

from __future__ import annotations

import math

import pytest
import torch

from bitmar.batch import Batch
from bitmar.engine.world import World
from bitmar.losses import RECALL_TEMPERATURE, compute_losses, loss_counts
from bitmar.model.bitmar import BitMar, Outputs
from bitmar.model.memory import MemoryState
from tests.support.batches import caption_batch, slice_batch, small_model, text_batch

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
ALL = {"lm", "contrastive", "recall"}


def run(batch: Batch, **changes: object) -> tuple[Outputs, dict[str, float]]:
    config = small_model(quantization=False, **changes)
    torch.manual_seed(0)
    outputs = BitMar(config)(batch, MemoryState.empty(config.memory_size, config.episode_dim), recall=True, logits=True)
    losses = compute_losses(outputs, batch, ALONE, config, ALL)
    return outputs, {name: float(total.detach()) for name, total in losses.sums.items()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.detach(), b.detach(), dim=0))


def test_language_model_loss_is_the_sum_over_trained_tokens() -> None:
    batch = caption_batch()
    outputs, sums = run(batch)
    assert outputs.logits is not None
    expected = 0.0
    for row in range(len(batch.rows)):
        for t in range(batch.targets.shape[1]):
            target = int(batch.targets[row, t])
            if target >= 0:
                expected -= float(outputs.logits[row, t].detach().log_softmax(-1)[target])
    assert sums["lm"] == pytest.approx(expected, rel=1e-5)
    assert int(loss_counts(batch)["lm"]) == int((batch.targets >= 0).sum())


@pytest.mark.parametrize("group", [2, 4, 8])
def test_contrastive_loss_by_hand(group: int) -> None:
    """Negatives: rows of the group with another image. Both directions, mean of the two."""
    batch = caption_batch(images=4)
    outputs, sums = run(batch, contrastive_group=group)
    scale, expected = float(outputs.log_temperature.detach().exp()), 0.0
    for i in range(len(batch.rows)):
        if not batch.valid[i]:
            continue
        start = i // group * group
        others = [j for j in range(start, start + group) if batch.valid[j] and batch.image_ids[j] != batch.image_ids[i]]
        own = scale * cosine(outputs.text_latent[i], outputs.vision_latent[i])
        to_image = [scale * cosine(outputs.text_latent[i], outputs.vision_latent[j]) for j in others]
        to_text = [scale * cosine(outputs.text_latent[j], outputs.vision_latent[i]) for j in others]
        for logits in (to_image, to_text):
            expected += 0.5 * (math.log(sum(math.exp(v) for v in [own, *logits])) - own)
    assert sums["contrastive"] == pytest.approx(expected, rel=1e-4)


def test_recall_loss_by_hand() -> None:
    """Each cue's recalled value against the episodes of its group; other captions of the image do not count."""
    group, batch = 4, caption_batch(images=4)
    outputs, sums = run(batch, recall_group=group)
    assert outputs.recalled is not None
    expected = 0.0
    for i in range(len(batch.rows)):
        if not batch.valid[i]:
            continue
        start = i // group * group
        for cue in range(2):
            logits = {
                j: cosine(outputs.recalled[i, cue], outputs.episodes[j]) / RECALL_TEMPERATURE
                for j in range(start, start + group)
                if j == i or (batch.valid[j] and batch.image_ids[j] != batch.image_ids[i])
            }
            expected += 0.5 * (math.log(sum(math.exp(v) for v in logits.values())) - logits[i])
    assert sums["recall"] == pytest.approx(expected, rel=1e-4)


def test_sums_and_counts_add_up_over_micro_batches() -> None:
    batch = caption_batch()
    _, whole = run(batch)
    halves = [slice_batch(batch, 0, 4), slice_batch(batch, 4, 8)]
    parts = [run(half)[1] for half in halves]
    for name, total in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(total, rel=1e-5), name
    for name, count in loss_counts(batch).items():
        assert sum(int(loss_counts(half)[name]) for half in halves) == int(count)


def test_text_rows_have_no_contrastive_and_no_recall_loss() -> None:
    batch = text_batch()
    _, sums = run(batch)
    assert sums["contrastive"] == 0.0
    assert sums["recall"] == 0.0
    assert int(loss_counts(batch)["contrastive"]) == 0


def test_surprise_is_the_mean_token_loss_of_rows_with_an_image() -> None:
    batch = caption_batch()
    config = small_model()
    outputs = BitMar(config)(batch, MemoryState.empty(config.memory_size, config.episode_dim), logits=True)
    assert outputs.logits is not None
    losses = compute_losses(outputs, batch, ALONE, config, {"lm"})
    assert losses.surprise[-1] == float("-inf")  # the masked row
    row = 2
    inside = batch.targets[row] >= 0
    logp = outputs.logits[row, inside].log_softmax(-1).gather(1, batch.targets[row, inside][:, None])
    assert float(losses.surprise[row]) == pytest.approx(float(-logp.mean().detach()), rel=1e-5)


def test_every_parameter_is_part_of_every_step() -> None:
    """ZeRO-3 applies an old gradient again to a parameter that gets none (see bitmar/engine/step.py)."""
    for batch in (caption_batch(), text_batch()):
        config = small_model()
        model = BitMar(config)
        outputs = model(batch, MemoryState.empty(config.memory_size, config.episode_dim))
        losses = compute_losses(outputs, batch, ALONE, config, {"lm"})
        (losses.sums["lm"] + 0.0 * outputs.side_sum()).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert missing == []
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padding_left_out_of_the_head_changes_no_loss() -> None:
    """`trained` names the positions with a target: the same losses, hits and gradients as without it."""
    batch, results = caption_batch(), []
    assert (batch.targets < 0).any()
    told = batch.replace(trained=(batch.targets.flatten() >= 0).nonzero()[:, 0])
    config = small_model()
    for side in (batch, told):
        torch.manual_seed(0)
        model = BitMar(config)
        outputs = model(side, MemoryState.empty(config.memory_size, config.episode_dim))
        (outputs.loss + 0.0 * outputs.side_sum()).backward()
        results.append((outputs, {name: p.grad for name, p in model.named_parameters()}))
    (plain, expected), (short, gradients) = results
    assert torch.equal(plain.hits, short.hits)
    torch.testing.assert_close(short.token_losses, plain.token_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(short.loss, plain.loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_micro_batch_without_a_target_has_loss_0_and_gradients_of_0() -> None:
    batch = caption_batch()
    nothing = batch.replace(targets=torch.full_like(batch.targets, -100), trained=torch.zeros(0, dtype=torch.int64))
    config = small_model()
    model = BitMar(config)
    outputs = model(nothing, MemoryState.empty(config.memory_size, config.episode_dim))
    (outputs.loss + 0.0 * outputs.side_sum()).backward()
    assert float(outputs.loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
