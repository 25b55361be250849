"""What a person should be told of at once: a pure function from a log, or an event, to alerts.

An alert of a kind is given once, and not again until a log has shown that the kind has cleared.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

NORM_RANGE = (1e-3, 10.0)  # of Gradients/Total_Norm, and of the largest of the steps since the log before
SLOW_FACTOR = 5.0  # times the median step of the latest logs
LOGS_MIN = 5  # before a step is called slow
LOGS_KEPT = 20
WAIT_SHARE = 0.5  # of a step
DISK_FREE_BYTES = 5 * 2**30

Values = Mapping[str, float]


@dataclass(frozen=True)
class Alert:
    """One alert; `kind` is what its repetition is judged by."""

    kind: str
    level: Literal["WARN", "ERROR"]
    title: str  # under 64 characters, wandb's limit
    text: str


@dataclass(frozen=True)
class Watch:
    """What is remembered from log to log. None: not known yet, so that the next log sets it without an alert."""

    skipped: float | None = None
    dead_heads: float | None = None
    step_seconds: tuple[float, ...] = ()
    active: frozenset[str] = frozenset()

    @classmethod
    def of_fresh_run(cls) -> Watch:
        """A run that has left no update out and has no dead head; a resumed one has its counts from before."""
        return cls(skipped=0.0, dead_heads=0.0)


def _skipped(watch: Watch, values: Values) -> Alert | None:
    count = values["Training/Skipped_Updates"]
    if watch.skipped is None or count <= watch.skipped:
        return None
    new = count - watch.skipped
    text = f"{new:.0f} since the last log, {count:.0f} in all: a loss or a gradient was not finite"
    return Alert("skipped_updates", "ERROR", "updates are left out", text)


def _norm(watch: Watch, values: Values) -> Alert | None:
    low, high = NORM_RANGE
    mean = values["Gradients/Total_Norm"]
    most = values.get("Gradients/Total_Norm_Max", mean)
    if low <= mean and most <= high:  # never true of NaN
        return None
    text = f"the mean of the steps is {mean:.3g}, the largest {most:.3g}: out of [{low:g}, {high:g}]"
    return Alert("gradient_norm", "WARN", "gradient norm out of range", text)


def _slow(watch: Watch, values: Values) -> Alert | None:
    seconds = values["Throughput/Step_Seconds"]
    if len(watch.step_seconds) < LOGS_MIN:
        return None
    usual = statistics.median(watch.step_seconds)
    if seconds <= SLOW_FACTOR * usual:
        return None
    return Alert("slow_steps", "WARN", "steps are slow", f"{seconds:.3g} s a step, after a median of {usual:.3g} s")


def _waits(watch: Watch, values: Values) -> Alert | None:
    wait, seconds = values["Data/Wait_Seconds"], values["Throughput/Step_Seconds"]
    if not watch.step_seconds or wait <= WAIT_SHARE * seconds:  # a start waits for its first batch
        return None
    return Alert("data_stall", "WARN", "training waits for data", f"{wait:.3g} s of the {seconds:.3g} s of a step")


def _dead_heads(watch: Watch, values: Values) -> Alert | None:
    heads = values["Attention/Dead_Heads"]
    if watch.dead_heads is None or heads <= watch.dead_heads:
        return None
    text = f"{heads:.0f} attention heads are dead, {watch.dead_heads:.0f} at the last log"
    return Alert("dead_heads", "WARN", "attention heads have died", text)


def _disk(watch: Watch, values: Values) -> Alert | None:
    free = values["System/Disk_Free"]
    if free >= DISK_FREE_BYTES:
        return None
    text = f"{free / 2**30:.2f} GiB are free where the run is written; checkpoints will fail"
    return Alert("disk", "ERROR", "the disk is nearly full", text)


# the metrics that a condition needs; without them in a log it stays as it was
_CONDITIONS: dict[str, tuple[tuple[str, ...], Callable[[Watch, Values], Alert | None]]] = {
    "skipped_updates": (("Training/Skipped_Updates",), _skipped),
    "gradient_norm": (("Gradients/Total_Norm",), _norm),
    "slow_steps": (("Throughput/Step_Seconds",), _slow),
    "data_stall": (("Data/Wait_Seconds", "Throughput/Step_Seconds"), _waits),
    "dead_heads": (("Attention/Dead_Heads",), _dead_heads),
    "disk": (("System/Disk_Free",), _disk),
}


def _told(kind: str, fields: Mapping[str, Any]) -> dict[str, Alert | None]:
    """What an event says of a kind of alert: that it holds, or that it has cleared."""
    step = fields.get("step")
    if kind == "skipped_update":
        text = f"step {step}: not finite: {fields.get('not_finite')}"
        return {"skipped_updates": Alert("skipped_updates", "ERROR", "updates are left out", text)}
    if kind == "checkpoint_failed":
        text = f"step {step}: {fields.get('problem')}"
        return {"checkpoint": Alert("checkpoint", "ERROR", "a checkpoint could not be written", text)}
    if kind == "hung":
        return {"hang": Alert("hang", "ERROR", "the run hangs and is ended", str(fields.get("problem")))}
    return {"checkpoint": None} if kind == "checkpoint" else {}


def find_alerts(
    watch: Watch, values: Values, events: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[list[Alert], Watch]:
    """The alerts that a log's values, and events (kind -> fields) since the last call, call for; and what to remember.

    Nothing is told twice without having cleared in between; a condition without its metrics stays as it was."""
    found: dict[str, Alert | None] = {
        kind: condition(watch, values)
        for kind, (needs, condition) in _CONDITIONS.items()
        if all(name in values for name in needs)
    }
    for kind, fields in (events or {}).items():
        found |= _told(kind, fields)
    alerts = [alert for kind, alert in found.items() if alert is not None and kind not in watch.active]
    holding = {kind for kind, alert in found.items() if alert is not None}
    seconds = values.get("Throughput/Step_Seconds")
    return alerts, dataclasses.replace(
        watch,
        skipped=values.get("Training/Skipped_Updates", watch.skipped),
        dead_heads=values.get("Attention/Dead_Heads", watch.dead_heads),
        step_seconds=watch.step_seconds if seconds is None else (*watch.step_seconds, seconds)[-LOGS_KEPT:],
        active=(watch.active - found.keys()) | holding,
    )
