"""Run a function in real ranks: processes joined over gloo on the loopback interface."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.multiprocessing as mp

from bitmar import train
from bitmar.assembly import assemble
from bitmar.config import Config
from bitmar.engine.world import World, free_port, join_world, leave, leave_world
from shards.record import DataError
from tools.engine_bench.preload import LATE_IMPORTS

TIMEOUT_S = 300  # of a collective: a guard against hangs, not a measure


def run_ranks(
    size: int,
    folder: Path,
    function: Callable[..., Any],
    *arguments: Any,
    threads: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
) -> list[Any]:
    """`function(world, *arguments)` in `size` processes; returns what each returned, by rank.

    Results travel through torch files in `folder`, so they may hold tensors and plain values. A rank that
    raises fails the caller with that rank's traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _accelerator(device):
        own = size, free_port(), str(folder), threads, dict(os.environ), function, arguments
        if device == "cpu":  # forked from a process that has imported all there is
            mp.get_context("forkserver").set_forkserver_preload([__name__, *LATE_IMPORTS])
        method = "forkserver" if device == "cpu" else "spawn"  # CUDA does not survive a fork
        mp.start_processes(_rank, own, nprocs=size, start_method=method)  # type: ignore[attr-defined]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(size)]


@contextmanager
def _accelerator(device: str) -> Iterator[None]:
    """What processes that start in here compute on. DeepSpeed looks once, when it is imported."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = device
    try:
        yield
    finally:
        if before is None:
            del os.environ["DS_ACCELERATOR"]
        else:
            os.environ["DS_ACCELERATOR"] = before


def train_all(world: World, cases: dict[str, tuple[Config, list[Path]]]) -> dict[str, str]:
    """Train each case; what ended it. Once a run has been put together some files go, or what a folder holds."""
    ended = {}
    for name, (config, lost) in cases.items():
        run = assemble(config, world)
        world.barrier()
        for path in lost if world.is_first else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        world.barrier()
        try:
            train.loop(run)
            ended[name] = ""
        except DataError as error:
            ended[name] = str(error)
        run.sinks.close(0)
    return ended


def _rank(
    rank: int,
    size: int,
    port: int,
    folder: str,
    threads: int,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.clear()
    os.environ |= environment | {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    world: World = join_world(TIMEOUT_S, threads)
    try:
        torch.save(function(world, *arguments), Path(folder) / f"rank{rank}.pt")
    finally:
        leave_world()
    leave(0)
