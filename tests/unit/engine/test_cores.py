"""Which cores a rank computes on."""

from __future__ import annotations

import os
import sys
import threading
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmar.engine.cores import allowed_cores, bind, share
from bitmar.engine.world import World
from tests.support.ranks import run_ranks

NOWHERE = Path("nowhere")  # a system that tells nothing of its cores
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="binding is Linux's")


@given(st.sets(st.integers(0, 63), min_size=1), st.integers(1, 8))
def test_shares_are_even_and_nobody_elses(cores: set[int], ranks: int) -> None:
    shares = share([sorted(cores)] * ranks, NOWHERE)
    assert len(shares) == ranks
    if len(cores) < ranks:
        assert not any(shares)
        return
    assert sorted(chain(*shares)) == sorted(cores)
    sizes = [len(mine) for mine in shares]
    assert set(sizes[1:]) <= {len(cores) // ranks}
    assert sizes[0] == len(cores) // ranks + len(cores) % ranks


def test_what_a_launcher_has_shared_out_stays() -> None:
    given = [[0, 1], [2, 3], [2, 3]]
    assert share(given, NOWHERE) == given


def test_hardware_threads_of_a_core_go_to_one_rank(tmp_path: Path) -> None:
    """Numbered as most systems do: first a thread of each core, then the others; two packages of two cores."""
    for core in range(8):
        told = tmp_path / f"cpu{core}" / "topology"
        told.mkdir(parents=True)
        (told / "physical_package_id").write_text(f"{core % 4 // 2}\n")
        (told / "core_id").write_text(f"{core % 2}\n")
    assert share([list(range(8))] * 4, tmp_path) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert share([list(range(8))] * 2, tmp_path) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def _cores_and_threads(world: World) -> tuple[list[int], int]:
    return allowed_cores(), torch.get_num_threads()


@pytest.mark.slow
@LINUX
def test_two_ranks_share_the_cores_of_their_machine(tmp_path: Path) -> None:
    cores = allowed_cores()
    if len(cores) < 2:
        pytest.skip("one core")
    (first, threads), (second, _) = run_ranks(2, tmp_path, _cores_and_threads)
    assert sorted(first + second) == cores
    assert threads == 1  # which was asked for


@LINUX
def test_a_rank_alone_has_all(tmp_path: Path) -> None:
    assert run_ranks(1, tmp_path, _cores_and_threads) == [(allowed_cores(), 1)]


@LINUX
def test_threads_that_do_not_fit_into_a_share_are_not_bound(tmp_path: Path) -> None:
    cores = allowed_cores()
    many = len(cores) // 2 + len(cores) % 2 + 1
    assert run_ranks(2, tmp_path, _cores_and_threads, threads=many) == [(cores, many)] * 2


@LINUX
def test_threads_that_run_already_are_bound_too(tmp_path: Path) -> None:
    assert run_ranks(1, tmp_path, _bound_with_its_threads) == [True]


def _bound_with_its_threads(world: World) -> bool:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    core = allowed_cores()[-1]
    bind([core])
    found = os.sched_getaffinity(thread.native_id or 0)
    end.set()
    thread.join()
    return found == {core} and allowed_cores() == [core]
