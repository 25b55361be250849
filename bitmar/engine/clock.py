"""Where the time of a step goes. On CUDA, events on the stream, which are waited for when the times are asked for."""

from __future__ import annotations

import time
from typing import Any

import torch

MANY_EVENTS = 4096  # that are held before those that have passed are let go

Mark = Any  # seconds, or a CUDA event


class StepClock:
    """Adds up the seconds of a step's parts since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._last: Mark = self._now()
        self._passed: list[tuple[str, Mark, Mark]] = []
        self._seconds: dict[str, float] = {}

    def start(self) -> None:
        """The next part begins now; what has passed since the last mark is nobody's."""
        self._last = self._now()

    def mark(self, part: str) -> None:
        """`part` ends now, and the next one begins."""
        now = self._now()
        if self._cuda:
            self._passed.append((part, self._last, now))
            if len(self._passed) >= MANY_EVENTS:
                self._fold(wait=False)
        else:
            self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
            self._fold(wait=True)
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _fold(self, wait: bool) -> None:
        """Take the times of events that have passed."""
        waiting = []
        for part, began, ended in self._passed:
            if wait or ended.query():
                self._seconds[part] = self._seconds.get(part, 0.0) + began.elapsed_time(ended) / 1000
            else:
                waiting.append((part, began, ended))
        self._passed = waiting

    def _now(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
