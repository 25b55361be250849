"""What the memory recalls of pairs that it was shown once, asked by one modality alone.

A pair is shown as an episode (bitmar/generation/episodes.py) and asked for by a cue: its image's vision tokens without
any text, or its caption without any image; fusion, by which the text could see the image, takes no part. The memory
hands back the pair whose slot the cue reads most. (What it reads is no measure: a mix of other images' episodes
resembles an image's own more than those of most others, so that comparing values finds the pair half the time where
it was never shown.)

Ties count by expectation: where nothing is read, all N tie and each cue is worth 1/N.
Shapes: N pairs, V width of the image vector, C episode width, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bitmar.batch import Batch
from bitmar.evaluation.scores import Score, fact, fraction
from bitmar.generation.episodes import pair_batch, remember
from bitmar.generation.incremental import asked_memory, memory_reader
from bitmar.model.attention import text_positions
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from bitmar.model.text import pooled
from shards.loader import ShardSet, ValidationSet
from shards.tokenizer import BOS

Cue = Literal["image", "text"]
CUES: tuple[Cue, ...] = ("image", "text")
DRAWN = 8  # captions to find a pair of another image


@dataclass(frozen=True)
class Pairs:
    """Captions (with <bos>) and the vectors of their images, each of another image."""

    captions: tuple[tuple[int, ...], ...]
    vectors: Float[Tensor, "N V"]

    def __len__(self) -> int:
        return len(self.captions)

    def part(self, begin: int, end: int) -> Pairs:
        return Pairs(self.captions[begin:end], self.vectors[begin:end])


def held_out_pairs(shards: ShardSet, most: int, row_tokens: int) -> Pairs:
    """Up to `most` pairs of the validation split, one of each image, from DRAWN x `most` of its captions. Raises
    DataError where it holds none."""
    rows = ValidationSet(
        shards,
        modality="pairs",
        micro_batch=64,
        row_tokens=row_tokens,
        max_samples=DRAWN * most,
        rank=0,
        world=1,
    )
    found: dict[int, tuple[tuple[int, ...], Tensor]] = {}
    for part in rows.batches():
        batch = Batch.from_rows(part)
        for row in batch.valid.nonzero()[:, 0].tolist():
            caption = tuple(batch.tokens[row, : int(batch.segments[row].sum())].tolist())
            if caption[0] == BOS:  # not the rest of one that was cut
                found.setdefault(int(batch.image_ids[row]), (caption, batch.vision[row]))
    chosen = [found[image] for image in sorted(found)][:most]  # ids are hashes: an order that means nothing
    return Pairs(tuple(caption for caption, _ in chosen), torch.stack([vector for _, vector in chosen]))


def hits(scores: Float[Tensor, "N N"]) -> Float[Tensor, "N"]:
    """Whether row i's best is column i; among t best alike, 1/t."""
    best = scores == scores.amax(1, keepdim=True)
    return best.diagonal().double() / best.sum(1)


@torch.no_grad()
def cue_queries(model: BitMar, pairs: Pairs, cue: Cue) -> Float[Tensor, "N C"]:
    """What each pair's image, or caption, asks the memory."""
    device = model.embedding.weight.device
    batch, reader = pair_batch(pairs.captions, pairs.vectors.to(device)), memory_reader(model)
    if cue == "image":
        asking = model.vision(batch.vision, batch.has_vision, False)[0].mean(1)
    else:
        config = model.config
        width = config.width // config.heads
        positions = text_positions(batch.positions, batch.segments, False, width, config.rotary_base)
        hidden, _ = model.encoder(model.embedding(batch.tokens), positions, batch.token_mask, None, False)
        asking = pooled(hidden, batch.token_mask, None)
    return reader.query(reader.query_norm(asking))


@torch.no_grad()
def slot_scores(
    model: BitMar, memory: MemoryState, slots: Sequence[int], pairs: Pairs, cue: Cue
) -> Float[Tensor, "N N"]:
    """How much cue i reads of the slot that took pair j; `slots`: of each pair, -1 where none holds it any more."""
    _, weights = asked_memory(memory_reader(model), memory, cue_queries(model, pairs, cue)[:, None])
    held = torch.tensor(slots, device=weights.device)
    return (weights[:, 0, held.clamp(min=0)] * (held >= 0)).cpu()


def empty_memory(model: BitMar) -> MemoryState:
    """Where the model is."""
    return MemoryState.empty(model.config.memory_size, model.config.episode_dim, model.embedding.weight.device)


def show(model: BitMar, memory: MemoryState, pairs: Pairs) -> tuple[MemoryState, tuple[int, ...]]:
    """The memory after it was shown the pairs, and the slot of each: -1 where a later pair has taken it."""
    memory, slots = remember(model, memory, pairs.captions, pairs.vectors)
    return memory, tuple(slot if slot not in slots[place + 1 :] else -1 for place, slot in enumerate(slots))


@dataclass(frozen=True)
class Recall:
    """Hits of N pairs, each in [0, 1]; chance is 1/N."""

    shown: Float[Tensor, "N"]  # once, and nothing else
    others: Float[Tensor, "N"]  # as many other pairs were shown instead: whether pair i reads the i-th of them most
    off: Float[Tensor, "N"]  # nothing was


def recall_once(model: BitMar, pairs: Pairs, others: Pairs, cue: Cue) -> Recall:
    """Asked of an empty memory that was shown `pairs`, or as many `others`, or nothing."""
    assert len(pairs) == len(others)
    empty = empty_memory(model)
    memory, slots = show(model, empty, pairs)
    states = [(memory, slots), show(model, empty, others), (empty, slots)]
    return Recall(*(hits(slot_scores(model, state, held, pairs, cue)) for state, held in states))


def recall_scores(model: BitMar, pairs: Pairs, most: int) -> list[Score]:
    """The scores of `most` pairs, or of half of those there are, and of the slots that they fill."""
    count = min(most, len(pairs) // 2)
    shown, others = pairs.part(0, count), pairs.part(count, 2 * count)
    scores = []
    for cue in CUES:
        found = recall_once(model, shown, others, cue)
        for name, right in (("", found.shown), (", other pairs shown", found.others), (", memory off", found.off)):
            told = f"recall of {count} pairs by {cue}{name}"
            scores.append(fraction("memory", told, right.numpy(), "pair", 1 / count))
    empty = empty_memory(model)
    used = int(show(model, empty, shown)[0].written.sum())
    return [*scores, fact("memory", "slots in use", used / model.config.memory_size, "pair", count, "fraction")]


def counts_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({min(1 << power, most) for power in range(most.bit_length() + 1)})


def recall_by_stored(model: BitMar, pairs: Pairs, cue: Cue) -> dict[int, Float[Tensor, "N"]]:
    """Hits of the first n pairs when n were shown, each among these n: n -> hits."""
    empty = empty_memory(model)
    found = {}
    for count in counts_up_to(len(pairs)):
        memory, slots = show(model, empty, pairs.part(0, count))
        found[count] = hits(slot_scores(model, memory, slots, pairs.part(0, count), cue))
    return found


@dataclass(frozen=True)
class Forgetting:
    """The first pairs after so many others have been shown as well."""

    hits: Float[Tensor, "N"]  # among the first pairs
    held: int  # of them, whose slot no later pair has taken
    used: int  # slots that hold an episode, of the memory's


def forgetting(model: BitMar, pairs: Pairs, others: Pairs, cue: Cue) -> dict[int, Forgetting]:
    """How the recall of `pairs` falls while others are shown: number of others -> what is left."""
    state = empty_memory(model)
    state, slots = remember(model, state, pairs.captions, pairs.vectors)
    found, done = {}, 0
    for count in [0, *counts_up_to(len(others))] if len(others) else [0]:
        more = others.part(done, count)
        state, taken = remember(model, state, more.captions, more.vectors)
        slots, done = (*slots, *taken), count
        kept = tuple(s if s not in slots[i + 1 :] else -1 for i, s in enumerate(slots[: len(pairs)]))
        scores = slot_scores(model, state, kept, pairs, cue)
        found[count] = Forgetting(hits(scores), sum(s >= 0 for s in kept), int(state.written.sum()))
    return found
