"""Rows "engine checkpoint": how long a checkpoint holds the loop, against a blocking save of the same state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

from bitmar.assembly import Run
from bitmar.engine.world import join_world
from tools.engine_bench.common import Bench, Row
from tools.engine_bench.steps import Trainer

HOLD_BAR = 0.15


def checkpoint_rows(bench: Bench) -> Iterator[Row]:
    """Saves of both kinds in turn, a step of training between them; 14 million parameters, ZeRO-1, one rank."""
    world = join_world()
    trainer = Trainer(bench.config("bitmar-14m", "checkpoint", "training.precision=fp32"), world)
    held, blocked, shares = list[float](), list[float](), list[float]()
    for turn in range(3 if bench.quick else 8):
        trainer.train(1)
        hold = hold_seconds(trainer.run)
        trainer.train(1)
        whole = blocking_seconds(trainer.run)
        if turn:
            held.append(hold)
            blocked.append(whole)
            shares.append(hold / whole)
    trainer.close()
    yield {
        "name": "engine checkpoint: time the loop is held, against a blocking save (bitmar-14m, ZeRO-1, 1 rank)",
        "ours": round(median(held), 4),
        "theirs": round(median(blocked), 4),
        "ratio": round(median(shares), 3),
        "unit": "s",
        "bar": f"<= {HOLD_BAR}",
        "ok": bench.verdict(shares, lambda share: share <= HOLD_BAR),
        "each_round": [round(share, 3) for share in shares],
    }


def hold_seconds(run: Run) -> float:
    """What a checkpoint of the trainer keeps the loop from going on; the disk takes it while the next step trains."""
    return save_seconds(run, wait=False)


def blocking_seconds(run: Run) -> float:
    """A save until it is on the disk."""
    return save_seconds(run, wait=True)


def save_seconds(run: Run, wait: bool) -> float:
    run.saver.wait()
    began = time.perf_counter()
    run.saver.save(run.engine, run.memory, run.progress, run.identity, wait=wait)
    return time.perf_counter() - began
