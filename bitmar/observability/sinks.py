"""Where a run's numbers go: files that are the truth, and the console and wandb that mirror them.

Rank 0 alone opens sinks; every other rank gets the `NullSink`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from bitmar.config import WandbConfig
from bitmar.observability.alerts import Watch, find_alerts
from bitmar.observability.console import ConsoleSink, event_line, step_text, summary
from bitmar.observability.records import JsonlSink
from bitmar.observability.wandb_identity import identify
from bitmar.observability.wandb_sink import WandbSink

_LOG_FILE = "log.txt"
_LOGGERS = ("bitmar", "shards")  # whatever these packages log goes into log.txt as well


class Sink(Protocol):
    """A place that takes a run's numbers, events, images, histograms and files."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the reduced metrics after `step` optimiser steps."""
        ...

    def event(self, kind: str, **fields: Any) -> None:
        """Take something that happened: a checkpoint, a resume, a warning."""
        ...

    def image(self, step: int, name: str, path: Path) -> None:
        """Take an image file under a metric-like name."""
        ...

    def histogram(self, step: int, name: str, counts: Sequence[float], edges: Sequence[float]) -> None:
        """Take a histogram, n counts between n + 1 edges, under a metric-like name; only wandb keeps it."""
        ...

    def artifact(self, kind: str, name: str, paths: Sequence[Path]) -> None:
        """Take files and folders that belong together, such as a checkpoint; only wandb does, and uploads them."""
        ...

    def truncate_after(self, step: int) -> int:
        """Forget the metrics of steps greater than `step`, where the sink can; returns how many lines were cut."""
        ...

    def close(self, exit_code: int = 0) -> None:
        """Write out what is held; the sink is not used afterwards."""
        ...


class NullSink:
    """Takes everything and keeps nothing: the sink of ranks other than 0."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def event(self, kind: str, **fields: Any) -> None:
        """Do nothing."""

    def image(self, step: int, name: str, path: Path) -> None:
        """Do nothing."""

    def histogram(self, step: int, name: str, counts: Sequence[float], edges: Sequence[float]) -> None:
        """Do nothing."""

    def artifact(self, kind: str, name: str, paths: Sequence[Path]) -> None:
        """Do nothing."""

    def truncate_after(self, step: int) -> int:
        """Do nothing."""
        return 0

    def close(self, exit_code: int = 0) -> None:
        """Do nothing."""


class TextSink:
    """log.txt: a dated line a log and an event, and whatever bitmar and shards log through `logging`."""

    def __init__(self, run_dir: Path, total_steps: int | None = None) -> None:
        """Append to run_dir/log.txt and attach it to the packages' loggers until `close`."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._total_steps = total_steps
        self._handler = logging.FileHandler(run_dir / _LOG_FILE, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._levels: dict[str, int] = {}
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            self._levels[name] = logger.level
            logger.setLevel(logging.INFO)
            logger.addHandler(self._handler)
        self._logger = logging.getLogger("bitmar.run")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the log's summary."""
        self._logger.info("%s  %s", step_text(step, self._total_steps), summary(values))

    def event(self, kind: str, **fields: Any) -> None:
        """Write the event; a kind "warning" or "error" at that level."""
        level = {"warning": logging.WARNING, "error": logging.ERROR}.get(kind, logging.INFO)
        self._logger.log(level, "%s", event_line(kind, fields))

    def image(self, step: int, name: str, path: Path) -> None:
        """Write where the image lies."""
        self._logger.info("%s  %s: %s", step_text(step, self._total_steps), name, path)

    def histogram(self, step: int, name: str, counts: Sequence[float], edges: Sequence[float]) -> None:
        """Do nothing."""

    def artifact(self, kind: str, name: str, paths: Sequence[Path]) -> None:
        """Do nothing."""

    def truncate_after(self, step: int) -> int:
        """Do nothing: the log is a history."""
        return 0

    def close(self, exit_code: int = 0) -> None:
        """Detach from the loggers and close the file."""
        for name, level in self._levels.items():
            logging.getLogger(name).removeHandler(self._handler)
            logging.getLogger(name).setLevel(level)
        self._handler.close()


class MultiSink:
    """Hands everything to several sinks, in their order, one call at a time: wandb's thread tells of itself too."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._turn = threading.Lock()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on a log."""
        with self._turn:
            for sink in self._sinks:
                sink.log(step, values)

    def event(self, kind: str, **fields: Any) -> None:
        """Hand on an event."""
        with self._turn:
            for sink in self._sinks:
                sink.event(kind, **fields)

    def image(self, step: int, name: str, path: Path) -> None:
        """Hand on an image."""
        with self._turn:
            for sink in self._sinks:
                sink.image(step, name, path)

    def histogram(self, step: int, name: str, counts: Sequence[float], edges: Sequence[float]) -> None:
        """Hand on a histogram."""
        with self._turn:
            for sink in self._sinks:
                sink.histogram(step, name, counts, edges)

    def artifact(self, kind: str, name: str, paths: Sequence[Path]) -> None:
        """Hand on an artifact."""
        with self._turn:
            for sink in self._sinks:
                sink.artifact(kind, name, paths)

    def truncate_after(self, step: int) -> int:
        """Hand on; returns the sum of the lines cut."""
        with self._turn:
            return sum(sink.truncate_after(step) for sink in self._sinks)

    def close(self, exit_code: int = 0) -> None:
        """Close every sink, also when one of them fails to."""
        with self._turn, ExitStack() as stack:
            for sink in reversed(self._sinks):  # the stack runs backwards
                stack.callback(sink.close, exit_code)


class AlertSink(NullSink):
    """Watches logs and events for what a person should be told of, and sends it on as events "alert"."""

    def __init__(self, target: Sink, watch: Watch) -> None:
        """`target` takes the alerts; `watch` is what is known of the run so far."""
        self._target, self._watch = target, watch

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Tell what the log calls for."""
        self._tell(values, {}, step=step)

    def event(self, kind: str, **fields: Any) -> None:
        """Tell what the event calls for: the run may end before its next log."""
        self._tell({}, {kind: fields})

    def _tell(self, values: Mapping[str, float], events: Mapping[str, Mapping[str, Any]], **fields: int) -> None:
        alerts, self._watch = find_alerts(self._watch, values, events)
        for alert in alerts:
            self._target.event("alert", **fields, level=alert.level, title=alert.title, text=alert.text)


def open_sinks(
    run_dir: Path,
    rank: int,
    *,
    wandb: WandbConfig,
    name: str,
    run_id: str,
    config: Mapping[str, Any],
    total_steps: int | None = None,
    resume_step: int | None = None,
) -> Sink:
    """The sinks of a rank: files, console and wandb on rank 0, nothing and no file on any other.

    With `resume_step`, metrics of later steps are cut off first; without it those of a start that left no checkpoint.
    `name` and `run_id` are the run's own, for what `wandb` leaves open; `config` is what wandb records of it and must
    hold no secret. Raises OSError when the run's directory cannot be written.
    """
    if rank != 0:
        return NullSink()
    files = JsonlSink(run_dir)
    sinks: Sink = MultiSink([files, TextSink(run_dir, total_steps), ConsoleSink(total_steps, resume_step or 0)])
    if resume_step is not None:
        sinks.event("resume", step=resume_step, lines_cut=files.truncate_after(resume_step))
    elif cut := files.truncate_after(-1):
        sinks.event("warning", message="a start that left no checkpoint is begun again", lines_cut=cut)
    identity = identify(wandb, name, run_id)
    if identity.mode != "disabled":
        mirror = WandbSink(run_dir, identity, config, wandb, tells=sinks)
        sinks = MultiSink([mirror, sinks])  # wandb closes before the files that take its warnings
    if wandb.alerts:
        watch = Watch.of_fresh_run() if resume_step is None else Watch()
        sinks = MultiSink([sinks, AlertSink(sinks, watch)])
    return sinks
