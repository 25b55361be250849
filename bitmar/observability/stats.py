"""Statistics of one rank between two logs: tensors on the device, nothing read back.

Every rank holds the same layout whatever it saw, so that `reduce` can join ranks slot by slot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import psutil
import torch
from torch import Tensor

from bitmar.observability.schema import SCHEMA, Metric, Reduction

_SUMMED = (Reduction.SUM, Reduction.MEAN, Reduction.EXP_MEAN)
_PEAKS = (Reduction.MAX, Reduction.MIN)


class Statistics:
    """Running sums, extremes and last values of a schema's metrics, float64, one slot a metric.

    `summed` [S], `peaks` [E] and `same` [Q] are the metrics by kind; the tensors beside them follow their
    order. A value is never read back to the host here. NaN and infinities are kept: a run that diverges
    shows it.
    """

    def __init__(self, schema: Iterable[Metric] = SCHEMA, device: torch.device | str = "cpu") -> None:
        """Allocate the slots on `device`. Raises ValueError when a name occurs twice."""
        metrics = tuple(schema)
        self._metrics = {metric.name: metric for metric in metrics}
        if len(self._metrics) != len(metrics):
            names = [metric.name for metric in metrics]
            raise ValueError(f"metric named twice: {sorted({n for n in names if names.count(n) > 1})}")
        self.device = torch.device(device)
        self.summed = tuple(m for m in metrics if m.reduction in _SUMMED)
        self.peaks = tuple(m for m in metrics if m.reduction in _PEAKS)
        self.sames = tuple(m for m in metrics if m.reduction is Reduction.SAME)
        self._slot = {m.name: i for kind in (self.summed, self.peaks, self.sames) for i, m in enumerate(kind)}
        self.sums = self._zeros(len(self.summed))
        self.counts = self._zeros(len(self.summed))
        self.extremes = self._zeros(len(self.peaks))  # of the value for MAX, of minus the value for MIN
        self.extreme_counts = self._zeros(len(self.peaks))
        self.last = self._zeros(len(self.sames))
        self.last_counts = self._zeros(len(self.sames))
        self.reset()

    def add(self, name: str, value: Tensor | float, count: Tensor | float = 1) -> None:
        """Add a sum and its count to a SUM, MEAN or EXP_MEAN metric.

        `value` is a sum (of nats, say) over `count` things (tokens), not a mean; both may be one-element
        tensors on the statistics' device. Count 0 with sum 0 means "nothing seen" and leaves a mean as it
        is. A rate that sums over ranks (Throughput/) is added once a log, or it would sum over steps too.
        Raises KeyError for an unknown name, ValueError for another kind of metric or a tensor of many
        elements.
        """
        slot = self._find(name, _SUMMED)
        self.sums[slot].add_(_scalar(name, value))
        self.counts[slot].add_(_scalar(name, count))

    def peak(self, name: str, value: Tensor | float) -> None:
        """Show a value to a MAX or MIN metric. Raises as `add`."""
        slot = self._find(name, _PEAKS)
        extreme = self.extremes[slot]
        shown = torch.as_tensor(_scalar(name, value), dtype=torch.float64, device=self.device)
        if self._metrics[name].reduction is Reduction.MIN:
            shown = -shown
        torch.maximum(extreme, shown, out=extreme)  # hands NaN on
        self.extreme_counts[slot].add_(1)

    def same(self, name: str, value: Tensor | float) -> None:
        """Set a SAME metric; the last value set before the log counts. Raises as `add`."""
        slot = self._find(name, (Reduction.SAME,))
        value = _scalar(name, value)
        if isinstance(value, Tensor):
            self.last[slot].copy_(value)
        else:
            self.last[slot].fill_(value)
        self.last_counts[slot].fill_(1)

    def reset(self) -> None:
        """Forget everything; to be called after each log."""
        for tensor in (self.sums, self.counts, self.extreme_counts, self.last, self.last_counts):
            tensor.zero_()
        self.extremes.fill_(-torch.inf)

    def _zeros(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.float64, device=self.device)

    def _find(self, name: str, kinds: Collection[Reduction]) -> int:
        if name not in self._metrics:
            raise KeyError(f"{name!r} is not a metric of the schema (bitmar/observability/schema.py)")
        reduction = self._metrics[name].reduction
        if reduction not in kinds:
            method = "same" if reduction is Reduction.SAME else "peak" if reduction in _PEAKS else "add"
            raise ValueError(f"{name!r} reduces by {reduction.value}: fill it with {method}()")
        return self._slot[name]


def _scalar(name: str, value: Tensor | float) -> Tensor | float:
    """A number, or a detached 0-d tensor."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"{name!r} takes one number, got a tensor of shape {tuple(value.shape)}")
    return value.detach().reshape(())


def process_rss_bytes() -> int:
    """Resident memory of this process, in bytes."""
    return psutil.Process().memory_info().rss


def gpu_memory_bytes(device: torch.device | str) -> tuple[int, int] | None:
    """(allocated now, peak of the process) on a CUDA device in bytes; None for any other device."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)


def record_memory(statistics: Statistics) -> None:
    """Show this rank's memory to the System/ metrics; the GPU's stay empty where there is none."""
    statistics.peak("System/Memory_RSS", process_rss_bytes())
    gpu = gpu_memory_bytes(statistics.device)
    if gpu is not None:
        statistics.peak("System/GPU_Memory_Allocated", gpu[0])
        statistics.peak("System/GPU_Memory_Peak", gpu[1])
