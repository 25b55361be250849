"""Real ranks as processes of their own, without DeepSpeed's launcher: what a launcher's environment tells them is set
here. For faults that end a process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bitmar.engine.world import free_port
from tests.support.processes import shell_environment
from tests.support.runs import ROOT

END_WITHIN_S = 120.0  # a guard against a hang


class Trainers:
    """The ranks of one start of a run, and what each said."""

    def __init__(
        self,
        recipe: Path,
        size: int,
        overrides: Sequence[str],
        port: int | None,
        extra: Mapping[int, Mapping[str, str]],
    ) -> None:
        self.folder = recipe.parent
        self._files = [self.folder / f"{recipe.stem}-rank{rank}.txt" for rank in range(size)]
        port = port or free_port()
        command = [sys.executable, "-m", "bitmar.train", "--config", str(recipe), *overrides]
        self.processes = []
        for rank, path in enumerate(self._files):
            environment = shell_environment(
                RANK=str(rank),
                WORLD_SIZE=str(size),
                LOCAL_RANK=str(rank),
                LOCAL_SIZE=str(size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                DS_ACCELERATOR="cpu",
                **extra.get(rank, {}),
            )
            with path.open("wb") as said:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
            self.processes.append(process)

    def said(self, rank: int) -> str:
        return self._files[rank].read_text()

    def errors(self, rank: int) -> list[str]:
        return [line for line in self.said(rank).splitlines() if line.startswith("error: ")]

    def codes(self, within_s: float = END_WITHIN_S) -> list[int]:
        """The exit code of each rank once all have ended."""
        until = time.monotonic() + within_s
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def trainers(
    recipe: Path,
    size: int,
    *overrides: str,
    port: int | None = None,
    extra: Mapping[int, Mapping[str, str]] | None = None,
) -> Iterator[Trainers]:
    """Ranks that are gone at the end, whatever happened. `extra`: more environment for some of them."""
    started = Trainers(recipe, size, overrides, port, extra or {})
    try:
        yield started
    finally:
        started.end()
