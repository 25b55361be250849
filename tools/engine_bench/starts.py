"""Rows "engine start": from a process to its first step, and from the death of a rank to the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from bitmar.observability.records import EVENTS_FILE, read_lines
from shards.convert import convert
from shards.writer import Options
from tools.data_bench.records import ROOT
from tools.engine_bench.common import Bench, Row
from tools.make_demo_data import make

RECIPE = ROOT / "launch/recipes/demo.yaml"
SUPERVISOR = ROOT / "launch/supervise.py"
START_BAR_S, RESTART_BAR_S = 15.0, 30.0
GUARD_S = 600.0  # against hangs
POLL_S = 0.02
OF_A_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


def start_rows(bench: Bench) -> Iterator[Row]:
    """The demo's recipe on 2 ranks through the launcher; quick: one process, and no rank dies."""
    shards = demo_shards(bench)
    run = bench.folder / "runs" / "start"
    overrides = [f"data.shards={shards}", f"run.directory={run.parent}", "run.name=start", "checkpoint.every_steps=10"]
    if bench.quick:
        overrides += ["training.max_steps=1", "training.max_epochs=1000", "validation.max_samples=32"]
        command = [sys.executable, "-m", "bitmar.train", "--config", str(RECIPE), *overrides]
    else:
        command = ["bash", "launch/local.sh", str(RECIPE), "2", *overrides]
        if SUPERVISOR.is_file():
            command = [sys.executable, str(SUPERVISOR), "--", *command]
    log = (bench.folder / "start.log").open("wb")
    began = time.time()
    process = start(command, log)
    try:
        event = wait_for(run, "started", 1, process)
        yield start_row(event, began, bench.quick)
        if not bench.quick:
            wait_for(run, "checkpoint", 1, process)
            yield restart_row(run, process, command, log)
    finally:
        stop(process)
        log.close()


def demo_shards(bench: Bench) -> Path:
    """What launch/demo.sh makes, or less of it."""
    raw, shards = bench.folder / "demo_raw", bench.folder / "demo_shards"
    images, words = (100, 6_000) if bench.quick else (4000, 150_000)
    make(raw, seed=0, images=images, words=words)
    vocabulary = yaml.safe_load(RECIPE.read_text())["model"]["vocab_size"]
    convert(raw, shards, Options(vocab_size=vocabulary), force=False, report=lambda *_: None)
    return shards


def start_row(event: dict[str, Any], began: float, quick: bool) -> Row:
    """A rank's own time, by what it went into, and the launcher's before it."""
    parts = {name: value for name, value in event.items() if name not in ("time", "kind", "step", "seconds")}
    seconds = event["seconds"]
    return {
        "name": f"engine start: a rank's process to its first step (demo, {'1 rank' if quick else '2 ranks'})",
        "ours": seconds,
        "theirs": None,
        "value": seconds,
        "unit": "s",
        "bar": f"<= {START_BAR_S:g}",
        "ok": seconds <= START_BAR_S,
        "parts": parts,
        "launcher": round(event["time"] - began - seconds, 3),
    }


def restart_row(run: Path, process: subprocess.Popen[bytes], command: Sequence[str], log: Any) -> Row:
    """Kill a rank; the supervisor, or this program where there is none, starts the same command again."""
    rank = ranks_of(process.pid)[-1]
    began = time.time()
    rank.kill()
    again = process
    if not SUPERVISOR.is_file():
        process.wait(GUARD_S)
        again = start(command, log)
    try:
        event = wait_for(run, "started", 2, again)
    finally:
        if again is not process:
            stop(again)
    seconds = round(event["time"] - began, 2)
    by = "launch/supervise.py" if SUPERVISOR.is_file() else "the same command, started again at once"
    return {
        "name": f"engine start: kill -9 of a rank to the first new step (demo, 2 ranks, {by})",
        "ours": seconds,
        "theirs": None,
        "value": seconds,
        "unit": "s",
        "bar": f"<= {RESTART_BAR_S:g}",
        "ok": seconds <= RESTART_BAR_S,
        "of_the_new_rank": event["seconds"],
    }


def start(command: Sequence[str], log: Any) -> subprocess.Popen[bytes]:
    """In a session of its own, so that all of it can be ended, and in no group that this process is in."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
    return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True, env=environment)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a command as a person's Ctrl-C in its terminal would, then whatever is left of it."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        if child.is_running():
            child.kill()


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The ranks below a launcher's process."""
    below = psutil.Process(launcher).children(recursive=True)
    return [child for child in below if any(word.startswith("--local_rank") for word in child.cmdline())]


def wait_for(run: Path, kind: str, count: int, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The `count`-th event of a kind in a run's log."""
    until = time.monotonic() + GUARD_S
    while time.monotonic() < until:
        path = run / EVENTS_FILE
        found = [line for line in read_lines(path) if line["kind"] == kind] if path.is_file() else []
        if len(found) >= count:
            return found[count - 1]
        if process.poll() not in (None, 0):
            break
        time.sleep(POLL_S)
    raise RuntimeError(f"{run} has logged no {kind!r} ({process.args}: exit code {process.poll()})")
