"""Loss on held-out rows with the right image, another's or none; with the memory, without, and with mixed-up values.

A pass over rows gives a table of sums, a line a row, of which every rank fills those of its own batches: added up over
ranks they are those of the whole set. Columns: nats, tokens, hits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitmar.batch import IGNORE, Batch
from bitmar.engine.world import World
from bitmar.evaluation.scores import Score, exp_ratio, joined, scored
from bitmar.model.bitmar import Outputs
from bitmar.model.memory import MemoryState
from bitmar.observability.features import nearest_is_own
from bitmar.observability.stats import Statistics
from shards.loader import Rows, ValidationSet

POOL = 256  # captions of Validation/Retrieval_R1
TASK = "perplexity"
NATS, TOKENS, HITS = range(3)  # columns
# a way to hold captions: (whose vision, which memory); the first is the one that others are compared with
RIGHT = ("right", "on")
WAYS = (RIGHT, ("permuted", "on"), ("none", "on"), ("right", "off"), ("permuted", "off"), ("none", "off"))
MIXED = ("right", "shuffled")
SEEN = {"right": "right vision", "permuted": "permuted vision", "none": "no vision"}

Forward = Callable[[Batch, MemoryState], Outputs]
Way = tuple[str, str]
Tables = dict[Way, Float[Tensor, "N 3"]]


@dataclass(frozen=True)
class Sums:
    """Of this rank's rows: zeros in those of others."""

    table: Float[Tensor, "N 3"]  # fp64, by row of the set
    latents: tuple[Tensor, ...] = ()  # where asked for: text and vision [POOL Z], image ids, whether there is one

    @property
    def nats(self) -> Float[Tensor, ""]:
        return self.table[:, NATS].sum()

    @property
    def tokens(self) -> Float[Tensor, ""]:
        return self.table[:, TOKENS].sum()

    @property
    def correct(self) -> Float[Tensor, ""]:
        return self.table[:, HITS].sum()


def shuffled_memory(memory: MemoryState) -> MemoryState:
    """Each written key with the value of the next one."""
    at = memory.written.nonzero()[:, 0]
    return dataclasses.replace(memory, values=memory.values.index_copy(0, at, memory.values[at.roll(1)]))


def empty_memory(memory: MemoryState) -> MemoryState:
    """One of the same size that holds nothing."""
    return MemoryState.empty(*memory.keys.shape, device=memory.keys.device)


def without_vision(batch: Batch) -> Batch:
    """The same captions with their images closed: each still reads the memory as the caption of its image."""
    return batch.replace(vision=torch.zeros_like(batch.vision), has_vision=torch.zeros_like(batch.has_vision))


@torch.no_grad()
def score(
    forward: Forward,
    rows: Iterable[Rows],
    total: int,
    memory: MemoryState,
    world: World,
    vision: bool = True,
    pool: bool = False,
) -> Sums:
    """Token loss and accuracy of each of `total` rows, of which `rows` are this rank's; `forward` must be in eval mode.
    `vision` False: without the images. `pool`: keep the latents of POOL rows, spread evenly over all."""
    table = torch.zeros(total, 3, dtype=torch.float64, device=world.device)
    kept: tuple[Tensor, ...] = ()
    for part in rows:
        batch = Batch.from_rows(part, world.device)
        outputs = forward(batch if vision else without_vision(batch), memory)
        losses, counted = outputs.token_losses, batch.targets != IGNORE
        sums = [x.sum(1, dtype=torch.float64) for x in (losses, counted, outputs.hits)]
        table.index_add_(0, batch.rows.clamp(max=total - 1), torch.stack(sums, dim=1))  # rows past the end hold zeros
        if pool:
            place = batch.rows * POOL // total
            chosen = batch.pair_mask & ((batch.rows - 1) * POOL // total < place)
            found = (outputs.text_latent.float(), outputs.vision_latent.float(), batch.image_ids, chosen)
            if not kept:
                kept = tuple(x.new_zeros(POOL, *x.shape[1:]) for x in found)
            for values, x in zip(kept, found, strict=True):
                values[place[chosen]] = x[chosen]
    return Sums(table, kept)


def score_way(forward: Forward, captions: ValidationSet, way: Way, memory: MemoryState, world: World) -> Sums:
    """`score` of captions held one way."""
    state = {"on": memory, "off": empty_memory(memory), "shuffled": shuffled_memory(memory)}[way[1]]
    rows = captions.batches("permuted" if way[0] == "permuted" else "right")
    return score(forward, rows, captions.rows, state, world, vision=way[0] != "none", pool=way == RIGHT)


def validate(
    forward: Forward,
    captions: ValidationSet | None,
    text: ValidationSet | None,
    memory: MemoryState,
    world: World,
    statistics: Statistics,
) -> Tables:
    """Fill the Validation/ metrics; the memory is read and stays as it is. This rank's tables of the captions."""
    tables: Tables = {}
    if captions is not None:
        right = score_way(forward, captions, RIGHT, memory, world)
        statistics.add("Validation/Loss", right.nats, right.tokens)
        statistics.add("Validation/Perplexity", right.nats, right.tokens)
        statistics.add("Validation/Token_Accuracy", right.correct, right.tokens)
        tables[RIGHT] = right.table
        others = (
            (("permuted", "on"), "Loss_Shuffled_Vision", "Vision_Gain"),
            (("right", "off"), "Loss_Memory_Off", "Memory_Gain"),
            (MIXED, "Loss_Shuffled_Memory", "Memory_Gain_Shuffled"),
        )
        for way, loss, gain in others:
            other = score_way(forward, captions, way, memory, world)
            statistics.add(f"Validation/{loss}", other.nats, other.tokens)
            statistics.add(f"Validation/{gain}", other.nats - right.nats, right.tokens)
            tables[way] = other.table
        *values, counted = right.latents
        pool = [world.sum(part) for part in values]  # each row is one rank's
        pool.append(world.sum(counted.long()) > 0)
        statistics.same("Validation/Retrieval_R1", nearest_is_own(*pool))
    if text is not None:
        held_out = score(forward, text.batches("right"), text.rows, memory, world)
        statistics.add("Validation/Loss_Text", held_out.nats, held_out.tokens)
    return tables


def whole_tables(
    tables: Mapping[Way, Tensor], units: Int[np.ndarray, "N"], world: World
) -> dict[Way, Float[np.ndarray, "U 3"]]:
    """Tables of all ranks together, a line a caption or record; `units`: that of each row."""
    return {way: joined(world.sum(table).cpu().numpy(), units) for way, table in tables.items()}


def perplexity_scores(
    tables: Mapping[Way, Float[np.ndarray, "U 3"]], vocabulary: int, what: str, unit: str
) -> list[Score]:
    """Loss, perplexity and token accuracy of each way, and what the image and the memory are worth, which is the loss
    without them minus the loss with them. Chance is a uniform guess among `vocabulary` tokens. `what`: "" of captions.
    """
    scores = []
    for way, table in tables.items():
        name = f"{what or SEEN[way[0]]}, memory {way[1]}"
        uniform = math.log(vocabulary)
        scores += [
            scored(TASK, f"loss, {name}", table, unit, uniform, measure="nats/token"),
            scored(TASK, f"perplexity, {name}", table, unit, float(vocabulary), exp_ratio, "1"),
            scored(TASK, f"token accuracy, {name}", table[:, [HITS, TOKENS]], unit, 1 / vocabulary),
        ]
    right = tables.get(RIGHT)
    gains = {
        ("permuted", "on"): "gain of the right image over another's",
        ("none", "on"): "gain of the right image over none",
        ("right", "off"): "gain of the memory",
        MIXED: "gain of the memory over a mixed-up one",
    }
    for way, name in gains.items() if right is not None else ():
        if way in tables:
            scores.append(difference(f"{name}, {what}" if what else name, tables[way], tables[RIGHT], unit))
    return scores


def difference(
    name: str, one: Float[np.ndarray, "U 3"], other: Float[np.ndarray, "U 3"], unit: str, task: str = TASK
) -> Score:
    """The loss of `one` minus that of `other`, over the same units; 0 by chance."""
    table = np.stack([one[:, NATS] - other[:, NATS], other[:, TOKENS]], axis=1)
    return scored(task, name, table, unit, 0.0, measure="nats/token")
