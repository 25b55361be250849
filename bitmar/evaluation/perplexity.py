"""Loss on held-out rows: right image, another's image, without memory; summed over ranks by counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitmar.batch import IGNORE, Batch
from bitmar.engine.world import World
from bitmar.model.bitmar import Outputs
from bitmar.model.memory import MemoryState
from bitmar.observability.features import nearest_is_own
from bitmar.observability.stats import Statistics
from shards.loader import Rows, ValidationSet

POOL = 256  # captions of Validation/Retrieval_R1

Forward = Callable[[Batch, MemoryState], Outputs]


@dataclass(frozen=True)
class Score:
    """Sums over this rank's rows."""

    nats: Float[Tensor, ""]
    tokens: Int[Tensor, ""]
    correct: Int[Tensor, ""]
    latents: tuple[Tensor, ...] = ()  # where asked for: text and vision [POOL Z], image ids, whether there is one


def shuffled_memory(memory: MemoryState) -> MemoryState:
    """Each written key with the value of the next one."""
    at = memory.written.nonzero()[:, 0]
    return dataclasses.replace(memory, values=memory.values.index_copy(0, at, memory.values[at.roll(1)]))


@torch.no_grad()
def score(
    forward: Forward, rows: Iterable[Rows], memory: MemoryState, world: World, pool_of: int | None = None
) -> Score:
    """Token loss and accuracy over `rows`; `forward` must be in eval mode. `pool_of`: keep latents of POOL rows of so
    many."""
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    tokens = torch.zeros((), dtype=torch.int64, device=world.device)
    correct = torch.zeros_like(tokens)
    kept: tuple[Tensor, ...] = ()
    for part in rows:
        batch = Batch.from_rows(part, world.device)
        outputs = forward(batch, memory)
        nats += outputs.token_losses.sum(dtype=torch.float64)
        tokens += (batch.targets != IGNORE).sum()
        correct += outputs.hits.sum()
        if pool_of is not None:
            place = batch.rows * POOL // pool_of  # of POOL, spread evenly over all rows
            chosen = batch.pair_mask & ((batch.rows - 1) * POOL // pool_of < place)
            found = (outputs.text_latent.float(), outputs.vision_latent.float(), batch.image_ids, chosen)
            if not kept:
                kept = tuple(x.new_zeros(POOL, *x.shape[1:]) for x in found)
            for pool, x in zip(kept, found, strict=True):
                pool[place[chosen]] = x[chosen]
    return Score(nats, tokens, correct, kept)


def validate(
    forward: Forward,
    captions: ValidationSet | None,
    text: ValidationSet | None,
    memory: MemoryState,
    world: World,
    statistics: Statistics,
) -> None:
    """Fill the Validation/ metrics. The memory is read and stays as it is."""
    if captions is not None:
        right = score(forward, captions.batches("right"), memory, world, captions.rows)
        statistics.add("Validation/Loss", right.nats, right.tokens)
        statistics.add("Validation/Perplexity", right.nats, right.tokens)
        statistics.add("Validation/Token_Accuracy", right.correct, right.tokens)
        shuffled = score(forward, captions.batches("permuted"), memory, world)
        statistics.add("Validation/Loss_Shuffled_Vision", shuffled.nats, shuffled.tokens)
        statistics.add("Validation/Vision_Gain", shuffled.nats - right.nats, right.tokens)
        empty = MemoryState.empty(*memory.keys.shape, device=world.device)
        without = score(forward, captions.batches("right"), empty, world)
        statistics.add("Validation/Loss_Memory_Off", without.nats, without.tokens)
        statistics.add("Validation/Memory_Gain", without.nats - right.nats, right.tokens)
        mixed = score(forward, captions.batches("right"), shuffled_memory(memory), world)
        statistics.add("Validation/Loss_Shuffled_Memory", mixed.nats, mixed.tokens)
        statistics.add("Validation/Memory_Gain_Shuffled", mixed.nats - right.nats, right.tokens)
        *values, counted = right.latents
        pool = [world.sum(part) for part in values]  # each row is one rank's
        pool.append(world.sum(counted.long()) > 0)
        statistics.same("Validation/Retrieval_R1", nearest_is_own(*pool))
    if text is not None:
        held_out = score(forward, text.batches("right"), memory, world)
        statistics.add("Validation/Loss_Text", held_out.nats, held_out.tokens)
