"""Where the time goes between the start of a process and its first step."""

from __future__ import annotations

import time

import psutil


class StartUp:
    """Seconds by part, in their order; the first begins with the process."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = psutil.Process().create_time()

    def mark(self, part: str) -> bool:
        """End a part now. False where it has ended before, which changes nothing."""
        if part in self.parts:
            return False
        now = time.time()
        self.parts[part] = round(now - self._last, 3)
        self._last = now
        return True

    @property
    def seconds(self) -> float:
        return round(sum(self.parts.values()), 3)
