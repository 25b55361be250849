"""The report of a run's attention heads: a short summary, everything as JSON, and the files with their pictures.

The page for reading is bitmar/analysis/head_page.py's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitmar.analysis import history_plots
from bitmar.analysis.head_statistics import KindAnalysis, analyse, first_and_last, mean, movers, order_of
from bitmar.analysis.history import FIGURES, History, read_history
from bitmar.head_names import KINDS
from bitmar.observability.drawing import About, save
from bitmar.observability.schema import DEAD_SHARE

REPORT = "attention_analysis_report"  # .md and .json
ALL = "all"
PATTERN_KINDS = ("cross_modal", "memory")  # whose figures are followed over training
_NAMED = 3  # heads of a kind in the summary

MEANINGS = {
    "importance": (
        "Importance of a head: the mean over the probe set's captions of |gradient of a caption's mean token loss by a "
        "factor of 1 on the head's output|, in nats. Rank 1 is the most important head of its kind at a step; heads "
        "that are equal share the mean of their ranks. Mean importance and mean rank are over the steps at which the "
        "head was measured."
    ),
    "consistency": (
        "Consistency of a head: the share of the analysis steps at which it is in the top, which is to say that fewer "
        "than top_k heads of its kind are more important and that its importance is above 0. Steps at which no head of "
        "the kind was measured do not count; those at which this one alone was missing (pruned) do."
    ),
    "stability": (
        "Stability of a kind: Spearman's rank correlation of its heads' importance at two analysis steps, which is "
        "Pearson's correlation of their ranks, over the heads measured at both. 1: the same order; 0: nothing in "
        "common; -1: the reverse order. It is taken between each step and the one before, and between each step and "
        "the last."
    ),
    "layers": (
        "Importance share of a layer: the importance of its heads at a step over that of all heads of the kind at this "
        "step. Top heads of a layer: how many heads of the top lie in it. The mean is over the analysis steps."
    ),
    "rise": (
        "Rise of a head: its mean rank over the first quarter of the analysis steps (one step at least) minus its mean "
        "rank over the last quarter. Above 0 it rose, below 0 it fell. Ranks are here among the heads measured at all "
        "steps of both quarters, so that no head rises because others were pruned."
    ),
    "dead": (
        f"Dead at a step: a head whose importance is below {100 * DEAD_SHARE:g} % of the mean of its kind's heads at "
        "this step."
    ),
    "patterns": (
        "Over training: the mean over the heads of a kind at each analysis step. Importance as above; entropy of a "
        "head's attention weights over its keys, in nats, mean over the queries (0: all on one key); concentration: "
        "share of the weights' mass on the top tenth of the keys. First and last quarter are means over those steps."
    ),
}


@dataclass(frozen=True)
class HeadReport:
    run: str
    top_k: int
    history: History
    kinds: tuple[KindAnalysis, ...]

    @property
    def patterns(self) -> dict[str, dict[str, np.ndarray]]:
        """kind -> figure -> [N, L, H] of the kinds that are followed over training."""
        chosen = [a.kind for a in self.kinds if a.kind in PATTERN_KINDS]
        return {kind: self.history.figures[kind] for kind in chosen}


def build(directory: Path, attention_type: str, top_k: int) -> HeadReport:
    """Read and analyse an attention_analysis directory: one of KINDS, or ALL that were measured.

    Raises ValueError for a directory that cannot be analysed, a kind that was not measured, and top_k below 1.
    """
    if top_k < 1:
        raise ValueError(f"--top_k must be at least 1, got {top_k}")
    history = read_history(directory)
    if attention_type not in (ALL, *history.figures):
        measured = ", ".join(history.figures)
        raise ValueError(f"{directory}: {attention_type} heads were not measured; measured are {measured}")
    kinds = [kind for kind in KINDS if kind in history.figures and attention_type in (ALL, kind)]
    place = directory.resolve()
    run = place.parent.name if place.name == "attention_analysis" else place.name
    found = [analyse(kind, history.steps, history.figures[kind]["Importance"], top_k) for kind in kinds]
    return HeadReport(run, top_k, history, tuple(found))


def summary(report: HeadReport) -> list[str]:
    """A few lines for a terminal."""
    history, lines = report.history, list[str]()
    first, last = history.steps[0], history.steps[-1]
    count = len(history.steps)
    steps = f"{count} analysis steps, {first:,} to {last:,}" if count > 1 else f"one analysis step, {first:,}"
    lines.append(f"{report.run}: {steps}")
    if history.left_out:
        files = ", ".join(f"{left.file} ({left.why})" for left in history.left_out)
        lines.append(f"left out: {len(history.left_out)} of {count + len(history.left_out)} files: {files}")
    for a in report.kinds:
        if not len(a.steps):
            lines.append(f"{a.kind}: {a.layers} x {a.heads} heads, importance not measured")
            continue
        top = [f"L{head.layer}H{head.head} {a.consistency[place]:.0%}" for place, head in named_top(a)[:_NAMED]]
        stable = float(mean(a.to_previous, 0))
        parts = [
            f"{a.kind}: {a.layers} x {a.heads} heads",
            f"most often in the top {a.top_k}: " + (", ".join(top) or "none"),
            "stability: " + (stability_gap(a) if math.isnan(stable) else f"{stable:.2f}"),
            f"dead at the last step: {a.dead[-1].sum()}",
        ]
        lines.append("; ".join(parts))
    return lines


def named_top(a: KindAnalysis) -> list[tuple[int, Any]]:
    """(place, name) of the heads that were ever in the top, the most consistent first."""
    places = order_of(mean(a.importance, 0), a.consistency)
    return [(place, a.name(place)) for place in places if a.consistency[place] > 0]


def stability_gap(a: KindAnalysis) -> str:
    """Why a kind has no stability."""
    if len(a.steps) < 2:
        return f"needs two analysis steps, there is {'one' if len(a.steps) else 'none'}"
    return "needs two heads whose importance differs"


def as_json(report: HeadReport) -> dict[str, Any]:
    """Everything that the report tells, as what JSON knows: a number that does not exist is None."""
    history = report.history
    return _plain(
        {
            "run": report.run,
            "top_k": report.top_k,
            "steps": history.steps,
            "files": {
                "read": len(history.steps),
                "left_out": [{"file": left.file, "why": left.why} for left in history.left_out],
            },
            "definitions": MEANINGS,
            "kinds": {a.kind: _kind(a) for a in report.kinds},
            "patterns": {
                kind: {"steps": history.steps, **{name.lower(): per_step(found[name]) for name in FIGURES}}
                for kind, found in report.patterns.items()
            },
        }
    )


def _kind(a: KindAnalysis) -> dict[str, Any]:
    steps = [a.steps[column] for column in a.top.T]
    measured = len(a.steps) > 0
    rose, fell = movers(a)
    columns = zip(a.consistency, mean(a.importance, 0), mean(a.ranks, 0), a.early_rank, a.late_rank, strict=True)
    heads = [
        {
            "head": str(a.name(place)),
            "layer": a.name(place).layer,
            "number": a.name(place).head,
            "consistency": consistency,
            "mean_importance": importance,
            "mean_rank": rank,
            "first_top_step": steps[place][0] if len(steps[place]) else None,
            "last_top_step": steps[place][-1] if len(steps[place]) else None,
            "rank_first_quarter": early,
            "rank_last_quarter": late,
            "rise": early - late,
            "dead_share": a.dead[:, place].mean() if measured else None,
        }
        for place, (consistency, importance, rank, early, late) in enumerate(columns)
    ]
    layers = [
        {
            "layer": layer,
            "importance_share": mean(a.layer_share, 0)[layer],
            "importance_share_last": a.layer_share[-1, layer] if measured else None,
            "top_heads": a.layer_top[:, layer].mean() if measured else None,
            "top_heads_last": a.layer_top[-1, layer] if measured else None,
        }
        for layer in range(a.layers)
    ]
    return {
        "layers": a.layers,
        "heads_a_layer": a.heads,
        "steps": a.steps,
        "heads": heads,
        "stability": {
            "to_previous": a.to_previous,
            "to_last": a.to_last,
            "mean_to_previous": mean(a.to_previous, 0),
            "missing": stability_gap(a) if not np.isfinite(a.to_previous).any() else None,
        },
        "layer_distribution": layers,
        "rose": [str(a.name(place)) for place in rose],
        "fell": [str(a.name(place)) for place in fell],
        "dead": {
            "below_share_of_mean": DEAD_SHARE,
            "count": a.dead.sum(1),
            "last_step": [str(a.name(place)) for place in np.flatnonzero(a.dead[-1:].any(0)).tolist()],
            "every_step": [str(a.name(place)) for place in np.flatnonzero(a.dead.all(0)).tolist()] if measured else [],
        },
    }


def per_step(values: np.ndarray) -> np.ndarray:
    """[N, L, H] -> [N]: mean over the heads."""
    return mean(values.reshape(len(values), -1), 1)


def pattern_rows(report: HeadReport) -> list[tuple[str, str, tuple[float, ...]]]:
    """(kind, figure, (first quarter, last quarter, last step, lowest, highest)) of what was measured."""
    rows = []
    for kind, found in report.patterns.items():
        for name in FIGURES:
            values = per_step(found[name])
            values = values[np.isfinite(values)]
            if len(values):
                early, late = first_and_last(values[:, None])
                numbers = (early[0], late[0], values[-1], values.min(), values.max())
                rows.append((kind, name, tuple(map(float, numbers))))
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(report: HeadReport, folder: Path) -> dict[str, str]:
    """Draw the pictures into a folder; picture -> its file's name, of those that the run has data for."""
    about = About(report.run, int(report.history.steps[-1]))
    measured = [a for a in report.kinds if len(a.steps)]
    figures = {
        f"consistency_{a.kind}": history_plots.consistency_figure(about, a) for a in measured if a.layers * a.heads > 1
    }
    figures |= {
        "stability": history_plots.stability_figure(about, measured),
        "layers": history_plots.layers_figure(about, measured),
        "rise_and_fall": history_plots.movers_figure(about, measured),
        "patterns": history_plots.patterns_figure(about, report.history.steps, report.patterns),
    }
    drawn = {}
    for name, figure in figures.items():
        if figure is not None:
            drawn[name] = f"{name}.png"
            save(figure, folder / drawn[name])
    return drawn


def write(path: Path, content: str) -> None:
    """In one move, so that a kill leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(content, encoding="utf-8", newline="\n")
    temporary.replace(path)


def write_json(report: HeadReport, path: Path) -> None:
    write(path, json.dumps(as_json(report), allow_nan=False, ensure_ascii=False, indent=1) + "\n")
