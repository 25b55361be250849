"""Shards made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.loader import ShardSet
from tests.unit.shards.making import REAL_RAW, make, small_raw
from tools import make_demo_data


@pytest.fixture(scope="session")
def raw_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real raw files when they are there, else generated ones."""
    if REAL_RAW.is_dir():
        print("raw data: the real test set")
        return REAL_RAW
    out = tmp_path_factory.mktemp("demo") / "raw"
    make_demo_data.make(out, 0, 1000, 50_000)
    print("raw data: GENERATED")
    return out


@pytest.fixture(scope="session")
def shard_dir(raw_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of raw_dir with default options but small shards."""
    out = tmp_path_factory.mktemp("shards") / "out"
    make(raw_dir, out, samples_per_shard=700, validation_fraction=0.05)
    return out


@pytest.fixture(scope="session")
def small_raw_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw set of 192 pairs and 12,000 words."""
    return small_raw(tmp_path_factory.mktemp("small") / "raw")


@pytest.fixture(scope="session")
def small_dir(small_raw_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of small_raw_dir, 50 samples each."""
    out = tmp_path_factory.mktemp("small_shards") / "out"
    make(small_raw_dir, out, samples_per_shard=50)
    return out


@pytest.fixture(scope="session")
def small_set(small_dir: Path) -> ShardSet:
    """small_dir, opened."""
    return ShardSet.open(small_dir)
