"""What ends or bends a run from outside: signals, a launcher that has gone, a hang; losses that are not finite or
spike; and the exit codes that tell a supervisor which it was.

    0 done   1 failed   2 a user's mistake   75 stopped with a checkpoint, start again   76 hung   130 interrupted
"""

from __future__ import annotations

import dataclasses
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from enum import IntFlag
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bitmar.batch import Batch
from bitmar.config import FaultsConfig
from bitmar.engine.launcher import Launchers, wake_when_orphaned
from bitmar.engine.watchdog import HUNG, START_UP_S, Pulses, Watchdog

__all__ = ["HUNG", "START_UP_S", "STOPPED", "Guard", "Notice", "Stopped", "TrainingError", "is_spike", "save_batches"]

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # of schedulers that take the node away, and terminals
LOOK_S = 0.5  # between two looks at the launcher
GRACE_S = 5.0  # what a rank has for its checkpoint once its launcher has gone


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step and what to do."""


class Stopped(Exception):
    """The run was asked to stop and has saved; the message says by what."""


class Notice(IntFlag):
    """What a rank tells the others at every step."""

    NONE = 0
    NO_DATA = 1  # it has no rows for the next step
    SIGNAL = 2
    LAUNCHER_GONE = 4

    @property
    def reason(self) -> str:
        return "the launcher has gone" if self & Notice.LAUNCHER_GONE else "asked to by a signal"


class Guard:
    """Takes notice for this rank of signals and of a launcher that has gone, and keeps its watchdog.

    One that was not started notices nothing: a run inside another program leaves that program's signals alone.
    """

    def __init__(self) -> None:
        self.notice = Notice.NONE
        self._watchdog: Watchdog | None = None
        self._over = threading.Event()
        self._handlers: dict[int, Any] = {}

    def start(self, config: FaultsConfig, run_directory: Path, environment: Mapping[str, str] = os.environ) -> None:
        """Heed signals and start the thread that watches. To be called in the main thread, before the ranks join."""
        heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
        self._handlers = {number: signal.signal(number, self._heed) for number in heeded}
        wake_when_orphaned()
        launchers = Launchers(environment)
        if config.hang_timeout_s > 0:
            rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
            pulses = None
            if size > 1:
                pulses = Pulses(rank, size, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
            self._watchdog = Watchdog(config.hang_timeout_s, run_directory, pulses)
            threading.Thread(target=self._watch_progress, args=(self._watchdog,), name="watchdog", daemon=True).start()
        threading.Thread(target=self._watch_launchers, args=(launchers,), name="launcher watch", daemon=True).start()

    def beat(self, stage: str, step: int, patience_s: float = 0.0) -> None:
        """`stage` of optimizer step `step` begins: the run is not hung. All ranks call it at the same points.

        `patience_s`: what the stage may take at least, where that is more than faults.hang_timeout_s."""
        if self._watchdog is not None:
            self._watchdog.beat(stage, step, patience_s)

    def on_hang(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called with what is known of a hang, before the watchdog ends the process for it."""
        if self._watchdog is not None:
            self._watchdog.tell = tell

    def close(self) -> None:
        """Stop watching and give the signals back. Does not return where the watchdog is about to end the process."""
        if self._watchdog is not None and self._watchdog.ending.is_set():
            threading.Event().wait()
        self._over.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        self.notice |= Notice.SIGNAL

    def _watch_progress(self, watchdog: Watchdog) -> None:
        while not self._over.wait(watchdog.interval_s):
            watchdog.tick()

    def _watch_launchers(self, launchers: Launchers) -> None:
        while launchers.gone() is None:
            if self._over.wait(LOOK_S):
                return
        self.notice |= Notice.LAUNCHER_GONE
        launchers.wake()
        time.sleep(GRACE_S)
        os._exit(STOPPED)  # also where it saved: what closes slowly must not outlive the launcher


def is_spike(loss: float, recent: Sequence[float], config: FaultsConfig) -> bool:
    """Whether `loss` is above spike_factor times the median of the last spike_window losses (never before these are
    there). The median, because earlier spikes in the window hardly move it."""
    return (
        config.spike_factor > 0
        and len(recent) >= config.spike_window
        and loss > config.spike_factor * statistics.median(recent)
    )


def save_batches(folder: Path, batches: Sequence[Batch], step: int, rank: int) -> Path:
    """Write a rank's micro-batches of a step, tensors named `MICRO_BATCH.FIELD`. Raises OSError."""
    path = folder / f"step_{step}_rank_{rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{number}.{name}": t for number, batch in enumerate(batches) for name, t in _tensors(batch).items()}
    save_file(tensors, path)
    return path


def _tensors(record: Any) -> dict[str, Tensor]:
    """The tensors of a dataclass, also of those inside it."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value.detach().cpu().contiguous().clone()
        elif dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": tensor for name, tensor in _tensors(value).items()}
    return found
