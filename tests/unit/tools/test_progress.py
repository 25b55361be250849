"""Progress bars: rate, a total that is learnt on the way, and plain lines where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from tools.progress import Bars, Rate


@pytest.mark.parametrize(
    ("unit", "done", "told"), [("bytes", 3_000_000, "1.0 MB/s"), ("samples", 3000, "1,000 samples/s"), ("", 3000, "")]
)
def test_rate(unit: str, done: int, told: str) -> None:
    now = [0.0]
    progress = Progress(get_time=lambda: now[0])
    task = progress.add_task("stage", total=2 * done, unit=unit)
    for second in range(1, 5):
        now[0] = float(second)
        progress.update(task, completed=done * (second - 1) / 3)
    assert Rate().render(progress.tasks[0]).plain == told


def shown(terminal: bool) -> str:
    out = io.StringIO()
    with Bars(Console(file=out, force_terminal=terminal, width=120)) as bars:
        for done, total in ((0, None), (50, 100), (100, 100)):
            bars.report("downloading a", done, total, "bytes")
        bars.report("checking a", 100, 100, "bytes")
    return out.getvalue()


def test_bars_on_a_terminal() -> None:
    last = [line for line in shown(terminal=True).splitlines() if "ing a" in line][-2:]
    assert ["downloading a" in last[0], "checking a" in last[1]] == [True, True], last
    assert all("100%" in line for line in last), last


def test_lines_elsewhere() -> None:
    assert shown(terminal=False) == "downloading a\nchecking a\n"
