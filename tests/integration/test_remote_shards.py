"""Sets of shards on servers: the rows, losses and errors of a training are those of the same set on a local disk."""

from __future__ import annotations

import math
import multiprocessing
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.loader import CacheOptions, Loader, PhaseSpec, Shape, ShardSet, ValidationSet
from shards.store import StoreError
from tests.support.servers import faulty_server, s3_server
from tests.unit.shards.making import make, small_raw

pytestmark = pytest.mark.slow

GUARD_S = 300
BOTH = [PhaseSpec("both", {"pairs": 1, "text": 1}, epochs=1)]
Step = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 pairs and 12,000 words, in shards of 20 samples."""
    folder = tmp_path_factory.mktemp("remote")
    make(small_raw(folder / "raw"), folder / "shards", samples_per_shard=20)
    return folder / "shards"


@contextmanager
def opened(url: str | Path, cache: Path, limit: int | None = None) -> Iterator[ShardSet]:
    shards = ShardSet.open(url, CacheOptions(cache, limit, attempts=3, back_off_s=0.01, room_wait_s=60))
    try:
        yield shards
    finally:
        shards.readers.close()
        shards.store.close()


def load(shards: ShardSet, window_shards: int, rank: int = 0, world: int = 1) -> Loader:
    """The rows of a rank; all ranks share the cache."""
    shape = Shape(8, 32, window_shards=window_shards)
    return Loader(shards, BOTH, seed=1, shape=shape, micro_batch=8 // world, rank=rank, world=world, node_ranks=world)


def steps(loader: Loader) -> list[Step]:
    names = ("tokens", "targets", "vision", "rows", "words")
    return [{name: np.concatenate([getattr(rows, name) for rows in micro]) for name in names} for _, micro in loader]


def same(one: list[Step], other: list[Step]) -> bool:
    return all(np.array_equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def least(shards: Path, window_shards: int) -> int:
    """The bytes of the windows that are read at a time."""
    loader = load(ShardSet.open(shards), window_shards)
    sizes = ShardSet.open(shards).shard_bytes
    return max(loader.order.window_bytes(sizes, 1), int(sizes.max()))


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.floats(1, 4))
def test_a_cache_of_any_size_that_holds_a_window_gives_the_same_rows(
    small: Path, tmp_path_factory: pytest.TempPathFactory, window_shards: int, windows: float
) -> None:
    """Also where a step reads more shards than it holds: what the buckets have left at the end lies in all of them."""
    cache = tmp_path_factory.mktemp("cache")
    limit = int(least(small, window_shards) * windows)
    with faulty_server(small) as server, opened(server.url, cache, limit) as shards:
        assert same(steps(load(shards, window_shards)), steps(load(ShardSet.open(small), window_shards)))
        assert sum(path.stat().st_size for path in cache.iterdir()) <= limit
        held_out = [rows.tokens for rows in validation(shards).batches()]
        assert all(map(np.array_equal, held_out, [rows.tokens for rows in validation(ShardSet.open(small)).batches()]))


def validation(shards: ShardSet) -> ValidationSet:
    return ValidationSet(shards, modality="pairs", micro_batch=4, row_tokens=32, max_samples=1000, rank=0, world=1)


def test_a_cache_that_holds_no_window_is_refused_with_what_would_do(small: Path, tmp_path: Path) -> None:
    limit = least(small, 2) - 1
    with faulty_server(small) as server:
        with (
            opened(server.url, tmp_path, limit) as shards,
            pytest.raises(ValueError, match=r"data\.cache_gib") as raised,
        ):
            load(shards, 2)
        said = re.search(r"take ([\d.e-]+): give ([\d.e-]+), or lower data\.window_shards", str(raised.value))
        assert said
        taken, enough = (math.floor(float(each) * 2**30) for each in said.groups())
        assert limit < taken < enough
        with opened(server.url, tmp_path, taken) as shards:
            load(shards, 2)


def read_rank(url: str, cache: Path, limit: int, rank: int, path: Path) -> None:
    with opened(url, cache, limit) as shards:
        found = steps(load(shards, 2, rank, 2))
    arrays: dict[str, Any] = {f"{at} {name}": value for at, step in enumerate(found) for name, value in step.items()}
    np.savez(path, **arrays)


def test_ranks_share_a_cache_that_holds_one_window_only(small: Path, tmp_path: Path) -> None:
    """Who comes first to the next window waits until the other has let go of the last one."""
    context = multiprocessing.get_context("spawn")
    limit = least(small, 2)
    paths = [tmp_path / f"{rank}.npz" for rank in range(2)]
    with faulty_server(small) as server:
        ranks = [
            context.Process(target=read_rank, args=(server.url, tmp_path / "cache", limit, rank, path), daemon=True)
            for rank, path in enumerate(paths)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(GUARD_S)
            assert process.exitcode == 0
    for rank, path in enumerate(paths):
        expected = steps(load(ShardSet.open(small), 2, rank, 2))
        with np.load(path) as got:
            for at, step in enumerate(expected):
                assert all(np.array_equal(got[f"{at} {name}"], value) for name, value in step.items())


BUCKET = "shards-of-a-test"


@pytest.fixture(scope="module")
def bucket(small: Path) -> Iterator[dict[str, str]]:
    """A real S3-compatible server that holds the set."""
    with s3_server(BUCKET, {f"sets/small/{path.name}": path for path in small.iterdir()}) as environment:
        yield environment


@pytest.fixture
def as_client(bucket: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))  # nothing of the person who runs this
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)


@pytest.mark.usefixtures("as_client")
def test_an_object_store_gives_the_same_rows(small: Path, tmp_path: Path) -> None:
    with opened(f"s3://{BUCKET}/sets/small", tmp_path) as shards:
        assert same(steps(load(shards, 2)), steps(load(ShardSet.open(small), 2)))


@pytest.mark.usefixtures("as_client")
def test_what_an_object_store_refuses_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=rf"^s3://{BUCKET}/no/manifest\.json: no such file \(HTTP 404\)"):
        ShardSet.open(f"s3://{BUCKET}/no", CacheOptions(tmp_path))
    with pytest.raises(StoreError, match=r"^s3://none-such/sets/manifest\.json: no such file \(HTTP 404\)"):
        ShardSet.open("s3://none-such/sets", CacheOptions(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistaken")
    with pytest.raises(StoreError, match=r"manifest\.json: refused \(HTTP 403\): check the credentials") as raised:
        ShardSet.open(f"s3://{BUCKET}/sets/small", CacheOptions(tmp_path))
    assert "mistaken" not in str(raised.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match=r"manifest\.json: no credentials .*: set them as"):
        ShardSet.open(f"s3://{BUCKET}/sets/small", CacheOptions(tmp_path))


@pytest.mark.usefixtures("as_client")
def test_an_object_store_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_server(tmp_path) as gone:
        monkeypatch.setenv("AWS_ENDPOINT_URL", gone.url)
    options = CacheOptions(tmp_path, attempts=2, back_off_s=0.01)
    with pytest.raises(StoreError, match=r"^s3://a-bucket/set/manifest\.json: the transfer broke .*attempt 2"):
        ShardSet.open("s3://a-bucket/set", options)


def test_the_next_window_is_downloaded_ahead_and_no_other(small: Path, tmp_path: Path) -> None:
    with faulty_server(small) as server, opened(server.url, tmp_path) as shards:
        loader = load(shards, 2)
        files = [entry["file"] for entry in shards.manifest["shards"]]
        wanted = {files[shard] for shard in loader.order.ahead(0, 0, 0, 8)}
        reading = iter(loader)
        next(reading)
        until = time.monotonic() + GUARD_S
        while not wanted <= {asked.name for asked in server.asked} and time.monotonic() < until:
            time.sleep(0.02)
        asked = {name for name in files if server.starts(name)}
        reading.close()  # type: ignore[attr-defined]
        assert wanted <= asked
        further = {files[shard] for step in range(6) for shard in loader.order.ahead(0, step, 0, 8)}
        assert asked <= further < set(files)
