"""The whole page: one HTML file that needs no network and may load nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from tools.report_page import sections
from tools.report_page.curves import charts
from tools.report_page.data import page_data
from tools.report_page.pictures import read_album
from tools.report_page.runs import Run, state_of

HERE = Path(__file__).resolve().parent


def build_page(runs: Sequence[Run], now: float) -> str:
    """The report of one run or several, as HTML; `now` is the time in UNIX seconds. Raises OSError."""
    states = [state_of(run, now) for run in runs]
    grouped = {group: made for group, made in charts(runs).items() if made or group in sections.ALWAYS}
    drawn = [chart for made in grouped.values() for chart in made]
    parts = [sections.header(runs, states, now)]
    links = [(f"group-{group}", group) for group in grouped]
    links += [("plots", "Plots"), ("events", "Events"), ("configuration", "Configuration")]
    parts.append(sections.bar(runs, links))
    told = sections.thinned(drawn)
    if told:
        parts.append(f"<p class=note>{sections.text(told)}</p>")
    first = 0
    for group, made in grouped.items():
        parts.append(sections.section(f"group-{group}", group, sections.curves(made, first, runs)))
        first += len(made)
    albums = [read_album(run.folder) for run in runs]
    parts.append(sections.section("plots", "Plots", sections.pictures(runs, albums)))
    histories = [sections.events(run) for run in runs]
    if len(runs) > 1:
        named = zip(runs, histories, strict=True)
        histories = [f"<h3>{sections.text(run.label)}</h3>{history}" for run, history in named]
    parts.append(sections.section("events", "Events", "".join(histories)))
    parts.append(sections.section("configuration", "Configuration", sections.configuration(runs)))
    title = f"{', '.join(run.label for run in runs)}: BitMar report"
    return _document(title, "".join(parts), page_data(runs, drawn))


def _document(title: str, body: str, data: str) -> str:
    """The page around its parts. Its policy lets these two scripts run, and nothing be loaded."""
    library, drawing = get_plotlyjs(), (HERE / "draw.js").read_text(encoding="utf-8")
    style = (HERE / "style.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {_allowed(library)} {_allowed(drawing)}; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{sections.text(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>{body}</main>
<noscript><p class=note>The curves are drawn by JavaScript, which is switched off.</p></noscript>
<script type="application/json" id="page-data">{data}</script>
<script>{library}</script>
<script>{drawing}</script>
</body>
</html>
"""


def _allowed(script: str) -> str:
    """A script's entry in the policy. Raises ValueError where the browser would read it as another text."""
    if "\r" in script or "</script" in script.lower():
        raise ValueError("a script of the page holds a carriage return or its own end: it would not run")
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
