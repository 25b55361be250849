"""Observability across process borders: two gloo ranks, a real offline wandb run, the secret."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch.multiprocessing.spawn import spawn

from bitmar.observability.plots import read_series
from bitmar.observability.reduce import reduce
from bitmar.observability.schema import SCHEMA, STEP_METRIC, Cadence, Metric, Reduction
from bitmar.observability.sinks import open_sinks
from bitmar.observability.stats import Statistics
from tests.unit.observability.wandb_file import history, wandb_records

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE = 2
CANARY = "c0ffee" * 7  # as long as a wandb key, and never one
LEAST = Metric("Data/Least", "1", Reduction.MIN, Cadence.STEP, "the schema has no minimum of its own")
Fill = list[tuple[float, float]]  # (value, count) by step


@dataclass(frozen=True)
class World:
    size: int
    rank: int


def fills(rank: int) -> dict[str, Fill]:
    """What a rank sees: 5 steps a metric, different on each rank; on every third metric rank 1 sees nothing."""
    seen: dict[str, Fill] = {}
    for index, metric in enumerate(SCHEMA):
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
        Reduction.MAX: max(values),
        Reduction.MIN: min(values),
        Reduction.SAME: fills(0)[metric_name][-1][0],
    }[reduction]


def filled(rank: int) -> Statistics:
    stats = Statistics()
    kinds = {metric.name: metric.reduction for metric in SCHEMA}
    for name, steps in fills(rank).items():
        for value, count in steps:
            if kinds[name] is Reduction.SAME:
                stats.same(name, torch.tensor(value, dtype=torch.float64))
            elif kinds[name] not in (Reduction.MAX, Reduction.MIN):
                stats.add(name, torch.tensor(value, dtype=torch.float64), count)
            elif count:
                stats.peak(name, value)
    return stats


def rank_main(rank: int, port: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE
    )
    original, calls = torch.distributed.all_reduce, []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **options)

    torch.distributed.all_reduce = counted
    world, stats = World(WORLD_SIZE, rank), filled(rank)
    result = reduce(stats, world)
    collectives = len(calls)

    stats.reset()
    empty = reduce(stats, world)
    if rank == 1:  # only one rank sees trouble
        stats.add("Training/Loss", math.nan)
        stats.peak("System/Memory_RSS", math.nan)
    else:
        stats.add("Training/Loss", 1.0)
        stats.peak("System/Memory_RSS", 5.0)
        stats.peak("System/GPU_Memory_Peak", 7.0)
    trouble = reduce(stats, world)

    sink = open_sinks(Path(folder) / "run", rank, project="p", name="n", run_id="i", config={}, wandb_mode="disabled")
    sink.log(5, result)
    sink.close()
    least = Statistics([LEAST])
    least.peak(LEAST.name, 3.0 - rank)
    least_result = reduce(least, world)
    report = {"result": result, "collectives": collectives, "empty": empty, "trouble": trouble, "least": least_result}
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


@pytest.mark.parametrize("metric", SCHEMA, ids=lambda metric: metric.name)
def test_metric_is_true_of_both_ranks(two_ranks: tuple[Path, list[dict[str, Any]]], metric: Any) -> None:
    for report in two_ranks[1]:
        assert report["result"][metric.name] == pytest.approx(
            expected(metric.name, metric.reduction), rel=1e-12, abs=1e-12
        )


def test_every_kind_of_reduction_is_walked_with_an_empty_rank() -> None:
    assert {metric.reduction for metric in (*SCHEMA, LEAST)} == set(Reduction)
    emptied = {m.reduction for m in SCHEMA if not any(count for _, count in fills(1)[m.name])}
    assert emptied >= {Reduction.SUM, Reduction.MEAN, Reduction.MAX}


def test_least_of_both_ranks(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [report["least"] for report in two_ranks[1]] == [{LEAST.name: 2.0}] * 2


def test_two_collectives_and_the_same_keys(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for report in two_ranks[1]:
        assert report["collectives"] <= 2
        assert set(report["result"]) == {metric.name for metric in SCHEMA}
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
    assert set(series) == {metric.name for metric in SCHEMA}
    assert all(len(steps) == 1 for steps, _ in series.values())


MIRROR = """
import sys
from pathlib import Path
from bitmar.observability.schema import SCHEMA
from bitmar.observability.sinks import open_sinks

run_dir, picture = Path(sys.argv[1]), Path(sys.argv[2])
resume_step = int(sys.argv[3]) if len(sys.argv) > 3 else None
config = {"model": {"width": 64}, "note": "x" * 40_000}
sink = open_sinks(run_dir, 0, project="bitmar", name="try", run_id="abc123", config=config, total_steps=40,
                  resume_step=resume_step)
for step in range(0 if resume_step is None else resume_step + 10, 40, 10):
    sink.log(step, {metric.name: step + index / 64 for index, metric in enumerate(SCHEMA)})
sink.image(40, "Plots/Losses", picture)
sink.event("done", step=40)
sink.close(0)
"""


def mirror(run_dir: Path, home: Path, *arguments: str, **environment: str) -> str:
    """Run MIRROR in a process whose home knows no key; returns all it printed."""
    home.mkdir(exist_ok=True)
    picture = home / "picture.png"
    write_png(picture)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    paths = {"HOME": str(home), "NETRC": str(home / "netrc"), "PYTHONPATH": str(ROOT)}
    wandb_paths = {"WANDB_CACHE_DIR": str(home / "cache"), "WANDB_CONFIG_DIR": str(home / "config")}
    done = subprocess.run(
        [sys.executable, "-c", MIRROR, str(run_dir), str(picture), *arguments],
        env={**clean, **paths, **wandb_paths, **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def write_png(path: Path) -> None:
    """A 2 x 2 grey PNG."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"\0\x00\xff\0\xff\x00")
    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", pixels) + part(b"IEND", b""))


def test_wandb_offline_file_holds_every_metric_and_the_step_axis(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    mirror(run_dir, tmp_path / "home")
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.display_name) == ("abc123", "bitmar", "try")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["model"] == {"width": 64}

    rows = [history(record) for record in records if record.WhichOneof("record_type") == "history"]
    metrics = [row for row in rows if "Plots/Losses/_type" not in row]
    assert [row[STEP_METRIC] for row in metrics] == [0, 10, 20, 30]
    for row in metrics:
        wanted = {m.name: row[STEP_METRIC] + index / 64 for index, m in enumerate(SCHEMA)}
        assert {name: row[name] for name in wanted} == {**wanted, STEP_METRIC: row[STEP_METRIC]}
    (image,) = [row for row in rows if "Plots/Losses/_type" in row]
    assert image[STEP_METRIC] == 40
    assert image["Plots/Losses/_type"] == "image-file"

    axes = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert any(axis.glob_name == "*" and axis.step_metric == STEP_METRIC for axis in axes)
    assert records[-1].WhichOneof("record_type") in ("exit", "final", "footer")


def test_a_resumed_wandb_run_keeps_its_id_and_our_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    mirror(run_dir, tmp_path / "home")
    mirror(run_dir, tmp_path / "home", "10")
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert {file.name for file in files} == {"run-abc123.wandb"}
    steps, _ = read_series(run_dir / "metrics.jsonl")["Training/Loss"]
    assert steps.tolist() == [0, 10, 20, 30]
    records = list(wandb_records(files[-1]))
    rows = [history(record) for record in records if record.WhichOneof("record_type") == "history"]
    assert [row[STEP_METRIC] for row in rows] == [20, 30, 40]


@pytest.mark.parametrize("mode", ["offline", "disabled", "malformed"])
def test_the_key_reaches_no_file(tmp_path: Path, mode: str) -> None:
    """With a key in the environment; "malformed" is refused by wandb itself, without any network."""
    key = CANARY if mode != "malformed" else CANARY[:12]
    environment = {"WANDB_API_KEY": key}
    if mode != "malformed":
        environment["WANDB_MODE"] = mode
    printed = mirror(tmp_path / "run", tmp_path / "home", **environment)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert key.encode() not in path.read_bytes(), path
        assert key not in str(path)
    assert key not in printed
    warned = "wandb is offline" in (tmp_path / "run/events.jsonl").read_text()
    assert warned == (mode == "malformed")
