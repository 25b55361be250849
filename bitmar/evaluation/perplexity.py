"""Loss on held-out rows: right image, another's image, without memory; summed over ranks by counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitmar.batch import IGNORE, Batch
from bitmar.engine.world import World
from bitmar.model.bitmar import Outputs
from bitmar.model.memory import MemoryState
from bitmar.observability.stats import Statistics
from shards.loader import Rows, ValidationSet

Forward = Callable[[Batch, MemoryState], Outputs]


@dataclass(frozen=True)
class Score:
    """Sums over this rank's rows."""

    nats: Float[Tensor, ""]
    tokens: Int[Tensor, ""]
    correct: Int[Tensor, ""]


@torch.no_grad()
def score(forward: Forward, rows: Iterable[Rows], memory: MemoryState, world: World) -> Score:
    """Token loss and accuracy over `rows`; `forward` must be in eval mode."""
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    tokens = torch.zeros((), dtype=torch.int64, device=world.device)
    correct = torch.zeros_like(tokens)
    for part in rows:
        batch = Batch.from_rows(part, world.device)
        outputs = forward(batch, memory)
        nats += outputs.token_losses.sum(dtype=torch.float64)
        tokens += (batch.targets != IGNORE).sum()
        correct += outputs.hits.sum()
    return Score(nats, tokens, correct)


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
        right = score(forward, captions.batches("right"), memory, world)
        statistics.add("Validation/Loss", right.nats, right.tokens)
        statistics.add("Validation/Perplexity", right.nats, right.tokens)
        statistics.add("Validation/Token_Accuracy", right.correct, right.tokens)
        shuffled = score(forward, captions.batches("permuted"), memory, world)
        statistics.add("Validation/Loss_Shuffled_Vision", shuffled.nats, shuffled.tokens)
        statistics.add("Validation/Vision_Gain", shuffled.nats - right.nats, right.tokens)
        empty = MemoryState.empty(*memory.keys.shape, device=world.device)
        without = score(forward, captions.batches("right"), empty, world)
        statistics.add("Validation/Loss_Memory_Off", without.nats, without.tokens)
    if text is not None:
        held_out = score(forward, text.batches("right"), memory, world)
        statistics.add("Validation/Loss_Text", held_out.nats, held_out.tokens)
