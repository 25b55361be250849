"""Pictures of the episodic memory: who was read, how much, how long ago. K slots, N logs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from bitmar.observability import drawing as d
from bitmar.observability.board import Arrays

ARRAYS = ("usage", "age", "written")
_COLUMNS, _ROWS = 300, 512  # of the heatmap over the steps
_NAMED_SLOTS = 24  # with their numbers below the bars


def slot_grid(values: np.ndarray) -> np.ndarray:
    """[K] as a near-square [rows, columns], slot by slot along the rows; what is left of the last row is NaN."""
    columns = max(math.ceil(math.sqrt(len(values))), 1)
    rows = math.ceil(len(values) / columns)
    grid = np.full(rows * columns, np.nan)
    grid[: len(values)] = values
    return grid.reshape(rows, columns)


@d.styled
def usage_figure(about: d.About, record: Arrays) -> Figure | None:
    """Heatmaps of read mass and age, slots in a grid, those without an episode hatched. None: no slot is written."""
    written = record["written"].astype(bool)
    if not written.any():
        return None
    figure, ((left, right),) = d.grid(about, "Memory slots", [3.1], 2, d.Room(bottom=1.55))
    for axis, key, heading, unit, colours in (
        (left, "usage", "Usage: all reads so far", "read mass", "viridis"),
        (right, "age", "Age: since read or written", "optimizer steps", "cividis"),
    ):
        grid = np.ma.masked_invalid(slot_grid(np.where(written, record[key].astype(np.float64), np.nan)))
        lines, columns = grid.shape
        axis.set_title(heading)
        _hatch(axis, np.isnan(slot_grid(np.zeros(len(written)))))
        top = float(grid.max()) if grid.count() else 1.0
        low = min(float(grid.min()), 0.0) if grid.count() else 0.0
        picture = axis.imshow(grid, cmap=colours, vmin=low, vmax=max(top, low + 1e-12), interpolation="nearest")
        axis.set_aspect("auto")
        axis.set_xlabel("+ slot")
        axis.set_ylabel("slot of the row's start")
        axis.set_xticks(d.every(columns, 8))
        starts = d.every(lines, 8)
        axis.set_yticks(starts, [str(start * columns) for start in starts])
        d.colour_bar(figure, picture, [axis], unit, MaxNLocator(5, integer=key == "age"), below_in=0.6)
    if not written.all():
        told = f"hatched: no episode yet ({(~written).sum():,} of {len(written):,} slots)"
        figure.supxlabel(told, y=0.02, fontsize=10)
    return figure


def _hatch(axis: Axes, outside: np.ndarray) -> None:
    """Grey hatched cells, which the written slots' cells hide; white where the grid has cells that are no slots."""
    lines, columns = outside.shape
    look = {"facecolor": d.PALE, "hatch": "////", "edgecolor": "#aaaaaa", "linewidth": 0, "zorder": -2}
    axis.add_patch(Rectangle((-0.5, -0.5), columns, lines, **look))
    beyond = int(outside[-1].sum())
    if beyond:
        place = (columns - beyond - 0.5, lines - 1.5)
        axis.add_patch(Rectangle(place, beyond, 1, facecolor="white", linewidth=0, zorder=-1))


def read_mass(records: Sequence[Arrays]) -> tuple[np.ndarray, np.ndarray]:
    """(edges [N + 1], mass [K, N]): steps between which slots received so much read mass a step.

    Usage adds up over the whole run, so the first log tells of all steps before it.
    """
    steps = np.array([0, *(int(record["step"]) for record in records)], dtype=np.float64)
    usage = np.stack([np.zeros_like(records[0]["usage"]), *(record["usage"] for record in records)]).T
    kept = np.array([0, *(np.flatnonzero(np.diff(steps) > 0) + 1)])
    steps, usage = steps[kept], usage[:, kept]
    return steps, np.diff(usage, axis=1) / np.diff(steps)


def fewer_cells(edges: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(edges of steps, edges of slots, mass) of at most _COLUMNS x _ROWS cells: mean over steps, most over slots."""
    columns, rows = d.groups(mass.shape[1], _COLUMNS), d.groups(mass.shape[0], _ROWS)
    coarse = edges[[*columns, mass.shape[1]]]
    sums = np.add.reduceat(mass * np.diff(edges), columns, axis=1) / np.diff(coarse)
    return coarse, np.array([*rows, mass.shape[0]]) - 0.5, np.maximum.reduceat(sums, rows, axis=0)


@d.styled
def timeline_figure(about: d.About, records: Sequence[Arrays]) -> Figure | None:
    """Read mass of each slot between logs, and how many slots hold an episode. None: no slot was ever written."""
    if not any(record["written"].any() for record in records):
        return None
    room = d.Room(right=d.BAR_IN + 0.2)  # whose label has two lines
    figure, ((top,), (bottom,)) = d.grid(about, "Memory over time", [3.0, 1.4], room=room, sharex=True)
    edges, mass = read_mass(records)
    top.set_title("Read mass a slot received")
    top.set_ylabel("slot")
    if len(edges) < 2:
        d.say(top, "one log at step 0 only")
    else:
        steps, slots, cells = fewer_cells(edges, mass)
        cells = np.ma.masked_invalid(cells)
        most = float(cells.max()) if cells.count() else 0.0
        colours = PowerNorm(0.5, vmin=0.0, vmax=most if most > 0 else 1.0)
        picture = top.pcolormesh(steps, slots, cells, cmap="viridis", norm=colours, rasterized=True)
        top.set_ylim(slots[-1], slots[0])
        top.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        d.colour_bar(figure, picture, [top], "read mass/step\n(root scale)", MaxNLocator(5))
    steps = np.array([int(record["step"]) for record in records], dtype=np.float64)
    active = np.array([float(record["written"].sum()) for record in records])
    kept = d.thinned(active)
    bottom.plot(steps[kept], active[kept], color=d.BLUE, drawstyle="steps-post", marker="o" if len(kept) < 40 else "")
    bottom.set_title("Slots that hold an episode")
    bottom.set_ylabel(f"slots, of {len(records[-1]['written']):,}")
    bottom.set_ylim(0.0, len(records[-1]["written"]) * 1.08)
    bottom.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    bottom.grid(True)
    d.step_axis(bottom, 0.0, float(steps[-1]))
    return figure


def read_order(record: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """(written slots by falling read mass, their shares of all read mass)."""
    slots = np.flatnonzero(record["written"])
    usage = np.nan_to_num(record["usage"].astype(np.float64), posinf=0.0, neginf=0.0)[slots]
    order = np.argsort(-usage, kind="stable")
    return slots[order], usage[order] / (usage.sum() or 1.0)


@d.styled
def reads_figure(about: d.About, record: Arrays) -> Figure | None:
    """Shares of the read mass by slot, most first, and the age of the same slots. None: no slot is written."""
    slots, shares = read_order(record)
    if not len(slots):
        return None
    figure, ((top,), (bottom,)) = d.grid(about, "Which slots are read", [2.4, 1.6], sharex=True)
    places = np.arange(len(slots)) + 1
    top.set_title(f"The five that are read most have {shares[:5].sum():.0%} of the read mass")
    top.bar(places, 100 * shares, width=0.85 if len(slots) < 100 else 1.0, color=d.BLUE)
    top.axhline(100 / len(slots), color=d.RED, linestyle="--", label=f"alike: {1 / len(slots):.2%}")
    top.legend(loc="upper right")
    top.set_ylabel("share of read mass")
    top.yaxis.set_major_formatter(d.PERCENT)
    bottom.set_title("Age of the same slots")
    bottom.bar(places, record["age"][slots], width=0.85 if len(slots) < 100 else 1.0, color=d.ORANGE)
    bottom.set_ylabel("age (steps)")
    bottom.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in (top, bottom):
        axis.grid(True, axis="y")
        axis.set_ylim(0.0, max(axis.dataLim.y1 * 1.08, 1e-9 if axis is top else 1.0))
    bottom.set_xlim(0.4, len(slots) + 0.6)
    if len(slots) <= _NAMED_SLOTS:
        bottom.set_xticks(places, [str(slot) for slot in slots])
        bottom.set_xlabel("slot, the most read first")
    else:
        bottom.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        bottom.set_xlabel(
            f"rank of the slot by read mass ({len(slots):,} of {len(record['written']):,} hold an episode)"
        )
    return figure
