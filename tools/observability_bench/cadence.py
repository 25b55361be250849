"""Rows "observability cadence": a step with what the recipe logs, or with everything at every step, against none."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from statistics import median

from bitmar import train
from bitmar.assembly import Run, assemble, open_loader
from bitmar.config import Config
from bitmar.engine.faults import Guard
from bitmar.engine.world import World
from tools.engine_bench.common import ENDLESS, Bench, Row
from tools.engine_bench.ranks import Group

DEFAULT_BAR, EVERYTHING_BAR = 1.01, 1.10
OFF = (
    "wandb.enabled=false",
    f"wandb.log_every_n_steps={ENDLESS}",
    *(f"wandb.log_{part}=false" for part in ("attention", "memory", "gradients", "quantization", "features")),
    "wandb.create_plots=false",
)
DEFAULT = (
    *("wandb.offline=true", "wandb.log_every_n_steps=50", "wandb.attention_log_interval=100"),
    "attention_analysis.log_every_n_steps=100",
)
# An epoch of the bench's few captions is some ten steps, one of a whole corpus more than a thousand: pictures are made
# once in the steps that are timed
EPOCHS_BETWEEN_PICTURES = {"demo": 2, "bitmar-14m": 8}
EVERYTHING = (
    *("wandb.offline=true", "wandb.log_every_n_steps=1", "wandb.attention_log_interval=1"),
    "attention_analysis.log_every_n_steps=1",
    *("wandb.log_memory=true", "wandb.log_quantization=true", "wandb.create_plots=false"),
)
WAYS = {"off": OFF, "default": DEFAULT, "everything": EVERYTHING}


class Beats(Guard):
    """Notes when each step began."""

    def __init__(self) -> None:
        super().__init__()
        self.began: dict[int, tuple[float, float]] = {}  # wall and CPU seconds

    def beat(self, stage: str, step: int, patience_s: float = 0.0) -> None:
        """Note it; nothing watches."""
        if stage == "waiting for data":
            self.began[step] = time.perf_counter(), time.process_time()


def cadence_rows(bench: Bench) -> Iterator[Row]:
    """The demo model and the 14M model, two ranks."""
    for recipe in ("demo",) if bench.quick else ("demo", "bitmar-14m"):
        configs = {
            way: bench.config(recipe, f"{recipe}-{way}", "training.precision=fp32", *own, *pictures(recipe))
            for way, own in WAYS.items()
        }
        group = Group(_rank, 2, configs)
        for way, bar, steps, rounds in (
            ("default", DEFAULT_BAR, 10 if bench.quick else 100, 2 if bench.quick or recipe != "demo" else 9),
            ("everything", EVERYTHING_BAR, 5 if bench.quick else 10, 3 if bench.quick else 5),
        ):
            yield _row(bench, group, recipe, way, bar, steps, rounds)
        group.close()


def pictures(recipe: str) -> tuple[str, str]:
    """How often they are made."""
    epochs = EPOCHS_BETWEEN_PICTURES[recipe]
    return f"wandb.plot_every_n_epochs={epochs}", f"attention_analysis.viz_every_n_epochs={epochs}"


def _row(bench: Bench, group: Group, recipe: str, way: str, bar: float, steps: int, rounds: int) -> Row:
    group.ask((way, 2))
    group.ask(("off", 2))
    found = list[tuple[float, float, float, float]]()
    for turn in range(rounds):
        first, second = (way, "off") if turn % 2 else ("off", way)
        told = {name: group.ask((name, steps)) for name in (first, second)}
        sides = [(max(wall for wall, _ in told[name]), sum(cpu for _, cpu in told[name])) for name in (way, "off")]
        found.append((sides[0][0], sides[1][0], sides[0][0] / sides[1][0], sides[0][1] / sides[1][1]))
    ratios = [ratio for _, _, ratio, _ in found]
    meant = {
        "default": "metrics every 50 steps, attention every 100, pictures once",
        "everything": "metrics and attention at every step",
    }[way]
    return {
        "name": f"observability cadence: {meant}, against logging off ({recipe}, 2 ranks, {bench.records.kind})",
        "ours": round(median(mine for mine, *_ in found), 4),
        "theirs": round(median(other for _, other, *_ in found), 4),
        "ratio": round(median(ratios), 4),
        "unit": "s a step",
        "bar": f"<= {bar}",
        "ok": bench.verdict(ratios, lambda ratio: ratio <= bar),
        "cpu_ratio": round(median(cpu for *_, cpu in found), 4),
        "each_round": [round(ratio, 4) for ratio in ratios],
    }


def _rank(world: World, link: Connection, configs: dict[str, Config]) -> None:
    runs: dict[str, Run] = {}
    while question := link.recv():
        way, steps = question
        if way not in runs:
            runs[way] = assemble(configs[way], world, Beats())
        link.send(train_steps(runs[way], steps))
    for run in runs.values():
        run.sinks.close(0)


def train_steps(run: Run, steps: int) -> tuple[float, float]:
    """(wall, CPU) seconds a step, of `steps` steps; the log at the end of a run is behind them."""
    assert isinstance(run.guard, Beats)
    first = run.progress.step
    last = dataclasses.replace(run.config.training, max_steps=first + steps + 1)
    run.config = dataclasses.replace(run.config, training=last)
    run.loader = open_loader(run.config, run.shards, run.progress, run.world)
    run.world.barrier()
    train.loop(run)
    (began, cpu_began), (ended, cpu_ended) = run.guard.began[first], run.guard.began[first + steps]
    return (ended - began) / steps, (cpu_ended - cpu_began) / steps
