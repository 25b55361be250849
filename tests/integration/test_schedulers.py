"""Schedulers: launch/slurm.sbatch with stand-ins for the cluster's srun and scontrol, and torchrun; ranks are real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT, metrics, newest, recipe, write_recipe

SRUN = """#!/usr/bin/env bash
# starts the tasks of one node as Slurm does, and ends with the largest exit code
[ -z "${SRUN_CODE:-}" ] || exit "$SRUN_CODE"
while [[ $1 = --* ]]; do shift; done
tasks=() code=0
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_TASKS_PER_NODE=2 "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || { c=$?; [ $c -le $code ] || code=$c; }; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) echo 127.0.0.1 ;;
    *) echo "$@" >>"$ASKED" ;;
esac
"""


def sbatch(folder: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """(the job, what it asked of scontrol)."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    asked = folder / "asked"
    asked.write_text("")
    job = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node1", "SLURM_SUBMIT_DIR": str(ROOT)}
    environment = dict(os.environ) | job | {"PATH": f"{programs}:{os.environ['PATH']}", "ASKED": str(asked)}
    script = folder / "job" / "slurm_script"  # as Slurm does: a copy, elsewhere
    script.parent.mkdir(exist_ok=True)
    script.write_text((ROOT / "launch/slurm.sbatch").read_text())
    command = ["bash", str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment | variables)
    return done, asked.read_text()


@pytest.mark.slow
def test_two_tasks_train_and_the_job_ends(tmp_path: Path, tiny_shards: Path) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", recipe(tiny_shards, tmp_path / "runs", "slurm"))
    done, asked = sbatch(tmp_path, str(path), "training.max_steps=2", "run.name=two words")
    assert done.returncode == 0, done.stderr
    assert "2 rank(s)" in done.stdout
    assert [line["Training/Step"] for line in metrics(tmp_path / "runs" / "two words") if "Training/Loss" in line] == [
        1,
        2,
    ]
    assert asked == ""


@pytest.mark.parametrize(
    ("code", "restarts", "asked"),
    [
        ("75", "0", "requeue 4711\n"),
        ("75", "500", "requeue 4711\n"),
        ("1", "19", "requeue 4711\n"),
        ("1", "20", ""),
        ("2", "0", ""),
    ],
)
def test_what_is_queued_again(code: str, restarts: str, asked: str, tmp_path: Path) -> None:
    done, said = sbatch(tmp_path, "demo", SRUN_CODE=code, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == int(code), done.stderr
    assert said == asked


@pytest.mark.slow
def test_torchrun_starts_a_run_as_it_is(tmp_path: Path, tiny_shards: Path) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", recipe(tiny_shards, tmp_path / "runs", "elastic"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "bitmar.train", "--config", str(path), "training.max_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "2 rank(s)" in done.stdout
    assert newest(tmp_path / "runs" / "elastic").name == "step_00000001"
