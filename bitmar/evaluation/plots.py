"""A picture of scores: each with its interval and the chance level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bitmar.evaluation.scores import Score
from bitmar.observability import drawing as d

ROW_IN, NAME_LETTERS, MOST_ROWS = 0.26, 54, 90


def panels(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """The scores that are drawn, by the axis they share."""
    nats = [s for s in scores if s.measure == "nats/token"]
    found = {
        "fraction (1 is best)": [s for s in scores if s.measure == "fraction"],
        "loss, nats a token (0 is best)": [s for s in nats if s.chance != 0],
        "difference of losses, nats a token": [s for s in nats if s.chance == 0],
    }
    return {label: rows[:MOST_ROWS] for label, rows in found.items() if rows}


@d.styled
def draw_scores(about: d.About, scores: Sequence[Score], path: Path) -> Path | None:
    """Write a PNG; None where none of the scores is of a kind that is drawn."""
    parts = panels(scores)
    if not parts:
        return None
    heights = [len(rows) + 2.2 for rows in parts.values()]
    figure = d.new_figure(about, "Scores, with 95 % intervals", 0.9 + ROW_IN * sum(heights))
    axes = figure.subplots(len(parts), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    tasks = list(dict.fromkeys(score.task for score in scores))
    for axis, (label, rows) in zip(axes, parts.items(), strict=True):
        _panel(axis, label, rows, tasks)
    drawn = dict.fromkeys(score.task for rows in parts.values() for score in rows)
    marks = [Line2D([], [], color=_colour(task, tasks), marker="o", label=task) for task in drawn]
    marks.append(Line2D([], [], color=d.BLACK, marker="|", markersize=11, linestyle="", label="chance"))
    figure.legend(handles=marks, loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    d.save(figure, path)
    return path


def _panel(axis: Axes, label: str, rows: Sequence[Score], tasks: Sequence[str]) -> None:
    for place, score in enumerate(rows):
        colour = _colour(score.task, tasks)
        low = score.value if score.low is None else min(score.low, score.value)
        high = score.value if score.high is None else max(score.high, score.value)
        spread = np.array([[score.value - low], [high - score.value]])
        axis.errorbar(score.value, place, xerr=spread, fmt="o", color=colour, capsize=3)
    known = [(place, score.chance) for place, score in enumerate(rows) if score.chance is not None]
    if known:
        places, levels = zip(*known, strict=True)
        axis.scatter(levels, places, marker="|", s=110, color=d.BLACK, linewidths=1.6, zorder=3)
    names = [d.shortened(d.shown(score.name), NAME_LETTERS) for score in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(label)
    axis.grid(axis="x")
    if label.startswith("fraction"):
        axis.set_xlim(-0.02, 1.02)


def _colour(task: str, tasks: Sequence[str]) -> str:
    return d.CYCLE[tasks.index(task) % len(d.CYCLE)]
