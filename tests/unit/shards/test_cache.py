"""The cache of downloaded files against a model: its limit, what is evicted and when, what is never evicted."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cache import Cache, NoRoom
from shards.transfer import StoreError

SIZES = {"a": 10, "b": 20, "c": 30, "d": 30, "e": 70}
CHECKSUM = {name: xxhash.xxh3_128(name.encode()).hexdigest() for name in SIZES}


@dataclass
class Model:
    """What the cache should hold: names, least recently used first, and how often each is in use."""

    limit: int
    used: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def fetch(self, name: str) -> type[Exception] | None:
        """Use a file; the error where it does not fit."""
        if name not in self.used:
            excess = sum(SIZES[other] for other in self.used) + SIZES[name] - self.limit
            for other in list(self.used):
                if excess > 0 and not self.used[other]:
                    del self.used[other]
                    excess -= SIZES[other]
            if excess > 0:
                return NoRoom if self.used else StoreError
        self.used[name] = self.used.get(name, 0) + 1
        self.used.move_to_end(name)
        return None


def fetch(cache: Cache, name: str, tick: int) -> int:
    """The descriptor that pins a file, which is made where it is not there; `tick` is the time."""
    path = cache.path(name, SIZES[name], CHECKSUM[name])
    with cache.locked():
        pinned = cache.pin(path, SIZES[name])
        if pinned is None:
            pinned = cache.start(path, SIZES[name])
            assert pinned is not None
            os.write(pinned, b"x" * SIZES[name])
            assert cache.finish(pinned, path)
        os.utime(path, ns=(tick, tick))  # the system's own clock may tell two uses apart only after milliseconds
    return pinned


WHATS = st.sampled_from(["use", "use", "use", "fetch", "release"])  # to use is to fetch and to release at once
OPERATIONS = st.lists(st.tuples(WHATS, st.sampled_from(sorted(SIZES))), max_size=30)


@settings(max_examples=100)
@given(st.integers(30, 100), OPERATIONS)
def test_against_a_model(tmp_path_factory: pytest.TempPathFactory, limit: int, operations: list) -> None:
    cache, model = Cache(tmp_path_factory.mktemp("cache"), limit), Model(limit)
    pins: dict[str, list[int]] = {name: [] for name in SIZES}
    with released(pins):
        for tick, (what, name) in enumerate(operations):
            if what != "release":
                expected, raised = model.fetch(name), None
                try:
                    pins[name].append(fetch(cache, name, tick))
                except StoreError as error:
                    raised = type(error)
                assert raised == expected
            if what != "fetch" and pins[name]:
                os.close(pins[name].pop())
                model.used[name] -= 1
            held = {path.name.rpartition("-")[2] for path in cache.directory.iterdir()} - {"lock"}
            assert held == set(model.used)
            assert sum(SIZES[name] for name in held) <= limit


@contextlib.contextmanager
def released(pins: dict[str, list[int]]) -> Iterator[None]:
    try:
        yield
    finally:
        for descriptors in pins.values():
            for descriptor in descriptors:
                os.close(descriptor)


def test_a_part_counts_as_the_whole_it_becomes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 60)
    a, c = (cache.path(name, SIZES[name], CHECKSUM[name]) for name in "ac")
    with cache.locked():
        first = cache.start(c, SIZES["c"])
        assert first is not None
        assert cache.start(c, SIZES["c"]) is None, "another fills it"
        second = cache.start(cache.path("d", 30, CHECKSUM["d"]), 30)
        assert second is not None
        with pytest.raises(NoRoom, match=r"60 are in use and 10 are wanted for .*-a; a limit of 70 bytes would do"):
            cache.start(a, SIZES["a"])
        os.close(second)  # given up: it makes way
        third = cache.start(a, SIZES["a"])
        assert third is not None
    os.close(first)
    os.close(third)


def test_a_file_of_another_size_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    cache = Cache(tmp_path, None)
    path = cache.path("a", SIZES["a"], CHECKSUM["a"])
    path.write_bytes(b"short")
    with cache.locked():
        assert cache.pin(path, SIZES["a"]) is None
    assert not path.exists()
