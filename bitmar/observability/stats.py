"""Statistics of one rank between two logs: tensors on the device, nothing read back.

Every rank holds the same layout whatever it saw, so that `reduce` can join ranks slot by slot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from bitmar.observability.schema import Layout, Metric, Reduction, schema_of

_SUMMED = (
    *(Reduction.SUM, Reduction.MEAN, Reduction.EXP_MEAN),
    *(Reduction.STD, Reduction.ROOT_SUM, Reduction.ROOT_MEAN),
)
_PEAKS = (Reduction.MAX, Reduction.MIN)


class Slots:
    """Running numbers, float64: those that are tensors on the device, those that the host knows beside them."""

    def __init__(self, length: int, device: torch.device) -> None:
        self._device = torch.zeros(length, dtype=torch.float64, device=device)
        self._host = np.zeros(length)
        self._put = set[int]()  # where a tensor was put

    def add(self, at: slice, value: Tensor | float) -> None:
        """Add a number, or a detached tensor of as many as `at` has slots."""
        if not isinstance(value, Tensor):
            self._host[at] += value
        elif value.ndim == 0:
            self._device[at].add_(value)
        else:
            self._device[at].add_(value.reshape(-1).to(self._device.device))

    def add_at(self, index: Tensor, values: Tensor) -> None:
        """Add a tensor of numbers to as many slots, in one operation."""
        self._device.index_add_(0, index, values.detach().to(torch.float64))

    def put(self, at: slice, value: Tensor | float) -> None:
        """Set slots to a number, or to a detached tensor of as many."""
        if isinstance(value, Tensor):
            self._host[at] = 0.0
            self._device[at].copy_(value.reshape(-1))
            self._put.add(at.start)
        else:
            self._host[at] = value
            if at.start in self._put:
                self._device[at].zero_()
                self._put.discard(at.start)

    def total(self) -> Tensor:
        """What both hold, on the device."""
        return self._device + torch.from_numpy(self._host).to(self._device.device)

    @property
    def bytes(self) -> int:
        """Held on the device."""
        return self._device.numel() * self._device.element_size()

    def reset(self) -> None:
        """Set all to 0."""
        self._device.zero_()
        self._host.fill(0.0)
        self._put.clear()


class Statistics:
    """Running sums, extremes and last values of a schema's metrics; an array takes a slot an element.

    `summed`, `peaks` and `sames` are the metrics by kind; the slots beside them follow their order. A value is never
    read back to the host here. NaN and infinities are kept: a run that diverges shows it.
    """

    def __init__(self, schema: Iterable[Metric] | None = None, device: torch.device | str = "cpu") -> None:
        """Allocate the slots on `device`. Raises ValueError when a name occurs twice."""
        metrics = tuple(schema_of(Layout()) if schema is None else schema)
        self._metrics = {metric.name: metric for metric in metrics}
        if len(self._metrics) != len(metrics):
            names = [metric.name for metric in metrics]
            raise ValueError(f"metric named twice: {sorted({n for n in names if names.count(n) > 1})}")
        self.device = torch.device(device)
        self.summed = tuple(m for m in metrics if m.reduction in _SUMMED)
        self.peaks = tuple(m for m in metrics if m.reduction in _PEAKS)
        self.sames = tuple(m for m in metrics if m.reduction is Reduction.SAME)
        self.place: dict[str, slice] = {}  # of a metric's elements among those of its kind
        self._slot: dict[str, int] = {}  # of a metric among those of its kind
        sizes = []
        for kind in (self.summed, self.peaks, self.sames):
            begin = 0
            for slot, metric in enumerate(kind):
                size = math.prod(metric.shape)
                self.place[metric.name] = slice(begin, begin + size)
                self._slot[metric.name] = slot
                begin += size
            sizes.append(begin)
        self.sums, self.last = Slots(sizes[0], self.device), Slots(sizes[2], self.device)
        self.counts, self.last_counts = Slots(len(self.summed), self.device), Slots(len(self.sames), self.device)
        self.squares = Slots(len(self.summed), self.device)  # of STD alone
        self.extremes = torch.zeros(sizes[1], dtype=torch.float64, device=self.device)  # of MIN, minus the value
        self.extreme_counts = Slots(sizes[1], self.device)
        self._indices: dict[tuple[str, ...], Tensor] = {}
        self.reset()

    @property
    def device_bytes(self) -> int:
        """Held on the device."""
        slots = (self.sums, self.counts, self.squares, self.extreme_counts, self.last, self.last_counts)
        tensors = [self.extremes, *self._indices.values()]
        return sum(s.bytes for s in slots) + sum(t.numel() * t.element_size() for t in tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._metrics

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a metric: () of a number. Raises KeyError."""
        return self._metrics[name].shape

    def add(self, name: str, value: Tensor | float, count: Tensor | float = 1, squares: Tensor | float = 0.0) -> None:
        """Add a sum and its count to a metric that adds up.

        `value` is a sum (of nats, say) over `count` things (tokens), not a mean; `squares`, for STD, the sum of their
        squares. All may be one-element tensors on the statistics' device; of an array `value` has its shape, and the
        one count stands for each element. Count 0 with sum 0 means "nothing seen" and leaves a mean as it is. A rate
        that sums over ranks (Throughput/) is added once a log, or it would sum over steps too. Raises KeyError for an
        unknown name, ValueError for another kind of metric or a tensor of another size.
        """
        slot = self._find(name, _SUMMED)
        self.sums.add(self.place[name], self._fitting(name, value))
        self.counts.add(slice(slot, slot + 1), _scalar(name, count))
        if self._metrics[name].reduction is Reduction.STD:
            self.squares.add(slice(slot, slot + 1), _scalar(name, squares))

    def add_all(self, names: Sequence[str], values: Tensor, counts: Tensor, squares: Tensor | None = None) -> None:
        """`add` for many numbers at once: `values`, `counts` and `squares` [n] on the device. Raises as `add`."""
        key = tuple(names)
        if key not in self._indices:
            slots = [self._find(name, _SUMMED) for name in key]
            places = [self.place[name].start for name in key]
            self._indices[key] = torch.tensor([places, slots], device=self.device)
        places, slots = self._indices[key]
        self.sums.add_at(places, values)
        self.counts.add_at(slots, counts)
        if squares is not None:
            self.squares.add_at(slots, squares)

    def peak(self, name: str, value: Tensor | float, count: Tensor | float = 1) -> None:
        """Show a value to a MAX or MIN metric; with count 0 an infinite value of nothing. Raises as `add`."""
        slot = self._find(name, _PEAKS)
        extreme = self.extremes[slot]
        shown = torch.as_tensor(_scalar(name, value), dtype=torch.float64, device=self.device)
        if self._metrics[name].reduction is Reduction.MIN:
            shown = -shown
        torch.maximum(extreme, shown, out=extreme)  # hands NaN on
        self.extreme_counts.add(slice(slot, slot + 1), _scalar(name, count))

    def peak_all(self, names: Sequence[str], values: Tensor) -> None:
        """`peak` for many MAX metrics at once: `values` [n] on the device, each of count 1. Raises as `add`."""
        key = ("peak_all", *names)
        if key not in self._indices:
            self._indices[key] = torch.tensor(
                [self._find(name, (Reduction.MAX,)) for name in names], device=self.device
            )
        slots, shown = self._indices[key], values.detach().to(torch.float64)
        self.extremes.index_copy_(0, slots, torch.maximum(self.extremes[slots], shown))  # hands NaN on
        self.extreme_counts.add_at(slots, torch.ones_like(shown))

    def same(self, name: str, value: Tensor | float) -> None:
        """Set a SAME metric; the last value set before the log counts. Raises as `add`."""
        slot = self._find(name, (Reduction.SAME,))
        self.last.put(self.place[name], self._fitting(name, value))
        self.last_counts.put(slice(slot, slot + 1), 1.0)

    def reset(self) -> None:
        """Forget everything; to be called after each log."""
        for slots in (self.sums, self.counts, self.squares, self.extreme_counts, self.last, self.last_counts):
            slots.reset()
        self.extremes.fill_(-torch.inf)

    def _find(self, name: str, kinds: Collection[Reduction]) -> int:
        if name not in self._metrics:
            raise KeyError(f"{name!r} is not a metric of the schema (bitmar/observability/schema.py)")
        reduction = self._metrics[name].reduction
        if reduction not in kinds:
            method = "same" if reduction is Reduction.SAME else "peak" if reduction in _PEAKS else "add"
            how = f"fill it with {method}()" if reduction is not Reduction.DERIVED else "nothing fills it"
            raise ValueError(f"{name!r} reduces by {reduction.value}: {how}")
        return self._slot[name]

    def _fitting(self, name: str, value: Tensor | float) -> Tensor | float:
        shape = self._metrics[name].shape
        if not shape:
            return _scalar(name, value)
        if not isinstance(value, Tensor) or value.shape != shape:
            told = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"{name!r} takes an array of shape {shape}, got {told}")
        return value.detach()


def _scalar(name: str, value: Tensor | float) -> Tensor | float:
    """A number, or a detached 0-d tensor."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"{name!r} takes one number, got a tensor of shape {tuple(value.shape)}")
    return value.detach() if value.ndim == 0 else value.detach().reshape(())
