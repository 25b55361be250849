"""Evaluation while a run trains: when it is due, and what becomes of it."""

from __future__ import annotations

from bitmar.assembly import Run
from bitmar.evaluation.in_training import evaluate_captions
from bitmar.evaluation.perplexity import Forward, Tables
from bitmar.evaluation.scores import FOLDER, write_scores
from bitmar.observability.reduce import reduce
from bitmar.observability.schema import Cadence, schema_of, select
from bitmar.observability.stats import Statistics
from shards.loader import ValidationSet


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
        step = run.progress.step
        header = {"step": step, "words": run.progress.words + int(run.counted[0])}
        try:
            write_scores(config.run_directory / FOLDER / f"step_{step}.json", header, scores)
        except OSError as error:
            run.sinks.event("warning", message=f"the scores of step {step} could not be written: {error.strerror}")
    return reduce(statistics, world).numbers
