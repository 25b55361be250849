"""A run's folder as a report needs it, also of a run that died before it wrote much."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bitmar.observability.records import EVENTS_FILE, METRICS_FILE, read_lines
from bitmar.observability.schema import STEP_METRIC
from tools.report_page.redaction import Redactor

CONFIG_FILE, SUMMARY_FILE, LOG_FILE = "config.yaml", "summary.json", "log.txt"
RUN_FILES = (CONFIG_FILE, METRICS_FILE, EVENTS_FILE, LOG_FILE, SUMMARY_FILE)

# A run that has written nothing for so long, and for so many times the pause between its last two logs, is dead.
PATIENCE_S = 900.0
PATIENCE_PAUSES = 3
_BEGINNINGS = ("start", "resume", "went_back")


class ReportError(ValueError):
    """What a user asked for cannot be done; the message is one line."""


@dataclass(frozen=True)
class Series:
    """One metric of one run: steps int64 [N], values float64 [N], NaN where the value was not finite."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class State:
    """How a run stands: `word` is finished, stopped, failed, died or running; `text` goes on from it."""

    word: str
    text: str


@dataclass(frozen=True)
class Run:
    """What a run's folder holds. Secrets are struck out of every text in it."""

    label: str  # short, and its own among the runs of a page
    folder: Path
    series: dict[str, Series] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    config: Any = None  # the parsed config.yaml; None: there is none that can be parsed
    config_text: str | None = None
    summary: dict[str, Any] | None = None
    log_times: tuple[float, ...] = ()  # of the lines of metrics.jsonl, UNIX seconds
    written: float = 0.0  # when a file of the run was last written, UNIX seconds
    notes: tuple[str, ...] = ()  # what is missing or damaged

    @property
    def since_start(self) -> list[dict[str, Any]]:
        """The events of the last start; those before it may be of steps that were taken back."""
        starts = [at for at, event in enumerate(self.events) if event.get("kind") in _BEGINNINGS]
        return self.events[starts[-1] :] if starts else self.events

    @property
    def last_step(self) -> int | None:
        """The last step that a file tells of; None where there is none."""
        steps = [int(series.steps[-1]) for series in self.series.values()]
        steps += [event["step"] for event in self.since_start if isinstance(event.get("step"), int)]
        return max(steps, default=None)

    @property
    def seconds(self) -> float | None:
        """From the first to the last line with a time, pauses between starts included."""
        times = [*self.log_times, *(t for event in self.events if isinstance(t := event.get("time"), int | float))]
        return max(times) - min(times) if times else None

    @property
    def data(self) -> str | None:
        """ "generated" or "given"; None while nothing tells."""
        told = (self.summary or {}).get("data")
        return told or next((e["data"] for e in reversed(self.events) if isinstance(e.get("data"), str)), None)

    def last(self, metric: str) -> tuple[int, float] | None:
        """(step, value) of a metric's last finite value."""
        series = self.series.get(metric)
        known = np.flatnonzero(np.isfinite(series.values)) if series is not None else np.empty(0, int)
        if series is None or not len(known):
            return None
        return int(series.steps[known[-1]]), float(series.values[known[-1]])

    def phases(self) -> list[tuple[str, int]]:
        """(name, first logged step) of each stretch of one phase."""
        series = self.series.get("Training/Phase")
        if series is None:
            return []
        given = self.config.get("phases") if isinstance(self.config, dict) else None
        names = [str(p.get("name")) for p in given if isinstance(p, dict)] if isinstance(given, list) else []
        found: list[tuple[str, int]] = []
        before = None
        for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
            if math.isfinite(value) and value != before:
                index, before = int(value), value
                found.append((names[index] if 0 <= index < len(names) else f"phase {index + 1}", step))
        return found


def labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, each with as many of its parents as it takes to tell them apart.

    Raises ReportError where a folder is given twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for at, whole in enumerate(parts):
        if whole in parts[:at]:
            raise ReportError(f"{folders[at]} is given twice; give each run once")
    depth = [1] * len(parts)
    while True:
        told = ["/".join(whole[-deep:]) for whole, deep in zip(parts, depth, strict=True)]
        twins = [at for at, label in enumerate(told) if told.count(label) > 1 and depth[at] < len(parts[at])]
        if not twins:
            return told
        for at in twins:
            depth[at] += 1


def read_runs(folders: Sequence[Path], redactor: Redactor) -> list[Run]:
    """The runs of these folders. Raises ReportError for what is no run, ValueError for a damaged file of one."""
    return [read_run(folder, label, redactor) for folder, label in zip(folders, labels(folders), strict=True)]


def read_run(folder: Path, label: str, redactor: Redactor) -> Run:
    """One run. Raises ReportError, ValueError."""
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder; give a run's folder, such as runs/demo")
    there = [folder / name for name in RUN_FILES if (folder / name).is_file()]
    if not there:
        raise ReportError(f"{folder} holds no run: none of {', '.join(RUN_FILES)} is in it")
    try:
        series, times = _read_metrics(folder / METRICS_FILE, redactor)
        config, text = _read_config(folder / CONFIG_FILE, redactor)
        return Run(
            label=redactor.text(label),
            folder=folder,
            series=series,
            events=[redactor.value(event) for event in read_lines(folder / EVENTS_FILE)],
            config=config,
            config_text=text,
            summary=_read_summary(folder / SUMMARY_FILE, redactor),
            log_times=times,
            written=max(path.stat().st_mtime for path in there),
            notes=tuple(_notes(folder, config, text)),
        )
    except OSError as error:
        raise ReportError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def _read_metrics(path: Path, redactor: Redactor) -> tuple[dict[str, Series], tuple[float, ...]]:
    """metrics.jsonl by metric, and the times of its lines. Raises ValueError."""
    steps: dict[str, array[int]] = {}  # arrays: a long run has millions of points
    values: dict[str, array[float]] = {}
    times = []
    for fields in read_lines(path):
        step = fields.get(STEP_METRIC)
        if not isinstance(step, int):
            raise ValueError(f"{path}: a line has no whole number as {STEP_METRIC}: {str(fields)[:80]}")
        if isinstance(fields.get("time"), int | float):
            times.append(float(fields["time"]))
        for name, value in fields.items():
            if "/" not in name or name == STEP_METRIC:  # "time", "nonfinite"; the step is the axis
                continue
            if value is not None and not isinstance(value, int | float):
                raise ValueError(f"{path}: {name} at step {step} is neither a number nor null: {str(value)[:40]!r}")
            steps.setdefault(name, array("q")).append(step)
            values.setdefault(name, array("d")).append(math.nan if value is None else value)
    series = {
        redactor.text(name): Series(np.array(steps[name], dtype=np.int64), np.array(values[name])) for name in steps
    }
    return series, tuple(times)


def _read_config(path: Path, redactor: Redactor) -> tuple[Any, str | None]:
    """(the parsed configuration, its text); the text alone where it is no YAML, nothing where there is none."""
    if not path.is_file():
        return None, None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = redactor.value(yaml.safe_load(text))
    except yaml.YAMLError:
        return None, redactor.text(text)
    return config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)


def _read_summary(path: Path, redactor: Redactor) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it, and the run counts as one without an end") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{path} is not a JSON object; remove it, and the run counts as one without an end")
    return redactor.value(summary)


def _notes(folder: Path, config: Any, config_text: str | None) -> list[str]:
    """What a reader must know of the files before believing the page."""
    notes = []
    for name, without in ((METRICS_FILE, "no curve can be drawn"), (EVENTS_FILE, "its history is not known")):
        path = folder / name
        if not path.is_file():
            notes.append(f"{name} is missing: {without}.")
        elif path.stat().st_size == 0:
            notes.append(f"{name} is empty: {without}.")
        elif not path.read_bytes().endswith(b"\n"):
            notes.append(f"The last line of {name} is unfinished and left out: the run was killed, or is writing it.")
    if config_text is None:
        notes.append(f"{CONFIG_FILE} is missing.")
    elif config is None:
        notes.append(f"{CONFIG_FILE} is not YAML, and shown as it is.")
    return notes


def state_of(run: Run, now: float) -> State:
    """How a run stands at the time `now`, UNIX seconds; nothing tells for sure that a run without an end still runs."""
    last = run.last_step
    reached = "before any step was logged" if last is None else f"after step {last:,}"
    ended = run.summary.get("step") if run.summary is not None else None
    if run.summary is not None and (last is None or not isinstance(ended, int) or last <= ended):
        return State("finished", reached)
    for event in reversed(run.since_start):
        match event.get("kind"):
            case "stopped":
                why = f" ({event['reason']})" if event.get("reason") else ""
                return State("stopped", f"{reached}{why}; the same command goes on")
            case "data_error":
                return State("failed", f"{reached}: its data could not be read")
            case "not_finite":
                return State("failed", f"{reached}: too many updates in a row were not finite")
    pause = run.log_times[-1] - run.log_times[-2] if len(run.log_times) > 1 else 0.0
    silent = now - run.written
    if silent < max(PATIENCE_S, PATIENCE_PAUSES * pause):
        return State("running", f"{reached}, or died within the last {silent / 60 + 1:.0f} min")
    return State("died", f"{reached}; last sign of it {clock(run.written)}")


def clock(seconds: float) -> str:
    """UNIX seconds as "2026-03-04 05:06:07 UTC"."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
