"""DeepSpeed's real launcher with 2 ranks, through the scripts a person runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import processes_of, shell_environment, wait_for
from tests.support.runs import ROOT, heed_interrupts, metrics, newest, recipe, write_recipe

pytestmark = pytest.mark.slow

END_WITHIN_S = 60.0  # a guard against a hang


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / name), *arguments]
    env = shell_environment(**environment)
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


def test_local_run_on_two_ranks(tmp_path: Path, tiny_shards: Path) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", recipe(tiny_shards, tmp_path / "runs", "launched"))
    done = script("local.sh", str(path), "2", "training.max_steps=6", "wandb.enabled=true", "wandb.offline=true")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "launched"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 6
    assert "2 rank(s)" in done.stdout
    assert "step 6/6" in done.stdout
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert newest(run).name == "step_00000006"
    assert [line["Training/Step"] for line in metrics(run) if "Training/Loss" in line] == [1, 2, 3, 4, 5, 6]
    noise = [text for text in ("FutureWarning", "[INFO]", "Traceback") if text in done.stdout + done.stderr]
    assert noise == []
    assert wait_for(lambda: not processes_of(str(tmp_path)), END_WITHIN_S)


def test_a_mistake_is_told_once_through_the_launcher(tmp_path: Path, tiny_shards: Path) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", recipe(tiny_shards, tmp_path / "runs", "bad"))
    done = script("local.sh", str(path), "2", "training.globl_batch=16")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line] == [
        "error: unknown key training.globl_batch; did you mean global_batch?"
    ]
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("ended_by", "code", "told"),
    [
        (signal.SIGINT, 130, "stopped; the same command goes on from the last checkpoint"),
        (signal.SIGTERM, 75, "stopped: asked to by a signal; the same command goes on from the last checkpoint"),
    ],
    ids=["Ctrl-C", "TERM"],
)
def test_a_stopped_run_leaves_no_rank(
    ended_by: signal.Signals, code: int, told: str, tmp_path: Path, tiny_shards: Path
) -> None:
    values = recipe(tiny_shards, tmp_path / "runs", "stopped")
    values["phases"][2]["steps"] = 100_000
    values["training"]["max_epochs"] = 100_000
    path = write_recipe(tmp_path / "tiny.yaml", values)
    command = ["bash", str(ROOT / "launch" / "local.sh"), str(path), "2"]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=said,
            cwd=ROOT,
            env=shell_environment(),
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
    try:
        log = tmp_path / "runs" / "stopped" / "metrics.jsonl"
        assert wait_for(lambda: log.is_file() and log.stat().st_size > 2000, 300)
        assert len(processes_of(str(path))) >= 2
        process.send_signal(ended_by)
        assert process.wait(END_WITHIN_S) == code
        assert wait_for(lambda: not processes_of(str(path)), END_WITHIN_S)
    finally:
        for left in processes_of(str(path)):
            left.kill()
    text = (tmp_path / "said").read_text()
    assert told in text
    assert "Traceback" not in text


@pytest.fixture
def own_raw(tmp_path: Path, tiny_raw: Path) -> Iterator[Path]:
    """Raw files under a name of this test's own, for the demo puts shards into data/ by that name."""
    link = tmp_path / f"test-{os.getpid()}"
    link.symlink_to(tiny_raw)
    yield link
    shutil.rmtree(ROOT / "data" / link.name, ignore_errors=True)


def test_demo_closes_with_the_numbers_of_the_summary(tmp_path: Path, own_raw: Path) -> None:
    """With RAW, few steps and a run of its own; a second start trains nothing and prints the same."""
    lengths = [f"phases.{phase}.steps=2" for phase in range(3)]
    few = [*lengths, "validation.max_samples=32", "training.global_batch=32", "training.micro_batch=16"]
    overrides = [*few, f"run.directory={tmp_path}", "training.precision=fp32", "engine.threads_per_rank=1"]
    environment = {"RAW": str(own_raw), "NAME": "short", "WANDB_MODE": "offline"}
    done = script("demo.sh", *overrides, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    closing = done.stdout[done.stdout.index("== result") :]
    summary = json.loads((tmp_path / "short" / "summary.json").read_text())
    for key in ("loss_initial", "loss_final", "loss_shuffled_vision"):
        assert f"{summary[key]:.4f}" in closing
    for name in ("log.txt", "plots", "checkpoints/step_00000006", "wandb"):
        assert str(tmp_path / "short" / name) in closing
        assert (tmp_path / "short" / name).exists()
    assert "GENERATED" in closing  # the set of this test is, and says so itself
    lines = (tmp_path / "short" / "metrics.jsonl").read_text()
    again = script("demo.sh", *overrides, **environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout[again.stdout.index("== result") :] == closing
    assert (tmp_path / "short" / "metrics.jsonl").read_text() == lines


def test_show_run_refuses_a_run_that_did_not_end(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "show_run.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
