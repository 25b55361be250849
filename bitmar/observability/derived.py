"""DERIVED metrics: numbers that follow from what is reduced already, on rank 0 alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from bitmar.observability.records import METRICS_FILE, read_lines
from bitmar.observability.reduce import Reduced
from bitmar.observability.schema import DEAD_SHARE, OF_SEVERAL_LOGS, STEP_METRIC, TERNARY, Layout, title

TREND_LOGS = 20


def derive(reduced: Reduced, layout: Layout, peak_tflops: float | None = None) -> dict[str, float]:
    """The numbers of a log and those that follow from it. `peak_tflops`: of one rank's device, where it is known."""
    numbers = dict(reduced.numbers)
    numbers |= _attention(reduced.arrays, layout)
    numbers |= _quantization(reduced.arrays, layout.matrices)
    for name in ("Samples", "Words", "Tokens", "Padded_Tokens"):
        whole = numbers.get(f"Throughput/{name}_Per_Second")
        if whole is not None:
            numbers[f"Throughput/{name}_Per_Second_Per_GPU"] = whole / layout.ranks
    if peak_tflops is not None and "Throughput/TFLOPs" in numbers:
        numbers["Throughput/MFU"] = numbers["Throughput/TFLOPs"] / (peak_tflops * layout.ranks)
    seconds = reduced.arrays.get("Throughput/Rank_Seconds")
    if seconds is not None:
        numbers["Throughput/Slowest_Rank"] = float(seconds.argmax())
        middle = float(np.median(seconds))
        numbers["Throughput/Rank_Imbalance"] = float(seconds.max()) / middle if middle > 0 else math.nan
    return numbers


def _attention(arrays: Mapping[str, np.ndarray], layout: Layout) -> dict[str, float]:
    numbers: dict[str, float] = {}
    dead, seen = 0.0, False
    for kind in layout.heads:
        entropy = arrays.get(f"Attention/Heads_{kind}_Entropy")
        if entropy is None:
            continue
        if kind == "Memory":
            numbers["Attention/Memory_Entropy"] = _mean(entropy)
        else:
            for layer, heads in enumerate(entropy):
                numbers[f"Attention/{kind}_layer_{layer}_Entropy"] = _mean(heads)
        numbers[f"Attention/{kind}_Concentration"] = _mean(arrays[f"Attention/Heads_{kind}_Concentration"])
        first = arrays.get(f"Attention/Heads_{kind}_First_Token")
        if first is not None:
            numbers[f"Attention/{kind}_First_Token_Mass"] = _mean(first)
        importance = arrays.get(f"Attention/Heads_{kind}_Importance")
        if importance is not None:
            mean = _mean(importance)
            numbers[f"Attention/Head_Importance_{kind}_Mean"] = mean
            numbers[f"Attention/Head_Importance_{kind}_Max"] = float(np.fmax.reduce(importance, axis=None))
            seen, dead = True, dead + float((importance < DEAD_SHARE * mean).sum())
    if seen:
        numbers["Attention/Dead_Heads"] = dead
    return numbers


def _mean(values: np.ndarray) -> float:
    """Over the heads that there are; those that were pruned are NaN."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _quantization(arrays: Mapping[str, np.ndarray], matrices: Iterable[str]) -> dict[str, float]:
    size = arrays.get("Quantization/Matrix_Size")
    if size is None:
        return {}
    zeros, plus = arrays["Quantization/Matrix_Zeros"], arrays["Quantization/Matrix_Plus"]
    scale, numbers = arrays["Quantization/Matrix_Scale"], dict[str, float]()
    owner = np.array([name.split(".")[0] for name in matrices])
    for component in TERNARY:
        mine = owner == component
        total = size[mine].sum()
        if total == 0:
            continue
        name = title(component)
        numbers[f"Quantization/WeightScale_{name}"] = float((scale * size)[mine].sum() / total)
        numbers[f"Quantization/Sparsity_{name}"] = float(zeros[mine].sum() / total)
        numbers[f"Quantization/Plus_{name}"] = float(plus[mine].sum() / total)
        numbers[f"Quantization/Minus_{name}"] = float((size - zeros - plus)[mine].sum() / total)
    shares = np.array([zeros.sum(), plus.sum(), (size - zeros - plus).sum()]) / size.sum()
    shares = shares[shares > 0]
    numbers["Quantization/Bits_Per_Weight"] = float(-(shares * np.log2(shares)).sum())
    return numbers


class _Course:
    """A metric over several logs of a phase."""

    def __init__(self) -> None:
        self._total, self._steps = 0.0, 0.0  # summed over the epoch's steps; how many
        self._recent: deque[tuple[float, float]] = deque(maxlen=TREND_LOGS)  # (step, value)

    def begin_epoch(self) -> None:
        self._total, self._steps = 0.0, 0.0

    def add(self, step: float, steps: float, value: float) -> None:
        """Take the mean over the `steps` steps up to `step`."""
        self._total, self._steps = self._total + steps * value, self._steps + steps
        self._recent.append((step, value))

    @property
    def epoch_mean(self) -> float | None:
        return self._total / self._steps if self._steps else None

    @property
    def trend(self) -> float | None:
        """A thousand steps' change, by least squares."""
        if len(self._recent) < 2:
            return None
        steps, values = np.array(self._recent).T
        centred = steps - steps.mean()
        return 1000 * float((centred * values).sum() / (centred**2).sum())


class History:
    """A run's logs, for what is told of several: an epoch's means, trends, validation over training."""

    def __init__(self) -> None:
        self._epoch: tuple[float, float] | None = None  # (phase, epoch)
        self._logged = 0.0  # step of the last log
        self._courses = {name: _Course() for name in OF_SEVERAL_LOGS}
        self._language_loss = math.nan
        self._validation_loss = math.nan

    @classmethod
    def read(cls, run_dir: Path) -> History:
        """As the run's metrics.jsonl tells it."""
        history = cls()
        for fields in read_lines(run_dir / METRICS_FILE):
            history.add({key: math.nan if value is None else value for key, value in fields.items() if "/" in key})
        return history

    def add(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Take a log, of training or of validation; what follows from it and those before."""
        if "Validation/Loss" in numbers:
            self._validation_loss = numbers["Validation/Loss"]
            ratio = self._validation_loss / self._language_loss
            return {} if math.isnan(ratio) else {"Training/Validation_Ratio": ratio}
        if "Training/Loss" not in numbers or "Training/Phase" not in numbers:
            return {}
        phase = numbers["Training/Phase"]
        epoch = (phase, math.ceil(numbers.get("Training/Epoch", 1.0) - 1e-9))
        if self._epoch is None or self._epoch[0] != phase:
            self._courses = {name: _Course() for name in OF_SEVERAL_LOGS}
        elif self._epoch != epoch:
            for course in self._courses.values():
                course.begin_epoch()
        self._epoch, self._language_loss = epoch, numbers.get("Training/Loss_LM", math.nan)
        step = numbers[STEP_METRIC]
        steps, self._logged = step - self._logged, step
        found: dict[str, float] = {}
        for name, course in self._courses.items():
            if name in numbers:
                course.add(step, steps, numbers[name])
                told = {f"{name}_Epoch_Mean": course.epoch_mean, f"{name}_Trend": course.trend}
                found |= {key: value for key, value in told.items() if value is not None}
        return found
