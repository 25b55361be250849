"""Commands that leave no process behind: each runs in a session of its own, which ends with whoever started it.

A watcher, a process of its own, holds the end of a pipe whose other end only the starting process has. When that
process goes, even by kill -9, the pipe closes and the watcher kills the session. A launcher started from here may
do the same for what it starts: they end one after the other, within milliseconds.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TextIO

import psutil

DONE = "done\n"
TICK_S = 0.5
DRAIN_S = 2.0
KILL_WITHIN_S = 5.0  # a process in the kernel's hands (a dead disk) may outlive its kill


class Guarded:
    """`command` in a session of its own. `process` is its first process; `end` must be called when that has ended."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], piped: bool = False) -> None:
        """Raises OSError where the command cannot be started. `piped`: its output comes through pipes."""
        self._watcher = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._told = False
        pipe = subprocess.PIPE if piped else None
        try:
            self.process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
            )
        except OSError:
            self._tell(DONE)
            raise
        assert self._watcher.stdin is not None
        self._watcher.stdin.write(f"{self.process.pid}\n")
        self._watcher.stdin.flush()

    def ask_to_stop(self) -> None:
        """TERM to the ranks of the session, all at once; where it has none here, to its first process.

        DeepSpeed's launcher would pass TERM on to one rank after the other, 30 s apart.
        """
        targets = [p.pid for p in session_processes(self.process.pid) if is_rank(p)] or [self.process.pid]
        for pid in targets:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue

    def end(self) -> None:
        """Kill what is left of the session."""
        end_session(self.process.pid)
        self.process.wait()
        self._tell(DONE)

    def _tell(self, word: str) -> None:
        if self._told:
            return
        self._told = True
        try:
            self._watcher.communicate(word)
        except BrokenPipeError:  # the watcher was killed; nothing is left to watch
            self._watcher.wait()


def follow(guarded: Guarded) -> Iterator[tuple[TextIO, str] | None]:
    """What a piped command writes, as (stream of this process, line), and None where it is silent; ends with it.

    Also where something that it has left behind goes on writing into its pipes.
    """
    lines: queue.SimpleQueue[tuple[TextIO, str]] = queue.SimpleQueue()
    process = guarded.process
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=_read, args=(pipe, stream, lines), daemon=True)
        for pipe, stream in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    ended: float | None = None
    while True:
        reading = any(reader.is_alive() for reader in readers)
        try:
            yield lines.get(timeout=TICK_S)
        except queue.Empty:
            yield None
            if not reading and process.poll() is not None:
                return
        if process.poll() is not None:
            ended = ended or time.monotonic()
            if reading and time.monotonic() > ended + DRAIN_S:
                return


def _read(pipe: IO[bytes], stream: TextIO, lines: queue.SimpleQueue[tuple[TextIO, str]]) -> None:
    with pipe:
        for line in pipe:
            lines.put((stream, line.decode("utf-8", "replace")))


class StopRequests:
    """Signals that ask this process to stop, from the moment it is made. `signals`: those that came, in order.

    A signal that is ignored stays so: nohup and background jobs of scripts mean it.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda got, _: self.signals.append(got))


def session_processes(session: int) -> list[psutil.Process]:
    """Living processes of a session of this machine."""
    return [p for p in living() if _session(p.pid) == session]


def living() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


def is_rank(process: psutil.Process) -> bool:
    """Whether a launcher started it as a rank: what ranks start themselves inherits their environment."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return "bitmar.train" in words and {"RANK", "WORLD_SIZE"} <= environment_of(process).keys()


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Environment with which a process was started; empty where it has gone or is another user's."""
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def end_session(session: int) -> None:
    """Kill every process of a session, also those that are being started meanwhile."""
    until = time.monotonic() + KILL_WITHIN_S
    while (found := session_processes(session)) and time.monotonic() < until:
        for process in found:
            try:
                process.kill()
            except psutil.Error:
                continue
        time.sleep(0.05)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def watch() -> None:
    """Wait until the starting process says that the session it names has ended, or goes without a word."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    session = sys.stdin.readline()
    if session != DONE and session and sys.stdin.read() != DONE:
        end_session(int(session))


if __name__ == "__main__":
    watch()
