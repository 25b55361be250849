"""Train BitMar: assemble world, data, model, engine and sinks, then loop over optimizer steps.

deepspeed [launcher options] --module bitmar.train --config launch/recipes/NAME.yaml [key.path=value ...]
python -m bitmar.train --config launch/recipes/NAME.yaml [key.path=value ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from bitmar.batch import IGNORE, Batch
from bitmar.config import Config, ConfigError, dump_config, load_config
from bitmar.engine import checkpoint
from bitmar.engine.checkpoint import CheckpointError, Progress
from bitmar.engine.schedule import Rates, rates_at
from bitmar.engine.step import StepResult, train_step
from bitmar.engine.world import World, join_world, leave_world
from bitmar.engine.zero import ZeroEngine, choose_precision
from bitmar.evaluation.perplexity import validate
from bitmar.model.bitmar import BitMar, parameter_counts
from bitmar.model.memory import MemoryState
from bitmar.observability.plots import write_plots
from bitmar.observability.reduce import reduce
from bitmar.observability.schema import Cadence, select
from bitmar.observability.sinks import Sink, open_sinks
from bitmar.observability.stats import Statistics, record_memory
from shards.loader import Loader, LoaderState, Rows, ShardSet, ValidationSet
from shards.order import PhaseSpec
from shards.record import DataError

USER_ERROR = 2  # exit code of a mistake in recipe, data or checkpoint
INTERRUPTED = 130
OTHER_RANK_WAIT_S = 5.0  # rank 0 tells of an error that all ranks meet; a rank that lives on after this tells its own


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step and what to do."""


@dataclass
class Window:
    """What this rank did since the last log; `seconds` leaves out validation, checkpoints and logging."""

    steps: int = 0
    samples: int = 0
    words: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Run:
    """The parts of a run, assembled once. `memory`, `progress`, `window` and `validation` change as it goes."""

    config: Config
    world: World
    shards: ShardSet
    engine: ZeroEngine
    loader: Loader
    lengths: list[int]  # optimizer steps of each phase
    parameters: dict[str, int]  # by component
    identity: dict[str, Any]
    memory: MemoryState
    progress: Progress
    sinks: Sink
    statistics: Statistics
    held_out: dict[str, ValidationSet]  # by modality
    window: Window = field(default_factory=Window)
    validation: dict[str, float] = field(default_factory=dict)  # the last one
    validated_at: int = -1
    saved_at: int = -1
    finished: bool = False  # an earlier start came to the end and wrote summary.json
    reported_damage: int = 0  # damaged samples told of so far

    @property
    def last_step(self) -> int:
        total = sum(self.lengths)
        return min(total, self.config.training.max_steps or total)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. A user's mistake is one line on standard error and exit code 2."""
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        config.check_world(int(os.environ.get("WORLD_SIZE", "1")))  # before the ranks wait for each other
        world = join_world(config.engine.timeout_s, config.engine.threads_per_rank)
        train(config, world)
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        report(error)
        return 1 if isinstance(error, TrainingError) else USER_ERROR
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


def parse(arguments: Sequence[str]) -> Config:
    """The command line as a checked Config. Raises ConfigError; bad flags exit as argparse does."""
    parser = argparse.ArgumentParser(prog="bitmar.train", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="recipe, see launch/recipes/")
    parser.add_argument("--resume", help="auto, never or a checkpoint's folder (checkpoint.resume)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    known = parser.parse_args(arguments)
    resume = [f"checkpoint.resume={known.resume}"] if known.resume else []
    return load_config(known.config, [*known.overrides, *resume])


def train(config: Config, world: World) -> None:
    """Run every phase of the recipe, from where the run's newest checkpoint left off."""
    run = assemble(config, world)
    code = 1
    try:
        if run.finished:
            if world.is_first:
                print(f"finished already at step {run.progress.step}; nothing is left to train", flush=True)
            code = 0
            return
        if run.progress.step == 0:
            run.progress = dataclasses.replace(run.progress, initial_loss=hold_validation(run))
        loop(run)
        finish(run)
        code = 0
    finally:
        run.sinks.close(code)


def loop(run: Run) -> None:
    """One iteration an optimizer step; it knows neither modality nor phase."""
    config, total = run.config, sum(run.lengths)
    if run.progress.step >= run.last_step:
        return
    started = time.perf_counter()
    for state, rows in run.loader:
        phase = config.phases[state.phase]
        rates = rates_at(run.progress.step, total, config.optimizer)
        run.engine.set_rates(rates, phase.train)
        batches = [Batch.from_rows(part, run.world.device) for part in rows]
        result = train_step(run.engine, batches, run.memory, phase, config, run.world, run.progress.step)
        run.memory = result.memory
        advance(run, state, result)
        observe(run, rows, result)
        step = run.progress.step
        run.window.seconds += time.perf_counter() - started
        if step % config.logging.log_every_n_steps == 0 or step == run.last_step:
            log(run, state, rates)
        if step % config.validation.every_steps == 0:
            hold_validation(run)
        if step % config.checkpoint.every_steps == 0:
            save(run)
        if step >= run.last_step:
            break
        started = time.perf_counter()


def assemble(config: Config, world: World) -> Run:
    """Build every part of the run. Raises ConfigError, DataError or CheckpointError."""
    config.check_world(world.size)
    shards = ShardSet.open(Path(config.data.shards))
    model = build_model(config, shards, world)
    parameters = parameter_counts(model)
    manifest_hash = hashlib.sha256(json.dumps(shards.manifest, sort_keys=True).encode()).hexdigest()
    identity = checkpoint.identity(config, shards.tokenizer_hash, manifest_hash)
    engine = ZeroEngine(model, config, world)
    memory, progress = resume_or_start(config, engine, identity, world)
    loader = open_loader(config, shards, progress, world)
    lengths = [loader.order.steps(i) for i in range(len(config.phases))]
    check_words(config, shards, loader)
    held_out = open_validation(config, shards, world)
    finished = world.broadcast_object(is_finished(config, progress, sum(lengths)))
    sinks = open_run(config, world, progress, sum(lengths), finished)
    statistics = Statistics(select(Cadence.STEP), world.device)
    parts = (
        shards,
        engine,
        loader,
        lengths,
        parameters,
        identity,
        memory,
        progress,
        sinks,
        statistics,
        held_out,
    )
    run = Run(config, world, *parts, saved_at=progress.step or -1, finished=finished)
    if world.is_first:
        announce(run)
    return run


def open_loader(config: Config, shards: ShardSet, progress: Progress, world: World) -> Loader:
    """This rank's batches from where the run stands. Raises ConfigError for a phase that the shards cannot serve."""
    try:
        return Loader(
            shards,
            [PhaseSpec(p.name, p.mix, p.epochs, p.words, p.steps) for p in config.phases],
            seed=config.run.seed,
            global_batch=config.training.global_batch,
            micro_batch=config.training.micro_batch,
            row_tokens=config.data.row_tokens,
            rank=world.rank,
            world=world.size,
            state=LoaderState(progress.phase, progress.position),
            prefetch=config.data.prefetch_steps,
        )
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def build_model(config: Config, shards: ShardSet, world: World) -> BitMar:
    """The model with its first weights, equal on all ranks. Raises ConfigError where the data does not fit it."""
    if shards.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the tokenizer's {shards.vocab_size} entries "
            f"({config.data.shards}); raise it, or convert with --vocab-size {config.model.vocab_size}"
        )
    if shards.vector_size != config.model.vision_encoder_dim:
        raise ConfigError(
            f"model.vision_encoder_dim {config.model.vision_encoder_dim} does not match the shards' vectors of "
            f"{shards.vector_size} numbers"
        )
    torch.manual_seed(config.run.seed)
    dtype = choose_precision(config.training.precision, world.device)
    return BitMar(config.model, config.run.seed, config.engine.activation_checkpointing, dtype)


def check_words(config: Config, shards: ShardSet, loader: Loader) -> None:
    """Refuse a run that reads more than BabyLM allows. Raises ConfigError."""
    words = shards.words("train")
    if words > config.data.words_limit:
        raise ConfigError(
            f"{config.data.shards} holds {words:,} words for training, more than data.words_limit "
            f"{config.data.words_limit:,} (BabyLM's limit)"
        )
    for source, passes in loader.order.passes().items():
        if passes > config.training.max_epochs:
            raise ConfigError(
                f"the phases read source {source} {passes} times, more than training.max_epochs "
                f"{config.training.max_epochs}; shorten them"
            )


def resume_or_start(
    config: Config, engine: ZeroEngine, identity: dict[str, Any], world: World
) -> tuple[MemoryState, Progress]:
    """Memory and progress of the checkpoint that checkpoint.resume asks for, or fresh ones."""
    wish = config.checkpoint.resume
    found = checkpoint.checkpoint_directories(config.run_directory) if wish == "auto" else []
    chosen = found[0] if found else Path(wish) if wish not in ("auto", "never") else None
    chosen = world.broadcast_object(chosen)
    if chosen is not None:
        return checkpoint.load(chosen, engine, identity, world)
    if world.is_first and checkpoint.checkpoint_directories(config.run_directory):
        raise CheckpointError(
            f"{config.run_directory} holds checkpoints already; resume them (checkpoint.resume=auto), "
            "or give this run another run.name"
        )
    model = config.model
    memory = MemoryState.empty(model.memory_size, model.episode_dim, world.device)
    return memory, Progress(world.broadcast_object(secrets.token_hex(4)))


def is_finished(config: Config, progress: Progress, total_steps: int) -> bool:
    """Whether nothing is left to train and summary.json tells of the last step."""
    path = config.run_directory / "summary.json"
    if progress.step < min(total_steps, config.training.max_steps or total_steps) or not path.is_file():
        return False
    return json.loads(path.read_text(encoding="utf-8"))["step"] == progress.step


def open_run(config: Config, world: World, progress: Progress, total_steps: int, finished: bool) -> Sink:
    """The run's directory with its resolved config, and the sinks of this rank. Raises ConfigError."""
    directory = config.run_directory
    if world.is_first:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.directory: {directory} cannot be written: {error.strerror}") from None
    mode = "disabled" if finished else config.logging.wandb
    return open_sinks(
        directory,
        world.rank,
        project=config.logging.wandb_project,
        name=config.run.name,
        run_id=progress.run_id,
        config=yaml.safe_load(dump_config(config)),
        wandb_mode=None if mode == "auto" else mode,
        total_steps=total_steps,
        resume_step=progress.step if progress.step else None,
    )


def open_validation(config: Config, shards: ShardSet, world: World) -> dict[str, ValidationSet]:
    """The held-out rows of each modality that the shards hold."""
    held = {s["modality"] for s in shards.manifest["shards"] if s["split"] == "validation" and s["samples"] > 0}
    return {
        modality: ValidationSet(
            shards,
            modality=modality,
            micro_batch=config.validation.micro_batch,
            row_tokens=config.data.row_tokens,
            max_samples=config.validation.max_samples,
            rank=world.rank,
            world=world.size,
        )
        for modality in sorted(held)
    }


def announce(run: Run) -> None:
    """Tell what is about to be trained."""
    total = sum(run.parameters.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in run.parameters.items())
    print(f"parameters: {total:,} ({parts})", flush=True)
    print(
        f"data: {'generated, ' if run.shards.generated else ''}{run.shards.words('train'):,} words for training; "
        f"{run.world.size} rank(s) on {run.world.device.type}, ZeRO-{run.engine.stage}, "
        f"matrix products in {str(run.engine.module.compute_dtype).removeprefix('torch.')}",
        flush=True,
    )
    phases = {p.name: n for p, n in zip(run.config.phases, run.lengths, strict=True)}
    run.sinks.event("start", step=run.progress.step, world=run.world.size, parameters=total, phases=phases)


def advance(run: Run, state: LoaderState, result: StepResult) -> None:
    """Count the step; the stored position is that of the next one."""
    done = state.position + 1 == run.lengths[state.phase]
    counted = torch.stack([result.words, result.samples]).tolist()
    run.progress = dataclasses.replace(
        run.progress,
        step=run.progress.step + 1,
        phase=state.phase + done,
        position=0 if done else state.position + 1,
        words=run.progress.words + counted[0],
        samples=run.progress.samples + counted[1],
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
    w.samples += sum(int(part.valid.sum()) for part in rows)
    w.words += sum(int(part.words.sum()) for part in rows)


def log(run: Run, state: LoaderState, rates: Rates) -> None:
    """Reduce the statistics over all ranks and hand them to the sinks. Raises TrainingError on NaN."""
    s, w, config = run.statistics, run.window, run.config
    if run.world.device.type == "cuda":
        started = time.perf_counter()
        torch.cuda.synchronize()
        w.seconds += time.perf_counter() - started
    s.add("Throughput/Samples_Per_Second", w.samples / w.seconds)
    s.add("Throughput/Words_Per_Second", w.words / w.seconds)
    s.add("Throughput/Tokens_Per_Second", w.tokens / w.seconds)
    s.add("Throughput/Step_Seconds", w.seconds, w.steps)
    damaged = run.loader.damaged
    s.peak("Data/Damaged_Samples", len(damaged))
    for shard, key in damaged[run.reported_damage :]:
        run.sinks.event("damaged_sample", shard=shard, key=key)
    run.reported_damage = len(damaged)
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
    """Write a checkpoint, unless the last one is of this step. Raises TrainingError rather than save NaN."""
    if run.saved_at == run.progress.step:
        return
    if not math.isfinite(float(run.engine.gradient_norm)):
        raise TrainingError(f"the gradient is {run.engine.gradient_norm} at step {run.progress.step}: not saved")
    seconds = run.progress.seconds + run.window.seconds
    path = checkpoint.save(
        run.config.run_directory,
        run.engine,
        run.memory,
        dataclasses.replace(run.progress, seconds=seconds),
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
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
