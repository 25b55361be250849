"""One optimizer step: forward and backward over the micro-batches, update, and the memory's one change.

Losses are divided by counts summed over all ranks and micro-batches, so ranks with fewer tokens weigh less and
the gradient is that of one process holding the whole global batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitmar.batch import Batch
from bitmar.config import Config, PhaseConfig
from bitmar.engine.census import Census
from bitmar.engine.clock import StepClock
from bitmar.engine.world import World
from bitmar.engine.zero import ZeroEngine
from bitmar.losses import compute_losses, loss_counts
from bitmar.model.bitmar import Outputs
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
    parts: dict[str, Float[Tensor, ""]]  # of the objective, as it is
    hits: Int[Tensor, ""]  # positions with no likelier token than the target
    latents: tuple[Latents, ...]  # of each micro-batch
    entropy: Float[Tensor, ""]  # of the predictions, summed over tokens; 0 where the step was not observed
    recall_cosines: Float[Tensor, "2"]  # summed over captions: by the image alone, by the text alone
    census: Census | None  # where the step was observed
    gradient_norm: float | Tensor  # before clipping
    skipped: bool  # a loss or gradient was not finite: weights, moments and memory are those of before


class Latents(NamedTuple):
    """Of a micro-batch's captions (or rows of text), detached."""

    text: Float[Tensor, "N Z"]
    vision: Float[Tensor, "N Z"]
    episode: Float[Tensor, "N C"]
    rows: Bool[Tensor, "N"]  # that count
    pairs: Bool[Tensor, "N"]  # of those, with an image


def train_step(
    engine: ZeroEngine,
    batches: list[Batch],
    memory: MemoryState,
    phase: PhaseConfig,
    config: Config,
    world: World,
    step: int,
    *,
    clock: StepClock | None = None,
    observe: bool = False,
) -> StepResult:
    """Train on this rank's micro-batches of optimizer step `step`; every rank calls it together.

    An observed step takes a census and keeps what else is told of it.
    """
    clock = clock or StepClock(world.device)
    wandb = config.wandb
    census = observe and (wandb.log_gradients or wandb.log_quantization or wandb.makes_histograms)
    engine.keep_scales(census)
    weights = {name: weight for name, weight in phase.losses.items() if weight > 0}
    counts = _total(loss_counts(batch) for batch in batches)
    words, samples = sum(b.words.sum() for b in batches), sum(b.samples for b in batches)
    everywhere = world.sum(torch.stack([*counts.values(), words, samples]))  # type: ignore[list-item]
    divisor = dict(zip(counts, everywhere.clamp(min=1), strict=False))
    objective, results, candidates, read_mass = 0.0, [], [], 0.0
    told: list[Told] = []
    for batch in batches:
        outputs = engine.forward(batch, memory, recall="recall" in weights, entropy=observe)
        losses = compute_losses(outputs, batch, world, config.model, set(weights))
        part = sum(weight * losses.sums[name] / divisor[name] for name, weight in weights.items())
        # ZeRO-3 applies the gradient of an earlier step again to a parameter that gets none in this one
        part = part + 0.0 * outputs.side_sum()
        clock.mark("Forward")
        engine.backward(part)
        clock.mark("Backward")
        engine.step(census=census)
        clock.mark("Update")
        told.append(tell(outputs, batch, observe))
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
    clock.mark("Update")
    sums = _total({k: v.detach() for k, v in r.sums.items()} for r in results)
    return StepResult(
        memory=memory,
        writes=writes,
        objective=torch.as_tensor(objective),
        sums=sums,
        counts=counts,
        memory_gate=outputs.memory_gate,
        words=everywhere[-2],
        samples=everywhere[-1],
        parts={name: weight * sums[name] / divisor[name] for name, weight in weights.items()},
        hits=torch.stack([t.hits for t in told]).sum(),
        latents=tuple(t.latents for t in told if t.latents is not None),
        entropy=torch.stack([t.entropy for t in told]).sum(),
        recall_cosines=torch.stack([t.recall_cosines for t in told]).sum(0),
        census=engine.census if census else None,
        gradient_norm=engine.gradient_norm,
        skipped=engine.skipped,
    )


class Told(NamedTuple):
    """What a micro-batch's forward pass tells beside its losses."""

    hits: Int[Tensor, ""]
    entropy: Float[Tensor, ""]
    recall_cosines: Float[Tensor, "2"]
    latents: Latents | None


@torch.no_grad()
def tell(outputs: Outputs, batch: Batch, observe: bool) -> Told:
    """Of a forward pass; without the latents where the step is not observed."""
    hits, cosines, latents = outputs.hits.sum(), outputs.loss.new_zeros(2), None
    if observe:
        if outputs.recalled is not None:
            found = F.cosine_similarity(outputs.recalled, outputs.episodes[:, None], dim=-1)
            cosines = (found * batch.pair_mask[:, None]).sum(0)
        counted = batch.pair_mask if batch.packing is not None else batch.valid
        text, vision, episode = (x.detach() for x in (outputs.text_latent, outputs.vision_latent, outputs.episodes))
        latents = Latents(text, vision, episode, counted, batch.pair_mask)
    return Told(hits, outputs.entropy, cosines, latents)


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
