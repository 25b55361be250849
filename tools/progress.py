"""Progress bars of the tools: a bar a stage, with rate and time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Rate(ProgressColumn):
    """How many units a second."""

    def render(self, task: Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields["unit"]
        if not speed or not unit:
            return Text("")
        if unit == "bytes":
            return Text(f"{decimal(int(speed))}/s")
        return Text(f"{speed:,.0f} {unit}/s")


class Bars:
    """A progress bar a stage, with rate and time left, on a terminal; one plain line a stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        bar, share, left = BarColumn(), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True)
        columns = (TextColumn("{task.description}"), bar, share, Rate(), left)
        self._progress = Progress(*columns, console=console) if console.is_terminal else None
        self._stage, self._task = "", TaskID(0)

    def __enter__(self) -> Bars:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def report(self, stage: str, done: int, total: int | None, unit: str) -> None:
        """Note that `done` of `total` units (None: not known) of a stage are done."""
        begins = stage != self._stage
        self._stage = stage
        if self._progress is None:
            if begins:
                self._console.print(stage, highlight=False)
            return
        if begins:
            self._task = self._progress.add_task(stage, total=total, completed=done, unit=unit)
        self._progress.update(self._task, completed=done, total=total)
