"""The report of a run's attention heads as a Markdown page with pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bitmar.analysis.head_report import (
    MEANINGS,
    REPORT,
    HeadReport,
    draw,
    named_top,
    pattern_rows,
    stability_gap,
    write,
    write_json,
)
from bitmar.analysis.head_statistics import KindAnalysis, mean, movers
from bitmar.analysis.history_plots import FIGURE_LABELS, shown_kind

_ROWS = 30  # of a table of heads
_NAMES = 20  # of heads in a row


def write_report(report: HeadReport, folder: Path) -> list[Path]:
    """Write page, JSON and pictures into `folder`, made where missing; the paths of the first two. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / f"{REPORT}.md", folder / f"{REPORT}.json"
    pictures = draw(report, folder)
    write_json(report, numbers)
    write(page, as_markdown(report, pictures))
    return [page, numbers]


def as_markdown(report: HeadReport, pictures: Mapping[str, str]) -> str:
    """`pictures`: name -> file beside the page (`draw`)."""
    parts = [
        *_head(report),
        *_consistency(report, pictures),
        *_stability(report, pictures),
        *_layers(report, pictures),
        *_rise(report, pictures),
        *_dead(report),
        *_patterns(report, pictures),
    ]
    return "\n\n".join(parts) + "\n"


def _head(report: HeadReport) -> Iterator[str]:
    history = report.history
    yield f"# Attention heads of {_text(report.run)}"
    first, last, count = history.steps[0], history.steps[-1], len(history.steps)
    steps = f"{count} analysis steps, from {first:,} to {last:,}" if count > 1 else f"One analysis step, {first:,}"
    yield (
        f"{steps}; the top {report.top_k} of each kind of attention. `encoder.L2H3` is head 3 of layer 2, both counted "
        f"from 0. All numbers: [{REPORT}.json]({REPORT}.json)."
    )
    if history.left_out:
        total = count + len(history.left_out)
        yield f"**{len(history.left_out)} of {total} files left out of all that follows:**"
        yield _table(("file", "why"), ((_text(left.file), left.why) for left in history.left_out))
    rows = []
    for a in report.kinds:
        best = ", ".join(f"L{h.layer}H{h.head} ({_share(a.consistency[p])})" for p, h in named_top(a)[:3])
        dead = str(a.dead[-1].sum()) if len(a.steps) else "-"
        size = f"{a.layers} x {a.heads}"
        rows.append(
            (shown_kind(a.kind), size, str(len(a.steps)), best or "-", _number(float(mean(a.to_previous, 0))), dead)
        )
    yield _table(
        ("kind", "layers x heads", "steps measured", "most consistent", "stability", "dead at the last step"), rows
    )
    yield MEANINGS["importance"]


def _consistency(report: HeadReport, pictures: Mapping[str, str]) -> Iterator[str]:
    yield "## Consistency"
    yield MEANINGS["consistency"]
    for a in report.kinds:
        yield f"### {shown_kind(a.kind)}"
        if not len(a.steps):
            yield "The importance of these heads was not measured."
            continue
        if a.top_k >= a.layers * a.heads:
            yield f"The top {a.top_k} has room for all of them: a smaller `--top_k` tells more of consistency."
        yield from _picture(pictures, f"consistency_{a.kind}", f"Consistency of {a.kind} heads, layer x head")
        yield from _heads(a)


def _heads(a: KindAnalysis) -> Iterator[str]:
    importance, ranks, found = mean(a.importance, 0), mean(a.ranks, 0), named_top(a)
    rows = []
    for place, head in found[:_ROWS]:
        steps = a.steps[a.top[:, place]]
        numbers = (_share(a.consistency[place]), _number(importance[place]), f"{ranks[place]:.1f}")
        rows.append((str(head), *numbers, f"{steps[0]:,}", f"{steps[-1]:,}"))
    if rows:
        columns = (
            "head",
            "consistency",
            "mean importance, nats",
            "mean rank",
            "first step in the top",
            "last step in it",
        )
        yield _table(columns, rows)
    more = f" The table shows the first {_ROWS} of them." if len(found) > _ROWS else ""
    missing = int(np.isnan(a.consistency).sum())
    never = f"; {missing} were never measured" if missing else ""
    yield f"{len(found)} of {a.layers * a.heads} heads were in the top at some step{never}.{more}"


def _stability(report: HeadReport, pictures: Mapping[str, str]) -> Iterator[str]:
    yield "## Stability"
    yield MEANINGS["stability"]
    yield from _picture(pictures, "stability", "Rank correlation over the steps")
    rows = []
    for a in report.kinds:
        if not np.isfinite(a.to_previous).any():
            rows.append((shown_kind(a.kind), stability_gap(a), "-", "-"))
            continue
        lowest = int(np.nanargmin(a.to_previous))
        low = f"{_number(a.to_previous[lowest])} (step {a.steps[lowest]:,})"
        rows.append((shown_kind(a.kind), _number(float(mean(a.to_previous, 0))), low, _number(a.to_last[0])))
    yield _table(("kind", "with the step before, mean", "lowest", "first step with the last"), rows)


def _layers(report: HeadReport, pictures: Mapping[str, str]) -> Iterator[str]:
    yield "## Layers"
    yield MEANINGS["layers"]
    yield from _picture(pictures, "layers", "Importance and top heads by layer")
    for a in report.kinds:
        if a.layers == 1 or not len(a.steps):
            continue
        yield f"### {shown_kind(a.kind)} by layer"
        share = mean(a.layer_share, 0)
        rows = (
            (
                str(layer),
                _share(share[layer]),
                _share(a.layer_share[-1, layer]),
                f"{a.layer_top[:, layer].mean():.1f}",
                str(a.layer_top[-1, layer]),
            )
            for layer in range(a.layers)
        )
        yield _table(
            ("layer", "importance share, mean", "at the last step", "top heads, mean", "at the last step"), rows
        )
    single = [shown_kind(a.kind) for a in report.kinds if a.layers == 1]
    if single:
        yield f"One layer only: {', '.join(single)}."


def _rise(report: HeadReport, pictures: Mapping[str, str]) -> Iterator[str]:
    yield "## Heads that rose and fell"
    yield MEANINGS["rise"]
    yield from _picture(pictures, "rise_and_fall", "The largest changes of rank")
    rows = []
    for a in report.kinds:
        for word, places in zip(("rose", "fell"), movers(a), strict=True):
            for place in places:
                ranks = (f"{a.early_rank[place]:.1f}", f"{a.late_rank[place]:.1f}", f"{a.rise[place]:+.1f}")
                rows.append((str(a.name(place)), word, *ranks))
    if rows:
        yield _table(("head", "", "rank, first quarter", "rank, last quarter", "rise"), rows)
    elif all(len(a.steps) < 2 for a in report.kinds):
        yield "This needs two analysis steps at which importance was measured."
    else:
        yield "No head's rank changed."


def _dead(report: HeadReport) -> Iterator[str]:
    yield "## Dead heads"
    yield MEANINGS["dead"]
    rows = []
    for a in report.kinds:
        if len(a.steps):
            last, always = np.flatnonzero(a.dead[-1]).tolist(), np.flatnonzero(a.dead.all(0)).tolist()
            rows.append((shown_kind(a.kind), *_counted(a, last), *_counted(a, always), f"{a.dead.sum(1).max()}"))
    if rows:
        yield _table(("kind", "at the last step", "which", "at every step", "which", "most at a step"), rows)


def _counted(a: KindAnalysis, places: Sequence[int]) -> tuple[str, str]:
    names = [f"L{a.name(place).layer}H{a.name(place).head}" for place in places[:_NAMES]]
    more = f" and {len(places) - _NAMES} more" if len(places) > _NAMES else ""
    return str(len(places)), (", ".join(names) + more) or "-"


def _patterns(report: HeadReport, pictures: Mapping[str, str]) -> Iterator[str]:
    if not report.patterns:
        return
    kinds = " and ".join(shown_kind(kind) for kind in report.patterns)
    yield f"## {kinds} over training"
    yield MEANINGS["patterns"]
    yield from _picture(pictures, "patterns", "Importance, entropy and concentration over the steps")
    rows = []
    for kind, name, numbers in pattern_rows(report):
        rows.append((shown_kind(kind), f"{FIGURE_LABELS[name][0]}, {FIGURE_LABELS[name][1]}", *map(_number, numbers)))
    yield _table(
        ("kind", "mean over the heads", "first quarter", "last quarter", "last step", "lowest", "highest"), rows
    )


def _picture(pictures: Mapping[str, str], name: str, text: str) -> Iterator[str]:
    if name in pictures:
        yield f"![{text}]({pictures[name]})"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (columns, ("---",) * len(columns), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(text: str) -> str:
    """A name from outside, so that nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", " ".join(text.split()))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.0f} %"
