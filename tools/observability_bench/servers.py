"""Rows "observability cadence: ... beside a wandb server that ...": steps beside useless servers, against those of a
run that is offline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from statistics import median

from bitmar.config import Config
from bitmar.engine.world import World
from tools.engine_bench.common import Bench, Row, measured_world
from tools.engine_bench.ranks import Group
from tools.observability_bench.cadence import DEFAULT, Turns, training_rank
from tools.observability_bench.wandb_server import Useless, WandbServer, wandb_server

SERVER_BAR = 1.02  # a row's rounds lay between 0.989 and 1.023 on two cores
DOES = {"hangs": "hangs", "closed": "is closed", "500": "answers 500"}
LOGS = ("wandb.log_every_n_steps=5", "wandb.create_plots=false")


def server_rows(bench: Bench) -> Iterator[Row]:
    """Each kind of useless server: it takes the run's start, and is of no use from then on."""
    kinds: tuple[Useless, ...] = ("hangs",) if bench.quick else ("hangs", "closed", "500")
    with ExitStack() as stack:
        servers = [stack.enter_context(wandb_server("answers")) for _ in kinds]
        offline = _start(bench, "offline", "wandb.offline=true")
        stack.callback(offline.end)  # as they are: a run's own end waits for its server
        beside = list[Group]()
        for kind, server in zip(kinds, servers, strict=True):
            beside.append(_start(bench, kind, "wandb.offline=false", server=server))
            stack.callback(beside[-1].end)
        turns = Turns(offline, *beside)
        turns.seconds(2)
        for kind, server in zip(kinds, servers, strict=True):
            if not any(name == "UpsertBucket" for name, _ in server.operations):
                raise RuntimeError("a run of the benchmark is not online")
            server.turn(kind)
        steps, rounds = (5, 2) if bench.quick else (60, 5)
        found = [turns.seconds(steps) for _ in range(rounds)]
    for place, kind in enumerate(kinds, start=1):
        ratios = [sides[place][0] / sides[0][0] for sides in found]
        yield {
            "name": f"observability cadence: a log every 5 steps, beside a wandb server that {DOES[kind]}, against a "
            f"run that is offline (demo, {measured_world()[0]} ranks, {bench.records.kind})",
            "ours": round(median(sides[place][0] for sides in found), 4),
            "theirs": round(median(sides[0][0] for sides in found), 4),
            "ratio": round(median(ratios), 4),
            "unit": "s a step",
            "bar": f"<= {SERVER_BAR}",
            "ok": bench.verdict(ratios, lambda ratio: ratio <= SERVER_BAR),
            "each_round": [round(ratio, 4) for ratio in ratios],
        }


def _start(bench: Bench, name: str, *own: str, server: WandbServer | None = None) -> Group:
    """Ranks that log to a server, or offline."""
    home = bench.folder / f"home-{name}"
    environment = {"WANDB_MODE": "offline"}
    if server is not None:
        environment = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
    environment |= {f"WANDB_{kind}_DIR": str(home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
    ranks, precision = measured_world()
    config = bench.config("demo", f"beside-{name}", precision, *DEFAULT, *LOGS, *own)
    return Group(_rank, ranks, environment, config)


def _rank(world: World, link: Connection, environment: dict[str, str], config: Config) -> None:
    os.environ |= environment
    training_rank(world, link, config)
