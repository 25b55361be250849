"""One optimizer step: forward and backward over the micro-batches, update, and the memory's one change.

Losses are divided by counts summed over all ranks and micro-batches, so ranks with fewer tokens weigh less and
the gradient is that of one process holding the whole global batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitmar.batch import Batch
from bitmar.config import Config, PhaseConfig
from bitmar.engine.world import World
from bitmar.engine.zero import ZeroEngine
from bitmar.losses import compute_losses, loss_counts
from bitmar.model.memory import Episodes, MemoryState, WriteReport, commit


@dataclass(frozen=True)
class StepResult:
    """What a step did. Sums and counts are this rank's; the rest is the same on every rank."""

    memory: MemoryState
    writes: WriteReport
    objective: Float[Tensor, ""]  # this rank's part; the parts of all ranks add up to the weighted loss
    sums: dict[str, Float[Tensor, ""]]
    counts: dict[str, Int[Tensor, ""]]
    memory_gate: Float[Tensor, "1"]
    words: Int[Tensor, ""]  # trained by all ranks
    samples: Int[Tensor, ""]
    gradient_norm: float | Tensor  # before clipping
    skipped: bool  # a loss or gradient was not finite: weights, moments and memory are those of before


def train_step(
    engine: ZeroEngine,
    batches: list[Batch],
    memory: MemoryState,
    phase: PhaseConfig,
    config: Config,
    world: World,
    step: int,
) -> StepResult:
    """Train on this rank's micro-batches of optimizer step `step`; every rank calls it together."""
    weights = {name: weight for name, weight in phase.losses.items() if weight > 0}
    counts = _total(loss_counts(batch) for batch in batches)
    words, samples = sum(b.words.sum() for b in batches), sum(b.samples for b in batches)
    everywhere = world.sum(torch.stack([*counts.values(), words, samples]))  # type: ignore[list-item]
    divisor = dict(zip(counts, everywhere.clamp(min=1), strict=False))
    objective, results, candidates, read_mass = 0.0, [], [], 0.0
    for batch in batches:
        outputs = engine.forward(batch, memory, recall="recall" in weights)
        losses = compute_losses(outputs, batch, world, config.model, set(weights))
        part = sum(weight * losses.sums[name] / divisor[name] for name, weight in weights.items())
        # ZeRO-3 applies the gradient of an earlier step again to a parameter that gets none in this one
        part = part + 0.0 * outputs.side_sum()
        engine.backward(part)
        engine.step()
        objective = objective + part.detach()
        results.append(losses)
        read_mass = read_mass + outputs.read_mass
        offered = (
            losses.surprise,
            batch.captions,
            batch.image_ids,
            outputs.keys.detach(),
            outputs.episodes.detach(),
        )
        candidates.append(Episodes(*offered).best(config.model.writes_per_step))
    writes = WriteReport((), 0, 0)
    if phase.write_memory and not engine.skipped:
        assert isinstance(read_mass, Tensor)
        count = config.model.writes_per_step
        best = Episodes.join(candidates).best(count).filled(count)
        everyone, mass = gather_episodes(best, read_mass, world)
        memory, writes = commit(memory, everyone, mass, config.model, config.run.seed, step)
    return StepResult(
        memory=memory,
        writes=writes,
        objective=torch.as_tensor(objective),
        sums=_total({k: v.detach() for k, v in r.sums.items()} for r in results),
        counts=counts,
        memory_gate=outputs.memory_gate,
        words=everywhere[-2],
        samples=everywhere[-1],
        gradient_norm=engine.gradient_norm,
        skipped=engine.skipped,
    )


def gather_episodes(mine: Episodes, read_mass: Float[Tensor, "K"], world: World) -> tuple[Episodes, Float[Tensor, "K"]]:
    """All ranks' candidates in rank order and the read mass summed in rank order, in one collective."""
    tensors = [getattr(mine, f.name) for f in dataclasses.fields(mine)] + [read_mass]
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in tensors]
    gathered = world.gather(torch.cat(flat))
    parts = []
    for part, tensor in zip(gathered.split([len(f) for f in flat], dim=1), tensors, strict=True):
        parts.append([row.clone().view(tensor.dtype).view(tensor.shape) for row in part])
    total = parts[-1][0].clone()
    for mass in parts[-1][1:]:
        total += mass
    return Episodes(*(torch.cat(p) for p in parts[:-1])), total


def _total(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total
