"""Rows "observability collectives", "observability plot" and what observability holds on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bitmar import observing
from bitmar.assembly import Run, assemble
from bitmar.config import Config, load_config
from bitmar.engine.census import HISTOGRAM_EDGES, matrices_of
from bitmar.engine.schedule import Rates, rates_at
from bitmar.engine.world import World
from bitmar.model.bitmar import BitMar
from bitmar.observability.board import Board
from bitmar.observability.reduce import payload
from bitmar.observability.schema import Layout, schema_of
from bitmar.observability.stats import Statistics
from shards.loader import LoaderState
from tools.data_bench.records import ROOT
from tools.engine_bench.common import Bench, Row, measured_world
from tools.engine_bench.ranks import Group
from tools.observability_bench.cadence import EVERYTHING, Beats, train_steps

MANY_RANKS, RANKS_A_NODE = 1024, 8
BYTES_BAR, HELD_BAR_MS, MEMORY_BAR = 64 * 1024, 2.0, 0.01
OPERATIONS_BAR = 4


def collective_rows(bench: Bench) -> Iterator[Row]:
    """Collectives of a log, counted while two ranks train; bytes of one, counted for many ranks."""
    ranks, precision = measured_world()
    config = bench.config("demo", "collectives", precision, *EVERYTHING, "wandb.pca_log_interval=1000000")
    group = Group(_counting_rank, ranks, config)
    told = group.ask("log")[0]
    group.close()
    yield {
        "name": f"observability collectives: of a log, metrics and attention (demo, {ranks} ranks)",
        "ours": sum(told.values()),
        "theirs": None,
        "value": sum(told.values()),
        "unit": "collectives",
        "bar": f"one an operation, <= {OPERATIONS_BAR}",
        "ok": (ranks == 1) == (not told) and all(count == 1 for count in told.values()) and len(told) <= OPERATIONS_BAR,
        "by_operation": told,
    }
    recipe = load_config(ROOT / "launch" / "recipes" / "bitmar-700m.yaml")
    size = payload_bytes(recipe, MANY_RANKS)
    yield {
        "name": f"observability collectives: bytes a rank sends a log step, {MANY_RANKS} ranks (bitmar-700m, counted)",
        "ours": size,
        "theirs": None,
        "value": size,
        "unit": "bytes",
        "bar": f"<= {BYTES_BAR}",
        "ok": size <= BYTES_BAR,
    }


def plot_rows(bench: Bench) -> Iterator[Row]:
    """How long the training thread is held by what pictures are made from, with an analysis of heads at each log."""
    config = load_config(ROOT / "launch" / "recipes" / "bitmar-120m.yaml")
    model = config.model
    layout = Layout(model, sources=tuple("abcdefgh"), matrices=tuple(f"encoder.{i}" for i in range(200)))
    shapes = {m.name: m.shape for m in schema_of(layout) if m.of}
    draw = np.random.default_rng(0)
    arrays = {name: draw.random(shape) for name, shape in shapes.items()}
    folder = bench.folder / "board"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"Training/Step": 1, "Training/Loss": 2.0}\n')
    board, held = Board(folder, str, layout.matrices), list[float]()
    memory = {name: draw.random(model.memory_size) for name in ("usage", "age", "written", "image_ids")}
    for step in range(20 if bench.quick else 200):
        began = time.perf_counter()
        board.take(step, arrays, memory)
        board.take_heads(step, arrays, config.attention_analysis, None)
        board.take_captions(step, np.ones((4, 64), np.int64), draw.random((4, 64, model.vision_tokens)))
        if step % 20 == 0:
            board.draw(step)
        for _ in board.pictures():
            pass
        held.append(1000 * (time.perf_counter() - began))
        time.sleep(0.01)
    board.close()
    problems = list(board.problems())
    assert not problems, problems
    yield {
        "name": "observability plot: training thread held by what pictures are made from, the longest (120M shapes)",
        "ours": round(max(held), 3),
        "theirs": None,
        "value": round(max(held), 3),
        "unit": "ms",
        "bar": f"<= {HELD_BAR_MS:g}",
        "ok": max(held) <= HELD_BAR_MS,
        "median": round(float(np.median(held)), 4),
    }


def memory_rows(bench: Bench) -> Iterator[Row]:
    """Bytes held on the device between two steps against those of the model's parameters."""
    for recipe in ("demo",) if bench.quick else ("demo", "bitmar-14m"):
        config = bench.config(recipe, f"{recipe}-memory", "training.precision=fp32", *EVERYTHING)
        group = Group(_holding_rank, 1, config)
        held = group.ask("held")[0]
        group.close()
        total = sum(p.numel() for p in BitMar(config.model).parameters()) * 4
        yield {
            "name": f"observability memory: held on the device, against the model's parameters ({recipe})",
            "ours": held,
            "theirs": total,
            "ratio": round(held / total, 5),
            "unit": "bytes",
            "bar": f"<= {MEMORY_BAR}",
            "ok": held <= MEMORY_BAR * total,
        }


def payload_bytes(config: Config, ranks: int) -> int:
    """What a rank of so many sends at a log of a recipe that reads eight sources."""
    with torch.device("meta"):
        model = BitMar(config.model)
    matrices = tuple(matrix.name for matrix in matrices_of(model))
    bins = len(HISTOGRAM_EDGES) - 1 if config.wandb.makes_histograms else 0
    layout = Layout(config.model, ranks, ranks // RANKS_A_NODE, tuple("abcdefgh"), matrices, bins)
    return sum(part.numel() * part.element_size() for part in payload(Statistics(schema_of(layout))))


def _counting_rank(world: World, link: Connection, config: Config) -> None:
    """Counts what a log sends, by operation."""
    run = assemble(config, world, Beats())
    train_steps(run, 2)
    counts: dict[str, int] = {}
    plain = dist.all_reduce

    def counted(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, *rest: Any, **named: Any) -> Any:
        name = str(op).rpartition(".")[2]
        counts[name] = counts.get(name, 0) + 1
        return plain(tensor, op, *rest, **named)

    run.window.last = run.window.last or _last_of(run)
    link.recv()
    dist.all_reduce = counted
    observing.log(run)
    dist.all_reduce = plain
    link.send(counts)
    link.recv()
    run.sinks.close(0)


def _last_of(run: Run) -> tuple[LoaderState, Rates]:
    return LoaderState(0, run.progress.step - 1), rates_at(run.progress.step, sum(run.lengths), run.config.optimizer)


def _holding_rank(world: World, link: Connection, config: Config) -> None:
    run = assemble(config, world, Beats())
    train_steps(run, 1)
    link.recv()
    link.send(held_bytes(run))
    link.recv()
    run.sinks.close(0)


def held_bytes(run: Run) -> int:
    """Of statistics, probes, and what the census watches and forward passes keep for it."""
    tensors = [run.engine.watched.packed, *(scale for _, layer in run.engine.rounded for scale in layer.scales)]
    for held in (*run.watch.probes.heads, run.engine.census):
        tensors += [value for value in vars(held).values() if isinstance(value, torch.Tensor)]
    return run.watch.statistics.device_bytes + sum(t.numel() * t.element_size() for t in tensors)
