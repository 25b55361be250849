"""What a person reads while a run goes: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

# name in the line, metric, format
_SHOWN = (
    ("loss", "Training/Loss", "{:.3f}"),
    ("lr", "Training/Learning_Rate", "{:.1e}"),
    ("", "Throughput/Samples_Per_Second", "{:.0f} samples/s"),
    ("validation loss", "Validation/Loss", "{:.3f}"),
    ("text loss", "Validation/Loss_Text", "{:.3f}"),
    ("perplexity", "Validation/Perplexity", "{:.1f}"),
    ("vision gain", "Validation/Vision_Gain", "{:+.4f}"),
    ("accuracy", "Validation/Token_Accuracy", "{:.1%}"),
)
_RATE_WINDOW = 20  # logs over which the pace for "left" is measured


def summary(values: Mapping[str, float]) -> str:
    """The few numbers of a log that a line has room for: "loss 5.213  lr 1.2e-03  812 samples/s"."""
    parts = (f"{label} {form.format(values[name])}".strip() for label, name, form in _SHOWN if name in values)
    return "  ".join(parts)


def event_line(kind: str, fields: Mapping[str, Any]) -> str:
    """An event as a person reads it: "checkpoint  step=50  path=checkpoints/50"."""
    return "  ".join([kind, *(f"{name}={value}" for name, value in fields.items())])


def step_text(step: int, total_steps: int | None) -> str:
    """ "step 50/400", or "step 50" when the end is not known in steps."""
    return f"step {step}" if total_steps is None else f"step {step}/{total_steps}"


def duration(seconds: float) -> str:
    """ "0:42", "12:05" or "3:07:09"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class TimeLeft:
    """The time to the last step at the pace of the latest logs.

    It starts with the first log: start-up, a slow first step and steps before a resume do not count.
    """

    def __init__(self, total_steps: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=_RATE_WINDOW)

    def __call__(self, step: int) -> str:
        """ "left 0:42" after `step` steps, or "" when there is nothing to tell it from."""
        now = self._clock()
        if not self._seen or step > self._seen[-1][0]:
            self._seen.append((step, now))
        first_step, first_time = self._seen[0]
        if self._total_steps is None or step <= first_step:
            return ""
        pace = (now - first_time) / (step - first_step)
        return f"left {duration(max(self._total_steps - step, 0) * pace)}"


class ConsoleSink:
    """A progress bar with rate, time left and loss on a terminal, plain lines when the stream is none."""

    def __init__(
        self,
        total_steps: int | None = None,
        start_step: int = 0,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total_steps` is None where the end is not known in steps; `stream` is stdout by default."""
        self._stream = stream if stream is not None else sys.stdout
        self._total_steps = total_steps
        self._left = TimeLeft(total_steps, clock)
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[line]}"),
                console=Console(file=self._stream),
            )
            self._task: TaskID = self._bar.add_task(
                step_text(start_step, total_steps), total=total_steps, completed=start_step, line=""
            )
            self._bar.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show a log's summary; a log without one of the shown metrics shows its step alone."""
        head = step_text(step, self._total_steps)
        text = summary(values)
        if self._bar is None:
            self._print("  ".join(part for part in (head, text, self._left(step)) if part))
        elif "Training/Loss" in values:
            line = "  ".join(part for part in (text, self._left(step)) if part)
            self._bar.update(self._task, completed=step, description=head, line=line)
        else:  # a validation stays on the screen above the bar
            self._print(f"{head}  {text}")

    def event(self, kind: str, **fields: Any) -> None:
        """Show an event as a line of its own, above the bar."""
        self._print(event_line(kind, fields))

    def image(self, step: int, name: str, path: Path) -> None:
        """Tell where an image lies."""
        self._print(f"{step_text(step, self._total_steps)}  {name}: {path}")

    def histogram(self, step: int, name: str, counts: Sequence[float], edges: Sequence[float]) -> None:
        """Do nothing."""

    def artifact(self, kind: str, name: str, paths: Sequence[Path]) -> None:
        """Do nothing."""

    def truncate_after(self, step: int) -> int:
        """Do nothing: what was shown stays."""
        return 0

    def close(self, exit_code: int = 0) -> None:
        """Leave the bar where it stands."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(Text(line))
        else:
            print(line, file=self._stream, flush=True)
