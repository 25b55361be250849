"""Mutated indexes, manifests and vectors: the readers raise their own error and nothing else, and execute nothing."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest

from shards.index import ShardReader, decode_vector, index_path
from shards.loader import ShardSet
from shards.record import VECTOR_SIZE, DataError
from shards.writer import parse_manifest

COUNTS = [pytest.param(400, id="400"), pytest.param(10_000, id="10000", marks=pytest.mark.soak)]


def mutated(data: bytes, rng: np.random.Generator, head: int | None = None) -> bytes:
    """Some bytes changed, taken out or put in, most of them among the first `head`."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        size = len(out) if head is None or rng.random() < 0.3 else min(head, len(out))
        at = int(rng.integers(size)) if size else 0
        kind = rng.integers(4)
        if kind == 0:
            out[at : at + 1] = bytes([int(rng.integers(256))])
        elif kind == 1:
            del out[at : at + int(rng.integers(1, 40))]
        elif kind == 2:
            out[at:at] = rng.choice([b"9", b"'", b"}", b"(", b"None", b"__import__('os')", b"\x00\xff"])
        else:
            out[at : at + 1] = b"0"
    return bytes(out)


def tried(action: object, *arguments: object) -> bool:
    """Whether it went through; only DataError may come of it."""
    try:
        action(*arguments)  # type: ignore[operator]
    except DataError:
        return False
    return True


@pytest.mark.parametrize("count", COUNTS)
def test_vectors(count: int) -> None:
    rng = np.random.default_rng(0)
    buffers = [io.BytesIO() for _ in range(3)]
    vector = rng.standard_normal(VECTOR_SIZE).astype("<f4")
    np.save(buffers[0], vector)
    np.savez(buffers[1], vector)
    np.savez_compressed(buffers[2], vector)
    refused = sum(
        not tried(decode_vector, mutated(buffers[at % 3].getvalue(), rng, 128), "fuzz") for at in range(count)
    )
    assert refused > count / 3


@pytest.mark.parametrize("count", COUNTS)
def test_indexes(count: int, small_dir: Path, tmp_path: Path) -> None:
    tar = shutil.copy(next(small_dir.glob("pairs-train-*.tar")), tmp_path)
    index = index_path(Path(tar))
    whole = index_path(small_dir / Path(tar).name).read_bytes()
    rng = np.random.default_rng(1)

    def read() -> None:
        reader = ShardReader(Path(tar))
        for sample in (0, len(reader) - 1):
            reader.sample_tokens(sample)
            reader.vector(sample)
            reader.text(sample)

    refused = 0
    for _ in range(count):
        index.write_bytes(mutated(whole, rng))
        refused += not tried(read)
    assert refused > count / 2


@pytest.mark.parametrize("count", COUNTS)
def test_manifests(count: int, small_dir: Path) -> None:
    whole = (small_dir / "manifest.json").read_bytes()
    rng = np.random.default_rng(2)
    refused = sum(not tried(parse_manifest, mutated(whole, rng), "fuzz") for _ in range(count))
    assert refused > count / 3


@pytest.mark.parametrize("count", [pytest.param(100, id="100"), pytest.param(2000, id="2000", marks=pytest.mark.soak)])
def test_sets(count: int, small_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small_dir, tmp_path / "copy")
    names = ("manifest.json", "lengths.npy", "tokenizer.json")
    files = {name: (copy / name).read_bytes() for name in names}
    rng = np.random.default_rng(3)
    for number in range(count):
        name = names[number % 3]
        (copy / name).write_bytes(mutated(files[name], rng, 200))
        tried(lambda: ShardSet.open(copy).corpus("train"))
        (copy / name).write_bytes(files[name])
    assert tried(ShardSet.open, copy)
