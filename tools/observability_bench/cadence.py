"""Rows "observability cadence": a step with what the recipe logs, or with everything at every step, against none."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

import torch

from bitmar import probing, train
from bitmar.assembly import Run, assemble, open_loader, open_run
from bitmar.config import Config
from bitmar.engine.census import histograms
from bitmar.engine.faults import Guard
from bitmar.engine.world import World
from bitmar.observability.probes import gates_of
from bitmar.observability.records import EVENTS_FILE, read_lines
from bitmar.watch import open_watch
from tools.engine_bench.common import ENDLESS, Bench, Row, measured_world
from tools.engine_bench.ranks import WAIT_S, Group

DEFAULT_BAR, EVERYTHING_BAR = 1.01, 1.10
EPOCH, CHANGE = "epoch", "change"  # ask a rank for an epoch's steps, and to be watched in its other way
TURN_S = 0.2  # one or two steps of the demo, a part of one of bitmar-14m
OFF = (
    "wandb.enabled=false",
    f"wandb.log_every_n_steps={ENDLESS}",
    *(f"wandb.log_{part}=false" for part in ("attention", "memory", "gradients", "quantization", "features")),
    "wandb.create_plots=false",
)
DEFAULT = (
    *("wandb.offline=true", "wandb.log_every_n_steps=50", "wandb.attention_log_interval=100"),
    *("wandb.plot_every_n_epochs=1", "attention_analysis.viz_every_n_epochs=1"),
    "attention_analysis.log_every_n_steps=100",
)
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
    """The demo model and the 14M model, two ranks; one a GPU where there are any."""
    for recipe in ("demo",) if bench.quick else ("demo", "bitmar-14m"):
        rounds = 1 if bench.quick else 3 if recipe == "demo" else 2
        yield _row(bench, recipe, "default", DEFAULT_BAR, 5 if bench.quick else None, rounds)
        short = (3, 1) if bench.quick else (20, 4)  # 80 steps, all of an epoch of bitmar-14m
        yield _row(bench, recipe, "everything", EVERYTHING_BAR, *short)
    if not bench.quick:  # of no bar
        yield _pass_row(bench)
        yield _histogram_row(bench)


def _pair(bench: Bench, recipe: str, way: str) -> tuple[Group, Group]:
    """The ranks that are watched, and those that are not, until they change places; both read the same captions."""
    ranks, precision = measured_world()

    def start(*sides: str) -> Group:
        names = (f"{recipe}-{way}-{sides[0]}-first-{side}" for side in sides)
        configs = [bench.config(recipe, name, precision, *WAYS[side]) for name, side in zip(names, sides, strict=True)]
        return Group(training_rank, ranks, *configs)

    return start(way, "off"), start("off", way)


class Turns:
    """Groups of ranks that train in turns of TURN_S, the others stopped by a signal with all their children.

    The speed of a machine changes in seconds by more than what is measured here; turns make all sides meet the same.
    What a side does beside its steps (wandb's process, drawing) runs in its own turns, and is a part of its time. What
    a rank has handed to a GPU by then is not stopped: some of it runs in the turn that follows.
    """

    def __init__(self, *sides: Group) -> None:
        self.sides = sides

    def seconds(self, steps: int) -> list[tuple[float, float]]:
        """(wall, CPU) seconds a step of each side; wall: of the turns it had, of its slower rank."""
        turns: list[list[tuple[float, float]]] = [[] for _ in self.sides]
        for side in self.sides:
            side.tell(steps)
            side.stop()
        training = list(range(len(self.sides)))
        while training:
            for number in list(training):
                side = self.sides[number]
                began = side.go_on()
                if side.answered(TURN_S if len(training) > 1 else WAIT_S):
                    training.remove(number)
                turns[number].append((began, side.stop()))
        for side in self.sides:
            side.go_on()
        told = [side.answers() for side in self.sides]
        return [
            (max(inside(mine, *rank.wall) for rank in ranks) / steps, sum(rank.cpu for rank in ranks) / steps)
            for mine, ranks in zip(turns, told, strict=True)
        ]


def inside(turns: Sequence[tuple[float, float]], began: float, ended: float) -> float:
    """Seconds between two moments that lie in turns."""
    return sum(max(0.0, min(last, ended) - max(first, began)) for first, last in turns)


def _row(bench: Bench, recipe: str, way: str, bar: float, steps: int | None, rounds: int) -> Row:
    """Rounds of `steps` steps, or of an epoch, whose pictures are made at its end and drawn in the next round.

    Two processes of the same kind differ by up to 1 % in all their steps. So the sides change places after half of the
    rounds, and a ratio is the geometric mean of two rounds: what a process has of its own falls out.
    """
    first, second = sides = _pair(bench, recipe, way)
    turns, length = Turns(*sides), steps or first.ask(EPOCH)[0]
    turns.seconds(2)
    there = [turns.seconds(length) for _ in range(rounds)]
    for side in sides:
        side.ask(CHANGE)
    turns.seconds(2)
    back = [turns.seconds(length)[::-1] for _ in range(rounds)]
    first.close()
    second.close()
    found = there + back
    halves, cpu = ([[mine[i] / other[i] for mine, other in half] for half in (there, back)] for i in (0, 1))
    ratios, cpu_ratios = ([math.sqrt(a * b) for a, b in zip(*both, strict=True)] for both in (halves, cpu))
    meant = {
        "default": "metrics every 50 steps, attention every 100, pictures every epoch",
        "everything": "metrics and attention at every step",
    }[way]
    return {
        "name": f"observability cadence: {meant}, against logging off ({recipe}, {measured_world()[0]} ranks, "
        f"{bench.records.kind})",
        "ours": round(median(mine[0] for mine, _ in found), 4),
        "theirs": round(median(other[0] for _, other in found), 4),
        "ratio": round(median(ratios), 4),
        "unit": "s a step",
        "bar": f"<= {bar}",
        "ok": bench.verdict(ratios, lambda ratio: ratio <= bar),
        "cpu_ratio": round(median(cpu_ratios), 4),
        "each_round": [round(ratio, 4) for ratio in ratios],
        "before_the_change": [round(ratio, 4) for ratio in halves[0]],
        "after_it": [round(ratio, 4) for ratio in halves[1]],
    }


def _pass_row(bench: Bench) -> Row:
    """What sets the bound of the demo at every step: calls of a pass over a rank's captions, whatever is looked at."""
    own = measured_world()[1], "wandb.probe_samples=2", *EVERYTHING
    group = Group(_passing_rank, 1, bench.config("demo", "demo-pass", *own))
    rounds = [group.ask(40)[0] for _ in range(5)]
    group.close()
    looked_at, bare = (median(side) for side in zip(*rounds, strict=True))
    return {
        "name": "observability cadence: a pass over 2 held-out captions, against one for the gates' gradients alone "
        f"(demo, 1 rank, {bench.records.kind})",
        "ours": round(looked_at, 5),
        "theirs": round(bare, 5),
        "ratio": round(looked_at / bare, 3),
        "unit": "s a pass",
        "bar": None,
        "ok": None,
    }


def _histogram_row(bench: Bench) -> Row:
    """What wandb.log_histograms adds to a log, against a step; it is off unless asked for."""
    recipe = "bitmar-14m"
    config = bench.config(recipe, f"{recipe}-histograms", measured_world()[1], *OFF)
    group = Group(_histogram_rank, 1, config)
    rounds = [group.ask("count")[0] for _ in range(3)]
    group.close()
    counted, step = (median(side) for side in zip(*rounds, strict=True))
    return {
        "name": f"observability cadence: histograms of a log, against a step ({recipe}, 1 rank, {bench.records.kind})",
        "ours": round(counted, 4),
        "theirs": round(step, 4),
        "ratio": round(counted / step, 4),
        "unit": "s",
        "bar": None,
        "ok": None,
    }


@dataclass(frozen=True)
class Taken:
    """What a rank tells of its steps."""

    wall: tuple[float, float]  # began and ended, on the clock that all processes share
    cpu: float


def training_rank(world: World, link: Connection, config: Config, other: Config | None = None) -> None:
    """Trains so many steps as the link asks for, until it asks for none; asked for EPOCH, tells how many that is; asked
    to CHANGE, goes on as `other` has it watched."""
    run = assemble(config, world, Beats())
    _await_mirror(config)
    while asked := link.recv():
        if asked == EPOCH:
            link.send(round(run.lengths[0] / run.loader.order.epochs(0)))
        elif asked == CHANGE:
            assert other is not None
            _change(run, other)
            link.send(CHANGE)
        else:
            link.send(train_steps(run, asked))
    run.sinks.close(0)


def _change(run: Run, config: Config) -> None:
    """The same run, engine and weights, watched in another way, once the pictures of its old one are drawn."""
    if run.watch.board is not None:
        if not run.watch.board.wait(WAIT_S):
            raise RuntimeError("the pictures of a side are not drawn")
        run.watch.board.stop()
    run.sinks.close(0)
    model = run.watch.parameters, run.watch.sizes
    run.config = config
    run.sinks = open_run(config, run.world, run.progress, run.last_step, False, run.shards.tokenizer)
    run.watch = open_watch(config, run.shards, run.engine, model, run.world, run.progress.step, files=True)
    _await_mirror(config)


def _await_mirror(config: Config) -> None:
    """Wait until wandb has started, which a long run does once."""
    events = config.run_directory / EVENTS_FILE
    until = time.monotonic() + WAIT_S
    while config.wandb.enabled and time.monotonic() < until:
        if any(event["kind"] == "wandb" for event in read_lines(events)):
            return
        time.sleep(0.1)


def _passing_rank(world: World, link: Connection, config: Config) -> None:
    run = assemble(config, world, Beats())
    train_steps(run, 1)
    (batch,) = run.watch.probes.heads

    def bare() -> None:
        with run.engine.frozen():
            outputs = run.engine.forward(batch, run.memory, heads=True)
            torch.autograd.grad(outputs.loss, gates_of(outputs.heads))

    while passes := link.recv():
        taken = []
        for work in (functools.partial(probing.pass_heads, run, batch), bare):
            work()
            _wait_for(world.device)
            began = time.perf_counter()
            for _ in range(passes):
                work()
            _wait_for(world.device)
            taken.append((time.perf_counter() - began) / passes)
        link.send(tuple(taken))
    run.sinks.close(0)


def _wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was handed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _histogram_rank(world: World, link: Connection, config: Config) -> None:
    run = assemble(config, world, Beats())
    while link.recv():
        taken = train_steps(run, 2)
        began = time.perf_counter()
        for _ in ("gradients", "weights"):  # of which there are as many
            histograms(run.engine.fragments(), "model", world.device)
        link.send((time.perf_counter() - began, (taken.wall[1] - taken.wall[0]) / 2))
    run.sinks.close(0)


def train_steps(run: Run, steps: int) -> Taken:
    """Train `steps` steps; the log at the end of a run is behind them."""
    assert isinstance(run.guard, Beats)
    first = run.progress.step
    last = dataclasses.replace(run.config.training, max_steps=first + steps + 1)
    run.config = dataclasses.replace(run.config, training=last)
    run.loader = open_loader(run.config, run.shards, run.progress, run.world)
    run.world.barrier()
    train.loop(run)
    (began, cpu_began), (ended, cpu_ended) = run.guard.began[first], run.guard.began[first + steps]
    return Taken((began, ended), cpu_ended - cpu_began)
