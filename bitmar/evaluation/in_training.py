"""What is cheap enough to be scored while a model trains: losses, retrieval over all held-out pairs, rounding."""

from __future__ import annotations

import torch

from bitmar.engine.world import World
from bitmar.evaluation.perplexity import RIGHT, Forward, Tables, perplexity_scores, score_way, whole_tables
from bitmar.evaluation.quantization import loss_scores, unrounded
from bitmar.evaluation.retrieval import DEPTHS, gather_latents, rank_all, retrieval_scores
from bitmar.evaluation.scores import Score
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from bitmar.observability.stats import Statistics
from shards.loader import ValidationSet

CLOSED = ("none", "on")


def evaluate_captions(
    forward: Forward,
    model: BitMar,
    captions: ValidationSet,
    whole: ValidationSet,
    tables: Tables,
    vocabulary: int,
    memory: MemoryState,
    world: World,
    statistics: Statistics,
) -> list[Score]:
    """Fill the metrics of the cadence `evaluation`; the scores of them and of a validation's `tables` (perplexity.
    validate), the same on every rank.

    Every rank runs as many batches, so that this works under ZeRO-3. `whole`: all held-out captions.
    """
    tables = tables | {CLOSED: score_way(forward, captions, CLOSED, memory, world).table}
    with unrounded(model), torch.compiler.set_stance("force_eager"):
        plain = score_way(forward, captions, RIGHT, memory, world)
    units = captions.sample_of_row
    joined = whole_tables(tables | {("unrounded", ""): plain.table}, units, world)
    unrounded_table = joined.pop(("unrounded", ""))
    scores = perplexity_scores(joined, vocabulary, "", "caption")
    scores += loss_scores(joined[RIGHT], unrounded_table)
    right, closed = tables[RIGHT].sum(0), tables[CLOSED].sum(0)
    statistics.add("Validation/Loss_No_Vision", closed[0], closed[1])
    statistics.add("Validation/Loss_Unrounded", plain.nats, plain.tokens)
    statistics.add("Validation/Rounding_Cost", right[0] - plain.nats, plain.tokens)
    latents = gather_latents(forward, whole.batches(), whole.rows, memory, world)
    if latents is not None:
        found = retrieval_scores(rank_all(latents, world))
        numbers = {score.name: score.value for score in found}
        for name, way in (("Image_To_Text", "image to text"), ("Text_To_Image", "text to image")):
            for depth in DEPTHS:
                statistics.same(f"Validation/{name}_R{depth}", numbers[f"{way} R@{depth}"])
            statistics.same(f"Validation/{name}_Median_Rank", numbers[f"{way} median rank"])
        scores += found
    return scores
