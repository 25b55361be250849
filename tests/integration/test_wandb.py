"""The mirror in wandb: real offline runs read back, useless servers, kills, and what must never be written."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from matplotlib.image import imread

from bitmar.observability.records import read_lines
from bitmar.observability.run_folder import read_series
from bitmar.observability.schema import SCHEMA, STEP_METRIC
from bitmar.observability.schema import charts as charts_of
from tests.support.mirror import CANARY, LOGS, mirror, own_environment, records, rows, told, wandb_files
from tests.support.processes import wait_for
from tests.support.runs import run_tool
from tools.observability_bench.wandb_server import Useless, wandb_server

OFFLINE = {"offline": True}


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
    assert [image[f"Plots/Losses/{key}"] for key in ("width", "height", "format")] == [2, 2, "png"]
    assert imread(file.parent / "files" / image["Plots/Losses/path"]).shape == (2, 2)

    assert any(axis.glob_name == "*" and axis.step_metric == STEP_METRIC for axis in records(file, "metric"))
    assert len(records(file, "exit")) == 1
    (event,) = told(run_dir, "wandb")
    assert event["upload_with"] == f"wandb sync {run_dir}/wandb/offline-run-*-abc123"
    assert told(run_dir, "warning") == []


def test_a_picture_is_not_unpacked_on_its_way(tmp_path: Path) -> None:
    """Its size stands at its beginning: one that is torn behind that is sent as well."""
    script = "picture.write_bytes(picture.read_bytes()[:45]); sink.image(10, 'Plots/Losses', picture); sink.close(0)"
    mirror(tmp_path / "run", tmp_path / "home", script=script)
    (file,) = wandb_files(tmp_path / "run")
    (image,) = rows(file)
    assert [image[f"Plots/Losses/{key}"] for key in ("width", "height")] == [2, 2]
    assert told(tmp_path / "run", "warning") == []


@pytest.mark.slow
def test_a_picture_that_is_ready_late_is_shown_at_the_newest_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    mirror(run_dir, tmp_path / "home", LOGS.replace("image(40", "image(10"), wandb=OFFLINE)
    (file,) = wandb_files(run_dir)
    assert [row[STEP_METRIC] for row in rows(file) if "Plots/Losses/_type" in row] == [30]
    assert [event["step"] for event in told(run_dir, "image")] == [10]


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


@pytest.mark.slow
def test_alerts_can_be_switched_off(tmp_path: Path) -> None:
    mirror(tmp_path / "run", tmp_path / "home", MORE, wandb={**OFFLINE, "alerts": False})
    assert told(tmp_path / "run", "alert") == []
    assert records(wandb_files(tmp_path / "run")[0], "alert") == []


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_that_went_back_sends_no_step_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    mirror(run_dir, tmp_path / "home", REWOUND, wandb=OFFLINE)
    assert [row["Training/Loss"] for row in rows(*wandb_files(run_dir))] == [10, 20, 30, -40]
    assert read_series(run_dir / "metrics.jsonl")["Training/Loss"][1].tolist() == [10, -20, -30, -40]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_wandb_process_that_dies_costs_a_warning(tmp_path: Path) -> None:
    mirror(tmp_path / "run", tmp_path / "home", CORE_KILLED, wandb=OFFLINE)
    assert len(list(read_lines(tmp_path / "run" / "metrics.jsonl"))) == 9
    (warning,) = told(tmp_path / "run", "warning")
    assert "wandb is given up for this run" in warning["message"]


KILLED = """
import os, signal, time
for step in range(10, 60, 10):
    sink.log(step, {"Training/Loss": float(step)})
mark = run_dir / "wandb" / "mirrored.json"
while not mark.exists() or json.loads(mark.read_text())["step"] < 50:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_of_a_killed_run_wandb_writes_what_it_was_sent(tmp_path: Path) -> None:
    """All but the last log, which was on its way."""
    mirror(tmp_path / "run", tmp_path / "home", KILLED, wandb=OFFLINE, code=-signal.SIGKILL)
    (file,) = wandb_files(tmp_path / "run")
    assert wait_for(lambda: [row[STEP_METRIC] for row in rows(file, killed=True)][:4] == [10, 20, 30, 40])


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


@pytest.mark.slow
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
    assert charts == {metric.name for metric, pattern in charts_of() if pattern is None} - {STEP_METRIC}
    told_of = [event for event in told(run_dir, "wandb") if "report" in event]
    assert len(told_of) == 2
    assert told(run_dir, "warning") == []
    assert CANARY not in printed + first["spec"]
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert CANARY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_a_report_of_a_run_that_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with wandb_server("answers") as server:
        for name, value in own_environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WANDB_API_KEY", CANARY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        done = run_tool("wandb_workspace.py", "team/bitmar", "--report", "abc123", "--name", "synced later")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(server.url)
    sent = server.variables("upsertView")[0]
    assert "BitMar: synced later" in str(sent)
    assert all(text in sent["spec"] for text in ("abc123", '"Plots/losses"', "^Attention/Encoder_layer_.+_Entropy$"))
    assert CANARY not in done.stdout + done.stderr + str(sent)


@pytest.mark.slow
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


HANGING = """
from bitmar.observability.wandb_identity import identify
from bitmar.observability.wandb_sink import WandbSink

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


@pytest.mark.slow
def test_training_waits_for_no_server(tmp_path: Path) -> None:
    """A server that never answers: a hundred thousand logs are taken, and a run that failed ends soon."""
    with wandb_server("hangs") as server:
        key = {"WANDB_API_KEY": CANARY, "WANDB_BASE_URL": server.url}
        printed = mirror(tmp_path / "run", tmp_path / "home", HANGING, wandb={"enabled": False}, environment=key)
    assert printed.count("does not keep up") == 1
    assert printed.count("did not finish in time") == 1


TURNED = """
import itertools, time
from bitmar.engine.world import leave

for step in itertools.count(1):
    sink.log(step, {"Training/Loss": 1.0})
    if (run_dir / "turned").exists():
        break
    time.sleep(0.1)
for later in range(step + 1, step + 21):
    sink.log(later, {"Training/Loss": 1.0})
    time.sleep(0.1)
sink.close(0)
leave(0)
"""


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["hangs", "closed", "500"])
def test_a_server_that_turns_bad_costs_a_warning(tmp_path: Path, kind: Useless) -> None:
    """Once it has taken logs; wandb by itself would try for hours. What was not sent is in the run's .wandb file."""
    run_dir = tmp_path / "run"
    with wandb_server("answers") as server, ThreadPoolExecutor() as pool:
        key = {"WANDB_API_KEY": CANARY, "WANDB_BASE_URL": server.url}
        logged = pool.submit(mirror, run_dir, tmp_path / "home", TURNED, environment=key)
        assert wait_for(lambda: any(list(server.history.values())))
        server.turn(kind)
        (run_dir / "turned").touch()
        logged.result()
    steps = [line[STEP_METRIC] for line in read_lines(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(server.history["abc123"]) + 20 <= len(steps)
    (file,) = run_dir.glob("wandb/run-*/*.wandb")
    assert [row[STEP_METRIC] for row in rows(file, killed=True)] == steps
    (warning,) = told(run_dir, "warning")
    assert "wandb is given up for this run" in warning["message"]
