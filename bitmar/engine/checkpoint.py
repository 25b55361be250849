"""Saves a run beside its training and restores it: what a checkpoint holds besides parameters, and when it exists.

At a save every rank copies its own pieces to host memory, which is all that training waits for; a thread writes them
(bitmar/engine/fragments.py) under a temporary name. When every rank's are on the disk, rank 0 writes state.json and
renames the folder: a checkpoint exists whole or not at all.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitmar.config import CheckpointConfig
from bitmar.engine.fragments import (
    FORMAT,
    MEMORY_FILE,
    CheckpointError,
    DamagedCheckpoint,
    FileRecord,
    Fragment,
    FragmentReader,
    damage,
    parameter_file,
    read_generator,
    read_state,
    state_shapes,
    sync,
    write_fragments,
    write_state,
    write_tensors,
)
from bitmar.engine.progress import FOLDER, Progress, checkpoint_directories, checkpoint_name
from bitmar.engine.retention import Candidate, Keep, removable
from bitmar.engine.world import World
from bitmar.engine.zero import ZeroEngine
from bitmar.model.memory import MemoryState

UNFINISHED = (".partial", ".removed")  # names that end so are left by a run that was killed


@dataclass(frozen=True)
class Saved:
    """How a save ended; the same on every rank."""

    step: int
    path: Path
    milestone_words: tuple[int, ...]  # passed at its step
    problem: str | None  # why there is no checkpoint; training may go on
    left_over: str | None  # why an older checkpoint could not be removed
    hold_seconds: float  # that training waited on this rank


@dataclass
class _Pending:
    """A save that has not ended. First every rank writes; then rank 0 gives the folder its name."""

    step: int
    directory: Path
    state: dict[str, Any]
    hold_seconds: float
    writing: Future[_Written]
    naming: Future[tuple[str | None, str | None]] | None = None


@dataclass(frozen=True)
class _Written:
    files: dict[str, FileRecord]
    problem: str | None


class Saver:
    """Writes the checkpoints of a run. Every rank has one and calls it at the same steps; collectives run in the
    caller's thread only."""

    def __init__(self, run_directory: Path, config: CheckpointConfig, world: World) -> None:
        self._folder = run_directory / FOLDER
        self._config = config
        self._world = world
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._host: dict[tuple[str, str], Tensor] = {}  # (parameter, kind): used again at every save
        self._pending: _Pending | None = None

    def save(
        self,
        engine: ZeroEngine,
        memory: MemoryState,
        progress: Progress,
        identity: dict[str, Any],
        keep: Keep | None = None,
        wait: bool = False,
    ) -> list[Saved]:
        """Begin a checkpoint, after the end of an earlier one; `wait`: also end it. Returns the saves that ended."""
        started = time.perf_counter()
        ended = self.wait()
        directory = self._folder / checkpoint_name(progress.step)
        if self._world.is_first:
            shutil.rmtree(_partial(directory), ignore_errors=True)
        _check_memory_agrees(memory, self._world)  # a collective: no rank writes before the folder is clear
        fragments = self._snapshot(engine)
        held = {name: tensor.detach().to("cpu", copy=True) for name, tensor in memory.tensors().items()}
        state = {
            "format": FORMAT,
            "progress": dataclasses.asdict(progress),
            "adam_step": engine.adam_step(),
            "keep": dataclasses.asdict(keep or Keep()),
            "identity": identity,
            "world": {"ranks": self._world.size, "zero_stage": engine.stage},
            "parameters": engine.parameter_shapes(),
        }
        writing = self._thread.submit(
            _write, _partial(directory), self._world.rank, fragments, torch.get_rng_state(), held
        )
        hold = time.perf_counter() - started
        self._pending = _Pending(progress.step, directory, state, hold, writing)
        return ended + (self.wait() if wait else [])

    def poll(self) -> list[Saved]:
        """Bring a save one stage on where every rank is ready; a collective while one is pending, else nothing."""
        pending = self._pending
        if pending is None:
            return []
        mine = pending.naming or pending.writing
        if self._world.any(not mine.done()):
            return []
        if pending.naming is None:
            written = self._world.gather_objects(pending.writing.result())
            pending.naming = self._thread.submit(self._name, pending, written) if self._world.is_first else _no_task()
            return []
        problem, left_over = self._world.broadcast_object(pending.naming.result())
        self._pending = None
        passed = tuple(pending.state["keep"]["milestone_words"])
        return [Saved(pending.step, pending.directory, passed, problem, left_over, pending.hold_seconds)]

    def wait(self) -> list[Saved]:
        """See a pending save to its end (a collective)."""
        ended: list[Saved] = []
        while self._pending is not None:
            (self._pending.naming or self._pending.writing).result()
            ended += self.poll()
        return ended

    def _snapshot(self, engine: ZeroEngine) -> list[Fragment]:
        """Copy this rank's pieces to host memory."""
        fragments = []
        for fragment in engine.fragments():
            copies = {}
            for kind, tensor in fragment.tensors.items():
                key = (fragment.name, kind)
                if key not in self._host:
                    pinned = self._world.device.type == "cuda"
                    self._host[key] = torch.empty(len(tensor), dtype=torch.float32, pin_memory=pinned)
                copies[kind] = _copy(tensor, self._host[key])
            fragments.append(Fragment(fragment.name, fragment.start, copies))
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        return fragments

    def _name(self, pending: _Pending, written: list[_Written]) -> tuple[str | None, str | None]:
        """Rank 0's last part: what went wrong with the checkpoint, and with the removal of older ones."""
        partial = _partial(pending.directory)
        problem = next((part.problem for part in written if part.problem is not None), None)
        files = {name: record for part in written for name, record in part.files.items()}
        try:
            if problem is None:
                for name, record in files.items():
                    if not (partial / name).is_file() or (partial / name).stat().st_size != record.bytes:
                        raise OSError(f"{partial / name}, which another rank wrote, is not there")
                records = {name: dataclasses.asdict(record) for name, record in files.items()}
                write_state(partial, pending.state | {"files": records})
                sync(partial)
                if pending.directory.exists():
                    _remove(pending.directory)
                os.replace(partial, pending.directory)
                sync(pending.directory.parent)
        except OSError as error:
            problem = f"checkpoint {pending.directory} cannot be written: {error}"
        if problem is not None:
            shutil.rmtree(partial, ignore_errors=True)
            return problem, None
        return None, self._prune()

    def _prune(self) -> str | None:
        try:
            candidates = []
            for directory in checkpoint_directories(self._folder.parent):
                state = read_state(directory)
                keep = Keep(**state["keep"])
                candidates.append(Candidate(directory, state["progress"]["step"], keep))
            for directory in removable(candidates, self._config.keep_last, self._config.keep_best):
                _remove(directory)
        except (OSError, CheckpointError) as error:
            return f"old checkpoints stay: {error}"
        return None


def _write(partial: Path, rank: int, fragments: list[Fragment], rng: Tensor, memory: dict[str, Tensor]) -> _Written:
    """A rank's files of one checkpoint; runs beside training."""
    name, files = parameter_file(rank), {}
    try:
        partial.mkdir(parents=True, exist_ok=True)
        files[name] = write_fragments(partial / name, fragments, rng)
        if rank == 0:
            files[MEMORY_FILE] = write_tensors(partial / MEMORY_FILE, memory)
    except (OSError, SafetensorError) as error:
        return _Written({}, f"checkpoint {partial} cannot be written (rank {rank}): {error}")
    return _Written(files, None)


def _copy(source: Tensor, host: Tensor) -> Tensor:
    """Copy into host memory; from a GPU it may go on after the return.

    Between host tensors by one thread: memory bounds it, and torch's parallel copy waits for a thread of each core,
    hundreds of times over, where other processes run.
    """
    if source.device.type == "cpu":
        np.copyto(host.numpy(), source.numpy())
    else:
        host.copy_(source, non_blocking=True)
    return host


def _no_task() -> Future[tuple[str | None, str | None]]:
    done: Future[tuple[str | None, str | None]] = Future()
    done.set_result((None, None))
    return done


def _partial(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


def _remove(directory: Path) -> None:
    """Take a checkpoint's name away first, so that a half-removed one is none."""
    doomed = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(directory, doomed)
    shutil.rmtree(doomed)


def remove_left_overs(run_directory: Path) -> None:
    """Remove what saves that were killed have left behind. Call it while no rank saves."""
    for path in (run_directory / FOLDER).glob(".step_*"):
        if path.name.endswith(UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)


def set_aside_later(directory: Path) -> list[Path]:
    """Rename the checkpoints that are later than `directory` in its run; returns their new names.

    A run that was told to go back must neither resume from what it left behind nor prune its new checkpoints in
    favour of them.
    """
    later = [path for path in sorted(directory.parent.glob("step_*")) if path.name > directory.name]
    return [set_aside(path, "left") for path in later]


def set_aside(path: Path, prefix: str) -> Path:
    """Give a checkpoint a name under which none is looked for."""
    free = (path.with_name(f"{prefix}{n or ''}_{path.name}") for n in itertools.count())
    return path.replace(next(name for name in free if not name.exists()))


def load(directory: Path, engine: ZeroEngine, identity: dict[str, Any], world: World) -> tuple[MemoryState, Progress]:
    """Restore engine, memory, generator and progress, whatever the world and stage that saved them (a collective).

    Raises CheckpointError before anything is changed, DamagedCheckpoint where an earlier checkpoint may do.
    """
    state = _read_together(directory, world)
    _check_identity(directory, state["identity"], identity)
    shapes = engine.parameter_shapes()
    _check_shapes(directory, state_shapes(state), shapes)
    reader = _open_together(directory, state["files"], shapes, world)
    engine.load(reader.read, state["adam_step"])
    memory = MemoryState(**load_file(directory / MEMORY_FILE, device=str(world.device)))
    generator = read_generator(directory, world.rank)
    if generator is not None:
        torch.set_rng_state(generator)
    world.barrier()
    return memory, Progress(**state["progress"])


def _read_together(directory: Path, world: World) -> dict[str, Any]:
    """Rank 0's state.json on every rank. Raises what rank 0 meets."""
    state, problem, kind = None, None, CheckpointError
    if world.is_first:
        try:
            state = read_state(directory)
        except CheckpointError as error:
            problem, kind = str(error), type(error)
    state, problem, kind = world.broadcast_object((state, problem, kind))
    if state is None:
        raise kind(problem)
    return state


def _open_together(
    directory: Path, files: dict[str, Any], shapes: dict[str, tuple[int, ...]], world: World
) -> FragmentReader:
    """Open the parameter files where every rank can, the ranks sharing the checksums. Raises DamagedCheckpoint."""
    reader, names = None, sorted(files)
    problem = damage(directory, files, names[world.rank :: world.size])
    if problem is None:
        try:
            reader = FragmentReader(directory, names, shapes)
        except DamagedCheckpoint as error:
            problem = str(error)
    problems = [told for told in world.gather_objects(problem) if told is not None]
    if problems or reader is None:
        raise DamagedCheckpoint(problems[0])
    return reader


def _check_shapes(directory: Path, theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            there, here = (list(s[name]) if name in s else "absent" for s in (theirs, ours))
            raise CheckpointError(
                f"checkpoint {directory} is of another model: {name} is {there} there and {here} here"
            )


def _check_identity(directory: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for section, meaning in (("model", "another model"), ("order", "another order of the data")):
        if section == "order" and not theirs[section]:  # step 0 of a run whose order nothing has fixed yet
            continue
        for key in sorted(set(theirs[section]) | set(ours[section])):
            there, here = theirs[section].get(key), ours[section].get(key)
            if there != here:
                name = f"model.{key}" if section == "model" else key
                raise CheckpointError(
                    f"checkpoint {directory} is of {meaning}: {name} is {there!r} there and {here!r} here; "
                    "give this run another run.name, or set checkpoint.resume=never"
                )


def _check_memory_agrees(memory: MemoryState, world: World) -> None:
    """The memory must have the same bits on every rank; anything else is a fault of this program."""
    digest = xxhash.xxh3_128()
    for tensor in memory.tensors().values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    mine = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=world.device)
    if not bool((world.gather(mine) == mine).all()):
        raise RuntimeError(f"the episodic memory differs between ranks (seen on rank {world.rank})")
