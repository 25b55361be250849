"""The processes that started this rank. A rank whose launcher has gone must end, however the launcher ended.

DeepSpeed's runner starts one inner launcher a node (itself, or over ssh), which starts the ranks. Killing either can
leave ranks alive that hold the port. The user's shell is none of them: a run may outlive the shell that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

# The pid of a script above these launchers, on rank 0's host, whose end is the run's as well.
OUTER_PID = "BITMAR_LAUNCHER_PID"
BY_DEEPSPEED = "CROSS_RANK"  # what DeepSpeed's inner launcher alone sets
INNER = "deepspeed.launcher.launch"
MODULES = (INNER, "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch")
PROGRAMS = ("deepspeed", "ds", "torchrun")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
REAPERS = ("systemd", "init")  # who takes in processes whose parent has gone


class Launchers:
    """The launcher's processes above this one, as they were when this was made."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._gone: str | None = None
        self.processes: list[psutil.Process] = []
        try:
            above = psutil.Process().parents()
            self.processes, self._gone = _chain(above, environment)
        except psutil.NoSuchProcess as error:
            self._gone = f"process {error.pid} above this rank"
        outer = environment.get(OUTER_PID, "")
        if outer.isdigit():
            try:
                self.processes.append(psutil.Process(int(outer)))
            except psutil.NoSuchProcess:
                self._gone = f"{OUTER_PID} {outer}"

    def wake(self) -> None:
        """Let this rank and the others of its launcher run on where they are stopped, so that they can end."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self.processes[0].children() if self.processes else []:
                process.send_signal(signal.SIGCONT)

    def gone(self) -> str | None:
        """Which of the launcher's processes has ended, None while all live."""
        for process in self.processes:
            if self._gone is None and not _lives(process):
                self._gone = f"launcher process {process.pid}"
        return self._gone


def wake_when_orphaned() -> None:
    """Have the kernel let this process run on, should it be stopped, when its parent ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


def _chain(above: Sequence[psutil.Process], environment: Mapping[str, str]) -> tuple[list[psutil.Process], str | None]:
    """The ancestors to watch, nearest first, and what has gone already."""
    lines = [process.cmdline() for process in above]
    found = [place for place, line in enumerate(lines) if _is_launcher(line)]
    if not found:
        return [], "DeepSpeed's launcher" if BY_DEEPSPEED in environment else None
    last = found[-1]
    if INNER not in _modules(lines[last]):
        return list(above[: last + 1]), None
    # No runner above the inner launcher: it was started over ssh, or by a scheduler's daemon.
    names = [process.name() for process in above]
    daemon = next((place for place in range(last + 1, len(above)) if names[place].startswith("sshd")), last + 1)
    if daemon < len(above) and names[daemon] in REAPERS:
        return [], "DeepSpeed's runner"
    return list(above[: daemon + 1]), None


def _is_launcher(line: Sequence[str]) -> bool:
    """Of a command line: an interpreter's `-m MODULE`, or a program that may stand behind its interpreter."""
    known = any(module in MODULES for module in _modules(line))
    return known or any(Path(word).name in PROGRAMS for word in line[:2])


def _modules(line: Sequence[str]) -> list[str]:
    return [module for flag, module in itertools.pairwise(line[:4]) if flag == "-m"]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
