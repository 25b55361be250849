"""DeepSpeed's real launcher, ended in every way: no process of the run is left, and what was trained is saved."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from bitmar.engine.faults import HUNG
from bitmar.engine.launcher import INNER
from bitmar.engine.world import free_port
from bitmar.observability.records import EVENTS_FILE, METRICS_FILE, read_lines
from tests.support.processes import shell_environment, wait_for
from tests.support.runs import ROOT, heed_interrupts, newest, recipe, write_recipe

pytestmark = pytest.mark.slow

GONE_WITHIN_S = 10.0  # the promise: nothing of a run lives longer than this after its launcher has ended


class Launched:
    """A run of two ranks through `deepspeed`, which goes on for ever."""

    def __init__(self, folder: Path, shards: Path, *overrides: str) -> None:
        values = recipe(shards, folder / "runs", "launched")
        values["phases"][2]["steps"] = 100_000
        values["training"]["max_epochs"] = 100_000
        self.recipe = write_recipe(folder / "launched.yaml", values)
        self.run = folder / "runs" / "launched"
        self.output = folder / "said"
        program = Path(sys.executable).parent / "deepspeed"
        options = ["--log_level", "critical", "--num_accelerators", "2", "--master_port", str(free_port())]
        command = [program, *options, "--module", "bitmar.train", "--config", self.recipe, *overrides]
        with self.output.open("wb") as said:
            self.runner = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env=shell_environment(DS_ACCELERATOR="cpu"),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
                preexec_fn=heed_interrupts,
            )

    def processes(self) -> list[psutil.Process]:
        """Living processes of the run: launchers, ranks and what they started carry the recipe's path."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = process.info["cmdline"] or []
            if str(self.recipe) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        inner = self.inner()
        ranks = [process for process in self.processes() if process.ppid() == inner.pid]
        return {int(process.environ()["RANK"]): process for process in ranks}

    def inner(self) -> psutil.Process:
        (inner,) = [process for process in self.processes() if INNER in process.cmdline()]
        return inner

    def trains(self) -> bool:
        log = self.run / METRICS_FILE
        return log.is_file() and log.read_bytes().count(b"\n") >= 8

    def events(self, kind: str) -> list[dict[str, object]]:
        return [line for line in read_lines(self.run / EVENTS_FILE) if line["kind"] == kind]


@contextmanager
def launched(folder: Path, shards: Path, *overrides: str) -> Iterator[Launched]:
    started = Launched(folder, shards, *overrides)
    try:
        assert wait_for(started.trains, 300), started.output.read_text()
        yield started
    finally:
        for left in started.processes():
            left.kill()
        started.runner.wait()


@pytest.mark.parametrize("killed", ["runner", "inner"])
def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path, tiny_shards: Path, killed: str) -> None:
    """Also where a rank is stopped at that moment, and can neither look nor save before it is woken."""
    with launched(tmp_path, tiny_shards) as started:
        assert set(started.ranks()) == {0, 1}
        started.ranks()[1].suspend()
        (started.runner if killed == "runner" else started.inner()).send_signal(signal.SIGKILL)
        started.runner.wait(60)
        until = time.monotonic() + GONE_WITHIN_S
        assert wait_for(lambda: not started.processes(), until - time.monotonic()), started.processes()
        (stopped,) = started.events("stopped")
        assert stopped["reason"] == "the launcher has gone"
        assert newest(started.run).name == f"step_{stopped['step']:08d}"


def test_a_signal_to_the_inner_launcher_saves_in_time(tmp_path: Path, tiny_shards: Path) -> None:
    """It reaches rank 1 only when rank 0 has ended; DeepSpeed's own exit code is then 1, so the event tells."""
    with launched(tmp_path, tiny_shards) as started:
        started.inner().send_signal(signal.SIGTERM)
        assert started.runner.wait(60) == 1
        assert wait_for(lambda: not started.processes(), GONE_WITHIN_S), started.processes()
        (stopped,) = started.events("stopped")
        assert newest(started.run).name == f"step_{stopped['step']:08d}"


def test_a_stopped_rank_ends_the_run_with_the_watchdogs_code(tmp_path: Path, tiny_shards: Path) -> None:
    with launched(tmp_path, tiny_shards, "faults.hang_timeout_s=10") as started:
        started.ranks()[1].suspend()
        assert started.runner.wait(180) == HUNG, started.output.read_text()
        assert wait_for(lambda: not started.processes(), GONE_WITHIN_S), started.processes()
        text = started.output.read_text()
        assert "rank 1 does not answer" in text
        assert "Traceback" not in text
        assert "train.py" in (started.run / "hangs" / "rank_0.txt").read_text()
        (alert,) = [event for event in started.events("alert") if event["title"] == "the run hangs and is ended"]
        assert "rank 1 does not answer" in str(alert["text"])
