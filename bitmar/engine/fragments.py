"""The files of a checkpoint, written in fragments: every rank its own pieces, read back at any world and stage.

    checkpoints/step_00000500/
      state.json                    step, loader position, words, run id, model, data, shapes, checksums of the others
      parameters-00000.safetensors  rank 0's pieces: model.NAME, exp_avg.NAME, exp_avg_sq.NAME (fp32, flat), in the
                                    header where in NAME each begins; rng: that rank's generator
      parameters-00001.safetensors  rank 1's, and so on
      memory.safetensors            the episodic memory

A parameter may lie in pieces in several files; together they hold each of its numbers once. Nothing in these files
can execute code, and reading them needs no engine and no process group.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 2
KINDS = ("model", "exp_avg", "exp_avg_sq")  # weight and AdamW's moments
STATE_FILE, MEMORY_FILE = "state.json", "memory.safetensors"
PARAMETERS, RNG = "parameters-", "rng"
STARTS = "starts"  # in a file's header: {parameter: first number of the piece in the flattened parameter}
HASH_CHUNK_BYTES = 2**22

Shapes = Mapping[str, tuple[int, ...]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, the reason and the way out."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are not what was written; an earlier one may do."""


@dataclass(frozen=True)
class Fragment:
    """Numbers start to start + length of a flattened parameter, with their moments."""

    name: str
    start: int
    tensors: dict[str, Tensor]  # one a kind: fp32 [length]


@dataclass(frozen=True)
class FileRecord:
    """What state.json keeps of a file."""

    bytes: int
    xxh3_128: str


def parameter_file(rank: int) -> str:
    return f"{PARAMETERS}{rank:05d}.safetensors"


def write_fragments(path: Path, fragments: Iterable[Fragment], rng: Tensor) -> FileRecord:
    """Write a rank's pieces and its generator's state. Raises OSError or SafetensorError."""
    tensors, starts = {RNG: rng}, {}
    for fragment in fragments:
        starts[fragment.name] = fragment.start
        tensors |= {f"{kind}.{fragment.name}": tensor for kind, tensor in fragment.tensors.items()}
    return write_tensors(path, tensors, {STARTS: json.dumps(starts)})


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> FileRecord:
    """Write contiguous CPU tensors down to the disk. Raises OSError or SafetensorError."""
    save_file(tensors, path, header)
    sync(path)
    return record_of(path)


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file. Raises OSError."""
    checksum, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            checksum.update(chunk)
            size += len(chunk)
    return FileRecord(size, checksum.hexdigest())


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's names. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Write state.json with a checksum of itself. Raises OSError."""
    path = directory / STATE_FILE
    path.write_text(json.dumps(state | {"checksum": _digest(state)}, indent=1), encoding="utf-8")
    sync(path)


def read_state(directory: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError, DamagedCheckpoint where it is not what was written."""
    path = directory / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {directory} has no {STATE_FILE}: not a checkpoint, or not whole") from None
    except ValueError as error:
        raise DamagedCheckpoint(
            f"checkpoint {directory}: {STATE_FILE} is damaged ({error}); remove the folder"
        ) from None
    except OSError as error:
        raise DamagedCheckpoint(f"checkpoint {directory}: {STATE_FILE} cannot be read: {error.strerror}") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"checkpoint {directory} is of format {found}, this version reads format {FORMAT}: finish the run with "
            "the version that wrote it, or give this run another run.name"
        )
    if state.pop("checksum", None) != _digest(state):
        raise DamagedCheckpoint(f"checkpoint {directory}: {STATE_FILE} is damaged (checksum); remove the folder")
    return state


def damage(directory: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> str | None:
    """What is wrong with `names` among a checkpoint's files, None where sizes and checksums hold."""
    for name in names:
        path, expected = directory / name, FileRecord(**files[name])
        try:
            if path.stat().st_size != expected.bytes or record_of(path) != expected:
                return f"checkpoint {directory}: {name} is damaged (checksum); remove the folder"
        except FileNotFoundError:
            return f"checkpoint {directory}: {name} is missing; remove the folder"
        except OSError as error:
            return f"checkpoint {directory}: {name} cannot be read: {error.strerror}"
    return None


def state_shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The whole shape of every parameter of a checkpoint."""
    return {name: tuple(shape) for name, shape in state["parameters"].items()}


@dataclass(frozen=True)
class _Piece:
    start: int
    stop: int
    file: Any  # an open safetensors file


class FragmentReader:
    """Reads any run of any parameter from the files of a checkpoint, mapped, not loaded."""

    def __init__(self, directory: Path, files: Iterable[str], shapes: Shapes) -> None:
        """Raises DamagedCheckpoint where the pieces do not hold every number of every parameter exactly once."""
        self._directory = directory
        self._pieces: dict[str, list[_Piece]] = {name: [] for name in shapes}
        for file in sorted(name for name in files if name.startswith(PARAMETERS)):
            self._add(file)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.start)
            edges = [0, *(piece.stop for piece in pieces)]
            starts = [*(piece.start for piece in pieces), math.prod(shapes[name])]
            if edges != starts:
                raise DamagedCheckpoint(f"checkpoint {directory}: the pieces of {name} do not make up the parameter")

    def _add(self, file: str) -> None:
        try:
            opened = safe_open(self._directory / file, framework="pt")
            starts = json.loads(opened.metadata()[STARTS])
            keys = set(opened.keys())
            for name, start in starts.items():
                lengths = {opened.get_slice(f"{kind}.{name}").get_shape()[0] for kind in KINDS}
                if len(lengths) != 1 or name not in self._pieces:
                    raise ValueError(f"{name} does not fit")
                self._pieces[name].append(_Piece(start, start + lengths.pop(), opened))
                keys -= {f"{kind}.{name}" for kind in KINDS}
            if keys != {RNG}:
                raise ValueError(f"{sorted(keys - {RNG})} belong to nothing")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"checkpoint {self._directory}: {file} cannot be read: {error}") from None

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Numbers start to stop of a flattened parameter or moment: fp32 [stop - start] on the CPU."""
        parts = [
            piece.file.get_slice(f"{kind}.{name}")[
                max(start, piece.start) - piece.start : min(stop, piece.stop) - piece.start
            ]
            for piece in self._pieces[name]
            if piece.start < stop and start < piece.stop
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def read_parameters(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and whole weight (fp32, on the CPU), in the model's order, one at a time.

    Checks every file first. Raises CheckpointError.
    """
    state = read_state(directory)
    problem = damage(directory, state["files"], state["files"])
    if problem is not None:
        raise DamagedCheckpoint(problem)
    shapes = state_shapes(state)
    reader = FragmentReader(directory, state["files"], shapes)
    for name, shape in shapes.items():
        yield name, reader.read("model", name, 0, math.prod(shape)).view(shape)


def read_generator(directory: Path, rank: int) -> Tensor | None:
    """The state of a rank's generator, None where the checkpoint is of fewer ranks."""
    path = directory / parameter_file(rank)
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(RNG)


def _digest(state: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())
