"""The parts of a run, built from its configuration in the order in which they need each other."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bitmar.config import Config, ConfigError, dump_config
from bitmar.engine import checkpoint
from bitmar.engine.checkpoint import CheckpointError, Progress
from bitmar.engine.world import World
from bitmar.engine.zero import ZeroEngine, choose_precision
from bitmar.model.bitmar import BitMar, parameter_counts
from bitmar.model.memory import MemoryState
from bitmar.observability.schema import Cadence, select
from bitmar.observability.sinks import NullSink, Sink, open_sinks
from bitmar.observability.stats import Statistics
from bitmar.startup import StartUp
from shards.loader import CacheOptions, Loader, LoaderState, Shape, ShardSet, ValidationSet
from shards.order import PhaseSpec
from shards.record import DataError


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
    counted: Tensor  # words and samples of all ranks since the last log, int64 [2]
    window: Window = field(default_factory=Window)
    validation: dict[str, float] = field(default_factory=dict)  # the last one
    validated_at: int = -1
    saved_at: int = -1
    finished: bool = False  # an earlier start came to the end and wrote summary.json
    start_up: StartUp = field(default_factory=StartUp)
    damaged: set[tuple[str, str]] = field(default_factory=set)  # (shard, key) that any rank has met, as of the last log

    @property
    def last_step(self) -> int:
        return last_step(self.config, self.lengths)


def assemble(config: Config, world: World, dry_run: bool = False, start_up: StartUp | None = None) -> Run:
    """Build every part of the run, in a dry run without a trace on the disk.

    Raises ConfigError, DataError or CheckpointError.
    """
    start_up = start_up or StartUp()
    config.check_world(world.size)
    shards = open_shards(config)
    start_up.mark("shards")
    model = build_model(config, shards, world)
    parameters = parameter_counts(model)
    start_up.mark("model")
    identity = checkpoint.identity(config, shards.tokenizer_hash, shards.identity)
    engine = ZeroEngine(model, config, world)
    start_up.mark("engine")
    memory, progress = resume_or_start(config, engine, identity, world, dry_run)
    start_up.mark("checkpoint")
    loader = open_loader(config, shards, progress, world)
    lengths = [loader.order.steps(i) for i in range(len(config.phases))]
    check_words(config, shards, loader)
    held_out = open_validation(config, shards, world)
    start_up.mark("loader")
    last = last_step(config, lengths)
    finished = world.broadcast_object(progress.step >= last and summary_step(config) == progress.step)
    sinks = NullSink() if dry_run else open_run(config, world, progress, last, finished)
    run = Run(
        config=config,
        world=world,
        shards=shards,
        engine=engine,
        loader=loader,
        lengths=lengths,
        parameters=parameters,
        identity=identity,
        memory=memory,
        progress=progress,
        sinks=sinks,
        statistics=Statistics(select(Cadence.STEP), world.device),
        held_out=held_out,
        counted=torch.zeros(2, dtype=torch.int64, device=world.device),
        saved_at=progress.step or -1,
        finished=finished,
        start_up=start_up,
    )
    start_up.mark("sinks")
    if world.is_first:
        announce(run)
    return run


def open_shards(config: Config) -> ShardSet:
    """The shards of the recipe, local or remote. Raises DataError."""
    data = config.data
    directory = None if data.cache_directory is None else Path(data.cache_directory)
    limit = None if data.cache_gib is None else int(data.cache_gib * 2**30)
    return ShardSet.open(data.shards, CacheOptions(directory, limit), damage_ceiling=data.damage_ceiling)


def open_loader(config: Config, shards: ShardSet, progress: Progress, world: World) -> Loader:
    """This rank's batches from where the run stands. Raises ConfigError for a phase that the shards cannot serve."""
    try:
        return Loader(
            shards,
            [PhaseSpec(p.name, p.mix, p.epochs, p.words, p.steps) for p in config.phases],
            seed=config.run.seed,
            shape=Shape(
                config.training.global_batch,
                config.data.row_tokens,
                config.data.partitions,
                config.data.window_shards,
            ),
            micro_batch=config.training.micro_batch,
            rank=world.rank,
            world=world.size,
            state=LoaderState(progress.phase, progress.position),
            prefetch=config.data.prefetch_steps,
            pack_captions=config.data.pack_captions,
            node_ranks=world.local_size,
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
    config: Config, engine: ZeroEngine, identity: dict[str, Any], world: World, dry_run: bool = False
) -> tuple[MemoryState, Progress]:
    """Memory and progress of the checkpoint that checkpoint.resume asks for, or fresh ones; a dry run renames none."""
    wish = config.checkpoint.resume
    found = checkpoint.checkpoint_directories(config.run_directory) if wish == "auto" else []
    chosen = found[0] if found else Path(wish) if wish not in ("auto", "never") else None
    chosen = world.broadcast_object(chosen)
    if chosen is not None:
        restored = checkpoint.load(chosen, engine, identity, world)
        if world.is_first and not dry_run and chosen.resolve().parent.parent == config.run_directory.resolve():
            for path in checkpoint.set_aside_later(chosen):
                print(f"set aside a later checkpoint: {path}", flush=True)
        return restored
    problem = None
    if world.is_first and checkpoint.checkpoint_directories(config.run_directory):
        problem = (
            f"{config.run_directory} holds checkpoints already; resume them (checkpoint.resume=auto), "
            "or give this run another run.name"
        )
    world.raise_together(problem, CheckpointError)
    model = config.model
    memory = MemoryState.empty(model.memory_size, model.episode_dim, world.device)
    return memory, Progress(world.broadcast_object(secrets.token_hex(4)))


def last_step(config: Config, lengths: list[int]) -> int:
    """The step at which a run of phases of `lengths` ends."""
    total = sum(lengths)
    return min(total, config.training.max_steps or total)


def summary_step(config: Config) -> int | None:
    """The step that the run's summary.json tells of; None where there is none that can be read."""
    try:
        return json.loads((config.run_directory / "summary.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError):
        return None


def open_run(config: Config, world: World, progress: Progress, total_steps: int, finished: bool) -> Sink:
    """The run's directory with its resolved config, and the sinks of this rank. Raises ConfigError."""
    directory = config.run_directory
    problem = None
    if world.is_first:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        except OSError as error:
            problem = f"run.directory: {directory} cannot be written: {error.strerror}"
    world.raise_together(problem, ConfigError)
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
