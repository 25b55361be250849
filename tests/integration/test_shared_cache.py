"""The cache of downloaded files, shared by processes: one download each, nothing in use evicted, nobody's lock left."""

from __future__ import annotations

import mmap
import multiprocessing
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import xxhash

from shards.store import CacheOptions, RemoteStore, StoreError, open_store
from tests.support.disks import small_disk
from tests.support.servers import Fault, FaultyServer, faulty_server

SIZE = 2_000_000
NAMES = ("a", "b", "c", "d")
GUARD_S = 120
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    return {name: np.random.default_rng(at).bytes(SIZE) for at, name in enumerate(NAMES)}


@pytest.fixture
def server(contents: dict[str, bytes], tmp_path: Path) -> Iterator[FaultyServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with faulty_server(folder) as served:
        yield served


def opened(url: str, cache: Path, limit: int | None = None, timeout_s: float = GUARD_S) -> RemoteStore:
    store = open_store(url, CacheOptions(cache, limit, attempts=3, back_off_s=0.01, timeout_s=timeout_s))
    assert isinstance(store, RemoteStore)
    return store


def fetch(store: RemoteStore, name: str, content: bytes) -> Path:
    return store.fetch(name, len(content), xxhash.xxh3_128(content).hexdigest())


def wait_for(path: Path, size: int) -> int:
    """Wait until a file holds so many bytes; returns how many."""
    until = time.monotonic() + GUARD_S
    while time.monotonic() < until:
        if path.exists() and path.stat().st_size >= size:
            return path.stat().st_size
        time.sleep(0.01)
    raise AssertionError(f"{path} never held {size} bytes")


def started(target: object, *arguments: object) -> BaseProcess:
    process = SPAWN.Process(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
    process.start()
    return process


def fetch_all(url: str, cache: Path, together: Barrier, contents: dict[str, bytes], turn: int) -> None:
    """Fetch every file, each process in another order."""
    store = opened(url, cache)
    names = list(contents)
    together.wait(GUARD_S)
    for name in names[turn:] + names[:turn]:
        assert fetch(store, name, contents[name]).read_bytes() == contents[name]
    store.close()


def test_processes_of_a_node_download_each_file_once(
    server: FaultyServer, contents: dict[str, bytes], tmp_path: Path
) -> None:
    together = SPAWN.Barrier(len(NAMES))
    processes = [
        started(fetch_all, server.url, tmp_path / "cache", together, contents, turn) for turn in range(len(NAMES))
    ]
    for process in processes:
        process.join(GUARD_S)
        assert process.exitcode == 0
    assert {name: server.starts(name) for name in NAMES} == {name: [0] for name in NAMES}


def hold(url: str, cache: Path, content: bytes, ours: Connection) -> None:
    """Map a file, tell so, and at a word check that what is mapped is still the file's; another word ends it."""
    store = opened(url, cache)
    path = fetch(store, "a", content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        ours.send("mapped")
        ours.recv()
        ours.send(path.exists() and mapped[:] == content)
        ours.recv()
    store.release("a")
    ours.send("released")
    ours.recv()
    store.close()


def test_what_another_process_has_mapped_is_never_evicted(
    server: FaultyServer, contents: dict[str, bytes], tmp_path: Path
) -> None:
    """Room for two files; the other process holds the one that was used least recently."""
    cache = tmp_path / "cache"
    theirs, ours = SPAWN.Pipe()
    process = started(hold, server.url, cache, contents["a"], theirs)
    assert ours.poll(GUARD_S)
    assert ours.recv() == "mapped"
    store = opened(server.url, cache, 2 * SIZE + 1)
    for name in ("b", "c", "d", "b"):
        assert fetch(store, name, contents[name]).read_bytes() == contents[name]
        assert kept(cache) == {"a", name}
        store.release(name)
    fetch(store, "b", contents["b"])
    with pytest.raises(StoreError, match=rf"limit of {2 * SIZE + 1} bytes .* a limit of {3 * SIZE} bytes"):
        fetch(store, "c", contents["c"])
    ours.send("look")
    assert ours.poll(GUARD_S)
    assert ours.recv() is True
    ours.send("release")
    assert ours.poll(GUARD_S)
    assert ours.recv() == "released"
    fetch(store, "c", contents["c"])
    assert kept(cache) == {"b", "c"}
    assert server.starts("a") == [0]
    ours.send("end")
    process.join(GUARD_S)
    assert process.exitcode == 0
    store.close()


def kept(cache: Path) -> set[str]:
    """The names of the whole files of a cache."""
    return {path.name.rpartition("-")[2] for path in cache.iterdir() if path.name != "lock"}


def fetch_one(url: str, cache: Path, content: bytes) -> None:
    fetch(opened(url, cache), "a", content)


def test_a_killed_download_is_gone_on_with(server: FaultyServer, contents: dict[str, bytes], tmp_path: Path) -> None:
    """Two processes want a file; the one that downloads it is killed half way, and the other takes over at once."""
    cache = tmp_path / "cache"
    server.fail("a", Fault(1, silent_after=SIZE * 3 // 4))
    killed = started(fetch_one, server.url, cache, contents["a"])
    part = cache / f"{xxhash.xxh3_128(contents['a']).hexdigest()[:16]}-{SIZE}-a.part"
    wait_for(part, 1 << 20)
    waiting = started(fetch_one, server.url, cache, contents["a"])
    also_waiting = threading.Thread(target=fetch_one, args=(server.url, cache, contents["a"]), daemon=True)
    also_waiting.start()
    killed.kill()
    killed.join(GUARD_S)
    wait_for(part.with_suffix(""), SIZE)
    starts = server.starts("a")
    waiting.join(GUARD_S)
    also_waiting.join(GUARD_S)
    assert waiting.exitcode == 0
    assert not also_waiting.is_alive()
    assert part.with_suffix("").read_bytes() == contents["a"]
    assert not part.exists()
    assert len(starts) == 2
    assert starts[1] >= 1 << 20


@pytest.mark.timeout(GUARD_S)
def test_a_cache_on_a_full_disk_is_one_clear_line(
    server: FaultyServer, contents: dict[str, bytes], tmp_path: Path
) -> None:
    """Room for one file: what is not in use makes way, and what is in use is named with the disk."""
    with small_disk(tmp_path / "disk", "3m") as disk:
        store = opened(server.url, disk)
        fetch(store, "a", contents["a"])
        with pytest.raises(StoreError) as raised:
            fetch(store, "b", contents["b"])
        said = str(raised.value)
        assert said.startswith(f"cache {disk}: No space left on device (for {server.url}/b): make room there")
        assert "\n" not in said
        assert kept(disk) - {"b.part"} == {"a"}
        store.release("a")
        assert fetch(store, "b", contents["b"]).read_bytes() == contents["b"]
        store.close()


def test_a_cache_that_cannot_be_written_is_one_clear_line(
    server: FaultyServer, contents: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = opened(server.url, tmp_path / "file" / "cache")
    with pytest.raises(StoreError, match=r"file/cache: Not a directory .*data\.cache_directory"):
        fetch(store, "a", contents["a"])
    store.close()


def test_a_cache_that_is_emptied_by_hand_is_filled_again(
    server: FaultyServer, contents: dict[str, bytes], tmp_path: Path
) -> None:
    """While a file of it is in use, which stays as it is."""
    cache = tmp_path / "cache"
    store = opened(server.url, cache)
    with fetch(store, "a", contents["a"]).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        empty(cache)
        assert fetch(store, "b", contents["b"]).read_bytes() == contents["b"]
        assert data[:] == contents["a"]
    store.release("a")
    assert fetch(store, "a", contents["a"]).read_bytes() == contents["a"]
    store.close()


def test_a_download_whose_cache_is_emptied_begins_anew(
    server: FaultyServer, contents: dict[str, bytes], tmp_path: Path
) -> None:
    """Another process then downloads into the same place, and neither takes the other's part for its own."""
    cache = tmp_path / "cache"
    server.fail("a", Fault(1, silent_after=SIZE * 3 // 4))
    impatient = opened(server.url, cache, timeout_s=2)
    got: list[Path] = []
    thread = threading.Thread(target=lambda: got.append(fetch(impatient, "a", contents["a"])), daemon=True)
    thread.start()
    part = cache / f"{xxhash.xxh3_128(contents['a']).hexdigest()[:16]}-{SIZE}-a.part"
    wait_for(part, 1 << 20)
    empty(cache)
    server.fail("a", Fault(1, silent_after=SIZE * 3 // 4))
    other = started(fetch_one, server.url, cache, contents["a"])
    wait_for(part, 1)
    thread.join(1)
    other.kill()  # what it had is gone on with
    thread.join(GUARD_S)
    assert [path.read_bytes() for path in got] == [contents["a"]]
    impatient.close()


def empty(cache: Path) -> None:
    """Remove what a person would remove: everything."""
    for path in cache.iterdir():
        path.unlink()
    cache.rmdir()
