"""Pictures of what the heads of a run did over training (bitmar/analysis/head_statistics.py). L layers, H heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bitmar.analysis.head_statistics import KindAnalysis, mean, movers
from bitmar.head_names import TITLES
from bitmar.observability import drawing as d

FIGURE_LABELS = {
    "Importance": ("Importance", "nats"),
    "Entropy": ("Entropy over the keys", "nats"),
    "Concentration": ("Mass on the top tenth of the keys", "share of mass"),
}
_TICKS = [1, 2, 5, 10]
_PALE = "#bbbbbb"
_FEW_STEPS = 30  # with a marker each


def shown_kind(kind: str) -> str:
    """As a heading: Cross-modal."""
    return d.kind_name(TITLES[kind])


def _colour(kind: str) -> str:
    return d.KIND_COLOURS[TITLES[kind]]


@d.styled
def consistency_figure(about: d.About, a: KindAnalysis) -> Figure:
    """How often each head is in the top, layer x head."""
    figure = d.new_figure(
        about, f"Heads in the top {a.top_k}: {shown_kind(a.kind)}", 1.6 + min(0.24 * a.layers + 0.6, 6.3)
    )
    axis = figure.subplots()
    share = 100 * a.consistency.reshape(a.layers, a.heads)
    axis.set_facecolor(_PALE)
    picture = axis.imshow(
        np.ma.masked_invalid(share), cmap="viridis", vmin=0.0, vmax=100.0, aspect="auto", interpolation="nearest"
    )
    axis.set_xticks(d.every(a.heads, 16))
    axis.set_yticks(d.every(a.layers, 24))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    unknown = int(np.isnan(share).sum())
    of = f"of {a.layers} x {a.heads} heads, at {len(a.steps):,} analysis steps"
    axis.set_title(of + (f"; grey: {unknown} never measured" if unknown else ""))
    bar = figure.colorbar(picture, ax=axis, label="share of steps", aspect=15, pad=0.02, format=d.PERCENT)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    return figure


@d.styled
def stability_figure(about: d.About, analyses: Sequence[KindAnalysis]) -> Figure | None:
    """Rank correlation of importance with the step before and with the last, over the steps. None: of no kind."""
    shown = [a for a in analyses if np.isfinite(a.to_previous).any()]
    if not shown:
        return None
    figure = d.new_figure(about, "How stable the order of the heads is", 1.6 + 1.9 * len(shown))
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axis, a in zip(axes, shown, strict=True):
        lines = (("with the step before", a.to_previous, d.BLUE, "o"), ("with the last step", a.to_last, d.RED, "s"))
        for label, values, colour, marker in lines:
            kept = d.thinned(values)
            few = marker if len(a.steps) < _FEW_STEPS else ""
            axis.plot(a.steps[kept], values[kept], color=colour, label=label, marker=few)
        axis.set_title(f"{shown_kind(a.kind)}: {a.layers * a.heads} heads")
        axis.set_ylabel("Spearman's rho")
        low = min(float(np.nanmin([a.to_previous, a.to_last])), 0.0)
        axis.set_ylim(low - 0.05, 1.05)
        axis.yaxis.set_major_locator(MaxNLocator(4, steps=_TICKS))
        axis.grid(True)
    d.step_axis(axes[-1], 0.0, float(max(a.steps[-1] for a in shown)))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


@d.styled
def layers_figure(about: d.About, analyses: Sequence[KindAnalysis]) -> Figure | None:
    """Each layer's part of the importance, and of the top. None: no kind has several layers."""
    shown = [a for a in analyses if a.layers > 1 and len(a.steps)]
    if not shown:
        return None
    figure = d.new_figure(about, "Where in the model the importance lies", 1.6 + 2.2 * len(shown))
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for pair, a in zip(axes, shown, strict=True):
        panels = (
            (pair[0], f"{shown_kind(a.kind)}: importance", "share of all", 100 * a.layer_share),
            (pair[1], f"heads of the top {a.top_k}", "heads", a.layer_top.astype(float)),
        )
        for axis, heading, unit, values in panels:
            places = np.arange(a.layers)
            axis.bar(places, mean(values, 0), color=_colour(a.kind), alpha=0.55, width=0.75)
            axis.plot(places, values[-1], color=d.BLACK, linestyle="", marker="o", clip_on=False)
            axis.set_title(heading)
            axis.set_ylabel(unit)
            axis.set_xticks(d.every(a.layers, 12))
            axis.set_ylim(0.0, axis.dataLim.y1 * 1.1 or 1.0)
            axis.yaxis.set_major_locator(MaxNLocator(4, steps=_TICKS))
            axis.grid(True, axis="y")
        pair[0].yaxis.set_major_formatter(d.PERCENT)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    bar = Patch(color=d.GREY, alpha=0.55, label="mean over the steps")
    dot = Line2D([], [], color=d.BLACK, linestyle="", marker="o", label="last step")
    figure.legend(handles=[bar, dot], loc="outside lower center", ncols=2)
    return figure


@d.styled
def movers_figure(about: d.About, analyses: Sequence[KindAnalysis]) -> Figure | None:
    """The heads whose rank changed most. None: of no kind."""
    shown = [(a, rose, fell) for a in analyses for rose, fell in [movers(a)] if rose or fell]
    if not shown:
        return None
    rows = [len(rose) + len(fell) for _, rose, fell in shown]
    figure = d.new_figure(about, "Heads that rose and fell", 1.5 + sum(0.24 * row + 0.75 for row in rows))
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[row + 1 for row in rows])[:, 0]
    for axis, (a, rose, fell) in zip(axes, shown, strict=True):
        places = [*rose, *fell[::-1]]
        change = a.rise[places]
        rows_at = np.arange(len(places))
        axis.barh(rows_at, change, color=np.where(change > 0, d.BLUE, d.RED), height=0.7)
        names = [f"L{place // a.heads}H{place % a.heads}" for place in places]
        ranks = [f"{a.early_rank[place]:.0f} → {a.late_rank[place]:.0f}" for place in places]
        axis.set_yticks(rows_at, [f"{name}   {rank}" for name, rank in zip(names, ranks, strict=True)])
        axis.invert_yaxis()
        axis.axvline(0.0, color=d.GREY, linewidth=0.8)
        axis.set_title(f"{shown_kind(a.kind)}: head, its rank of {np.isfinite(a.rise).sum()} early → late")
        axis.grid(True, axis="x")
        axis.tick_params(axis="y", length=0)
        axis.xaxis.set_major_locator(MaxNLocator(7, steps=_TICKS, integer=True))
    axes[-1].set_xlabel("ranks risen (right) or fallen (left), first to last quarter of the steps")
    return figure


@d.styled
def patterns_figure(
    about: d.About, steps: np.ndarray, figures: Mapping[str, Mapping[str, np.ndarray]]
) -> Figure | None:
    """Importance, entropy and concentration of each kind's heads over the steps. None: nothing was measured.

    `figures`: kind -> figure -> [N, L, H].
    """
    kinds = [kind for kind, found in figures.items() if any(np.isfinite(x).any() for x in found.values())]
    if not kinds:
        return None
    figure = d.new_figure(about, "Attention over training: " + ", ".join(map(shown_kind, kinds)), 7.6)
    axes = figure.subplots(len(FIGURE_LABELS), len(kinds), sharex=True, squeeze=False)
    for column, kind in enumerate(kinds):
        for row, (name, (heading, unit)) in enumerate(FIGURE_LABELS.items()):
            axis, values = axes[row, column], figures[kind][name].reshape(len(steps), -1)
            axis.set_title(heading if row else f"{shown_kind(kind)}: {heading.lower()}")
            if not np.isfinite(values).any():
                d.say(axis, "not measured in this run")
                continue
            _lines(axis, steps, values * (100.0 if name == "Concentration" else 1.0), _colour(kind))
            axis.set_ylabel(unit)
            if name == "Concentration":
                axis.yaxis.set_major_formatter(d.PERCENT)
        d.step_axis(axes[-1, column], 0.0, float(steps[-1]))
    head, middle = Line2D([], [], color=_PALE), Line2D([], [], color=d.GREY, linewidth=2.0)
    figure.legend([head, middle], ["a head", "mean of the heads"], loc="outside lower center", ncols=2)
    return figure


def _lines(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """[N, P]: a thin line a head, a thick one for their mean."""
    marker = "o" if len(steps) < _FEW_STEPS else ""
    if values.shape[1] > 1:
        for line in values.T:
            kept = d.thinned(line)
            axis.plot(steps[kept], line[kept], color=_PALE, linewidth=0.7, marker=marker, markersize=2.5)
    middle = mean(values, 1)
    kept = d.thinned(middle)
    axis.plot(steps[kept], middle[kept], color=colour, marker=marker)
    axis.set_ylim(0.0, axis.dataLim.y1 * 1.08 or 1.0)
    axis.yaxis.set_major_locator(MaxNLocator(4, steps=_TICKS))
    axis.grid(True)
