"""Train BitMar: assemble world, data, model, engine and sinks, then loop over optimizer steps.

deepspeed [launcher options] --module bitmar.train --config launch/recipes/NAME.yaml [key.path=value ...]
python -m bitmar.train --config launch/recipes/NAME.yaml [key.path=value ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from bitmar import recovery
from bitmar.assembly import Run, assemble
from bitmar.batch import Batch
from bitmar.config import Config, ConfigError, load_config
from bitmar.engine.faults import STOPPED, Guard, Notice, Stopped, TrainingError
from bitmar.engine.fragments import CheckpointError
from bitmar.engine.schedule import rates_at
from bitmar.engine.step import StepResult, train_step
from bitmar.engine.world import World, is_lost_peer, join_world, leave, leave_world, report
from bitmar.evaluating import evaluate, is_evaluation_due
from bitmar.evaluation.perplexity import validate
from bitmar.model.bitmar import Outputs
from bitmar.model.memory import MemoryState
from bitmar.observability.reduce import reduce
from bitmar.observability.schema import Cadence, schema_of, select
from bitmar.observability.stats import Statistics
from bitmar.observing import (
    draw,
    gather_damage,
    is_log_due,
    is_observed,
    log,
    log_start,
    observe,
    settle,
    show_pictures,
)
from bitmar.probing import probe
from bitmar.rehearsal import rehearse
from bitmar.saving import mark_due, save, tell_saved
from bitmar.startup import StartUp
from shards.loader import LoaderState, Rows
from shards.record import DataError

USER_ERROR = 2  # exit code of a mistake in recipe, data or checkpoint
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. A user's mistake is one line on standard error and exit code 2; the others: engine/faults.py."""
    guard = Guard()
    try:
        start_up = StartUp()
        start_up.mark("imports")
        config, dry_run = parse(sys.argv[1:] if arguments is None else arguments)
        config.check_world(int(os.environ.get("WORLD_SIZE", "1")))  # before the ranks wait for each other
        guard.start(config.faults, config.run_directory)
        world = join_world(config.engine.timeout_s, config.engine.threads_per_rank, config.engine.bind_to_cores)
        start_up.mark("process_group")
        if dry_run:
            rehearse(config, world, guard)
        else:
            train(config, world, guard, start_up)
    except Stopped as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {error}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        return STOPPED
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        report(str(error))
        return 1 if isinstance(error, TrainingError) else USER_ERROR
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        report("another rank has gone; the same command goes on from the last checkpoint")
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    finally:
        guard.close()
        leave_world()
    return 0


def parse(arguments: Sequence[str]) -> tuple[Config, bool]:
    """(checked Config, whether it is a dry run). Raises ConfigError; bad flags exit as argparse does."""
    parser = argparse.ArgumentParser(prog="bitmar.train", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="recipe, see launch/recipes/")
    parser.add_argument("--resume", help="auto, never or a checkpoint's folder (checkpoint.resume)")
    parser.add_argument("--max-steps", help="stop after so many optimizer steps in all (training.max_steps)")
    parser.add_argument("--dry-run", action="store_true", help="assemble everything, print the plan, train nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    known = parser.parse_intermixed_args(arguments)
    flags = {"checkpoint.resume": known.resume, "training.max_steps": known.max_steps}
    named = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return load_config(known.config, [*known.overrides, *named]), known.dry_run


def train(config: Config, world: World, guard: Guard | None = None, start_up: StartUp | None = None) -> None:
    """Run every phase of the recipe, from where the run's newest checkpoint left off. Raises Stopped when asked to."""
    run = assemble(config, world, guard, start_up)
    code = 1
    try:
        if run.finished:
            if world.is_first:
                print(f"finished already at step {run.progress.step}; nothing is left to train", flush=True)
            code = 0
            return
        if run.progress.step == 0:
            log_start(run)
            run.progress = dataclasses.replace(run.progress, initial_loss=hold_validation(run))
            run.start_up.mark("validation")
        elif run.progress.validation_due:
            hold_validation(run, is_evaluation_due(run))
        loop(run)
        finish(run)
        code = 0
    except Stopped:
        code = STOPPED
        raise
    finally:
        if run.watch.board is not None:
            run.watch.board.stop()
        run.sinks.close(code)


def loop(run: Run) -> None:
    """One iteration an optimizer step; it knows neither modality nor phase."""
    config, total = run.config, sum(run.lengths)
    steps = iter(run.loader)
    while run.progress.step < run.last_step:
        started = time.perf_counter()
        run.watch.clock.start()
        run.guard.beat("waiting for data", run.progress.step)
        state, rows = next_step(run, steps)
        run.guard.beat("training", run.progress.step)
        run.start_up.mark("first_batch")
        rates = rates_at(run.progress.step, total, config.optimizer)
        if run.progress.step in run.progress.left_out:
            advance(run, state, None)
        else:
            phase = config.phases[state.phase]
            run.engine.set_rates(rates, phase.train)
            batches = [Batch.from_rows(part, run.world.device) for part in rows]
            result = train_step(
                run.engine,
                batches,
                run.memory,
                phase,
                config,
                run.world,
                run.progress.step,
                clock=run.watch.clock,
                observe=is_observed(run, state),
            )
            if recovery.undo_spike(run, result):
                steps = iter(run.loader)
                continue
            recovery.count_skips(run, batches, result)
            run.memory = result.memory
            advance(run, state, result)
            observe(run, rows, result)
            run.watch.clock.mark("Logging")
            if run.start_up.mark("first_step"):
                run.sinks.event("started", step=run.progress.step, seconds=run.start_up.seconds, **run.start_up.parts)
            run.window.seconds += time.perf_counter() - started
        run.window.last = state, rates
        step = run.progress.step
        milestones = mark_due(run)
        saves = run.save_due and run.progress.skipped_in_a_row == 0  # weights may be broken while updates are left out
        if is_log_due(run, step, state) or saves:
            settle(run)
            probe(run)
            log(run)
        evaluates = is_evaluation_due(run, milestones)
        if evaluates or step % config.validation.every_steps == 0:
            hold_validation(run, evaluates)
        run.watch.clock.start()
        if saves:
            save(run)
        tell_saved(run, run.saver.poll())
        run.watch.clock.mark("Checkpoint")
        draw(run, state)


def next_step(run: Run, steps: Iterator[tuple[LoaderState, list[Rows]]]) -> tuple[LoaderState, list[Rows]]:
    """This rank's rows of the next step. Where any rank has none to give, or is asked to stop, all save and raise
    DataError or Stopped."""
    item, problem = None, None
    try:
        item = next(steps)
        run.watch.clock.mark("Data")  # before the ranks agree, which would have all wait for the slowest
        run.shards.readers.check_damage(run.damaged)
    except DataError as error:
        problem = str(error)
    notice = check_notices(run, Notice.NONE if problem is None else Notice.NO_DATA)
    if notice & Notice.NO_DATA:
        stop_for_data(run, problem)
    run.watch.clock.start()
    assert item is not None  # the loader holds as many steps as the phases have
    return item


def check_notices(run: Run, mine: Notice = Notice.NONE, validating: bool = False) -> Notice:
    """What any rank has taken notice of, agreed upon by all. Raises Stopped, on all, where the run is to stop."""
    notice = Notice(run.world.agree(int(mine | run.guard.notice)))
    if notice & (Notice.SIGNAL | Notice.LAUNCHER_GONE) and not notice & Notice.NO_DATA:
        run.progress = dataclasses.replace(run.progress, validation_due=validating)
        close_books(run)
        run.sinks.event("stopped", step=run.progress.step, reason=notice.reason)
        raise Stopped(notice.reason)
    return notice


def close_books(run: Run) -> None:
    """Log what was trained since the last log, and save."""
    if run.window.last is not None:
        log(run)
    if run.progress.step > 0:
        save(run, wait=True)


def stop_for_data(run: Run, problem: str | None) -> NoReturn:
    """End the run because of its data, on all ranks together, with a checkpoint of what was trained."""
    problem = next(told for told in run.world.gather_objects(problem) if told is not None)
    gather_damage(run)
    run.sinks.event("data_error", step=run.progress.step, problem=problem)
    close_books(run)
    raise DataError(problem)


def advance(run: Run, state: LoaderState, result: StepResult | None) -> None:
    """Count the step; the stored position is that of the next one. Words and samples are read at the next log.

    `result`: None of a step that was left out."""
    done = state.position + 1 == run.lengths[state.phase]
    if result is not None:
        run.counted += torch.stack([result.words, result.samples])
    run.progress = dataclasses.replace(
        run.progress,
        step=run.progress.step + 1,
        phase=state.phase + done,
        position=0 if done else state.position + 1,
        recent_losses=() if done else run.progress.recent_losses,
    )


def hold_validation(run: Run, evaluates: bool = False) -> float | None:
    """Score the held-out rows, log them, and return Validation/Loss (of text where there are no captions).

    `evaluates`: with what bitmar/evaluating.py adds.
    """
    step = run.progress.step
    if run.validated_at != step and run.held_out:
        statistics = Statistics(select(schema_of(run.watch.layout), Cadence.VALIDATION), run.world.device)
        run.engine.train(False)
        sets = run.held_out.get("pairs"), run.held_out.get("text")

        def forward(batch: Batch, memory: MemoryState) -> Outputs:
            run.guard.beat("validating", step)
            check_notices(run, validating=True)
            return run.engine.forward(batch, memory)

        tables = validate(forward, *sets, run.memory, run.world, statistics)
        more = evaluate(run, forward, tables) if evaluates else {}
        run.engine.train(True)
        run.validation, run.validated_at = reduce(statistics, run.world).numbers | more, step
        run.progress = dataclasses.replace(run.progress, validation_due=False)
        run.sinks.log(step, run.validation | run.watch.history.add(run.validation))
    return run.validation.get("Validation/Loss", run.validation.get("Validation/Loss_Text"))


def finish(run: Run) -> None:
    """Validate and save where the run ended, plot it, and write summary.json."""
    hold_validation(run)
    save(run, wait=True)
    if run.saved_at != run.progress.step:
        raise TrainingError(
            "the last checkpoint could not be written (events.jsonl says why); make room, and the same command goes on"
        )
    if not run.world.is_first:
        return
    directory = run.config.run_directory
    if run.watch.board is not None:
        run.watch.board.draw(run.progress.step)
        run.watch.board.close()
        show_pictures(run)
    if run.config.wandb.log_model_checkpoints:
        plots = sorted((directory / "plots").glob("*.png"))
        run.sinks.artifact("plots", f"{run.config.run.name}-plots", plots)
    seconds, progress = run.progress.seconds, run.progress
    summary = {
        "data": "generated" if run.shards.generated else "given",
        "step": progress.step,
        "loss_initial": progress.initial_loss,
        "loss_final": run.validation.get("Validation/Loss"),
        "loss_shuffled_vision": run.validation.get("Validation/Loss_Shuffled_Vision"),
        "loss_text": run.validation.get("Validation/Loss_Text"),
        "perplexity": run.validation.get("Validation/Perplexity"),
        "seconds": round(seconds, 3),
        "samples_per_second": round(progress.samples / seconds, 3) if seconds else None,
        "words": progress.words,
        "parameters": sum(run.parameters.values()),
    }
    temporary = directory / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    temporary.replace(directory / "summary.json")


if __name__ == "__main__":
    leave(main())
