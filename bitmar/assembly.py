"""The parts of a run, built from its configuration in the order in which they need each other."""

from __future__ import annotations

import dataclasses
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
from bitmar.engine.checkpoint import Saver
from bitmar.engine.faults import START_UP_S, Guard, Notice, Stopped
from bitmar.engine.fragments import CheckpointError, DamagedCheckpoint
from bitmar.engine.progress import Progress, checkpoint_directories, identity_of
from bitmar.engine.retention import WordMilestones, milestones
from bitmar.engine.world import World
from bitmar.engine.zero import ZeroEngine, choose_precision
from bitmar.loading import CONFIG_FILE, TOKENIZER_FILE
from bitmar.model.bitmar import BitMar, parameter_counts, parameter_sizes
from bitmar.model.memory import MemoryState
from bitmar.observability.sinks import NullSink, Sink, open_sinks
from bitmar.startup import StartUp
from bitmar.version import code_version
from bitmar.watch import Watch, Window, open_watch
from shards.loader import CacheOptions, Loader, LoaderState, Shape, ShardSet, ValidationSet
from shards.order import PhaseSpec
from shards.record import DataError


@dataclass
class Run:
    """The parts of a run, assembled once. `memory`, `progress`, `window` and `validation` change as it goes; the loader
    does where a loss spike is undone."""

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
    saver: Saver
    milestones: WordMilestones
    sinks: Sink
    held_out: dict[str, ValidationSet]  # by modality
    watch: Watch
    counted: Tensor  # words and samples of all ranks since the last log, int64 [2]
    window: Window = field(default_factory=Window)
    validation: dict[str, float] = field(default_factory=dict)  # the last one
    validated_at: int = -1
    saved_at: int = -1
    save_due: bool = False
    milestones_due: tuple[int, ...] = ()  # passed, and not saved yet
    guard: Guard = field(default_factory=Guard)
    finished: bool = False  # an earlier start came to the end and wrote summary.json
    start_up: StartUp = field(default_factory=StartUp)
    damaged: set[tuple[str, str]] = field(default_factory=set)  # (shard, key) that any rank has met, as of the last log

    @property
    def last_step(self) -> int:
        return last_step(self.config, self.lengths)


def assemble(
    config: Config,
    world: World,
    guard: Guard | None = None,
    start_up: StartUp | None = None,
    dry_run: bool = False,
) -> Run:
    """Build every part of the run, in a dry run without a trace on the disk.

    Raises ConfigError, DataError, CheckpointError or Stopped.
    """
    start_up = start_up or StartUp()
    config.check_world(world.size)
    guard = guard or Guard()
    begin("opening the shards", world, guard)
    shards = open_shards(config)
    start_up.mark("shards")
    begin("building the engine", world, guard)
    model = build_model(config, shards, world)
    parameters, sizes = parameter_counts(model), parameter_sizes(model)
    start_up.mark("model")
    identity = identity_of(config, shards.tokenizer_hash, shards.identity)
    engine = ZeroEngine(model, config, world)
    start_up.mark("engine")
    begin("loading a checkpoint", world, guard)
    start = resume_or_start(config, engine, identity, world, dry_run)
    memory, progress = start.memory, start.progress
    start_up.mark("checkpoint")
    begin("preparing the data", world, guard)
    loader = open_loader(config, shards, progress, world)
    lengths = [loader.order.steps(i) for i in range(len(config.phases))]
    check_words(config, shards, loader)
    held_out = open_validation(config, shards, world)
    start_up.mark("loader")
    last = last_step(config, lengths)
    finished = world.broadcast_object(progress.step >= last and summary_step(config) == progress.step)
    sinks = NullSink() if dry_run else open_run(config, world, progress, last, finished, shards.tokenizer)
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
        saver=Saver(config.run_directory, config.checkpoint, world),
        milestones=await_milestones(config, progress),
        sinks=sinks,
        held_out=held_out,
        watch=open_watch(config, shards, engine, (parameters, sizes), world, progress.step, files=not dry_run),
        window=Window.of(len(shards.source_names)),
        counted=torch.zeros(2, dtype=torch.int64, device=world.device),
        saved_at=progress.step or -1,
        finished=finished,
        guard=guard,
        start_up=start_up,
    )
    start_up.mark("sinks")
    for problem in start.passed_over:
        sinks.event("checkpoint_passed_over", problem=problem)
    if world.is_first:
        guard.on_hang(lambda problem: sinks.event("hung", problem=problem))
        announce(run)
    return run


def begin(stage: str, world: World, guard: Guard) -> None:
    """Begin a stage of the start. Raises Stopped on all ranks where any is asked to stop: there is nothing to save."""
    guard.beat(stage, 0, START_UP_S)
    notice = Notice(world.agree(int(guard.notice)))
    if notice:
        raise Stopped(notice.reason)


def await_milestones(config: Config, progress: Progress) -> WordMilestones:
    """The counts of words that are still ahead."""
    words_per_step_max = config.training.global_batch * config.data.row_tokens
    return WordMilestones(milestones(config.checkpoint), progress.words, words_per_step_max)


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
            micro_batch=config.micro_batch(world.size),
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
    """Refuse a run that reads more than BabyLM allows. Raises ConfigError.

    Words of all sources <= words_limit and passes over each <= max_epochs, so words seen <= words_limit x max_epochs.
    """
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


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    memory: MemoryState
    progress: Progress
    passed_over: tuple[str, ...] = ()  # what is wrong with later checkpoints


def resume_or_start(
    config: Config, engine: ZeroEngine, identity: dict[str, Any], world: World, dry_run: bool = False
) -> Start:
    """From the checkpoint that checkpoint.resume asks for, or afresh; a dry run renames and removes none.

    Raises CheckpointError."""
    wish, directory = config.checkpoint.resume, config.run_directory
    if world.is_first and not dry_run:
        checkpoint.remove_left_overs(directory)
    found = world.broadcast_object(checkpoint_directories(directory))
    if wish == "auto" and found:
        return resume_newest(found, engine, identity, world, dry_run)
    if wish not in ("auto", "never"):
        chosen = Path(wish)
        start = Start(*checkpoint.load(chosen, engine, identity, world))
        if world.is_first and not dry_run and chosen.resolve().parent.parent == directory.resolve():
            for path in checkpoint.set_aside_later(chosen):
                print(f"set aside a later checkpoint: {path}", flush=True)
        return start
    if found:
        raise CheckpointError(
            f"{directory} holds checkpoints already; resume them (checkpoint.resume=auto), "
            "or give this run another run.name"
        )
    model = config.model
    memory = MemoryState.empty(model.memory_size, model.episode_dim, world.device)
    return Start(memory, Progress(world.broadcast_object(secrets.token_hex(4))))


def resume_newest(
    found: list[Path], engine: ZeroEngine, identity: dict[str, Any], world: World, dry_run: bool
) -> Start:
    """From the newest checkpoint that is not damaged; `found`: newest first. Raises CheckpointError."""
    passed_over: list[str] = []
    for directory in found:
        try:
            memory, progress = checkpoint.load(directory, engine, identity, world)
        except DamagedCheckpoint as error:
            passed_over.append(str(error))
            continue
        for bad, problem in zip(found, passed_over, strict=False):
            if world.is_first and not dry_run:
                print(f"{problem}; set aside as {checkpoint.set_aside(bad, 'damaged')}", flush=True)
        world.barrier()
        return Start(memory, progress, tuple(passed_over))
    raise CheckpointError(f"{passed_over[0]}; no earlier checkpoint is whole")


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


def open_run(
    config: Config, world: World, progress: Progress, total_steps: int, finished: bool, tokenizer: str
) -> Sink:
    """The run's directory with its resolved config and its tokenizer's file, and the sinks of this rank.

    Raises ConfigError.
    """
    directory = config.run_directory
    problem = None
    if world.is_first:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
            (directory / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
        except OSError as error:
            problem = f"run.directory: {directory} cannot be written: {error.strerror}"
    world.raise_together(problem, ConfigError)
    check_shared(directory, world)
    return open_sinks(
        directory,
        world.rank,
        wandb=dataclasses.replace(config.wandb, enabled=config.wandb.enabled and not finished),
        name=config.run.name,
        run_id=progress.run_id,
        config={**yaml.safe_load(dump_config(config)), "code": code_version()},
        total_steps=total_steps,
        resume_step=progress.step if progress.step else None,
    )


def check_shared(directory: Path, world: World) -> None:
    """Refuse a run's folder that the ranks do not share: each writes its part of a checkpoint. Raises ConfigError."""
    sign = directory / f".shared-{world.broadcast_object(secrets.token_hex(4))}"
    if world.is_first:
        sign.touch()
    world.barrier()
    without = [rank for rank, seen in enumerate(world.gather_objects(sign.is_file())) if not seen]
    if world.is_first:
        sign.unlink()
    if without:
        raise ConfigError(
            f"run.directory: {directory} of rank 0 is not what rank {without[0]} sees there; all ranks write their "
            "parts of a checkpoint to it, so it must lie on a file system that they share"
        )


def open_validation(config: Config, shards: ShardSet, world: World) -> dict[str, ValidationSet]:
    """The held-out rows of each modality that the shards hold."""
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
        for modality in shards.validated
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
    code = code_version()
    data = "generated" if run.shards.generated else "given"
    start = {"step": run.progress.step, "world": run.world.size, "parameters": total, "phases": phases, "data": data}
    peak = {"peak_tflops": run.watch.peak_tflops} if run.watch.peak_tflops else {}  # of a device: Throughput/MFU's
    run.sinks.event("start", **start, **peak, **code)
