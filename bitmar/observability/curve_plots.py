"""Curves over the steps, straight from metrics.jsonl: losses, throughput, schedule, gradients, flips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bitmar.observability import drawing as d
from bitmar.observability.run_folder import Series
from bitmar.observability.schema import PARTS, STEP_METRIC

_LETTER_SHARE = 0.018  # of the axis' width, for a letter of a phase's name


@dataclass(frozen=True)
class Curve:
    metric: str
    label: str
    colour: str
    style: Any = "-"  # of a line, as matplotlib takes it
    marker: str = ""
    factor: float = 1.0


@dataclass(frozen=True)
class Panel:
    heading: str
    unit: str
    curves: tuple[Curve, ...]
    log_scale: bool = False  # what is not > 0 is left out
    whole: bool = False  # the axis starts at 0
    stacked: bool = False  # curves as areas on each other, but for those without a colour's place in the stack


def _by_component(group: str, figure: str, components: Sequence[str], factor: float = 1.0) -> tuple[Curve, ...]:
    """A colour and a dash each, so that neither is needed to tell them apart."""
    dashes = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
    return tuple(
        Curve(
            f"{group}/" + figure.format(name),
            name,
            d.COMPONENT_COLOURS[name],
            dashes[i % len(dashes)],
            factor=factor,
        )
        for i, name in enumerate(components)
    )


_COMPONENTS = tuple(d.COMPONENT_COLOURS)
_TERNARY = _COMPONENTS[1:]
_PART_COLOURS = dict(zip(PARTS, (d.RED, d.BLUE, d.SKY, d.GREEN, d.ORANGE, d.PURPLE), strict=True))

LOSSES = (
    Panel(
        "Training loss",
        "loss (nats/token)",
        (
            Curve("Training/Loss", "objective", d.BLACK),
            Curve("Training/Loss_LM", "language", d.BLUE, "--"),
            Curve("Training/Loss_Contrastive", "contrastive\n(nats/row)", d.ORANGE),
            Curve("Training/Loss_Recall", "recall\n(1/episode)", d.GREEN),
        ),
    ),
    Panel(
        "Validation loss: are image and memory used?",
        "loss (nats/token)",
        (
            Curve("Validation/Loss", "right image", d.BLUE, "-", "o"),
            Curve("Validation/Loss_Shuffled_Vision", "other's image", d.RED, "--", "s"),
            Curve("Validation/Loss_Memory_Off", "memory off", d.GREEN, ":", "^"),
            Curve("Validation/Loss_Text", "text records", d.PURPLE, "-.", "D"),
        ),
    ),
)
THROUGHPUT = (
    Panel("Samples", "samples/s", (Curve("Throughput/Samples_Per_Second", "all ranks", d.BLUE),), whole=True),
    Panel("Tokens", "tokens/s", (Curve("Throughput/Tokens_Per_Second", "all ranks", d.GREEN),), whole=True),
    Panel(
        "Time of a step by part; logs and checkpoints come on top",
        "time (s)",
        (
            *(Curve(f"Throughput/{part}_Seconds", part.lower(), colour) for part, colour in _PART_COLOURS.items()),
            Curve("Throughput/Step_Seconds", "step", d.BLACK),
        ),
        whole=True,
        stacked=True,
    ),
    Panel(
        "Padding efficiency",
        "real tokens/slots",
        (Curve("Data/Padding_Efficiency", "all ranks", d.ORANGE),),
        whole=True,
    ),
)
SCHEDULE = (
    Panel("Learning rate", "rate", (Curve("Training/Learning_Rate", "rate", d.BLUE),), whole=True),
    Panel("Weight decay", "decay", (Curve("Training/Weight_Decay", "decay", d.ORANGE),), whole=True),
    Panel("Gradient norm before the clip", "norm", (Curve("Gradients/Total_Norm", "norm", d.GREEN),), log_scale=True),
)
GRADIENTS = (
    Panel(
        "Norm by component, before the clip",
        "norm (log scale)",
        _by_component("Gradients", "{}_Norm", _COMPONENTS),
        log_scale=True,
    ),
    Panel(
        "A step's update over the weights",
        "norm/norm (log scale)",
        _by_component("Gradients", "{}_Update_To_Weight", _COMPONENTS),
        log_scale=True,
    ),
)
FLIPS = (
    Panel(
        "Ternary weights that changed between two logs",
        "weights (%, log scale)",
        _by_component("Quantization", "Flips_{}", _TERNARY, factor=100.0),
        log_scale=True,
    ),
)
_ALL = (*LOSSES, *THROUGHPUT, *SCHEDULE, *GRADIENTS, *FLIPS)
METRICS = frozenset({"Training/Phase", *(curve.metric for panel in _ALL for curve in panel.curves)})


def phase_spans(series: Series) -> list[tuple[int, float, float]]:
    """(phase, first step, last step) of each stretch of one phase; neighbours share their boundary."""
    steps, phases = series.get("Training/Phase", (np.empty(0), np.empty(0)))
    known = np.isfinite(phases)
    steps, phases = steps[known], phases[known].astype(int)
    if not len(steps):
        return []
    starts = [0, *(np.flatnonzero(np.diff(phases)) + 1).tolist()]
    bounds = [*(float(steps[start]) for start in starts), float(steps[-1])]
    return [(int(phases[start]), bounds[i], bounds[i + 1]) for i, start in enumerate(starts)]


def has_any(panels: Sequence[Panel], series: Series) -> bool:
    """Whether there is a finite number to draw in any of the panels."""
    return any(len(_points(curve, panel, series)[0]) for panel in panels for curve in panel.curves)


@d.styled
def curves_figure(
    about: d.About, heading: str, panels: Sequence[Panel], series: Series, phases: Sequence[str] = ()
) -> Figure:
    """The panels below each other; `phases` are the names of the phases by index."""
    height_in = 2.1 if len(panels) <= 2 else 1.8
    labels = [curve.label for panel in panels if len(panel.curves) > 1 for curve in panel.curves]
    room = d.Room(top=1.15, right=d.legend_room(labels))  # the phases' names stand below the first heading
    figure, axes = d.grid(about, heading, [height_in] * len(panels), room=room, sharex=True)
    spans = phase_spans(series)
    for place, (axis, panel) in enumerate(zip(axes[:, 0], panels, strict=True)):
        _draw(axis, panel, series)
        shade(axis, spans)
        if place == 0:
            name_phases(axis, spans, phases)
    steps = series.get(STEP_METRIC, (np.zeros(1), np.zeros(1)))[0]
    d.step_axis(axes[-1, 0], min(0.0, steps[0]), float(steps.max()))
    return figure


def _points(curve: Curve, panel: Panel, series: Series) -> tuple[np.ndarray, np.ndarray]:
    steps, values = series.get(curve.metric, (np.empty(0), np.empty(0)))
    values = values * curve.factor
    values = np.where(np.isfinite(values) & ((values > 0) | (not panel.log_scale)), values, np.nan)
    if not np.isfinite(values).any():
        return np.empty(0), np.empty(0)
    kept = d.thinned(values)
    return steps[kept], values[kept]


def _draw(axis: Axes, panel: Panel, series: Series) -> None:
    axis.set_ylabel(panel.unit)
    points = {curve: _points(curve, panel, series) for curve in panel.curves}
    points = {curve: found for curve, found in points.items() if len(found[0])}
    axis.set_title(panel.heading)
    if not points:
        d.say(axis, "not logged in this run")
        return
    areas = {curve: found for curve, found in points.items() if panel.stacked and curve.colour != d.BLACK}
    _stack(axis, areas)
    for curve, (steps, values) in points.items():
        if curve not in areas:
            alone = np.isfinite(values).sum() == 1
            marker = curve.marker if len(steps) <= 60 else ""
            style = {"color": curve.colour, "linestyle": curve.style, "marker": "o" if alone else marker}
            axis.plot(steps, values, label=curve.label, **style)
    axis.grid(True)
    if len(panel.curves) > 1:
        d.legend_beside(axis, reverse=panel.stacked)
    if panel.log_scale:
        d.log_y(axis)
    elif panel.whole:
        axis.set_ylim(0.0, axis.dataLim.y1 * 1.08 or 1.0)


def _stack(axis: Axes, areas: dict[Curve, tuple[np.ndarray, np.ndarray]]) -> None:
    """Areas over all the steps that any of them has; between its own (it may be thinned) each is a straight line."""
    if not areas:
        return
    steps = np.unique(np.concatenate([found[0] for found in areas.values()]))
    rows = []
    for own, values in areas.values():
        finite = np.isfinite(values)
        rows.append(np.interp(steps, own[finite], values[finite]))
    if len(steps) == 1:  # an area needs a width
        steps, rows = np.array([steps[0] - 0.5, steps[0] + 0.5]), [row.repeat(2) for row in rows]
    axis.stackplot(steps, rows, labels=[c.label for c in areas], colors=[c.colour for c in areas], alpha=0.75)


def shade(axis: Axes, spans: list[tuple[int, float, float]]) -> None:
    """Every second phase a little darker, with a line where it begins."""
    for order, (_, first, last) in enumerate(spans):
        if order % 2:
            axis.axvspan(first, last, color="#000000", alpha=0.05, linewidth=0)
        if order:
            axis.axvline(first, color=d.GREY, linewidth=0.8, linestyle=(0, (4, 3)))


def name_phases(axis: Axes, spans: list[tuple[int, float, float]], names: Sequence[str]) -> None:
    """The phases' names above the axis, below its heading."""
    axis.set_title(axis.get_title("left"), pad=20)
    for phase, first, last in spans:
        share = (last - first) / max(spans[-1][2] - spans[0][1], 1.0)
        name = d.shown(names[phase]) if phase < len(names) else f"phase {phase + 1}"
        room = int(share / _LETTER_SHARE)
        text = d.shortened(name, room) if room > 3 or len(name) <= room else ""
        place = axis.get_xaxis_transform()
        axis.text((first + last) / 2, 1.02, text, transform=place, ha="center", fontsize=10, color=d.GREY)
