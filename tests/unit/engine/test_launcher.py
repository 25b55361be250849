"""Which processes above a rank are its launcher's, and that the end of any is seen: with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from bitmar.engine.launcher import BY_DEEPSPEED, OUTER_PID, Launchers
from tests.support.processes import shell_environment, wait_for
from tests.support.runs import ROOT

RANK = """
import os, sys, time
from bitmar.engine.launcher import Launchers
launchers = Launchers()
out = open(sys.argv[1], "w", buffering=1)
print(os.getpid(), *(process.pid for process in launchers.processes), file=out)
while launchers.gone() is None:
    time.sleep(0.05)
print("gone", file=out)
"""
STARTS = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"


@pytest.fixture
def rank(tmp_path: Path) -> list[str]:
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    return [sys.executable, str(tmp_path / "rank.py"), str(tmp_path / "said")]


def program(folder: Path, name: str) -> list[str]:
    """A launcher of that name that runs its arguments."""
    (folder / name).write_text(STARTS)
    return [sys.executable, str(folder / name)]


def module(folder: Path, name: str) -> list[str]:
    """As `python -m NAME` looks in a list of processes."""
    (folder / "starts.py").write_text(STARTS.replace("argv[1:]", "argv[3:]"))
    return [sys.executable, str(folder / "starts.py"), "-m", name]


def lines(tmp_path: Path) -> list[str]:
    said = tmp_path / "said"
    return said.read_text().splitlines() if said.exists() else []


@pytest.mark.parametrize("killed", ["runner", "inner"])
def test_the_end_of_either_launcher_is_seen_and_a_shell_is_none(tmp_path: Path, rank: list[str], killed: str) -> None:
    """shell -> deepspeed -> python -m deepspeed.launcher.launch -> rank."""
    tree = [*program(tmp_path, "deepspeed"), *module(tmp_path, "deepspeed.launcher.launch"), *rank]
    shell = subprocess.Popen(
        ["bash", "-c", '"$@"; true', "bash", *tree], cwd=ROOT, env=shell_environment(PYTHONPATH=str(ROOT))
    )
    try:
        assert wait_for(lambda: len(lines(tmp_path)) == 1)
        pid, *watched = map(int, lines(tmp_path)[0].split())
        inner, runner = psutil.Process(pid).parent(), psutil.Process(pid).parents()[1]
        assert inner is not None
        assert watched == [inner.pid, runner.pid]
        assert runner.ppid() == shell.pid
        os.kill({"runner": runner, "inner": inner}[killed].pid, signal.SIGKILL)
        assert wait_for(lambda: lines(tmp_path)[-1] == "gone")
    finally:
        for child in psutil.Process(shell.pid).children(recursive=True) if shell.poll() is None else []:
            child.kill()
        shell.kill()
        shell.wait()


def test_a_script_above_names_itself(tmp_path: Path, rank: list[str]) -> None:
    script = subprocess.Popen(["sleep", "600"])
    started = subprocess.Popen(
        rank, cwd=ROOT, env=shell_environment(PYTHONPATH=str(ROOT)) | {OUTER_PID: str(script.pid)}
    )
    try:
        assert wait_for(lambda: len(lines(tmp_path)) == 1)
        assert lines(tmp_path)[0].split()[1:] == [str(script.pid)]
        script.kill()  # not reaped: a zombie has ended too
        assert started.wait(60) == 0
        assert lines(tmp_path)[-1] == "gone"
    finally:
        started.kill()
        started.wait()
        script.kill()
        script.wait()


def test_a_rank_that_deepspeed_started_and_left_knows_it() -> None:
    gone = Launchers({BY_DEEPSPEED: "0"}).gone()
    assert gone is not None
    assert "DeepSpeed" in gone


def test_a_rank_without_a_launcher_watches_none() -> None:
    alone = Launchers({})
    assert alone.processes == []
    assert alone.gone() is None
