"""The cost of a step: the trainer against a bare loop, rounding against plain linear layers, the share of GEMM rate."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from bitmar import train
from bitmar.assembly import Run, assemble, open_loader
from bitmar.config import Config
from bitmar.engine.world import World, join_world
from bitmar.model.flops import FORMULA, Flops, Work, training_flops
from shards.loader import Loader, LoaderState
from tools.engine_bench.common import BareLoop, Bench, Clock, Row, ratio_row, step_batches

GEMM_SHAPES = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096))
STEP_BAR, PLAIN_BAR, FLOPS_BAR = 1.05, 1.10, 0.60


class Trainer:
    """The whole trainer, from the loader's thread to the log, some steps at a time."""

    def __init__(self, config: Config, world: World) -> None:
        self.run: Run = assemble(config, world)

    def train(self, steps: int) -> None:
        """The loop of bitmar.train, as if the run ended after `steps` more; it logs there, too."""
        run = self.run
        last = dataclasses.replace(run.config.training, max_steps=run.progress.step + steps)
        run.config = dataclasses.replace(run.config, training=last)
        run.loader = open_loader(run.config, run.shards, run.progress, run.world)
        train.loop(run)

    def close(self) -> None:
        self.run.sinks.close(0)


def step_rows(bench: Bench) -> Iterator[Row]:
    """Rows "engine step"."""
    yield trainer_row(bench)
    yield bitlinear_row(bench)
    yield flops_row(bench)


def trainer_row(bench: Bench) -> Row:
    """A step of the trainer against a bare loop over the same batches; their rounds alternate."""
    world = join_world()
    config = bench.config("bitmar-14m", "step", "training.precision=fp32")
    trainer, bare = Trainer(config, world), BareLoop(config, world)
    rounds, steps = (3, 1) if bench.quick else (6, 8)
    ours, theirs = list[Clock](), list[Clock]()
    for turn in range(rounds + 1):
        first = trainer.run.progress.step
        batches = [step_batches(trainer.run.loader, step, world) for step in range(first, first + steps)]
        with Clock() as mine:
            trainer.train(steps)
        with Clock() as other:
            for micro_batches in batches:
                bare.step(micro_batches)
        if turn:  # the first round warms up
            ours.append(mine)
            theirs.append(other)
    trainer.close()
    wall = [mine.wall / other.wall for mine, other in zip(ours, theirs, strict=True)]
    cpu = [mine.cpu / other.cpu for mine, other in zip(ours, theirs, strict=True)]
    row = ratio_row(
        f"engine step: the trainer against a bare torch loop (bitmar-14m, ZeRO-1, 1 rank, {bench.records.kind}, "
        f"{config.training.global_batch} captions a step, a log every {steps} steps)",
        [clock.wall / steps for clock in ours],
        [clock.wall / steps for clock in theirs],
        "s a step",
        bar=f"<= {STEP_BAR}, wall and CPU time",
    )
    row |= {"cpu_ratio": round(median(cpu), 3), "each_round": [round(ratio, 3) for ratio in wall]}
    verdicts = [bench.verdict(ratios, lambda ratio: ratio <= STEP_BAR) for ratios in (wall, cpu)]
    return row | {"ok": None if None in verdicts else all(verdicts)}


def bitlinear_row(bench: Bench) -> Row:
    """Steps with and without rounding in turn, CPU seconds of one thread."""
    world = join_world()
    sides = {}
    for quantized in (True, False):
        config = bench.config(
            "bitmar-14m",
            "plain",
            "training.precision=fp32",
            f"model.quantization={str(quantized).lower()}",
            f"model.vision_quantization={str(quantized).lower()}",
        )
        sides[quantized] = BareLoop(config, world)
    loader = open_captions(config, bench, world)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with threads(1):
        for step in range(3 if bench.quick else 13):
            batches = step_batches(loader, step, world)
            for quantized, side in sides.items():
                with Clock() as clock:
                    side.step(batches)
                if step:
                    seconds[quantized].append(clock.cpu)
    ratios = [mine / other for mine, other in zip(seconds[True], seconds[False], strict=True)]
    return ratio_row(
        f"engine step: BitLinear against plain linear layers (bitmar-14m, {bench.records.kind}, one thread)",
        seconds[True],
        seconds[False],
        "CPU s a step",
        bar=f"<= {PLAIN_BAR}",
        ok=bench.verdict(ratios, lambda ratio: ratio <= PLAIN_BAR),
        each_round=[round(ratio, 3) for ratio in ratios],
    )


def open_captions(config: Config, bench: Bench, world: World) -> Loader:
    """The training captions, to be asked for by step."""
    from bitmar.engine.progress import Progress

    return open_loader(config, bench.shards, Progress("none"), world)


def flops_row(bench: Bench) -> Row:
    """Operations a second of the trainer over the best rate of a matrix product, in turn, on all cores."""
    world = join_world()
    config = bench.config("bitmar-14m", "flops", "training.precision=fp32")
    trainer = Trainer(config, world)
    rounds, steps = (2, 1) if bench.quick else (8, 5)
    rates, best, vision = list[float](), 0.0, list[float]()
    for turn in range(rounds + 1):
        first = trainer.run.progress.step
        work = sum((work_of(trainer.run.loader, step) for step in range(first, first + steps)), Work())
        with Clock() as clock:
            trainer.train(steps)
        best = max(best, gemm_rate(0.2 if bench.quick else 1.0))
        if turn:
            flops: Flops = training_flops(config.model, work)
            rates.append(flops.total / clock.wall)
            vision.append(flops.vision / clock.wall)
    trainer.close()
    shares = [rate / best for rate in rates]
    return {
        "name": f"engine step: model FLOP/s over the best fp32 matrix product's (bitmar-14m, {bench.records.kind}, "
        f"1 process, {torch.get_num_threads()} threads)",
        "ours": round(median(rates) / 1e9, 2),
        "theirs": round(best / 1e9, 2),
        "ratio": round(median(shares), 3),
        "unit": "GFLOP/s",
        "bar": f">= {FLOPS_BAR}",
        "ok": bench.verdict(shares, lambda share: share >= FLOPS_BAR),
        "of_vision_tokens": round(median(vision) / 1e9, 2),
        "formula": FORMULA,
    }


def work_of(loader: Loader, step: int) -> Work:
    """The real tokens of a step's captions."""
    total = Work()
    for rows in loader.step_rows(LoaderState(0, step)):
        lengths = (rows.segments > 0).sum(1)[rows.valid].astype(float)
        total += Work(float(lengths.sum()), float((lengths * (lengths + 1) / 2).sum()), float(rows.has_vision.sum()))
    return total


def gemm_rate(seconds: float) -> float:
    """The best operations a second of a single-precision matrix product, over shapes and repetitions."""
    best = 0.0
    for m, k, n in GEMM_SHAPES:
        a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, 2 * m * k * n / (time.perf_counter() - began))
    return best


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
