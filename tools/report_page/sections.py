"""The parts of the page as HTML. Everything that comes from a run's files goes through `text`."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tools.report_page.configs import ABSENT, differences
from tools.report_page.curves import GROUPS, MAX_POINTS, Chart
from tools.report_page.data import COLOURS
from tools.report_page.headline import headline
from tools.report_page.pictures import Album
from tools.report_page.runs import Run, State, clock

GENERATED = "GENERATED data{}: these losses say nothing about real captions."
ALWAYS = GROUPS[:5]  # groups that have a section even where nothing was logged
MAX_EVENTS = 400  # of a run on the page: the first ones and the last ones
_FIRST_EVENTS = 50
_GAPS_TOLD = 6
_TROUBLE = {
    *("warning", "error", "data_error", "not_finite", "skipped_update", "loss_spike", "went_back"),
    *("checkpoint_failed", "checkpoint_passed_over", "damaged_sample"),
}


def text(value: object) -> str:
    """Escaped for an element or a quoted attribute."""
    return html.escape(str(value))


def colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table in a box of its own that scrolls; cells are HTML already."""
    top = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    opening = f'<div class="scroll {kind}" tabindex=0><table><thead><tr>{top}</tr></thead>'
    return f"{opening}<tbody>{body}</tbody></table></div>"


def header(runs: Sequence[Run], states: Sequence[State], now: float) -> str:
    """Names, states, what the data is, and the key numbers: tiles for one run, a table for several."""
    names = ", ".join(run.label for run in runs)
    parts = [f"<p class=kind>BitMar {'run' if len(runs) == 1 else f'comparison of {len(runs)} runs'}</p>"]
    parts.append(f"<h1>{text(names)}</h1>")
    if any(run.data == "generated" for run in runs):
        which = [run.label for run in runs if run.data == "generated"]
        of = "" if len(which) == len(runs) else f" ({', '.join(which)})"
        parts.append(f"<p class=banner>{text(GENERATED.format(of))}</p>")
    if len(runs) == 1:
        parts.append(f"<p>{_state(states[0])}</p>{_notes(runs[0])}{_phases(runs[0])}")
        tiles = (
            f"<div class=tile><dt>{text(n.label)}</dt><dd>{text(n.value)}<small>{text(n.about)}</small></dd></div>"
            for n in headline(runs[0])
        )
        parts.append(f"<dl class=tiles>{''.join(tiles)}</dl>")
    else:
        parts += [_numbers(runs, states), *(_notes(run, run.label) for run in runs)]
    data = f"Data: {runs[0].data or 'generated or given is told at the end of a run'}. " if len(runs) == 1 else ""
    parts.append(f"<p class=quiet>{text(data)}Written {text(clock(now))}.</p>")
    return f"<header>{''.join(parts)}</header>"


def _state(state: State) -> str:
    return f'<span class="state {text(state.word)}">{text(state.word)}</span> {text(state.text)}'


def _notes(run: Run, label: str = "") -> str:
    told = f"{text(label)}: " if label else ""
    return "".join(f"<p class=note>{told}{text(note)}</p>" for note in run.notes)


def _phases(run: Run) -> str:
    phases = run.phases()
    if len(phases) < 2:
        return ""
    told = ", ".join(f"{name} {step:,}" for name, step in phases)
    return f"<p class=quiet>Phases (dotted lines) by the first step logged: {text(told)}.</p>"


def _numbers(runs: Sequence[Run], states: Sequence[State]) -> str:
    """A column a run, a row a number."""
    numbers = [{number.label: number for number in headline(run)} for run in runs]
    head = ["", *(f"<i class=dot style='background:{colour(at)}'></i>{text(run.label)}" for at, run in enumerate(runs))]
    rows = [["State", *(_state(state) for state in states)]]
    rows.append(["Data", *(text(run.data or "not told yet") for run in runs)])
    for label in dict.fromkeys(label for each in numbers for label in each):
        cells = []
        for each in numbers:
            number = each.get(label)
            about = f"<small>{text(number.about)}</small>" if number else ""
            cells.append(f"<b>{text(number.value)}</b>{about}" if number else "<span class=quiet>none</span>")
        rows.append([text(label), *cells])
    return table(head, rows, "numbers")


def bar(runs: Sequence[Run], links: Sequence[tuple[str, str]]) -> str:
    """What stays on the screen: links to the sections, and for several runs a switch for each."""
    anchors = "".join(f'<a href="#{text(anchor)}">{text(title)}</a>' for anchor, title in links)
    switches = ""
    if len(runs) > 1:
        switches = "".join(
            f'<label><input type=checkbox checked data-run="{at}">'
            f"<i class=dot style='background:{colour(at)}'></i>{text(run.label)}</label>"
            for at, run in enumerate(runs)
        )
        switches = f"<div class=switches>{switches}</div>"
    return f'<nav aria-label="Sections"><div class=links>{anchors}</div>{switches}</nav>'


def section(anchor: str, title: str, content: str, about: str = "") -> str:
    told = f"<p class=quiet>{text(about)}</p>" if about else ""
    return f'<section id="{text(anchor)}"><h2>{text(title)}</h2>{told}{content}</section>'


def curves(charts: Sequence[Chart], first: int, runs: Sequence[Run]) -> str:
    """The charts of one group; draw.js fills them. `first` is the number of the first one on the page."""
    if not charts:
        return "<p class=quiet>Nothing of this was logged.</p>"
    return f"<div class=charts>{''.join(_chart(c, first + at, runs) for at, c in enumerate(charts))}</div>"


def _chart(chart: Chart, number: int, runs: Sequence[Run]) -> str:
    about = [chart.meaning]
    if chart.members:
        about.append(f"pale to dark: {chart.members[0]} to {chart.members[-1]}")
    told = "; ".join(part for part in about if part)
    gaps = "; ".join(_gaps(chart, runs))
    warning = f"<p class=trouble>NOT FINITE, drawn as gaps: {text(gaps)}</p>" if gaps else ""
    values = np.concatenate([line.series.values for line in chart.lines])
    positive = bool((values[np.isfinite(values)] > 0).all()) and bool(np.isfinite(values).any())
    button = f"<button type=button class=log data-for={number} aria-pressed=false>log</button>" if positive else ""
    return (
        f'<figure class=chart><figcaption><h3 title="{text(chart.metric)}">{text(chart.title)}</h3>{button}'
        f"<p class=quiet>{text(told)}</p>{warning}</figcaption>"
        f'<div class=plot data-chart={number} role=img aria-label="{text(chart.metric)} by step"></div></figure>'
    )


def _gaps(chart: Chart, runs: Sequence[Run]) -> Iterator[str]:
    """Where values were not finite: the curve has a gap there."""
    for at, run in enumerate(runs):
        steps: set[int] = set()
        for line in chart.lines:
            if line.run == at:
                steps.update(line.whole.steps[~np.isfinite(line.whole.values)].tolist())
        if steps:
            listed = ", ".join(f"{step:,}" for step in sorted(steps)[:_GAPS_TOLD])
            more = f" and {len(steps) - _GAPS_TOLD:,} more" if len(steps) > _GAPS_TOLD else ""
            of = f"{run.label}: " if len(runs) > 1 else ""
            yield f"{of}step {listed}{more}"


def thinned(charts: Sequence[Chart]) -> str:
    """What the page says of curves that were thinned; nothing where none was."""
    longest = max((len(line.whole.steps) for chart in charts for line in chart.lines), default=0)
    if longest <= MAX_POINTS:
        return ""
    return (
        f"Curves are thinned to {MAX_POINTS:,} points at most (the longest has {longest:,}): of each stretch the "
        "smallest and the largest value are drawn, so spikes remain. --csv writes every point."
    )


def pictures(runs: Sequence[Run], albums: Sequence[Album]) -> str:
    """The PNGs by kind, the runs' side by side, and what was left out."""
    kinds = sorted({picture.kind for album in albums for picture in album.pictures}, key=lambda k: (k[:4] != "plot", k))
    shown = []
    for kind in kinds:
        for run, album in zip(runs, albums, strict=True):
            for picture in (p for p in album.pictures if p.kind == kind):
                caption = text(f"{run.label}: {picture.name}" if len(runs) > 1 else picture.name)
                shown.append(
                    f'<figure class=picture><button type=button class=large aria-label="Enlarge {caption}">'
                    f'<img alt="{caption}" src="data:image/png;base64,{picture.content}"></button>'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
    parts = [f"<div class=pictures>{''.join(shown)}</div>"] if shown else []
    for run, album in zip(runs, albums, strict=True):
        of = f"{run.label}: " if len(runs) > 1 else ""
        told = [] if album.pictures else ["no plots; a run draws them while it trains or at its end"]
        told += [f"{album.older} older pictures are left out"] if album.older else []
        told += [f"damaged: {', '.join(album.damaged)}"] if album.damaged else []
        told += [f"too large for the page: {', '.join(album.no_room)}"] if album.no_room else []
        parts += [f"<p class=quiet>{text(of + '; '.join(told))}.</p>"] if told else []
    return "".join(parts)


def events(run: Run) -> str:
    """A run's events as a table, in their order."""
    if not run.events:
        return "<p class=quiet>No events.</p>"
    shown = list(run.events)
    left_out = max(0, len(shown) - MAX_EVENTS)
    if left_out:
        shown = shown[:_FIRST_EVENTS] + shown[_FIRST_EVENTS + left_out :]
    rows = [_event(event) for event in shown]
    told = f"<p class=quiet>{left_out:,} events in the middle are left out; events.jsonl has all.</p>"
    return (told if left_out else "") + table(("Time (UTC)", "Event", "Step", "Details"), rows, "events")


def _event(event: dict[str, Any]) -> list[str]:
    kind, time = str(event.get("kind", "")), event.get("time")
    details = {key: value for key, value in event.items() if key not in ("time", "kind", "step")}
    told = "; ".join(f"{key} {_detail(value)}" for key, value in details.items())
    name = f"<b class=trouble>{text(kind)}</b>" if kind in _TROUBLE else text(kind)
    when = text(clock(time).removesuffix(" UTC")) if isinstance(time, int | float) else ""
    return [when, name, text(event.get("step", "")), text(told)]


def _detail(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def configuration(runs: Sequence[Run]) -> str:
    """What differs between the runs, then each one's resolved configuration, folded up."""
    parts = []
    if len(runs) > 1:
        rows = differences([run.config for run in runs])
        head = ["What differs", *(text(run.label) for run in runs)]
        cells = [
            [text(key), *(f"<span class=quiet>{v}</span>" if v == ABSENT else text(v) for v in values)]
            for key, values in rows
        ]
        parts.append(table(head, cells, "differences") if rows else "<p>The configurations are equal.</p>")
    for run in runs:
        title = text(run.label if len(runs) > 1 else "config.yaml, resolved")
        content = "config.yaml is missing." if run.config_text is None else run.config_text
        parts.append(f"<details><summary>{title}</summary><pre tabindex=0>{text(content)}</pre></details>")
    return "".join(parts)
