"""Observability across process borders: two gloo ranks."""

from __future__ import annotations

import json
import math
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch.multiprocessing.spawn import spawn

from bitmar import observing, train
from bitmar.assembly import Run
from bitmar.config import Config, WandbConfig
from bitmar.engine.world import World
from bitmar.observability.reduce import payload, reduce
from bitmar.observability.run_folder import read_series
from bitmar.observability.schema import SCHEMA, Cadence, Metric, Reduction
from bitmar.observability.sinks import open_sinks
from bitmar.observability.stats import Statistics
from tests.support.ranks import run_ranks
from tests.support.runs import STEPS, tiny_config

WORLD_SIZE = 2
FILLED = [metric for metric in SCHEMA if metric.reduction is not Reduction.DERIVED]
LEAST = Metric("Data/Least", "1", Reduction.MIN, Cadence.STEP, "the schema has no minimum of its own")
Fill = list[tuple[float, float]]  # (value, count) by step


def fills(rank: int) -> dict[str, Fill]:
    """What a rank sees: 5 steps a metric, different on each rank; on every third metric rank 1 sees nothing."""
    seen: dict[str, Fill] = {}
    for index, metric in enumerate(FILLED):
        draw = random.Random(f"{metric.name} {'all' if metric.reduction is Reduction.SAME else rank}")
        steps = [(draw.uniform(-3, 9), float(draw.randint(1, 64))) for _ in range(5)]
        nothing = rank == 1 and index % 3 == 0 and metric.reduction is not Reduction.SAME
        seen[metric.name] = [(0.0, 0.0)] * 5 if nothing else steps
    return seen


def expected(metric_name: str, reduction: Reduction) -> float:
    """The plain computation over the joined data of all ranks."""
    joined = [pair for rank in range(WORLD_SIZE) for pair in fills(rank)[metric_name] if pair[1]]
    values, total_count = [value for value, _ in joined], sum(count for _, count in joined)
    mean = math.fsum(values) / total_count
    return {
        Reduction.SUM: math.fsum(values),
        Reduction.MEAN: mean,
        Reduction.EXP_MEAN: math.exp(mean),
        Reduction.STD: math.sqrt(math.fsum(value**2 / count for value, count in joined) / total_count - mean**2),
        Reduction.ROOT_SUM: math.sqrt(math.fsum(map(abs, values))),
        Reduction.ROOT_MEAN: math.sqrt(math.fsum(map(abs, values)) / total_count),
        Reduction.MAX: max(values),
        Reduction.MIN: min(values),
        Reduction.SAME: fills(0)[metric_name][-1][0],
    }[reduction]


def filled(rank: int) -> Statistics:
    stats = Statistics()
    kinds = {metric.name: metric.reduction for metric in FILLED}
    for name, steps in fills(rank).items():
        for value, count in steps:
            if kinds[name] is Reduction.SAME:
                stats.same(name, torch.tensor(value, dtype=torch.float64))
            elif kinds[name] in (Reduction.ROOT_SUM, Reduction.ROOT_MEAN):
                stats.add(name, torch.tensor(abs(value), dtype=torch.float64), count)
            elif kinds[name] not in (Reduction.MAX, Reduction.MIN):
                squares = value**2 / count if count else 0.0  # of `count` numbers that are alike
                stats.add(name, torch.tensor(value, dtype=torch.float64), count, squares)
            elif count:
                stats.peak(name, value)
    return stats


def watch_all_reduces() -> list[tuple[str, int]]:
    """(operation, numbers) of every all-reduce of this process from now on."""
    original, calls = torch.distributed.all_reduce, list[tuple[str, int]]()

    def counted(tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM, *rest: Any, **named: Any) -> Any:
        calls.append((str(op).rpartition(".")[2], tensor.numel()))
        return original(tensor, op, *rest, **named)

    torch.distributed.all_reduce = counted
    return calls


def rank_main(rank: int, port: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE
    )
    calls = watch_all_reduces()
    world, stats = World(rank, WORLD_SIZE, rank, WORLD_SIZE, torch.device("cpu")), filled(rank)
    result = reduce(stats, world)
    sent = list(calls)

    stats.reset()
    empty = reduce(stats, world).numbers
    if rank == 1:  # only one rank sees trouble
        stats.add("Training/Loss", math.nan)
        stats.peak("System/Memory_RSS", math.nan)
    else:
        stats.add("Training/Loss", 1.0)
        stats.peak("System/Memory_RSS", 5.0)
        stats.peak("System/GPU_Memory_Peak", 7.0)
    trouble = reduce(stats, world).numbers

    sink = open_sinks(Path(folder) / "run", rank, wandb=WandbConfig(enabled=False), name="n", run_id="i", config={})
    sink.log(5, result.numbers)
    sink.close()
    least = Statistics([LEAST])
    least.peak(LEAST.name, 3.0 - rank)
    least_result = reduce(least, world).numbers
    report = {
        "result": result.numbers,
        "sent": sent,
        "empty": empty,
        "trouble": trouble,
        "least": least_result,
    }
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(rank_main, args=(port, str(folder)), nprocs=WORLD_SIZE)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("metric", FILLED, ids=lambda metric: metric.name)
def test_metric_is_true_of_both_ranks(two_ranks: tuple[Path, list[dict[str, Any]]], metric: Any) -> None:
    for report in two_ranks[1]:
        assert report["result"][metric.name] == pytest.approx(
            expected(metric.name, metric.reduction), rel=1e-12, abs=1e-12
        )


def test_every_kind_of_reduction_is_walked_with_an_empty_rank() -> None:
    assert {metric.reduction for metric in (*FILLED, LEAST)} == set(Reduction) - {Reduction.DERIVED}
    emptied = {m.reduction for m in FILLED if not any(count for _, count in fills(1)[m.name])}
    assert emptied >= {Reduction.SUM, Reduction.MEAN, Reduction.MAX}


def test_least_of_both_ranks(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [report["least"] for report in two_ranks[1]] == [{LEAST.name: 2.0}] * 2


def test_a_collective_an_operation_and_the_same_keys(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    added, extremes = payload(filled(0))
    for report in two_ranks[1]:
        assert report["sent"] == [["SUM", len(added)], ["MAX", len(extremes)]]
        assert set(report["result"]) == {metric.name for metric in FILLED}
        assert report["empty"] == {}


def test_nan_of_one_rank_reaches_all(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for report in two_ranks[1]:
        assert math.isnan(report["trouble"]["Training/Loss"])
        assert math.isnan(report["trouble"]["System/Memory_RSS"])
        assert report["trouble"]["System/GPU_Memory_Peak"] == 7.0  # only one rank has a GPU


def test_only_rank_0_writes(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    run_dir = two_ranks[0] / "run"
    assert sorted(path.name for path in run_dir.iterdir()) == ["events.jsonl", "log.txt", "metrics.jsonl"]
    series = read_series(run_dir / "metrics.jsonl")
    assert set(series) == {metric.name for metric in FILLED}
    assert all(len(steps) == 1 for steps, _ in series.values())


def operations_of_logs(world: World, config: Config) -> list[list[str]]:
    """The all-reduces of each log of a run."""
    calls, logs = watch_all_reduces(), list[list[str]]()

    def log(run: Run) -> None:
        before = len(calls)
        observing.log(run)
        logs.append([operation for operation, _ in calls[before:]])

    train.log = log
    train.train(config, world)
    return logs


@pytest.mark.slow
def test_a_log_of_a_run_is_a_collective_an_operation(tmp_path: Path, tiny_shards: Path) -> None:
    """Whatever it tells of: three phases, probes, latents, histograms. BOR: whether any rank has met damage."""
    config = tiny_config(tmp_path, tiny_shards, tmp_path / "runs", "run", "wandb.log_histograms=true")
    for logs in run_ranks(WORLD_SIZE, tmp_path / "ranks", operations_of_logs, config):
        assert logs == [["BOR", "SUM", "MAX"]] * STEPS
