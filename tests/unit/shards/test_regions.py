"""Regions of files: a map and reads at offsets give the same bytes, and missing bytes are an error that says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import index
from shards.loader import Loader, LoaderState, PhaseSpec, Shape, ShardSet
from shards.record import DataError
from shards.regions import MappedRegion, join, open_region


class Owner:
    """What a region is closed with."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("regions") / "file"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    return path


@settings(max_examples=100)
@given(st.integers(0, 4000), st.integers(0, 1000), st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000))))
def test_maps_and_reads_agree(file: Path, start: int, size: int, cuts: list[tuple[int, int]]) -> None:
    owner, data = Owner(), file.read_bytes()[start : start + size]
    mapped, read = (open_region(owner, file, start, size, shared=shared) for shared in (False, True))
    runs = [sorted((min(a, size), min(b, size))) for a, b in cuts]
    for begin, stop in runs:
        assert mapped[begin:stop] == read[begin:stop] == data[begin:stop]
    begins, stops = [run[0] for run in runs], [run[1] for run in runs]
    wanted = b"".join(data[begin:stop] for begin, stop in runs)
    for region in (mapped, read):
        assert join([region] * len(runs), begins, stops) == wanted
    assert isinstance(mapped, MappedRegion)
    assert mapped.items(np.dtype("u1")).tobytes() == data
    assert [block.tobytes() for block in mapped.blocks(7)] == [data[at : at + 7] for at in range(size - 6)]


def test_missing_bytes_name_the_file(tmp_path: Path) -> None:
    owner, path = Owner(), tmp_path / "file"
    path.write_bytes(bytes(100))
    for shared in (False, True):
        with pytest.raises(DataError, match=r"file is truncated: get it again"):
            open_region(owner, path, 50, 51, shared=shared)
        with pytest.raises(DataError, match=r"none: No such file"):
            open_region(owner, tmp_path / "none", 0, 1, shared=shared)
    region = open_region(owner, path, 50, 50, shared=True)
    path.write_bytes(bytes(80))
    assert region[0:30] == bytes(30)
    with pytest.raises(DataError, match=r"file is truncated: get it again"):
        region[10:40]


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("modality", ["pairs", "text"])
def test_rows_of_a_shared_file_system_are_the_same(
    small_dir: Path, modality: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the shards of a step are taken together or span by span."""
    steps = []
    for shared in (False, True):
        monkeypatch.setattr(index, "is_shared", lambda path, shared=shared: shared)
        phases, shape = [PhaseSpec("p", {modality: 1}, steps=8)], Shape(size, 24)
        shards = ShardSet.open(small_dir)
        loader = Loader(shards, phases, seed=0, shape=shape, micro_batch=size, rank=0, world=1)
        steps.append([loader.step_rows(LoaderState(0, step))[0] for step in range(8)])
        held = {type(opened.reader.data).__name__ for opened in shards.readers._open.values()}
        assert held == {"FileRegion" if shared else "MappedRegion"}
    for mapped, read in zip(*steps, strict=True):
        for name in ("tokens", "targets", "segments", "positions", "vision", "image_ids", "words", "valid"):
            assert np.array_equal(getattr(mapped, name), getattr(read, name)), name
