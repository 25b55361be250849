"""The mirror in wandb: real offline runs read back, useless servers, kills, and what must never be written."""

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
from matplotlib.image import imread
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from bitmar.observability.plots import read_series
from bitmar.observability.records import read_lines
from bitmar.observability.schema import SCHEMA, STEP_METRIC
from bitmar.version import code_version
from tests.support.mirror import CANARY, LOGS, home_variables, mirror, own_environment, records, rows, wandb_files
from tests.support.processes import wait_for
from tests.support.runs import ROOT, STEPS, recipe, write_recipe
from tests.support.trainers import trainers
from tests.support.wandb_server import Useless, wandb_server

OFFLINE = {"offline": True}


def told(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run_dir / "events.jsonl") if event["kind"] == kind]


def test_the_offline_file_holds_every_metric_over_the_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    about = {"entity": "team", "group": "g", "tags": ["a", "b"], "notes": "why"}
    mirror(run_dir, tmp_path / "home", wandb=about)  # without a key it is offline
    (file,) = wandb_files(run_dir)
    (run,) = records(file, "run")
    assert (run.run_id, run.entity, run.project, run.display_name) == ("abc123", "team", "bitmar", "try")
    assert (run.run_group, list(run.tags), run.notes) == ("g", ["a", "b"], "why")
    assert 'key: "model"' in str(run.config)
    assert run.git.commit == ""  # of wandb's own making, which would hold the remote's address

    metrics = [row for row in rows(file) if "Plots/Losses/_type" not in row]
    assert [row[STEP_METRIC] for row in metrics] == [0, 10, 20, 30]
    for row in metrics:
        wanted = {m.name: row[STEP_METRIC] + index / 64 for index, m in enumerate(SCHEMA)}
        assert {name: row[name] for name in wanted} == {**wanted, STEP_METRIC: row[STEP_METRIC]}
    (image,) = [row for row in rows(file) if "Plots/Losses/_type" in row]
    assert (image[STEP_METRIC], image["Plots/Losses/_type"]) == (40, "image-file")
    assert imread(file.parent / "files" / image["Plots/Losses/path"]).shape == (2, 2)

    assert any(axis.glob_name == "*" and axis.step_metric == STEP_METRIC for axis in records(file, "metric"))
    assert len(records(file, "exit")) == 1
    (event,) = told(run_dir, "wandb")
    assert event["upload_with"] == f"wandb sync {run_dir}/wandb/offline-run-*-abc123"
    assert told(run_dir, "warning") == []


MORE = """
sink.log(10, {"Training/Loss": 1.0, "Gradients/Total_Norm": 50.0})
sink.log(20, {"Training/Loss": 1.0, "Gradients/Total_Norm": 50.0})
sink.histogram(20, "Weights/decoder", [1, 2, 3], [0.0, 0.5, 1.0, 1.5])
folder = run_dir / "step_00000020"
folder.mkdir()
(folder / "state.json").write_text("{}")
sink.artifact("checkpoint", "try-checkpoint", [folder])
sink.artifact("plots", "try plots", [picture])
sink.artifact("checkpoint", "gone", [run_dir / "gone"])
sink.close(0)
"""


def test_histograms_alerts_and_artifacts_are_in_it_too(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    mirror(run_dir, tmp_path / "home", MORE, wandb=OFFLINE)
    (file,) = wandb_files(run_dir)
    (histogram,) = [row for row in rows(file) if "Weights/decoder/_type" in row]
    assert histogram["Weights/decoder/_type"] == "histogram"
    assert histogram["Weights/decoder/values"] == [1, 2, 3]
    assert histogram["Weights/decoder/bins"] == [0.0, 0.5, 1.0, 1.5]
    assert histogram[STEP_METRIC] == 20
    (alert,) = records(file, "alert")
    assert (alert.title, alert.level) == ("gradient norm out of range", "WARN")
    (event,) = told(run_dir, "alert")
    assert (event["step"], event["text"]) == (10, alert.text)
    sent = [request.log_artifact.artifact for request in records(file, "request")] or records(file, "artifact")
    names = {(artifact.type, artifact.name): sorted(artifact.aliases) for artifact in sent}
    assert names == {
        ("checkpoint", "try-checkpoint"): ["latest", "step_00000020"],
        ("plots", "try-plots"): ["latest"],
    }
    (warning,) = told(run_dir, "warning")
    assert "gone" in warning["message"]
    assert "Weights/decoder" not in (run_dir / "metrics.jsonl").read_text()


def test_alerts_can_be_switched_off(tmp_path: Path) -> None:
    mirror(tmp_path / "run", tmp_path / "home", MORE, wandb={**OFFLINE, "alerts": False})
    assert told(tmp_path / "run", "alert") == []
    assert records(wandb_files(tmp_path / "run")[0], "alert") == []


def test_a_resumed_run_keeps_its_id_and_its_steps_rise(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    mirror(run_dir, tmp_path / "home", LOGS.replace("40, 10", "30, 10").replace("image(40", "image(20"))
    mirror(run_dir, tmp_path / "home", resume_step=0)
    first, second = wandb_files(run_dir)
    assert first.name == second.name == "run-abc123.wandb"
    assert [row[STEP_METRIC] for row in rows(first)] == [0, 10, 20, 20]  # the last is the image
    assert [row[STEP_METRIC] for row in rows(second)] == [30, 40]
    assert read_series(run_dir / "metrics.jsonl")["Training/Loss"][0].tolist() == [0, 10, 20, 30]


REWOUND = """
for step in (10, 20, 30):
    sink.log(step, {"Training/Loss": float(step)})
sink.truncate_after(10)
for step in (20, 30, 40):
    sink.log(step, {"Training/Loss": -float(step)})
sink.close(0)
"""


def test_a_run_that_went_back_sends_no_step_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    mirror(run_dir, tmp_path / "home", REWOUND, wandb=OFFLINE)
    assert [row["Training/Loss"] for row in rows(*wandb_files(run_dir))] == [10, 20, 30, -40]
    assert read_series(run_dir / "metrics.jsonl")["Training/Loss"][1].tolist() == [10, -20, -30, -40]


def test_without_resume_each_start_is_a_run_of_its_own(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for resume_step in (None, 0):
        mirror(run_dir, tmp_path / "home", resume_step=resume_step, wandb={**OFFLINE, "resume": False})
    first, second = wandb_files(run_dir)
    assert first.name != second.name
    assert [row[STEP_METRIC] for row in rows(second)] == [10, 20, 30, 40]


def test_without_wandb_the_rest_is_whole(tmp_path: Path) -> None:
    mirror(tmp_path / "run", tmp_path / "home", prelude='import sys\nsys.modules["wandb"] = None\n')
    (warning,) = told(tmp_path / "run", "warning")
    assert "it is not installed" in warning["message"]
    assert len(list(read_lines(tmp_path / "run" / "metrics.jsonl"))) == 4
    assert len(told(tmp_path / "run", "image")) == 1
    assert not (tmp_path / "run" / "wandb").exists()


CORE_KILLED = """
import time
import psutil

def core():
    return [child for child in psutil.Process().children() if "wandb-core" in " ".join(child.cmdline())]

sink.log(10, {"Training/Loss": 1.0})
while not (run_dir / "wandb" / "mirrored.json").exists():
    time.sleep(0.05)
for process in core():
    process.kill()
    process.wait()
for step in range(20, 100, 10):
    sink.log(step, {"Training/Loss": 1.0})
    time.sleep(0.1)
sink.close(0)
"""


def test_a_wandb_process_that_dies_costs_a_warning(tmp_path: Path) -> None:
    mirror(tmp_path / "run", tmp_path / "home", CORE_KILLED, wandb=OFFLINE)
    assert len(list(read_lines(tmp_path / "run" / "metrics.jsonl"))) == 9
    (warning,) = told(tmp_path / "run", "warning")
    assert "wandb is given up for this run" in warning["message"]


@pytest.mark.parametrize("mode", ["offline", "disabled", "malformed"])
def test_the_key_reaches_no_file(tmp_path: Path, mode: str) -> None:
    """With a key in the environment; "malformed" is refused by wandb itself, without any network."""
    key = CANARY if mode != "malformed" else CANARY[:12]
    environment = {"WANDB_API_KEY": key}
    if mode != "malformed":
        environment["WANDB_MODE"] = mode
    printed = mirror(tmp_path / "run", tmp_path / "home", environment=environment)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert key.encode() not in path.read_bytes(), path
        assert key not in str(path)
    assert key not in printed
    warned = "wandb is offline" in (tmp_path / "run/events.jsonl").read_text()
    assert warned == (mode == "malformed")


ONLINE = LOGS.replace("40, 10", "30, 10").replace("image(40", "image(20")


def test_online_the_address_is_told_and_two_starts_are_one_run(tmp_path: Path) -> None:
    """Against a stand-in that keeps what the real client sends: metrics, alerts, images, the report at the end."""
    run_dir, home = tmp_path / "run", tmp_path / "home"
    with wandb_server("answers") as server:
        key = {"WANDB_API_KEY": CANARY, "WANDB_BASE_URL": server.url}
        printed = mirror(run_dir, home, ONLINE, wandb={"report": True}, environment=key)
        printed += mirror(run_dir, home, resume_step=0, wandb={"report": True}, environment=key)
    assert printed.count(f"url={server.url}/team/bitmar/runs/abc123") == 2
    assert set(server.history) == {"abc123"}
    assert [row[STEP_METRIC] for row in server.history["abc123"]] == [0, 10, 20, 20, 30, 40]
    assert [row["_step"] for row in server.history["abc123"]] == list(range(6))
    assert "gradient norm out of range" in [sent["title"] for sent in server.variables("NotifyScriptableRunAlert")]
    assert any(name.startswith("media/images/Plots/Losses") for name in server.uploads)
    first, _ = server.variables("upsertView")
    charts = set(re.findall(r'"metrics":\["([^"]+)"\]', first["spec"]))
    assert charts == {metric.name for metric in SCHEMA} - {STEP_METRIC}
    told_of = [event for event in told(run_dir, "wandb") if "report" in event]
    assert len(told_of) == 2
    assert told(run_dir, "warning") == []
    assert CANARY not in printed + first["spec"]
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert CANARY.encode() not in path.read_bytes(), path


def test_offline_parts_are_synced_into_one_run(tmp_path: Path) -> None:
    run_dir, home = tmp_path / "run", tmp_path / "home"
    mirror(run_dir, home, ONLINE, wandb=OFFLINE)
    mirror(run_dir, home, resume_step=0, wandb=OFFLINE)
    (first, _) = told(run_dir, "wandb")
    program = Path(sys.executable).parent / "wandb"
    with wandb_server("answers") as server:
        environment = own_environment(home, WANDB_API_KEY=CANARY, WANDB_BASE_URL=server.url)
        command = f"{program.parent}/{first['upload_with']}"
        done = subprocess.run(
            ["bash", "-c", command], env=environment, cwd=home, capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, done.stderr
    assert [row[STEP_METRIC] for row in server.history["abc123"]] == [0, 10, 20, 20, 30, 40]


# Whole trainings


def write_run(folder: Path, shards: Path, name: str, **wandb: Any) -> Path:
    values = recipe(shards, folder / "runs", name)
    values["wandb"] = {"log_every_n_steps": 1, **wandb}
    return write_recipe(folder / f"{name}.yaml", values)


def complete(run_dir: Path) -> bool:
    """Whether metrics.jsonl has every step, and each validation."""
    lines = list(read_lines(run_dir / "metrics.jsonl"))
    trained = [line[STEP_METRIC] for line in lines if "Training/Loss" in line]
    validated = [line[STEP_METRIC] for line in lines if "Validation/Loss" in line]
    return trained == list(range(1, STEPS + 1)) and validated == list(range(0, STEPS + 1, 5))


def as_mirrored(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("time", "nonfinite") and value is not None}


def test_a_training_is_mirrored_line_by_line(tmp_path: Path, tiny_shards: Path) -> None:
    """Every key at its cadence, config and code version; checkpoints and plots where asked for."""
    path, run_dir = write_run(tmp_path, tiny_shards, "whole", offline=True, log_model_checkpoints=True), tmp_path
    run_dir = tmp_path / "runs" / "whole"
    with trainers(path, 1, extra={0: home_variables(tmp_path / "home")}) as started:
        assert started.codes() == [0], started.said(0)
    assert complete(run_dir)
    (file,) = wandb_files(run_dir)
    logged = [as_mirrored(line) for line in read_lines(run_dir / "metrics.jsonl")]
    mirrored = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows(file)]
    mirrored = [row for row in mirrored if not any(name.endswith("/_type") for name in row)]
    assert mirrored == logged
    (run,) = records(file, "run")
    assert 'key: "code"' in str(run.config)
    code = code_version(ROOT)
    assert all(str(value) in str(run.config) for value in code.values() if isinstance(value, str))
    (start,) = told(run_dir, "start")
    assert {name: start[name] for name in code} == code
    sent = [request.log_artifact.artifact for request in records(file, "request")] or records(file, "artifact")
    assert {artifact.name for artifact in sent} == {"whole-checkpoint", "whole-plots"}


@pytest.mark.slow
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
    steps = [row[STEP_METRIC] for file in files for row in rows(file)]
    assert steps == sorted(steps)
    assert steps[-1] == STEPS
    trained = [row[STEP_METRIC] for file in files for row in rows(file) if "Training/Loss" in row]
    assert len(set(trained)) == len(trained)


@pytest.mark.slow
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


HANGING = """
from bitmar.observability.wandb_sink import WandbSink, identify

class Tells:
    def event(self, kind, **fields):
        print(kind, fields)

options = WandbConfig()
mirror = WandbSink(run_dir, identify(options, "n", "id2"), {}, options, Tells(), queue_length=10)
for step in range(100_000):
    mirror.log(step, {"Training/Loss": 1.0})  # of which each would wait for the server, if one did
mirror.close(1)
sink.close(1)
import os
sys.stdout.flush()
os._exit(0)
"""


def test_training_waits_for_no_server(tmp_path: Path) -> None:
    """A server that never answers: a hundred thousand logs are taken, and a run that failed ends soon."""
    with wandb_server("hangs") as server:
        key = {"WANDB_API_KEY": CANARY, "WANDB_BASE_URL": server.url}
        printed = mirror(tmp_path / "run", tmp_path / "home", HANGING, wandb={"enabled": False}, environment=key)
    assert printed.count("does not keep up") == 1
    assert printed.count("did not finish in time") == 1


@pytest.mark.slow
def test_only_rank_0_opens_logs_plots_and_wandb(tmp_path: Path, tiny_shards: Path) -> None:
    path, run_dir = write_run(tmp_path, tiny_shards, "two", offline=True), tmp_path / "runs" / "two"
    environment = home_variables(tmp_path / "home")
    endless = ("phases.2.steps=100000", "training.max_epochs=100000")
    with trainers(path, 2, *endless, extra=dict.fromkeys(range(2), environment)) as started:
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
