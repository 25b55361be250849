"""Curves: thinned so that spikes remain, brought together in charts, and as CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from bitmar.observability.schema import find
from tools.report_page.runs import Run, Series

MAX_POINTS = 1000  # of a curve on the page
CSV_COLUMNS = ("run", "step", "metric", "value", "unit")

GROUPS = (
    *("Training", "Validation", "Throughput", "Memory", "Attention"),
    *("Features", "Quantization", "Gradients", "Model", "System", "Data"),
)
UNKNOWN_UNIT = "unit unknown"
_LAST_NUMBER = re.compile(r"([A-Za-z]*)([_-]?)(\d+)(?!.*\d)")


@dataclass(frozen=True)
class Line:
    """One metric of one run in a chart; `place` of `places` among the chart's metrics, such as a layer of all."""

    run: int
    label: str  # of the metric among the chart's others; "" where it is alone
    place: int
    places: int
    series: Series  # thinned
    whole: Series


@dataclass(frozen=True)
class Chart:
    """The curves that share a pair of axes."""

    metric: str  # "#" in place of the number in which the metrics of a family differ
    unit: str
    meaning: str
    members: tuple[str, ...]  # labels of a family's metrics; empty where there is one metric
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        return self.metric.partition("/")[2].replace("_", " ")


def thin(series: Series, most: int = MAX_POINTS) -> Series:
    """At most `most` points: of each stretch the smallest and the largest value, and a gap where it has one.

    The first and the last point stay. Each point is one of the series', at its own step.
    """
    assert most >= 5, "a stretch has up to three points, besides both ends"
    count = len(series.steps)
    if count <= most:
        return series
    finite = np.isfinite(series.values)
    stretches = (most - 2) // (2 if finite.all() else 3)
    kept = {0, count - 1}
    for part in np.array_split(np.arange(count), stretches):
        known = part[finite[part]]
        if len(known):
            values = series.values[known]
            kept |= {int(known[values.argmin()]), int(known[values.argmax()])}
        if len(known) < len(part):
            kept.add(int(part[~finite[part]][0]))
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])


def charts(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """The charts of each group, groups and metrics in their order; metrics that differ in their last number only, such
    as the layers of one kind, share a chart."""
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_LAST_NUMBER.sub(r"\1\2#", name), []).append(name)
    found: dict[str, list[Chart]] = {group: [] for group in GROUPS}
    for family, members in families.items():
        if len({unit_of(name) for name in members}) > 1:  # nothing to share an axis
            made = [_chart(name, [name], runs) for name in members]
        else:
            made = [_chart(family if len(members) > 1 else members[0], sorted(members, key=_number), runs)]
        found.setdefault(family.partition("/")[0], []).extend(made)
    return found


def _chart(title: str, members: list[str], runs: Sequence[Run]) -> Chart:
    metric = find(members[0])
    told = tuple(_member(name) for name in members) if len(members) > 1 else ()
    lines = [
        Line(at, told[place] if told else "", place, len(members), thin(run.series[name]), run.series[name])
        for at, run in enumerate(runs)
        for place, name in enumerate(members)
        if name in run.series
    ]
    return Chart(title, unit_of(members[0]), metric.meaning if metric else "", told, tuple(lines))


def unit_of(name: str) -> str:
    """A metric's unit by the schema."""
    metric = find(name)
    return metric.unit if metric is not None else UNKNOWN_UNIT


def _number(name: str) -> int:
    found = _LAST_NUMBER.search(name)
    return int(found[3]) if found else 0


def _member(name: str) -> str:
    """ "layer 3" of Attention/Encoder_layer_3_Entropy."""
    found = _LAST_NUMBER.search(name)
    return f"{found[1]} {found[3]}".strip() if found else name


def write_csv(out: IO[str], runs: Iterable[Run]) -> None:
    """Every point of every curve, a row each: run, step, metric, value, unit. A value that was not finite is empty; a
    unit that the schema does not know too."""
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(CSV_COLUMNS)
    for run in runs:
        for name, series in run.series.items():
            metric = find(name)
            unit = metric.unit if metric is not None else ""
            for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                rows.writerow((run.label, step, name, repr(value) if np.isfinite(value) else "", unit))
