"""The files of a checkpoint: pieces of any cut are read back, and anything but a whole cover is refused."""

from __future__ import annotations

import dataclasses
import math
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitmar.engine.fragments import (
    FORMAT,
    KINDS,
    STATE_FILE,
    CheckpointError,
    DamagedCheckpoint,
    Fragment,
    FragmentReader,
    parameter_file,
    read_generator,
    read_parameters,
    read_state,
    write_fragments,
    write_state,
)

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2)}


def numbers(name: str, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}.{name}".encode()))
    return torch.randn(math.prod(SHAPES[name]), generator=generator)


def piece(name: str, start: int, stop: int) -> Fragment:
    return Fragment(name, start, {kind: numbers(name, kind)[start:stop].clone() for kind in KINDS})


def save(directory: Path, parts: list[list[Fragment]]) -> None:
    """A checkpoint of parameters only, a file a rank."""
    records = {}
    for rank, fragments in enumerate(parts):
        name = parameter_file(rank)
        record = write_fragments(directory / name, fragments, torch.full((4,), rank, dtype=torch.uint8))
        records[name] = dataclasses.asdict(record)
    write_state(directory, {"format": FORMAT, "parameters": SHAPES, "files": records})


def shared_out(cuts: dict[str, list[int]]) -> list[list[Fragment]]:
    """Pieces between the cuts, the first of each parameter on rank 0 and so on."""
    ranks: list[list[Fragment]] = [[] for _ in range(4)]
    for name, shape in SHAPES.items():
        edges = sorted({0, math.prod(shape), *cuts[name]})
        for rank, (start, stop) in enumerate(pairwise(edges)):
            ranks[rank].append(piece(name, start, stop))
    return ranks


WHOLE = [[piece(name, 0, math.prod(shape)) for name, shape in SHAPES.items()]]


@given(
    cuts=st.fixed_dictionaries({n: st.lists(st.integers(0, math.prod(s)), max_size=3) for n, s in SHAPES.items()}),
    ends=st.tuples(st.integers(0, 14), st.integers(1, 15)),
)
def test_any_run_is_read_from_any_cut(
    tmp_path_factory: pytest.TempPathFactory, cuts: dict[str, list[int]], ends: tuple[int, int]
) -> None:
    directory = tmp_path_factory.mktemp("cut")
    save(directory, shared_out(cuts))
    reader = FragmentReader(directory, read_state(directory)["files"], SHAPES)
    start, stop = min(ends[0], ends[1] - 1), ends[1]
    for kind in KINDS:
        assert torch.equal(reader.read(kind, "a", start, stop), numbers("a", kind)[start:stop])
    whole = dict(read_parameters(directory))
    assert list(whole) == list(SHAPES)
    assert all(torch.equal(whole[name], numbers(name, "model").view(SHAPES[name])) for name in SHAPES)


@pytest.mark.parametrize(
    "parts",
    [
        [[piece("a", 0, 15), piece("b", 0, 7)]],
        [[piece("a", 0, 15), piece("b", 0, 6), piece("c", 0, 8)]],
        [[piece("a", 0, 15), piece("b", 1, 7), piece("c", 0, 8)]],
        [WHOLE[0], [piece("b", 3, 5)]],
        [[*WHOLE[0][:1], piece("b", 0, 4), piece("c", 0, 8)], [piece("b", 3, 7)]],
    ],
    ids=["a parameter is missing", "its end", "its beginning", "twice", "an overlap"],
)
def test_pieces_that_do_not_make_up_the_parameters_are_refused(tmp_path: Path, parts: list[list[Fragment]]) -> None:
    save(tmp_path, parts)
    with pytest.raises(DamagedCheckpoint, match="do not make up"):
        list(read_parameters(tmp_path))


def test_each_rank_finds_its_generator(tmp_path: Path) -> None:
    save(tmp_path, shared_out({"a": [4], "b": [], "c": []}))
    for rank in range(4):
        found = read_generator(tmp_path, rank)
        assert found is not None
        assert found.tolist() == [rank] * 4
    assert read_generator(tmp_path, 4) is None


@pytest.mark.parametrize("place", [0, 9, 0.3, 0.7, -1])
def test_a_flipped_bit_is_found(tmp_path: Path, place: float) -> None:
    save(tmp_path, WHOLE)
    path = tmp_path / parameter_file(0)
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"parameters-00000\.safetensors is damaged"):
        list(read_parameters(tmp_path))


def test_a_flipped_bit_of_the_state_is_found(tmp_path: Path) -> None:
    save(tmp_path, WHOLE)
    content, written = (tmp_path / STATE_FILE).read_bytes(), read_state(tmp_path)
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / STATE_FILE).write_bytes(changed)
        try:
            found = read_state(tmp_path)
        except CheckpointError:
            continue
        assert found == written, place


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="is of format 1, this version reads format 2"):
        read_state(tmp_path)
