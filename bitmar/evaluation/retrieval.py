"""Cross-modal retrieval over a whole set: which image a caption finds, and which caption an image.

Candidates are ordered by the cosine of text_latent and vision_latent, which the contrastive loss trains. Conventions:

- The candidates of a caption are the distinct images, and its rank is that of its own image.
- The candidates of an image are all captions, and its rank is that of the best of its own, so that several captions
  an image count once (as Karpathy and Fei-Fei 2015 do).
- Ties are counted against the model: another's candidate with a cosine that is no more than TIE smaller stands before.
- A caption that is longer than a row is represented by its first row.

Shapes: M captions, N images, Z latent width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bitmar.batch import Batch
from bitmar.engine.world import World
from bitmar.evaluation.perplexity import Forward
from bitmar.evaluation.scores import Score, interval, joined, resamples, scored
from bitmar.model.memory import MemoryState
from shards.rows import Rows
from shards.tokenizer import BOS

TASK = "retrieval"
TIE = 1e-6  # of a cosine: what the order of sums may change
BLOCK = 1024  # queries whose cosines are held at a time
DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Latents:
    text: Float[Tensor, "M Z"]
    images: Float[Tensor, "N Z"]
    owner: Int[Tensor, "M"]  # the image of each caption; every image has one at least


@dataclass(frozen=True)
class Ranks:
    """1 is the best. `owner`: the image of each caption."""

    by_caption: Int[np.ndarray, "M"]
    by_image: Int[np.ndarray, "N"]
    owner: Int[np.ndarray, "M"]


@torch.no_grad()
def gather_latents(
    forward: Forward, rows: Iterable[Rows], total: int, memory: MemoryState, world: World
) -> Latents | None:
    """The latents of all ranks' captions, on every rank; None of no pairs. `total`: rows of all ranks."""
    text = vision = None
    ids = torch.zeros(total, dtype=torch.int64, device=world.device)
    for part in rows:
        batch = Batch.from_rows(part, world.device)
        outputs = forward(batch, memory)
        if text is None or vision is None:
            text, vision = (x.new_zeros(total, x.shape[1]) for x in (outputs.text_latent, outputs.vision_latent))
        first = batch.pair_mask & (batch.tokens[:, 0] == BOS)
        at = batch.rows[first]
        text[at], vision[at], ids[at] = outputs.text_latent[first], outputs.vision_latent[first], batch.image_ids[first]
    assert text is not None, "a rank has a batch at least"
    assert vision is not None
    text, vision, ids = world.sum(text.float()), world.sum(vision.float()), world.sum(ids)  # each row is one rank's
    text, vision, ids = text[ids != 0], vision[ids != 0], ids[ids != 0]
    if not len(ids):
        return None
    _, owner = torch.unique(ids, return_inverse=True)
    place = torch.full((int(owner.max()) + 1,), len(owner), device=owner.device)
    place.scatter_reduce_(0, owner, torch.arange(len(owner), device=owner.device), "amin")
    return Latents(text, vision[place], owner)


def rank_all(latents: Latents, world: World, block: int = BLOCK) -> Ranks:
    """The ranks of all queries, each rank of the world at its share of them, a block of cosines at a time."""
    text, images = (F.normalize(x.double(), dim=-1) for x in (latents.text, latents.images))
    owner = latents.owner
    of_captions = torch.zeros(len(text), dtype=torch.int64, device=owner.device)
    for at in _blocks(len(text), block, world):
        cosines = text[at] @ images.T
        own = cosines.gather(1, owner[at, None])
        of_captions[at] = (~(cosines < own - TIE)).sum(1)  # its own is one of them; what is not a number stands first
    of_images = torch.zeros(len(images), dtype=torch.int64, device=owner.device)
    for at in _blocks(len(images), block, world):
        cosines = images[at] @ text.T
        numbers = torch.arange(at.start, at.stop, device=owner.device)
        mine = owner == numbers[:, None]
        best = cosines.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        of_images[at] = 1 + (~(cosines < best - TIE) & ~mine).sum(1)
    parts = (world.sum(of_captions), world.sum(of_images), owner)
    return Ranks(*(part.cpu().numpy() for part in parts))


def _blocks(count: int, block: int, world: World) -> Iterable[slice]:
    """This rank's blocks of `count` queries."""
    share = -(-count // world.size)
    for start in range(world.rank * share, min(count, (world.rank + 1) * share), block):
        yield slice(start, min(start + block, count, (world.rank + 1) * share))


def chance_within(depth: int, candidates: int, own: Int[np.ndarray, "Q"]) -> float:
    """The chance that one of a query's `own` candidates is among the first `depth` in random order, mean of queries."""
    if depth >= candidates:
        return 1.0
    sizes, counts = np.unique(own, return_counts=True)
    missed = [math.exp(_log_choose(candidates - m, depth) - _log_choose(candidates, depth)) for m in sizes.tolist()]
    return float(1 - np.average(missed, weights=counts))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) if k <= n else -math.inf


def chance_median(candidates: int, own: Int[np.ndarray, "Q"]) -> int:
    """The least rank that half of the queries reach by chance."""
    low, high = 1, candidates
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if chance_within(middle, candidates, own) >= 0.5 - 1e-9 else (middle + 1, high)
    return low


def median_rank(ranks: Int[np.ndarray, "Q"], weights: np.ndarray) -> float:
    """The least of `ranks`, which rise, that at least half of the queries reach; `weights`: how often each counts."""
    reached = np.cumsum(weights)
    return float(ranks[np.searchsorted(reached, reached[-1] / 2)])


def retrieval_scores(ranks: Ranks) -> list[Score]:
    """R@1, 5, 10 and the median rank both ways; images are resampled, each with its captions."""
    images, captions = len(ranks.by_image), len(ranks.by_caption)
    each, alone = np.arange(images), np.ones(captions, np.int64)
    per_image = np.bincount(ranks.owner, minlength=images)
    ways = (
        ("image to text", ranks.by_image, each, captions, per_image),
        ("text to image", ranks.by_caption, ranks.owner, images, alone),
    )
    scores = []
    for way, found, unit, candidates, own in ways:
        for depth in DEPTHS:
            table = joined(np.stack([found <= depth, np.ones(len(found))], axis=1), unit)
            chance = chance_within(depth, candidates, own)
            scores.append(scored(TASK, f"{way} R@{depth}", table, "image", chance))
        order = np.argsort(found, kind="stable")
        rising, of = found[order], unit[order]
        draws = [median_rank(rising, weights[of]) for drawn in resamples(images) for weights in drawn]
        value, chance = median_rank(rising, np.ones(len(rising))), float(chance_median(candidates, own))
        low, high = interval(np.array(draws))
        scores.append(Score(TASK, f"{way} median rank", value, low, high, chance, "image", images, "rank"))
    return scores
