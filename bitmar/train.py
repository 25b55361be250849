"""Train BitMar: assemble world, data, model, engine and sinks, then loop over optimizer steps.

deepspeed [launcher options] --module bitmar.train --config launch/recipes/NAME.yaml [key.path=value ...]
python -m bitmar.train --config launch/recipes/NAME.yaml [key.path=value ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from bitmar.assembly import Run, Window, assemble
from bitmar.batch import IGNORE, Batch
from bitmar.config import Config, ConfigError, load_config
from bitmar.engine import checkpoint
from bitmar.engine.checkpoint import CheckpointError
from bitmar.engine.memory_plan import ZeroSettings
from bitmar.engine.schedule import Rates, rates_at
from bitmar.engine.step import StepResult, train_step
from bitmar.engine.world import World, is_lost_peer, join_world, leave_world
from bitmar.engine.zero import read_ds_config
from bitmar.evaluation.perplexity import validate
from bitmar.observability.plots import write_plots
from bitmar.observability.reduce import reduce
from bitmar.observability.schema import Cadence, select
from bitmar.observability.stats import Statistics, record_memory
from bitmar.plan import counted_phases, make_plan, table
from bitmar.startup import StartUp
from shards.loader import LoaderState, Rows
from shards.record import DataError

USER_ERROR = 2  # exit code of a mistake in recipe, data or checkpoint
INTERRUPTED = 130
OTHER_RANK_WAIT_S = 5.0  # rank 0 tells of an error that all ranks meet; a rank that lives on after this tells its own


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. A user's mistake is one line on standard error and exit code 2."""
    try:
        start_up = StartUp()
        start_up.mark("imports")
        config, dry_run = parse(sys.argv[1:] if arguments is None else arguments)
        config.check_world(int(os.environ.get("WORLD_SIZE", "1")))  # before the ranks wait for each other
        world = join_world(config.engine.timeout_s, config.engine.threads_per_rank)
        start_up.mark("process_group")
        if dry_run:
            rehearse(config, world)
        else:
            train(config, world, start_up)
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        report(error)
        return 1 if isinstance(error, TrainingError) else USER_ERROR
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        report(TrainingError("another rank has gone; the same command goes on from the last checkpoint"))
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    finally:
        leave_world()
    return 0


def report(error: Exception) -> None:
    """One line on standard error: from rank 0, and from another rank that is the only one to fail."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(OTHER_RANK_WAIT_S)
    print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr, flush=True)


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


def rehearse(config: Config, world: World) -> None:
    """Assemble a run with its first batch and print what it will take; nothing is trained, nothing is written."""
    run = assemble(config, world, dry_run=True)
    steps = iter(run.loader)
    item = next(steps, None)
    batches = [Batch.from_rows(part, world.device) for part in item[1]] if item else []
    if world.is_first:
        plan = make_plan(
            config,
            ZeroSettings.of(read_ds_config(Path(config.engine.ds_config))),
            world.size,
            counted_phases(config, run.loader.order, run.shards.corpus("train")),
            device=world.device.type,
            dtype=run.engine.module.compute_dtype,
            counted=True,
        )
        print(table(plan), flush=True)
        if item:
            shape = "x".join(map(str, batches[0].tokens.shape))
            name = config.phases[item[0].phase].name
            print(f"first batch       phase {name}, {len(batches)} micro-batch(es) of {shape} positions", flush=True)
        print(f"dry run: nothing was trained or written; it would go on from step {run.progress.step}", flush=True)
    world.barrier()


def train(config: Config, world: World, start_up: StartUp | None = None) -> None:
    """Run every phase of the recipe, from where the run's newest checkpoint left off."""
    run = assemble(config, world, start_up=start_up)
    code = 1
    try:
        if run.finished:
            if world.is_first:
                print(f"finished already at step {run.progress.step}; nothing is left to train", flush=True)
            code = 0
            return
        if run.progress.step == 0:
            run.progress = dataclasses.replace(run.progress, initial_loss=hold_validation(run))
            run.start_up.mark("validation")
        loop(run)
        finish(run)
        code = 0
    finally:
        run.sinks.close(code)


def loop(run: Run) -> None:
    """One iteration an optimizer step; it knows neither modality nor phase."""
    config, total = run.config, sum(run.lengths)
    steps = iter(run.loader)
    while run.progress.step < run.last_step:
        started = time.perf_counter()
        state, rows = next_step(run, steps)
        run.start_up.mark("first_batch")
        phase = config.phases[state.phase]
        rates = rates_at(run.progress.step, total, config.optimizer)
        run.engine.set_rates(rates, phase.train)
        batches = [Batch.from_rows(part, run.world.device) for part in rows]
        result = train_step(run.engine, batches, run.memory, phase, config, run.world, run.progress.step)
        run.memory = result.memory
        advance(run, state, result)
        if run.start_up.mark("first_step"):
            run.sinks.event("started", step=run.progress.step, seconds=run.start_up.seconds, **run.start_up.parts)
        observe(run, rows, result)
        step = run.progress.step
        run.window.seconds += time.perf_counter() - started
        saves = step % config.checkpoint.every_steps == 0
        if step % config.logging.log_every_n_steps == 0 or saves or step == run.last_step:
            log(run, state, rates)
        if step % config.validation.every_steps == 0:
            hold_validation(run)
        if saves:
            save(run)


def next_step(run: Run, steps: Iterator[tuple[LoaderState, list[Rows]]]) -> tuple[LoaderState, list[Rows]]:
    """This rank's rows of the next step. Where any rank has none to give, all save and raise DataError."""
    item, problem = None, None
    try:
        item = next(steps)
        run.shards.readers.check_damage(run.damaged)
    except DataError as error:
        problem = str(error)
    if run.world.any(problem is not None):
        stop_for_data(run, problem)
    assert item is not None  # the loader holds as many steps as the phases have
    return item


def stop_for_data(run: Run, problem: str | None) -> NoReturn:
    """End the run because of its data, on all ranks together, with a checkpoint of what was trained."""
    problem = next(told for told in run.world.gather_objects(problem) if told is not None)
    gather_damage(run)
    run.sinks.event("data_error", step=run.progress.step, problem=problem)
    if run.window.steps:
        state = LoaderState(run.progress.phase, run.progress.position)
        log(run, state, rates_at(run.progress.step, sum(run.lengths), run.config.optimizer))
    if run.progress.step > 0:
        save(run)
    raise DataError(problem)


def advance(run: Run, state: LoaderState, result: StepResult) -> None:
    """Count the step; the stored position is that of the next one. Words and samples are read at the next log."""
    done = state.position + 1 == run.lengths[state.phase]
    run.counted += torch.stack([result.words, result.samples])
    run.progress = dataclasses.replace(
        run.progress,
        step=run.progress.step + 1,
        phase=state.phase + done,
        position=0 if done else state.position + 1,
    )


def observe(run: Run, rows: list[Rows], result: StepResult) -> None:
    """Add a step to the statistics; nothing is read back from the device."""
    s = run.statistics
    s.add("Training/Loss", result.objective, 1 / run.world.size)
    names = {
        "lm": "Training/Loss_LM",
        "contrastive": "Training/Loss_Contrastive",
        "recall": "Training/Loss_Recall",
    }
    for name, total in result.sums.items():
        s.add(names[name], total, result.counts[name])
    norm = torch.as_tensor(result.gradient_norm)
    s.add("Gradients/Total_Norm", norm)
    s.add("Gradients/Clipped_Fraction", norm > run.config.training.gradient_clip)
    s.add("Memory/Writes", len(result.writes.slots))
    s.add("Memory/Gate_Mean", result.memory_gate)
    s.add("Data/Wait_Seconds", run.loader.wait_seconds)
    tokens = sum(int((part.targets != IGNORE).sum()) for part in rows)
    s.add("Data/Padding_Efficiency", tokens, sum(part.targets.size for part in rows))
    w = run.window
    w.steps += 1
    w.tokens += tokens
    w.samples += sum(part.samples for part in rows)
    w.words += sum(int(part.words.sum()) for part in rows)


def log(run: Run, state: LoaderState, rates: Rates) -> None:
    """Reduce the statistics over all ranks and hand them to the sinks. Raises TrainingError on NaN."""
    s, w, config = run.statistics, run.window, run.config
    words, samples = run.counted.tolist()
    run.counted.zero_()
    run.progress = dataclasses.replace(
        run.progress, words=run.progress.words + words, samples=run.progress.samples + samples
    )
    if run.world.device.type == "cuda":
        started = time.perf_counter()
        torch.cuda.synchronize()
        w.seconds += time.perf_counter() - started
    s.add("Throughput/Samples_Per_Second", w.samples / w.seconds)
    s.add("Throughput/Words_Per_Second", w.words / w.seconds)
    s.add("Throughput/Tokens_Per_Second", w.tokens / w.seconds)
    s.add("Throughput/Step_Seconds", w.seconds, w.steps)
    gather_damage(run)
    s.same("Data/Damaged_Samples", len(run.damaged))
    phase = config.phases[state.phase]
    s.same("Training/Learning_Rate", rates.learning_rate)
    s.same("Training/Weight_Decay", rates.weight_decay)
    s.same("Training/Epoch", (state.position + 1) / run.lengths[state.phase] * (phase.epochs or 1.0))
    s.same("Training/Step", run.progress.step)
    s.same("Training/Words", run.progress.words)
    s.same("Training/Phase", state.phase)
    s.same("Training/Batch_Size", config.training.global_batch)
    written = run.memory.written
    s.same("Memory/Active_Slots_Percentage", 100 * written.double().mean())
    s.same("Memory/Age_Mean", (run.memory.age * written).sum() / written.sum().clamp(min=1))
    record_memory(s)
    values = reduce(s, run.world)
    s.reset()
    run.progress = dataclasses.replace(run.progress, seconds=run.progress.seconds + w.seconds)
    run.window = Window()
    run.sinks.log(run.progress.step, values)
    for name in ("Training/Loss", "Gradients/Total_Norm"):
        if not math.isfinite(values[name]):
            raise TrainingError(
                f"{name} is {values[name]} by step {run.progress.step}; the last checkpoint is from before: lower "
                "optimizer.peak_rate or training.gradient_clip and resume"
            )


def gather_damage(run: Run) -> None:
    """Bring together what damaged samples the ranks have met, and list the new ones."""
    new = set(run.loader.damaged) - run.damaged
    if not run.world.any(bool(new)):
        return
    union = set[tuple[str, str]]().union(*run.world.gather_objects(new))
    for shard, key in sorted(union - run.damaged):
        run.sinks.event("damaged_sample", shard=shard, key=key)
    run.damaged |= union


def hold_validation(run: Run) -> float | None:
    """Score the held-out rows, log them, and return Validation/Loss (of text where there are no captions)."""
    step = run.progress.step
    if run.validated_at != step and run.held_out:
        statistics = Statistics(select(Cadence.VALIDATION), run.world.device)
        run.engine.train(False)
        sets = run.held_out.get("pairs"), run.held_out.get("text")
        validate(run.engine.forward, *sets, run.memory, run.world, statistics)
        run.engine.train(True)
        run.validation, run.validated_at = reduce(statistics, run.world), step
        run.sinks.log(step, run.validation)
    return run.validation.get("Validation/Loss", run.validation.get("Validation/Loss_Text"))


def save(run: Run) -> None:
    """Write a checkpoint of a step just logged, unless the last one is of it. Raises TrainingError, not to save NaN."""
    if run.saved_at == run.progress.step:
        return
    if not math.isfinite(float(run.engine.gradient_norm)):
        raise TrainingError(f"the gradient is {run.engine.gradient_norm} at step {run.progress.step}: not saved")
    path = checkpoint.save(
        run.config.run_directory,
        run.engine,
        run.memory,
        run.progress,
        run.identity,
        run.world,
        run.config.checkpoint.keep_last,
    )
    run.saved_at = run.progress.step
    run.sinks.event("checkpoint", step=run.progress.step, path=str(path))


def finish(run: Run) -> None:
    """Validate and save where the run ended, plot it, and write summary.json."""
    hold_validation(run)
    save(run)
    if not run.world.is_first:
        return
    directory = run.config.run_directory
    write_plots(directory, [phase.name for phase in run.config.phases], run.shards.generated)
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
    sys.exit(main())
