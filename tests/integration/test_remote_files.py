"""Files of a server that fails: tried again, gone on with, or one clear error; never kept where they are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from shards.store import CacheOptions, RemoteStore, Store, StoreError, open_store
from tests.support.servers import Fault, FaultyServer, faulty_server

pytestmark = pytest.mark.slow

SIZE = 3_000_000
ATTEMPTS = 3
IMPATIENT_S = 2.0  # for the next bytes, where the server is silent
NAME = "a.tar"


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def server(content: bytes, tmp_path: Path) -> Iterator[FaultyServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(content)
    with faulty_server(folder) as served:
        yield served


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    """The fault of a parametrized test, which it may spend."""
    return replace(request.param)


@pytest.fixture
def options(request: pytest.FixtureRequest, tmp_path: Path) -> CacheOptions:
    """Impatient in tests of a fault that makes the server silent or slow."""
    fault = request.getfixturevalue("fault") if "fault" in request.fixturenames else Fault()
    waits = fault.silent_after is not None or fault.trickles
    timeout_s = IMPATIENT_S if waits else 60.0
    return CacheOptions(tmp_path / "cache", None, ATTEMPTS, back_off_s=0.01, timeout_s=timeout_s)


@pytest.fixture
def store(server: FaultyServer, options: CacheOptions) -> Iterator[RemoteStore]:
    yield from opened(server.url, options)


def opened(url: str, options: CacheOptions) -> Iterator[RemoteStore]:
    store = open_store(url, options)
    assert isinstance(store, RemoteStore)
    yield store
    store.close()


def fetch(store: Store, content: bytes, name: str = NAME) -> Path:
    return store.fetch(name, len(content), xxhash.xxh3_128(content).hexdigest())


PASSING = {
    "500": Fault(2, status=500),
    "503": Fault(2, status=503),
    "429": Fault(2, status=429),
    "cut off": Fault(1, cut=SIZE // 2),
    "cut off before the first byte": Fault(2, cut=0),
    "a length too long": Fault(1, longer=5000),
    "a length too short": Fault(1, longer=-5000),
    "silent before the headers": Fault(1, silent_after=-1),
    "silent after the headers": Fault(1, silent_after=0),
    "silent half way": Fault(1, silent_after=SIZE // 2),
    "trickles": Fault(1, trickles=True),
    "a flipped bit": Fault(1, flipped=SIZE // 3),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING, indirect=True)
def test_what_passes_is_got_over(store: RemoteStore, server: FaultyServer, content: bytes, fault: Fault) -> None:
    times = fault.times or 0
    server.fail(NAME, fault)
    assert fetch(store, content).read_bytes() == content
    assert len(server.starts(NAME)) == times + 1
    assert not list(store.options.folder().glob("*.part"))


LASTING = {
    "500": (Fault(status=500), "HTTP 500"),
    "503": (Fault(status=503), "HTTP 503"),
    "cut off before the first byte": (Fault(cut=0), "broke|cut off"),
    "a length too long": (Fault(longer=5000), "3005000 bytes, expected 3000000"),
    "a length too short": (Fault(longer=-5000), "2995000 bytes, expected 3000000"),
    "silent before the headers": (Fault(silent_after=-1), "no answer within 2 s"),
    "silent after the headers": (Fault(silent_after=0), "no answer within 2 s"),
    "trickles": (Fault(trickles=True), "bytes in 2 s"),
}


@pytest.mark.parametrize(("fault", "said"), LASTING.values(), ids=LASTING, indirect=["fault"])
def test_what_lasts_is_one_error_after_bounded_tries(
    store: RemoteStore, server: FaultyServer, content: bytes, fault: Fault, said: str
) -> None:
    server.fail(NAME, fault)
    with pytest.raises(StoreError, match=said) as raised:
        fetch(store, content)
    assert f"{server.url}/{NAME}: " in str(raised.value)
    assert f"attempt {ATTEMPTS}, the last" in str(raised.value)
    assert len(server.starts(NAME)) == ATTEMPTS
    server.heal()
    assert fetch(store, content).read_bytes() == content


@pytest.mark.parametrize(("status", "said"), [(404, "no such file"), (403, "refused")])
def test_what_another_attempt_cannot_cure_is_told_at_once(
    store: RemoteStore, server: FaultyServer, content: bytes, status: int, said: str
) -> None:
    server.fail(NAME, Fault(status=status))
    with pytest.raises(StoreError, match=rf"{NAME}: {said} \(HTTP {status}\)"):
        fetch(store, content)
    assert server.starts(NAME) == [0]


def test_a_server_that_is_gone_is_named(options: CacheOptions, content: bytes, tmp_path: Path) -> None:
    with faulty_server(tmp_path) as gone:
        url = gone.url
    store = open_store(url, options)
    with pytest.raises(StoreError, match=rf"{url}/{NAME}: cannot connect .*attempt {ATTEMPTS}, the last"):
        fetch(store, content)
    store.close()


def test_what_was_cut_off_goes_on_where_it_ended(store: RemoteStore, server: FaultyServer, content: bytes) -> None:
    server.fail(NAME, Fault(1, cut=2_000_000))
    assert fetch(store, content).read_bytes() == content
    first, second = server.starts(NAME)
    assert first == 0
    assert 0 < second <= 2_000_000  # what the client had not yet taken when the connection broke is asked for again


def test_a_server_without_ranges_sends_the_whole_again(
    store: RemoteStore, server: FaultyServer, content: bytes
) -> None:
    server.fail(NAME, Fault(1, cut=2_000_000))
    server.fail(NAME, Fault(ranges=False))
    assert fetch(store, content).read_bytes() == content
    first, second = server.starts(NAME)
    assert first == 0 < second


def test_what_stays_damaged_is_never_used(store: RemoteStore, server: FaultyServer, content: bytes) -> None:
    server.fail(NAME, Fault(flipped=5))
    with pytest.raises(StoreError, match=rf"{server.url}/{NAME}: its checksum is .* the set there is damaged"):
        fetch(store, content)
    assert server.starts(NAME) == [0, 0], "a damaged file is fetched once more"
    assert not [path for path in store.options.folder().iterdir() if path.stat().st_size]
    server.heal()
    assert fetch(store, content).read_bytes() == content


def test_a_file_that_changed_between_two_attempts_is_fetched_whole(
    store: RemoteStore, server: FaultyServer, content: bytes
) -> None:
    """The first half of another file of the same length lies there already."""
    server.fail(NAME, Fault(cut=SIZE // 2, flipped=7))
    hasty = open_store(server.url, replace(store.options, attempts=1))
    with pytest.raises(StoreError, match=r"cut off|broke"):
        fetch(hasty, content)
    hasty.close()
    server.heal()
    assert fetch(store, content).read_bytes() == content
    starts = server.starts(NAME)
    assert len(starts) == 3
    assert starts[0] == starts[2] == 0 < starts[1]


def test_what_is_damaged_in_the_cache_is_fetched_again(
    store: RemoteStore, server: FaultyServer, content: bytes
) -> None:
    path = fetch(store, content)
    store.close()
    damaged = bytearray(content)
    damaged[SIZE // 2] ^= 1
    path.write_bytes(damaged)
    with_cache = open_store(server.url, store.options)
    assert fetch(with_cache, content).read_bytes() == content
    assert server.starts(NAME) == [0, 0]
    with_cache.close()


@pytest.fixture
def objects(server: FaultyServer, options: CacheOptions, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteStore]:
    """The same server, asked by an object store's client."""
    (server.folder / "bucket").mkdir()
    (server.folder / NAME).rename(server.folder / KEY)
    variables = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "thrown", "AWS_SECRET_ACCESS_KEY": "away"}
    for name, value in {**variables, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("shards.transfer.SLOWEST_RANGE_BYTES_S", SIZE)  # a server that trickles is given 5 seconds
    yield from opened("s3://bucket", options)


KEY = f"bucket/{NAME}"
OF_OBJECTS = ("500", "503", "cut off", "silent before the headers", "silent half way", "trickles", "a flipped bit")


@pytest.mark.parametrize("fault", [PASSING[name] for name in OF_OBJECTS], ids=OF_OBJECTS, indirect=True)
def test_what_passes_at_an_object_store_is_got_over(
    objects: RemoteStore, server: FaultyServer, content: bytes, fault: Fault
) -> None:
    times = fault.times or 0
    server.fail(KEY, fault)
    assert fetch(objects, content).read_bytes() == content
    assert server.starts(KEY) == [0] * (times + 1)


@pytest.mark.parametrize(
    "fault", [Fault(status=500), Fault(cut=0), Fault(silent_after=0)], ids=["500", "cut off", "silent"], indirect=True
)
def test_what_lasts_at_an_object_store_is_one_error_after_bounded_tries(
    objects: RemoteStore, server: FaultyServer, content: bytes, fault: Fault
) -> None:
    server.fail(KEY, fault)
    with pytest.raises(StoreError, match=rf"^s3://bucket/{NAME}: .*\(attempt {ATTEMPTS}, the last\)$"):
        fetch(objects, content)
    assert server.starts(KEY) == [0] * ATTEMPTS


def test_what_an_object_store_does_not_have_is_told_at_once(objects: RemoteStore, server: FaultyServer) -> None:
    with pytest.raises(StoreError, match=r"^s3://bucket/other\.tar: no such file \(HTTP 404\)"):
        fetch(objects, b"x", "other.tar")
    assert server.starts("bucket/other.tar") == [0]
