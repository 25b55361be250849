"""PNG plots of a run, drawn from its metrics.jsonl: losses, throughput, schedule.

At the end of a run, or alone: `python -m bitmar.observability.plots RUN_DIR`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bitmar.observability.records import METRICS_FILE, read_lines
from bitmar.observability.schema import STEP_METRIC

# Okabe and Ito's colours, told apart by colour-blind readers too
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_BLACK, _GREY = "#000000", "#555555"
_DPI = 150
_LETTER_SHARE = 0.0095  # of the axis' width, for a letter of a phase's name


@dataclass(frozen=True)
class _Curve:
    metric: str
    label: str
    colour: str
    style: str = "-"
    marker: str = ""


@dataclass(frozen=True)
class _Panel:
    heading: str
    unit: str
    curves: tuple[_Curve, ...]
    log_scale: bool = False
    whole: bool = False  # the axis starts at 0


_LOSSES = (
    _Panel(
        "Training loss",
        "loss (nats a token)",
        (
            _Curve("Training/Loss", "objective", _BLACK),
            _Curve("Training/Loss_LM", "language model", _BLUE, "--"),
            _Curve("Training/Loss_Contrastive", "contrastive (nats a row)", _ORANGE),
            _Curve("Training/Loss_Recall", "memory recall", _GREEN),
        ),
    ),
    _Panel(
        "Validation loss: does the model use its image and its memory?",
        "loss (nats a token)",
        (
            _Curve("Validation/Loss", "right image", _BLUE, "-", "o"),
            _Curve("Validation/Loss_Shuffled_Vision", "another's image", _RED, "--", "s"),
            _Curve("Validation/Loss_Memory_Off", "memory off", _GREEN, ":", "^"),
            _Curve("Validation/Loss_Text", "text records", _PURPLE, "-.", "D"),
        ),
    ),
)
_THROUGHPUT = (
    _Panel("Samples", "samples/s", (_Curve("Throughput/Samples_Per_Second", "all ranks", _BLUE),), whole=True),
    _Panel("Tokens", "tokens/s", (_Curve("Throughput/Tokens_Per_Second", "all ranks", _GREEN),), whole=True),
    _Panel(
        "Time of a step",
        "seconds",
        (
            _Curve("Throughput/Step_Seconds", "whole step", _BLACK),
            _Curve("Data/Wait_Seconds", "waiting for data", _RED),
        ),
        whole=True,
    ),
    _Panel(
        "Padding efficiency",
        "real tokens / slots",
        (_Curve("Data/Padding_Efficiency", "all ranks", _ORANGE),),
        whole=True,
    ),
)
_SCHEDULE = (
    _Panel("Learning rate", "rate", (_Curve("Training/Learning_Rate", "learning rate", _BLUE),), whole=True),
    _Panel("Weight decay", "decay", (_Curve("Training/Weight_Decay", "weight decay", _ORANGE),), whole=True),
    _Panel(
        "Gradient norm, before the clip",
        "norm",
        (_Curve("Gradients/Total_Norm", "global norm", _GREEN),),
        log_scale=True,
    ),
)
_FILES = (
    ("losses.png", "Losses", _LOSSES),
    ("throughput.png", "Throughput of the whole cluster", _THROUGHPUT),
    ("schedule.png", "Schedule and gradient", _SCHEDULE),
)

Series = dict[str, tuple[np.ndarray, np.ndarray]]


def write_plots(run_dir: Path, phase_names: Sequence[str] = (), generated: bool = False) -> list[Path]:
    """Draw run_dir/plots/{losses,throughput,schedule}.png and return their paths.

    `phase_names` are the names of the phases by index ("phase 1" where one is missing); `generated` says in
    every title that the data is generated. A metric the run never logged is left out. Raises ValueError
    when the run has logged nothing.
    """
    series = read_series(run_dir / METRICS_FILE)
    if not series:
        raise ValueError(f"{run_dir / METRICS_FILE}: no metrics to plot; is it the directory of a run?")
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    for file, heading, panels in _FILES:
        title = f"{heading}: {run_dir.resolve().name}" + (" (generated data)" if generated else "")
        figure = _figure(title, panels, series, phase_names)
        paths.append(folder / file)
        figure.savefig(paths[-1], dpi=_DPI)
    return paths


def read_series(path: Path) -> Series:
    """metrics.jsonl as metric -> (steps [N], values [N]); a value that was not finite is NaN."""
    points: dict[str, list[tuple[float, float]]] = {}
    for fields in read_lines(path):
        step = fields[STEP_METRIC]
        for name, value in fields.items():
            if "/" in name:  # not "time", not "nonfinite"
                points.setdefault(name, []).append((step, math.nan if value is None else value))
    arrays = {name: np.array(pairs, dtype=np.float64) for name, pairs in points.items()}
    return {name: (array[:, 0], array[:, 1]) for name, array in arrays.items()}


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


def _figure(title: str, panels: tuple[_Panel, ...], series: Series, names: Sequence[str]) -> Figure:
    figure = Figure(figsize=(11, 1.0 + 2.9 * len(panels)), layout=ConstrainedLayoutEngine(h_pad=0.1))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    steps = series.get(STEP_METRIC, (np.zeros(1), np.zeros(1)))[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, series)
        _shade(axis, phase_spans(series), names)
        axis.set_xlim(min(0.0, steps[0]), max(steps[-1], 1.0))
    axes[-1].set_xlabel("optimiser step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
    return figure


def _draw(axis: Axes, panel: _Panel, series: Series) -> None:
    axis.set_title(panel.heading, loc="left", fontsize=11, pad=18)
    axis.set_ylabel(panel.unit)
    drawn = False
    for curve in panel.curves:
        steps, values = series.get(curve.metric, (np.empty(0), np.empty(0)))
        if not np.isfinite(values).any():
            continue
        drawn = True
        marker = curve.marker or ("o" if len(steps) == 1 else "")
        axis.plot(
            steps,
            values,
            label=curve.label,
            color=curve.colour,
            linestyle=curve.style,
            marker=marker,
            markersize=4,
            linewidth=1.6,
        )
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if not drawn:
        axis.text(0.5, 0.5, "not logged in this run", ha="center", va="center", transform=axis.transAxes)
        axis.set_yticks([])
        return
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
    if panel.log_scale and axis.dataLim.y0 > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif panel.whole:
        axis.set_ylim(0.0, axis.dataLim.y1 * 1.08 or 1.0)


def _shade(axis: Axes, spans: list[tuple[int, float, float]], names: Sequence[str]) -> None:
    for order, (phase, first, last) in enumerate(spans):
        if order % 2:
            axis.axvspan(first, last, color="#000000", alpha=0.05, linewidth=0)
        if order:
            axis.axvline(first, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        share = (last - first) / max(spans[-1][2] - spans[0][1], 1.0)
        name = _fitting(names[phase] if phase < len(names) else f"phase {phase + 1}", share)
        place = axis.get_xaxis_transform()
        axis.text((first + last) / 2, 1.02, name, transform=place, ha="center", fontsize=9, color=_GREY)


def _fitting(name: str, share: float) -> str:
    """The name, shortened to a phase's share of the axis so that neighbours do not overlap."""
    room = int(share / _LETTER_SHARE)
    if len(name) <= room:
        return name
    return name[: room - 1].rstrip() + "…" if room > 3 else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the plots of one run's directory and print where they lie."""
    parser = argparse.ArgumentParser(description="Plot a run's metrics.jsonl into RUN_DIR/plots.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--phases", nargs="*", default=(), metavar="NAME", help="the phases' names in order")
    parser.add_argument("--generated", action="store_true", help='say "generated data" in the titles')
    options = parser.parse_args(arguments)
    for path in write_plots(options.run_dir, options.phases, options.generated):
        print(path)


if __name__ == "__main__":
    main()
