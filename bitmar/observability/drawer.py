"""The process that draws a run's pictures (bitmar/observability/plots.py), as the trainer keeps it.

It is started with the first drawing and stays, asleep, until the run ends: its imports are a second of a core that
training wants. It gets what training leaves of the cores.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Drawer:
    """Draws for one thread; `kill` may come from another."""

    def __init__(self, run_dir: Path) -> None:
        """Raises OSError where the process cannot be started."""
        command = ["nice", "-n", "19", sys.executable, "-m", "bitmar.observability.plots", str(run_dir)]
        command += ["--serve", "--parent", str(os.getpid())]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=self._said, text=True)
        except OSError:
            self._said.close()
            raise
        yield_cores(self._process.pid)  # before its imports

    @property
    def works(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def draw(self, folders: Sequence[str], within_s: float) -> tuple[list[Path], str]:
        """The pictures of these folders that were drawn, and what went wrong: empty, or the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        said, told, expired = self._said.seek(0, os.SEEK_END), list[Path](), threading.Event()

        def end() -> None:
            expired.set()
            self._process.kill()

        late = threading.Timer(within_s, end)
        late.daemon = True
        late.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and has said why
                print(*folders, file=self._process.stdin, flush=True)
            for line in self._process.stdout:
                if line == "\n":
                    return told, ""
                told.append(Path(line.rstrip("\n")))
            code = self._process.wait()
        finally:
            late.cancel()
        if expired.is_set():
            return told, f"not drawn within {within_s:g} s"
        self._said.seek(said)
        return told, self._said.read().strip().split("\n")[-1] or f"exit code {code}"

    def kill(self) -> None:
        """End it in the middle of what it does."""
        self._process.kill()

    def close(self, within_s: float) -> None:
        """End it, which draws nothing."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


def yield_cores(pid: int) -> None:
    """Have a process run only where no other one wants its core: training, which waits for its slowest rank, does.

    Where the system has no such class, or a container refuses it, the low priority that it was started with remains.
    """
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
