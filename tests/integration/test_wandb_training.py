"""Whole trainings and their mirror in wandb: line by line, killed, beside useless servers, stopped, swept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from bitmar.config import load_config
from bitmar.engine.faults import STOPPED
from bitmar.observability.records import read_lines
from bitmar.observability.schema import STEP_METRIC, Cadence, Layout, Metric, schema_of
from bitmar.version import code_version
from shards.loader import ShardSet
from tests.support.mirror import CANARY, home_variables, own_environment, records, rows, told, wandb_files
from tests.support.processes import wait_for
from tests.support.runs import ROOT, STEPS, newest, recipe, write_recipe
from tests.support.trainers import trainers
from tools.observability_bench.wandb_server import Useless, wandb_server

pytestmark = pytest.mark.slow

ENDLESS = ("phases.2.steps=100000", "training.max_epochs=100000")


def write_run(folder: Path, shards: Path, name: str, **wandb: Any) -> Path:
    values = recipe(shards, folder / "runs", name)
    values["wandb"] = {"log_every_n_steps": 1, "create_plots": False, **wandb}
    return write_recipe(folder / f"{name}.yaml", values)


def complete(run_dir: Path) -> bool:
    """Whether metrics.jsonl has every step, and each validation."""
    lines = list(read_lines(run_dir / "metrics.jsonl"))
    trained = [line[STEP_METRIC] for line in lines if "Training/Loss" in line]
    validated = [line[STEP_METRIC] for line in lines if "Validation/Loss" in line]
    return trained == list(range(1, STEPS + 1)) and validated == list(range(0, STEPS + 1, 5))


def as_mirrored(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("time", "nonfinite") and value is not None}


def every(steps: int, first: int | None = None) -> list[int]:
    return list(range(steps if first is None else first, STEPS + 1, steps))


PAIRS = ("phases.1.mix={pairs: 1.0}", "phases.2.mix={pairs: 1.0}")  # after the phase of text
DUE = {  # of a run that logs every second step, and at those of probes and checkpoints
    Cadence.START: [0],
    Cadence.STEP: sorted({*every(2), *every(5)}),
    Cadence.ATTENTION: every(5),
    Cadence.LATENTS: every(10),
    Cadence.VALIDATION: every(5, first=0),
    Cadence.EVALUATION: every(10),
}
ALWAYS, TEXT, BEFORE_MEMORY = every(1, first=0), range(5), range(9)
LEFT_OUT = (  # which metrics, at which of their steps, and why
    ("System/GPU_.+", ALWAYS, "there is no GPU"),
    ("Throughput/MFU", ALWAYS, "the peak of a CPU is not known"),
    ("Training/Loss(_Share)?_Contrastive(_Epoch_Mean|_Trend)?", TEXT, "the phase of text has no such loss"),
    ("Training/Loss(_Share)?_Recall(_Epoch_Mean|_Trend)?", BEFORE_MEMORY, "the phases before have no such loss"),
    ("Memory/Recall_Cosine_.+", BEFORE_MEMORY, "nothing is recalled without that loss"),
    ("Memory/Write_Norm", BEFORE_MEMORY, "nothing is written"),
    ("Attention/Memory_Mean", BEFORE_MEMORY, "the memory is empty"),
    ("Features/(Vision|Episode)_(Mean|Std|Min|Max|Norm)", TEXT, "text has no image"),
    ("Quantization/Flips_.+", [2], "the first census has none before it"),
    ("Training/.+_Trend", [2, 5, 10], "the first log of a phase makes no trend"),
    ("Training/Validation_Ratio", [0], "nothing has been trained"),
)


def due_steps(metric: Metric) -> list[int]:
    """The steps at which the run above is to log a metric."""
    absent = {step for pattern, steps, _ in LEFT_OUT if re.fullmatch(pattern, metric.name) for step in steps}
    return [] if metric.of else [step for step in DUE[metric.cadence] if step not in absent]


def at_wrong_steps(
    mirrored: list[dict[str, Any]], schema: tuple[Metric, ...]
) -> dict[str, tuple[list[int], list[int]]]:
    """The steps of (its rows, those that it was due at) of each metric where they differ."""
    found = {m.name: [row[STEP_METRIC] for row in mirrored if m.name in row] for m in schema if m.name != STEP_METRIC}
    due = {metric.name: due_steps(metric) for metric in schema}
    return {name: (steps, due[name]) for name, steps in found.items() if steps != due[name]}


def test_a_training_is_mirrored_line_by_line(tmp_path: Path, tiny_shards: Path) -> None:
    """Every metric at the steps of its cadence, config and code version; checkpoints and plots where asked for."""
    wandb = {"offline": True, "log_model_checkpoints": True, "create_plots": True}
    wandb |= {"log_every_n_steps": 2, "attention_log_interval": 5, "pca_log_interval": 10}
    path, run_dir = write_run(tmp_path, tiny_shards, "whole", **wandb), tmp_path / "runs" / "whole"
    with trainers(path, 1, *PAIRS, extra={0: home_variables(tmp_path / "home")}) as started:
        assert started.codes() == [0], started.said(0)
    (file,) = wandb_files(run_dir)
    logged = [as_mirrored(line) for line in read_lines(run_dir / "metrics.jsonl")]
    mirrored = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows(file)]
    mirrored = [row for row in mirrored if not any(name.endswith("/_type") for name in row)]
    assert mirrored == logged
    schema = schema_of(Layout(load_config(path).model, sources=ShardSet.open(tiny_shards).source_names))
    assert {name for row in mirrored for name in row} <= {metric.name for metric in schema}
    assert at_wrong_steps(mirrored, schema) == {}
    (run,) = records(file, "run")
    assert 'key: "code"' in str(run.config)
    code = code_version(ROOT)
    assert all(str(value) in str(run.config) for value in code.values() if isinstance(value, str))
    (start,) = told(run_dir, "start")
    assert {name: start[name] for name in code} == code
    sent = [request.log_artifact.artifact for request in records(file, "request")] or records(file, "artifact")
    assert {artifact.name for artifact in sent} == {"whole-checkpoint", "whole-plots"}


def test_a_run_killed_and_resumed_twice_is_one_run_with_rising_steps(tmp_path: Path, tiny_shards: Path) -> None:
    path, run_dir = write_run(tmp_path, tiny_shards, "killed", offline=True), tmp_path / "runs" / "killed"
    environment = home_variables(tmp_path / "home")

    def logged() -> int:
        return max((int(line[STEP_METRIC]) for line in read_lines(run_dir / "metrics.jsonl")), default=0)

    for step in (7, 13):  # each a while after a checkpoint
        with trainers(path, 1, extra={0: environment}) as started:
            assert wait_for(lambda step=step: logged() >= step), started.said(0)
            started.signal(0, signal.SIGKILL)
            started.codes()
    with trainers(path, 1, extra={0: environment}) as started:
        assert started.codes() == [0], started.said(0)
    assert complete(run_dir)
    files = wandb_files(run_dir)
    assert len(files) == 3
    assert len({file.name for file in files}) == 1
    told = [row for file in files for row in rows(file, killed=file != files[-1])]
    steps = [row[STEP_METRIC] for row in told]
    assert steps == sorted(steps)
    assert steps[-1] == STEPS
    trained = [row[STEP_METRIC] for row in told if "Training/Loss" in row]
    assert len(set(trained)) == len(trained)


@pytest.mark.parametrize("kind", ["closed", "hangs", "500"])
def test_a_useless_server_costs_a_warning(tmp_path: Path, tiny_shards: Path, kind: Useless) -> None:
    path, run_dir = write_run(tmp_path, tiny_shards, kind, report=True), tmp_path / "runs" / kind
    tokens = {"HF_TOKEN": "hf_canary_0123456789", "AWS_SECRET_ACCESS_KEY": "aws/canary/0123456789"}
    with wandb_server(kind) as server:
        key = {"WANDB_API_KEY": CANARY, "WANDB_BASE_URL": server.url}
        environment = home_variables(tmp_path / "home") | key | tokens
        with trainers(path, 1, extra={0: environment}) as started:
            assert started.codes() == [0], started.said(0)
            said = started.said(0)
        assert server.asked or kind == "closed"
    assert complete(run_dir)
    (warning,) = told(run_dir, "warning")
    assert "wandb is offline" in warning["message"]
    (file,) = wandb_files(run_dir)  # which holds all of it, for `wandb sync`
    assert [row[STEP_METRIC] for row in rows(file) if "Training/Loss" in row] == list(range(1, STEPS + 1))
    for secret in (CANARY, *tokens.values()):
        assert secret not in said
        for written in (path for path in tmp_path.rglob("*") if path.is_file()):
            assert secret.encode() not in written.read_bytes(), written


def test_stop_on_the_page_saves_and_ends_both_ranks(tmp_path: Path, tiny_shards: Path) -> None:
    path, run_dir = write_run(tmp_path, tiny_shards, "stopped"), tmp_path / "runs" / "stopped"
    with wandb_server("answers") as server:
        key = {"WANDB_API_KEY": CANARY, "WANDB_BASE_URL": server.url}
        environment = home_variables(tmp_path / "home") | key
        with trainers(path, 2, *ENDLESS, extra=dict.fromkeys(range(2), environment)) as started:
            assert wait_for(lambda: bool(server.history)), started.said(0)
            server.stopped = True
            assert started.codes() == [STOPPED, STOPPED], started.said(0)
    (stopped,) = told(run_dir, "stopped")
    assert newest(run_dir).name == f"step_{stopped['step']:08d}"
    (sent,) = server.history.values()
    assert sent[-1][STEP_METRIC] == stopped["step"]
    assert told(run_dir, "warning") == []


def test_only_rank_0_opens_logs_plots_and_wandb(tmp_path: Path, tiny_shards: Path) -> None:
    path, run_dir = write_run(tmp_path, tiny_shards, "two", offline=True, create_plots=True), tmp_path / "runs" / "two"
    environment = home_variables(tmp_path / "home")
    with trainers(path, 2, *ENDLESS, extra=dict.fromkeys(range(2), environment)) as started:
        assert wait_for(lambda: bool(wandb_files(run_dir)) and len(list(read_lines(run_dir / "metrics.jsonl"))) > 12)
        opened = [{Path(file.path).name for file in psutil.Process(p.pid).open_files()} for p in started.processes]
        below = [psutil.Process(p.pid).children(recursive=True) for p in started.processes]
        cores = [["wandb-core" in " ".join(child.cmdline()) for child in children] for children in below]
        loaded = [Path(f"/proc/{p.pid}/maps").read_text() for p in started.processes]
        names = {"metrics.jsonl", "events.jsonl", "log.txt"}
        assert names <= opened[0]
        assert any(cores[0])
        assert not {name for name in opened[1] if name in names or name.endswith((".wandb", ".png", ".log"))}
        assert not any(cores[1])
        assert "site-packages/wandb" not in loaded[1]


def test_a_sweep_starts_a_training_under_the_agents_id(tmp_path: Path, tiny_shards: Path) -> None:
    """What the agent of wandb would run, by wandb's own making of commands."""
    sweep = yaml.safe_load((ROOT / "launch/sweep.yaml").read_text())
    path = write_run(tmp_path, tiny_shards, "swept", offline=True)
    chosen = {"optimizer.peak_rate": {"value": 0.002}, "training.max_steps": {"value": 3}}
    values = create_sweep_command_args({"args": chosen}) | {"env": ["/usr/bin/env"], "interpreter": ["python"]}
    command: list[str] = []
    for part in create_sweep_command(sweep["command"]):
        command += values[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part]
    command = [part.replace("launch/recipes/demo.yaml", str(path)) for part in command]
    environment = own_environment(tmp_path / "home", WANDB_RUN_ID="agents7", DS_ACCELERATOR="cpu")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "sweep-agents7"
    (file,) = wandb_files(run_dir)
    assert file.name == "run-agents7.wandb"
    assert rows(file)[-1][STEP_METRIC] == 3
    assert "peak_rate: 0.002" in (run_dir / "config.yaml").read_text()
