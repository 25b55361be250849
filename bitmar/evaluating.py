"""Evaluation while a run trains: when it is due, what is cheap enough to be scored (losses, retrieval over all held-out
pairs, rounding), and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitmar.assembly import Run
from bitmar.engine.progress import FOLDER, checkpoint_name
from bitmar.engine.world import World
from bitmar.evaluation.perplexity import RIGHT, Forward, Tables, perplexity_scores, score_way, whole_tables
from bitmar.evaluation.quantization import loss_scores, unrounded
from bitmar.evaluation.retrieval import DEPTHS, gather_latents, rank_all, retrieval_scores
from bitmar.evaluation.score_file import ScoreFile, TaskScores, name_of
from bitmar.evaluation.scores import Score, path_of
from bitmar.model.bitmar import BitMar
from bitmar.model.memory import MemoryState
from bitmar.observability.reduce import reduce
from bitmar.observability.schema import Cadence, schema_of, select
from bitmar.observability.stats import Statistics
from shards.loader import ValidationSet
from shards.record import DataError

CLOSED = ("none", "on")


def is_evaluation_due(run: Run, milestones: tuple[int, ...] = ()) -> bool:
    """Whether the step just done, which has passed `milestones`, is to be evaluated."""
    every = run.config.evaluation.every_steps
    return every > 0 and (run.progress.step % every == 0 or bool(milestones))


def evaluate(run: Run, forward: Forward, tables: Tables) -> dict[str, float]:
    """Score the held-out captions further than a validation, which gave `tables`, does; write the scores to
    RUN/evaluation/step_X.json, and return the metrics."""
    captions, config, world = run.held_out.get("pairs"), run.config, run.world
    if captions is None:
        return {}
    whole = ValidationSet(
        run.shards,
        modality="pairs",
        micro_batch=config.validation.micro_batch,
        row_tokens=config.data.row_tokens,
        max_samples=run.shards.samples("validation", "pairs"),
        rank=world.rank,
        world=world.size,
    )
    statistics = Statistics(select(schema_of(run.watch.layout), Cadence.EVALUATION), world.device)
    vocabulary, model = run.shards.vocab_size, run.engine.module
    scores = evaluate_captions(forward, model, captions, whole, tables, vocabulary, run.memory, world, statistics)
    if world.is_first:
        try:
            record(run, scores)
        except (OSError, DataError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            run.sinks.event("warning", message=f"the scores of step {run.progress.step} could not be written: {why}")
    return reduce(statistics, world).numbers


def record(run: Run, scores: Sequence[Score]) -> None:
    """Write scores of the step to their file. Raises OSError, DataError."""
    directory, step = run.config.run_directory, run.progress.step
    header = {"step": step, "words": run.progress.words + int(run.counted[0])}
    file = ScoreFile(path_of(directory, step), directory / FOLDER / checkpoint_name(step), header)
    for name in dict.fromkeys(map(name_of, scores)):
        mine = [score for score in scores if name_of(score) == name]
        file.add(name, TaskScores(run.shards.location, mine, run.shards.generated))


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
