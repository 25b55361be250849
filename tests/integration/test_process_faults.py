"""Ranks that are killed, stopped or asked to stop, as real processes without a launcher."""

from __future__ import annotations

import json
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from bitmar.engine.faults import HUNG, STOPPED
from bitmar.observability.records import EVENTS_FILE, METRICS_FILE, read_lines
from tests.support.processes import wait_for
from tests.support.runs import (
    cannot_run,
    checkpoint_progress,
    checkpoint_tensors,
    differing,
    metrics,
    newest,
    recipe,
    write_recipe,
)
from tests.support.trainers import trainers

pytestmark = pytest.mark.slow

ENDLESS = ["phases.2.steps=100000", "training.max_epochs=100000"]
HANG = [*ENDLESS, "faults.hang_timeout_s=10"]


def recipe_of(folder: Path, shards: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_recipe(folder / f"{name}.yaml", recipe(shards, folder / "runs", name))


def trains(run: Path, lines: int = 4) -> bool:
    """Whether the run has logged so many lines."""
    log = run / METRICS_FILE
    return log.is_file() and log.read_bytes().count(b"\n") >= lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> tuple[Path, float]:
    """(the run's folder, seconds from its first event to its last)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with trainers(recipe_of(folder, tiny_shards, "straight"), 2) as started:
        assert started.codes() == [0, 0], started.said(0) + started.said(1)
    run = folder / "runs" / "straight"
    times = [line["time"] for line in read_lines(run / EVENTS_FILE)]
    return run, times[-1] - times[0]


def losses(run: Path) -> list[dict[str, Any]]:
    """What the log says of losses and norms, whatever was logged when."""
    wanted = ("Training/Step", "Training/Loss", "Training/Loss_LM", "Gradients/Total_Norm", "Validation/Loss")
    return [{k: v for k, v in line.items() if k in wanted} for line in metrics(run)]


def assert_same_end(run: Path, expected: Path) -> None:
    assert newest(run).name == newest(expected).name
    assert differing(checkpoint_tensors(newest(run)), checkpoint_tensors(newest(expected))) == []
    assert checkpoint_progress(newest(run)) == checkpoint_progress(newest(expected))
    assert losses(run) == losses(expected)
    assert json.loads((run / "summary.json").read_text())["step"] > 0


@pytest.mark.parametrize("number", [*range(3), *(pytest.param(n, marks=pytest.mark.soak) for n in range(3, 20))])
def test_a_rank_killed_at_any_moment_changes_no_bit_of_the_end(
    undisturbed: tuple[Path, float], tmp_path: Path, tiny_shards: Path, number: int
) -> None:
    straight, seconds = undisturbed
    path, run = recipe_of(tmp_path, tiny_shards, "killed"), tmp_path / "runs" / "killed"
    chance = random.Random(number)
    victim, moment = chance.randrange(2), chance.uniform(0, seconds)
    with trainers(path, 2) as started:
        assert wait_for(lambda: (run / EVENTS_FILE).is_file() and (run / EVENTS_FILE).stat().st_size > 0)
        time.sleep(moment)
        started.signal(victim, signal.SIGKILL)
        codes = started.codes()
        if codes != [0, 0]:  # the victim may have ended a moment before
            other = 1 - victim
            assert codes[victim] in (-signal.SIGKILL, 0)
            assert codes[other] in (0, 1), started.said(other)
            assert "Traceback" not in started.said(other), started.said(other)
            if codes[other] == 1:
                assert ["another rank has gone" in line for line in started.errors(other)] == [True]
    with trainers(path, 2) as started:
        assert started.codes() == [0, 0], started.said(0) + started.said(1)
    assert_same_end(run, straight)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.soak)], ids=lambda number: number.name
)
def test_a_signal_to_one_rank_saves_and_ends_both(
    undisturbed: tuple[Path, float], tmp_path: Path, tiny_shards: Path, number: signal.Signals
) -> None:
    path, run = recipe_of(tmp_path, tiny_shards, "stopped"), tmp_path / "runs" / "stopped"
    with trainers(path, 2) as started:
        assert wait_for(lambda: trains(run))
        started.signal(1 if number is signal.SIGTERM else 0, number)
        assert started.codes() == [STOPPED, STOPPED], started.said(0) + started.said(1)
        assert "stopped: asked to by a signal; the same command goes on" in started.said(0)
    (stopped,) = [line for line in read_lines(run / EVENTS_FILE) if line["kind"] == "stopped"]
    assert newest(run).name == f"step_{stopped['step']:08d}"
    assert not (run / "summary.json").exists()
    with trainers(path, 2) as started:
        assert started.codes() == [0, 0], started.said(0) + started.said(1)
    assert_same_end(run, undisturbed[0])


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.soak)])  # test_launcher_faults.py has 1
def test_a_rank_that_is_stopped_is_named_and_the_run_ends(tmp_path: Path, tiny_shards: Path, victim: int) -> None:
    path, run = recipe_of(tmp_path, tiny_shards, "hung"), tmp_path / "runs" / "hung"
    other = 1 - victim
    with trainers(path, 2, *HANG) as started:
        assert wait_for(lambda: trains(run))
        started.signal(victim, signal.SIGSTOP)
        assert started.processes[other].wait(120) == HUNG, started.said(other)
        (line,) = started.errors(other)
        assert f"rank {victim}" in line.split(";")[1]
        assert "does not answer" in line
    stacks = (run / "hangs" / f"rank_{other}.txt").read_text()
    assert "train.py" in stacks
    assert "most recent call first" in stacks
    assert f"rank {victim}" in stacks.splitlines()[-1]
    assert not (run / "hangs" / f"rank_{victim}.txt").exists()


@pytest.mark.soak
def test_a_rank_stopped_for_less_than_the_limit_goes_on(tmp_path: Path, tiny_shards: Path) -> None:
    path, run = recipe_of(tmp_path, tiny_shards, "paused"), tmp_path / "runs" / "paused"
    with trainers(path, 2, "faults.hang_timeout_s=20") as started:
        assert wait_for(lambda: trains(run, 2))
        for rank in (0, 1):
            started.signal(rank, signal.SIGSTOP)
        time.sleep(2)
        for rank in (0, 1):
            started.signal(rank, signal.SIGCONT)
        assert started.codes() == [0, 0], started.said(0) + started.said(1)
    assert not (run / "hangs").exists()


def test_a_port_in_use_is_one_line(tmp_path: Path, tiny_shards: Path) -> None:
    path = recipe_of(tmp_path, tiny_shards, "port")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with trainers(path, 2, port=port) as started:
            assert started.processes[0].wait(120) == 2
            expected = f"error: port {port} is in use on this host; give deepspeed another --master_port"
            assert started.errors(0) == [expected]
            assert "Traceback" not in started.said(0)


def test_ranks_whose_clocks_are_a_day_apart_change_no_bit(
    undisturbed: tuple[Path, float], tmp_path: Path, tiny_shards: Path
) -> None:
    """As on hosts whose clocks differ: libfaketime moves the wall clock of one rank's process."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        cannot_run("libfaketime is missing (apt-get install faketime)")
    skewed = {"LD_PRELOAD": str(library), "FAKETIME": "+1d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    path, run = recipe_of(tmp_path, tiny_shards, "skewed"), tmp_path / "runs" / "skewed"
    with trainers(path, 2, "faults.hang_timeout_s=60", extra={1: skewed}) as started:
        assert started.codes() == [0, 0], started.said(0) + started.said(1)
    assert_same_end(run, undisturbed[0])
