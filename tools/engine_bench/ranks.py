"""Rows "engine rank": two ranks on two cores against one rank on one core."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import psutil
import torch.multiprocessing as mp

from bitmar.assembly import build_model, open_loader, open_shards
from bitmar.config import Config
from bitmar.engine.cores import allowed_cores, bind
from bitmar.engine.progress import Progress
from bitmar.engine.schedule import rates_at
from bitmar.engine.step import train_step
from bitmar.engine.world import World, free_port, join_world, leave, leave_world
from bitmar.engine.zero import ZeroEngine
from bitmar.model.memory import MemoryState
from tools.data_bench.records import ROOT
from tools.engine_bench.common import ENDLESS, Bench, Row, on_gpus, step_batches
from tools.engine_bench.preload import LATE_IMPORTS

BARS = {1: 1.7, 3: 1.5}  # by ZeRO stage
WAIT_S = 900  # for an answer: a guard against hangs


def rank_rows(bench: Bench) -> Iterator[Row]:
    """Samples a second of both worlds, whose rounds alternate."""
    if (os.cpu_count() or 1) < 2:
        return
    for stage, bar in BARS.items():
        config = bench.config(
            "bitmar-14m",
            "ranks",
            "training.precision=fp32",
            f"engine.ds_config={ROOT / 'ds_configs' / f'zero{stage}.json'}",
            *(["training.global_batch=64"] if bench.quick else []),
        )
        one, two = (Group(_rank, size, config, bound=True) for size in (1, 2))
        ratios, rates = list[float](), list[tuple[float, float]]()
        for turn in range(3 if bench.quick else 9):
            alone, together = one.seconds(1), two.seconds(1)
            if turn:
                rates.append((config.training.global_batch / together, config.training.global_batch / alone))
                ratios.append(alone / together)
        one.close()
        two.close()
        yield {
            "name": f"engine rank: 2 ranks on 2 cores against 1 rank on 1 core (bitmar-14m, ZeRO-{stage}, "
            f"{bench.records.kind}, one thread a rank)",
            "ours": round(median(mine for mine, _ in rates), 2),
            "theirs": round(median(other for _, other in rates), 2),
            "ratio": round(median(ratios), 3),
            "unit": "samples/s",
            "bar": f">= {bar}",
            "ok": bench.verdict(ratios, lambda ratio, bar=bar: ratio >= bar),
            "each_round": [round(ratio, 3) for ratio in ratios],
        }


class Group:
    """The ranks of a world that train when they are told to."""

    def __init__(self, main: Callable[..., None], size: int, *arguments: object, bound: bool = False) -> None:
        """main(world, link, *arguments) in each rank, which answers what the link brings until that is 0. `bound`: each
        on one core, also where it could have more; otherwise they are where the trainer puts them."""
        port, environment = free_port(), dict(os.environ)
        if on_gpus():
            context = mp.get_context("spawn")  # CUDA does not survive a fork
        else:
            context = mp.get_context("forkserver")
            context.set_forkserver_preload([__name__, *LATE_IMPORTS, "wandb"])  # once, not by every rank
        pairs = [context.Pipe() for _ in range(size)]
        self.links = [mine for mine, _ in pairs]
        self.ranks = [
            context.Process(
                target=_join, args=(rank, size, port, environment, bound, main, theirs, arguments), daemon=True
            )
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for rank in self.ranks:
            rank.start()
        self._children: list[int] = []  # at the last stop

    @property
    def _pids(self) -> list[int]:
        return [rank.pid for rank in self.ranks if rank.pid is not None]

    def ask(self, question: object) -> list[Any]:
        """What each rank answers."""
        self.tell(question)
        return self.answers()

    def tell(self, question: object) -> None:
        for link in self.links:
            link.send(question)

    def answered(self, wait_s: float) -> bool:
        """Whether all ranks have answered, waiting so long for it."""
        until = time.perf_counter() + wait_s
        return all(link.poll(max(0.0, until - time.perf_counter())) for link in self.links)

    def answers(self) -> list[Any]:
        """What each rank answers to what it was told last."""
        answers = []
        for link in self.links:
            if not link.poll(WAIT_S):
                raise RuntimeError("a rank of the benchmark does not answer")
            answers.append(link.recv())
        return answers

    def seconds(self, steps: int) -> float:
        """Time that the slowest rank takes for so many steps."""
        return max(self.ask(steps))

    def stop(self) -> float:
        """Stop the ranks and all their children by a signal, until `go_on`; the moment at which the ranks stopped, as
        time.perf_counter tells it."""
        _signal(self._pids, signal.SIGSTOP)
        stopped = time.perf_counter()
        _signal(self._children, signal.SIGSTOP)  # those that are known: to look for others takes milliseconds
        known, self._children = self._children, self._find_children()
        _signal([pid for pid in self._children if pid not in known], signal.SIGSTOP)
        return stopped

    def go_on(self) -> float:
        """Have them go on; the moment at which the ranks do: what it takes to tell their children is not theirs."""
        going = time.perf_counter()
        _signal([*self._pids, *self._children], signal.SIGCONT)
        return going

    def _find_children(self) -> list[int]:
        return [child.pid for pid in self._pids for child in psutil.Process(pid).children(recursive=True)]

    def close(self) -> None:
        for link in self.links:
            link.send(0)
        for rank in self.ranks:
            rank.join()

    def end(self) -> None:
        """End the ranks, and what they have started, as they are."""
        children = self._find_children()
        for rank in self.ranks:
            rank.kill()
        _signal(children, signal.SIGKILL)
        for rank in self.ranks:
            rank.join()
        for link in self.links:
            link.close()


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has come to its end
            os.kill(pid, number)


def _join(
    rank: int,
    size: int,
    port: int,
    environment: dict[str, str],
    bound: bool,
    main: Callable[..., None],
    link: Connection,
    arguments: tuple[object, ...],
) -> None:
    os.dup2(2, 1)  # rows alone go to standard output
    warnings.filterwarnings("ignore", category=FutureWarning)
    if bound:
        cores = allowed_cores()
        bind([cores[rank % len(cores)]])
    os.environ |= environment | {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    main(join_world(threads=1), link, *arguments)
    leave_world()
    leave(0)


def _rank(world: World, link: Connection, config: Config) -> None:
    shards = open_shards(config)
    engine = ZeroEngine(build_model(config, shards, world), config, world)
    loader = open_loader(config, shards, Progress("none"), world)
    memory, taken, phase = MemoryState.empty(config.model.memory_size, config.model.episode_dim), 0, config.phases[0]
    while steps := link.recv():
        began = time.perf_counter()
        for step in range(taken, taken + steps):
            engine.set_rates(rates_at(step, ENDLESS, config.optimizer), phase.train)
            batches = step_batches(loader, step, world)
            memory = train_step(engine, batches, memory, phase, config, world, step).memory
        world.barrier()
        taken += steps
        link.send(time.perf_counter() - began)
