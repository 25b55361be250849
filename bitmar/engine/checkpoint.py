"""Portable checkpoints: whole parameters in safetensors, the same files at any world size and ZeRO stage.

    checkpoints/step_00000500/
      state.json              step, loader position, words, run id, model, data, checksums of the other files
      parameters-00000.safetensors ...   model.NAME, exp_avg.NAME, exp_avg_sq.NAME (fp32), in parameter order
      memory.safetensors      the episodic memory
      rng.safetensors         torch's generator state of every rank

Written under a temporary name, synced, then renamed: a checkpoint exists whole or not at all. Nothing that is
loaded can execute code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmar.config import Config
from bitmar.engine.world import World
from bitmar.engine.zero import ParameterState, ZeroEngine
from bitmar.model.memory import MemoryState

FORMAT = 1
FILE_BYTES = 512 * 2**20  # a parameter file is closed when it holds this much
MOMENTS = ("exp_avg", "exp_avg_sq")
ORDER_KEYS = ("row_tokens", "window_shards", "partitions", "pack_captions")  # of data: what the order follows from
UNNAMED = {"data.pack_captions": False}  # what checkpoints are of that do not name the key yet


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, the reason and the way out."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, apart from tensors. `step` counts optimizer steps since the run began."""

    run_id: str
    step: int = 0
    phase: int = 0
    position: int = 0  # optimizer step inside the phase
    words: int = 0
    samples: int = 0
    initial_loss: float | None = None  # validation before the first step
    seconds: float = 0.0  # training time so far, over all starts
    skipped: int = 0  # updates left out because a loss or gradient was not finite
    skipped_in_a_row: int = 0
    recent_losses: Sequence[float] = ()  # of the phase's last steps, for the spike guard
    left_out: Sequence[int] = ()  # steps that are not trained, after a loss spike
    rewinds: int = 0
    validation_due: bool = False  # a stop cut the validation of this step short


def identity(config: Config, tokenizer_hash: str, data_hash: str) -> dict[str, Any]:
    """What must be equal for a checkpoint to go on: the model, and all that the order of the data follows from."""
    return {
        "model": dataclasses.asdict(config.model),
        "order": {
            "run.seed": config.run.seed,
            "training.global_batch": config.training.global_batch,
            **{f"data.{name}": getattr(config.data, name) for name in ORDER_KEYS},
            "phases": [[p.name, p.mix, p.epochs, p.words, p.steps] for p in config.phases],
            "tokenizer": tokenizer_hash,
            "shards": data_hash,
        },
    }


def checkpoint_directories(run_directory: Path) -> list[Path]:
    """Whole checkpoints of a run, newest first."""
    found = (run_directory / "checkpoints").glob("step_*")
    return sorted((p for p in found if (p / "state.json").is_file()), reverse=True)


def save(
    run_directory: Path,
    engine: ZeroEngine,
    memory: MemoryState,
    progress: Progress,
    identity: dict[str, Any],
    world: World,
    keep_last: int,
) -> Path:
    """Write a checkpoint (a collective), then remove all but the last `keep_last`. Returns its folder."""
    target = run_directory / "checkpoints" / f"step_{progress.step:08d}"
    temporary = target.with_name(f".{target.name}.partial")
    rng = world.gather(torch.get_rng_state().to(world.device)).cpu()
    _check_memory_agrees(memory, world)
    writer = _Writer(temporary) if world.is_first else None
    for state in engine.states():  # a collective: every rank goes through all of them, whatever rank 0 meets
        if writer is not None:
            writer.add(state)
    problem = None
    if writer is not None:
        state = {
            "format": FORMAT,
            "progress": dataclasses.asdict(progress),
            "adam_step": engine.adam_step(),
            "identity": identity,
        }
        writer.finish(target, memory, rng, state)
        writer.prune(checkpoint_directories(run_directory)[keep_last:])
        problem = writer.problem
    world.raise_together(problem, CheckpointError)
    return target


class _Writer:
    """Rank 0's files of one checkpoint. `problem` keeps the first thing that goes wrong; nothing is written after."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.files: list[str] = []
        self.problem: str | None = None
        self._held: dict[str, Tensor] = {}
        with self._noting():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def add(self, state: ParameterState) -> None:
        """Take a parameter; a file is closed when it holds FILE_BYTES."""
        if self.problem is not None:
            return
        for kind, tensor in (("model", state.weight), ("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            self._held[f"{kind}.{state.name}"] = tensor.cpu().clone()
        if sum(tensor.nbytes for tensor in self._held.values()) >= FILE_BYTES:
            self._flush()

    def finish(self, target: Path, memory: MemoryState, rng: Tensor, state: dict[str, Any]) -> None:
        """Write what stands beside the parameters, sync all of it and give the folder its name."""
        if self._held:
            self._flush()
        self._save("memory.safetensors", {k: v.cpu().contiguous() for k, v in memory.tensors().items()})
        self._save("rng.safetensors", {str(rank): part.contiguous() for rank, part in enumerate(rng)})
        if self.problem is not None:
            return
        with self._noting():
            state = state | {"sha256": {name: _sha256(self.temporary / name) for name in self.files}}
            (self.temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            for name in [*self.files, "state.json"]:
                _sync(self.temporary / name)
            _sync(self.temporary)
            if target.exists():
                _remove(target)
            os.replace(self.temporary, target)
            _sync(target.parent)

    def prune(self, old: list[Path]) -> None:
        """Remove older checkpoints, unless this one could not be written."""
        if self.problem is None:
            with self._noting():
                for directory in old:
                    _remove(directory)

    def _flush(self) -> None:
        self._save(f"parameters-{len(self.files):05d}.safetensors", self._held)
        self._held = {}

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        with self._noting():
            save_file(tensors, self.temporary / name)
            self.files.append(name)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep the message of the first thing that goes wrong."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.problem = self.problem or f"checkpoint {self.temporary} cannot be written: {error}"


def _remove(directory: Path) -> None:
    """Take a checkpoint's name away first, so that a half-removed one is none."""
    doomed = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(directory, doomed)
    shutil.rmtree(doomed)


def set_aside_later(directory: Path) -> list[Path]:
    """Rename the checkpoints that are later than `directory` in its run; returns their new names.

    A run that was told to go back must neither resume from what it left behind nor prune its new checkpoints in
    favour of them.
    """
    renamed = []
    for path in sorted(directory.parent.glob("step_*")):
        if path.name > directory.name:
            free = (path.with_name(f"left{n or ''}_{path.name}") for n in itertools.count())
            renamed.append(path.replace(next(name for name in free if not name.exists())))
    return renamed


def load(directory: Path, engine: ZeroEngine, identity: dict[str, Any], world: World) -> tuple[MemoryState, Progress]:
    """Restore engine, memory, generator and progress. Raises CheckpointError before anything is changed."""
    state = read_state(directory)
    _check_identity(directory, state["identity"], identity)
    world.raise_together(_damage(directory, state) if world.is_first else None, CheckpointError)
    shapes = engine.parameter_shapes()
    where = _locate(directory, state, shapes)
    engine.load_states(_read_parameters(directory, where, list(shapes), world.device), state["adam_step"])
    memory = MemoryState(**load_file(directory / "memory.safetensors", device=str(world.device)))
    rng = load_file(directory / "rng.safetensors")
    if str(world.rank) in rng:
        torch.set_rng_state(rng[str(world.rank)])
    world.barrier()
    return memory, Progress(**state["progress"])


def _damage(directory: Path, state: dict[str, Any]) -> str | None:
    """What is wrong with the files of a checkpoint, None where their checksums hold."""
    for name, expected in state["sha256"].items():
        if not (directory / name).is_file():
            return f"checkpoint {directory}: {name} is missing; remove the folder"
        if _sha256(directory / name) != expected:
            return f"checkpoint {directory}: {name} is damaged (checksum); remove the folder"
    return None


def read_state(directory: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError."""
    path = directory / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {directory} has no state.json: not a checkpoint, or not whole") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory}: state.json cannot be read: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {directory} is not of format {FORMAT}; it was written by another version")
    return state


def _locate(directory: Path, state: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """File of every tensor, after comparing names and shapes with the model's. Raises CheckpointError."""
    where: dict[str, str] = {}
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(n for n in state["sha256"] if n.startswith("parameters-")):
        try:
            with safe_open(directory / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    where[key] = name
                    found[key] = tuple(file.get_slice(key).get_shape())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {directory}: {name} cannot be read: {error}") from None
    for name, shape in shapes.items():
        for kind in ("model", *MOMENTS):
            have = found.get(f"{kind}.{name}")
            if have != shape:
                what = f"holds {list(have)}" if have else "lacks it"
                raise CheckpointError(f"checkpoint {directory} is of another model: {kind}.{name} should be "
                                      f"{list(shape)}, the checkpoint {what}")  # fmt: skip
    return where


def _read_parameters(
    directory: Path, where: dict[str, str], names: list[str], device: torch.device
) -> Iterator[ParameterState]:
    handles = {file: safe_open(directory / file, framework="pt", device=str(device)) for file in set(where.values())}
    opened = {file: handle.__enter__() for file, handle in handles.items()}
    for name in names:
        tensors = (opened[where[f"{kind}.{name}"]].get_tensor(f"{kind}.{name}") for kind in ("model", *MOMENTS))
        yield ParameterState(name, *tensors)
    for handle in handles.values():
        handle.__exit__(None, None, None)


def _check_identity(directory: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for section, meaning in (("model", "another model"), ("order", "another order of the data")):
        for key in sorted(set(theirs[section]) | set(ours[section])):
            there, here = theirs[section].get(key, UNNAMED.get(key)), ours[section].get(key)
            if there != here:
                name = f"model.{key}" if section == "model" else key
                raise CheckpointError(
                    f"checkpoint {directory} is of {meaning}: {name} is {there!r} there and {here!r} here; "
                    "give this run another run.name, or set checkpoint.resume=never"
                )


def _check_memory_agrees(memory: MemoryState, world: World) -> None:
    """The memory must have the same bits on every rank; anything else is a fault of this program."""
    digest = hashlib.sha256()
    for tensor in memory.tensors().values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    mine = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=world.device)
    if not bool((world.gather(mine) == mine).all()):
        raise RuntimeError(f"the episodic memory differs between ranks (seen on rank {world.rank})")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
