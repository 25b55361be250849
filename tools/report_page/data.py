"""What draw.js draws: charts as JSON, a colour a run."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.report_page.curves import Chart, Line
from tools.report_page.runs import Run

# Okabe and Ito's colours, told apart by colour-blind readers too, without the yellow that white paper swallows
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dash", "dot")  # for runs beyond the colours
_PALEST = 0.35  # share of the run's colour in the first line of a family
_MARKED = 25  # points, up to which each is marked
_DIGITS = 6  # of a value on the page; the CSV has them all
_LARGE = 1e4  # from here on axes count in k, M, G


def page_data(runs: Sequence[Run], charts: Sequence[Chart]) -> str:
    """The charts as JSON that may stand inside a <script> element."""
    last = max((int(line.series.steps[-1]) for chart in charts for line in chart.lines), default=0)
    content = {
        "last": max(last, 1),
        "phases": [step for _, step in runs[0].phases()[1:]] if len(runs) == 1 else [],
        "charts": [_chart(chart, runs) for chart in charts],
    }
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _chart(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    values = np.concatenate([line.series.values for line in chart.lines])
    large = bool(np.nanmax(np.abs(values), initial=0.0) >= _LARGE)
    return {
        "unit": plain("no unit" if chart.unit == "1" else chart.unit),
        "exponent": "SI" if large else "power",
        "range": _range(values),
        "lines": [_line(line, runs) for line in chart.lines],
    }


def _range(values: np.ndarray) -> list[float] | None:
    """The axis of a chart that shows one value only, around which the library would draw 1 up and down."""
    known = values[np.isfinite(values)]
    if not len(known) or known.min() != known.max() or known[0] == 0:
        return None
    return sorted((float(known[0]) * 0.5, float(known[0]) * 1.5))


def _line(line: Line, runs: Sequence[Run]) -> dict[str, Any]:
    name = ", ".join(part for part in (runs[line.run].label if len(runs) > 1 else "", line.label) if part)
    return {
        "run": line.run,
        "name": plain(name),
        "colour": shade(COLOURS[line.run % len(COLOURS)], line.place, line.places),
        "dash": DASHES[line.run // len(COLOURS) % len(DASHES)],
        "mode": "lines+markers" if _needs_markers(line) else "lines",
        "x": line.series.steps.tolist(),
        "y": [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in line.series.values.tolist()],
    }


def _needs_markers(line: Line) -> bool:
    """Few points, or one between two gaps, which has no line."""
    finite = np.isfinite(line.series.values)
    beside = np.concatenate([[False], finite, [False]])
    alone = finite & ~beside[:-2] & ~beside[2:]
    return len(finite) <= _MARKED or bool(alone.any())


def plain(text: str) -> str:
    """A text for the plotting library, which reads some HTML in names and titles."""
    return html.escape(text, quote=False)


def shade(colour: str, place: int, places: int) -> str:
    """The colour mixed with white: palest at place 0, whole at the last place."""
    share = 1.0 if places == 1 else _PALEST + (1 - _PALEST) * place / (places - 1)
    mixed = (round(255 + (int(colour[at : at + 2], 16) - 255) * share) for at in (1, 3, 5))
    return "#" + "".join(f"{part:02x}" for part in mixed)
