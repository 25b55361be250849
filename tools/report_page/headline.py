"""The few numbers of a run that stand at the top of its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from tools.report_page.runs import Run


@dataclass(frozen=True)
class Number:
    """A number as people read it, and what it is of."""

    label: str
    value: str
    about: str = ""


def headline(run: Run) -> list[Number]:
    """What the run has of: losses, perplexity, words, steps, rate, times, size."""
    made = [
        _number(run, "Validation loss", "loss_final", "Validation/Loss", "{:.4f}", "nats/token"),
        _number(run, "Loss before training", "loss_initial", None, "{:.4f}", "nats/token"),
        _number(run, "Permuted vectors", "loss_shuffled_vision", "Validation/Loss_Shuffled_Vision", "{:.4f}", ""),
        _number(run, "Validation loss, text", "loss_text", "Validation/Loss_Text", "{:.4f}", "nats/token"),
        _number(run, "Perplexity", "perplexity", "Validation/Perplexity", "{:,.2f}", ""),
        _number(run, "Training loss", None, "Training/Loss", "{:.4f}", "nats/token"),
        _number(run, "Words", "words", "Training/Words", "{:,.0f}", "each pass counted"),
        _steps(run),
        _rate(run),
        _number(run, "Training time", "seconds", None, "", "without validation and start-up", span),
        Number("First to last line", span(run.seconds), "pauses included") if run.seconds else None,
        _parameters(run),
        _ranks(run),
    ]
    return [number for number in made if number is not None]


def _number(
    run: Run,
    label: str,
    key: str | None,
    metric: str | None,
    form: str,
    about: str,
    told: Callable[[float], str] | None = None,
) -> Number | None:
    """The value that summary.json holds under `key`, else the metric's last one with its step."""
    told = told or form.format
    given = (run.summary or {}).get(key) if key else None
    if _is_number(given):
        return Number(label, told(given), about)
    last = run.last(metric) if metric else None
    if last is None:
        return None
    step, value = last
    return Number(label, told(value), ", ".join(part for part in (about, f"step {step:,}") if part))


def _parameters(run: Run) -> Number | None:
    """As the end or a start tells."""
    told = [event.get("parameters") for event in run.events if event.get("kind") == "start"]
    given = [count for count in (*told, (run.summary or {}).get("parameters")) if _is_number(count)]
    return Number("Parameters", f"{given[-1]:,}") if given else None


def _steps(run: Run) -> Number | None:
    return None if run.last_step is None else Number("Optimizer steps", f"{run.last_step:,}")


def _rate(run: Run) -> Number | None:
    given = (run.summary or {}).get("samples_per_second")
    if _is_number(given):
        return Number("Samples a second", f"{given:,.1f}", "whole training")
    series = run.series.get("Throughput/Samples_Per_Second")
    if series is None or not np.isfinite(series.values).any():
        return None
    return Number("Samples a second", f"{np.nanmedian(series.values):,.1f}", "median of the logs")


def _ranks(run: Run) -> Number | None:
    worlds = [event["world"] for event in run.events if event.get("kind") == "start" and _is_number(event.get("world"))]
    if not worlds:
        return None
    changes = [world for at, world in enumerate(worlds) if at == 0 or world != worlds[at - 1]]
    return Number("Ranks", ", then ".join(str(world) for world in changes))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def span(seconds: float) -> str:
    """ "12.3 s", "4 min 05 s", "3 h 07 min" or "2 d 03 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d} h"
    return f"{hours} h {minute:02d} min" if hours else f"{minutes} min {second:02d} s"
