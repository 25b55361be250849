"""Where a run's numbers go: files that are the truth, and the console and wandb that mirror them.

Rank 0 alone opens sinks; every other rank gets the `NullSink`. This is the only file that imports wandb.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from bitmar.observability.console import ConsoleSink, event_line, step_text, summary
from bitmar.observability.records import JsonlSink
from bitmar.observability.schema import STEP_METRIC

WandbMode = Literal["online", "offline", "disabled"]

_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 120.0
_LOG_FILE = "log.txt"
_LOGGERS = ("bitmar", "shards")  # whatever these packages log goes into log.txt as well


class Sink(Protocol):
    """A place that takes a run's numbers, events and images."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the reduced metrics after `step` optimiser steps."""
        ...

    def event(self, kind: str, **fields: Any) -> None:
        """Take something that happened: a checkpoint, a resume, a warning."""
        ...

    def image(self, step: int, name: str, path: Path) -> None:
        """Take an image file under a metric-like name."""
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

    def truncate_after(self, step: int) -> int:
        """Do nothing: the log is a history."""
        return 0

    def close(self, exit_code: int = 0) -> None:
        """Detach from the loggers and close the file."""
        for name, level in self._levels.items():
            logging.getLogger(name).removeHandler(self._handler)
            logging.getLogger(name).setLevel(level)
        self._handler.close()


class WandbSink:
    """A wandb run that mirrors the metrics: online where wandb finds a key, else offline in run_dir/wandb.

    wandb is never a reason to stop a run. An online run that cannot start becomes an offline one (`wandb
    sync` uploads it later), and a wandb process that dies in mid-run is given up; both send a "warning"
    event to the `warnings` sink.
    """

    def __init__(
        self,
        run_dir: Path,
        project: str,
        name: str,
        run_id: str,
        config: Mapping[str, Any],
        mode: WandbMode | None = None,
        warnings: Sink | None = None,
    ) -> None:
        """Start (or resume, by `run_id`) the run.

        `mode` None follows WANDB_MODE, else goes online if wandb's own means (WANDB_API_KEY, its settings,
        ~/.netrc) hold a key. The key itself is neither taken nor shown here. `config` must hold no secret.
        """
        import wandb  # here, because it costs start-up time on every rank
        from wandb import errors
        from wandb.sdk import mailbox
        from wandb.sdk.mailbox import mailbox_handle

        self._wandb = wandb
        self._warnings: Sink = warnings if warnings is not None else NullSink()
        # What wandb raises for itself, for a process of its own that died, and for a run that it refuses.
        lost = (mailbox.MailboxClosedError, mailbox.HandleAbandonedError, mailbox_handle.ServerResponseError)
        self._failures: tuple[type[Exception], ...] = (errors.Error, OSError, *lost)
        run_dir.mkdir(parents=True, exist_ok=True)
        about = {"dir": run_dir, "project": project, "name": name, "id": run_id, "config": dict(config)}
        self._run: Any = None
        while self._run is None:  # online, else offline, else not at all
            try:
                self.mode: WandbMode = mode or self._default_mode()
                self._run = self._start(self.mode, about)
            except self._failures as error:
                if mode == "disabled":
                    raise
                mode = "disabled" if mode == "offline" else "offline"
                self._warn(f"wandb is {mode}", error)
                self._end_service()  # it still holds the run's id

    def _default_mode(self) -> WandbMode:
        wished = os.environ.get("WANDB_MODE")
        if wished in ("online", "offline", "disabled"):
            return cast(WandbMode, wished)
        return "online" if self._wandb.login(prompt=False, verify=False) else "offline"

    def _start(self, mode: WandbMode, about: dict[str, Any]) -> Any:
        settings = self._wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
            quiet=True,
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
        )
        run = self._wandb.init(mode=mode, resume="allow", settings=settings, **about)
        # wandb's own step starts again at 0 in a resumed offline run, so every metric has ours as its axis
        run.define_metric(STEP_METRIC)
        run.define_metric("*", step_metric=STEP_METRIC)
        return run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror the metrics, with the step as a metric of its own."""
        self._send({**values, STEP_METRIC: step})

    def event(self, kind: str, **fields: Any) -> None:
        """Do nothing: events belong to the run's files."""

    def image(self, step: int, name: str, path: Path) -> None:
        """Mirror an image file. Raises FileNotFoundError when there is none."""
        if not path.is_file():
            raise FileNotFoundError(f"no image at {path}")
        self._send({name: self._wandb.Image(str(path)), STEP_METRIC: step})

    def truncate_after(self, step: int) -> int:
        """Do nothing: wandb takes nothing back, and its curves, drawn over our own step, go back by themselves."""
        return 0

    def close(self, exit_code: int = 0) -> None:
        """Finish the run with the process's exit code, waiting a bounded time for uploads."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except self._failures as error:
            self._warn("wandb did not finish", error)
        self._run = None

    def _send(self, fields: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(fields)
        except self._failures as error:
            self._run = None
            self._warn("wandb is given up for this run", error)

    def _end_service(self) -> None:
        try:
            self._wandb.teardown()
        except self._failures as error:
            self._warn("wandb's process did not end", error)

    def _warn(self, what: str, error: Exception) -> None:
        message = f"{what}: {type(error).__name__}: {error}"
        key = os.environ.get("WANDB_API_KEY")
        self._warnings.event("warning", message=message.replace(key, "***") if key else message)


class MultiSink:
    """Hands everything to several sinks, in their order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on a log."""
        for sink in self._sinks:
            sink.log(step, values)

    def event(self, kind: str, **fields: Any) -> None:
        """Hand on an event."""
        for sink in self._sinks:
            sink.event(kind, **fields)

    def image(self, step: int, name: str, path: Path) -> None:
        """Hand on an image."""
        for sink in self._sinks:
            sink.image(step, name, path)

    def truncate_after(self, step: int) -> int:
        """Hand on; returns the sum of the lines cut."""
        return sum(sink.truncate_after(step) for sink in self._sinks)

    def close(self, exit_code: int = 0) -> None:
        """Close every sink, also when one of them fails to."""
        with ExitStack() as stack:
            for sink in reversed(self._sinks):  # the stack runs backwards
                stack.callback(sink.close, exit_code)


def open_sinks(
    run_dir: Path,
    rank: int,
    *,
    project: str,
    name: str,
    run_id: str,
    config: Mapping[str, Any],
    wandb_mode: WandbMode | None = None,
    total_steps: int | None = None,
    resume_step: int | None = None,
) -> Sink:
    """The sinks of a rank: files, console and wandb on rank 0, nothing and no file on any other.

    With `resume_step`, metrics of later steps are cut off first; without it those of a start that left no checkpoint.
    `wandb_mode` "disabled" leaves wandb out altogether; None lets the key decide. Raises OSError when the run's
    directory cannot be written.
    """
    if rank != 0:
        return NullSink()
    files = JsonlSink(run_dir)
    sinks: list[Sink] = [files, TextSink(run_dir, total_steps), ConsoleSink(total_steps, resume_step or 0)]
    local = MultiSink(sinks)
    if resume_step is not None:
        local.event("resume", step=resume_step, lines_cut=files.truncate_after(resume_step))
    elif cut := files.truncate_after(-1):
        local.event("warning", message="a start that left no checkpoint is begun again", lines_cut=cut)
    if wandb_mode == "disabled":
        return local
    mirror = WandbSink(run_dir, project, name, run_id, config, wandb_mode, warnings=local)
    return MultiSink([mirror, *sinks])  # wandb closes before the files that take its warnings
