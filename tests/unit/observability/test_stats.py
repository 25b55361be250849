from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from bitmar.observability.reduce import reduce
from bitmar.observability.schema import SCHEMA, Cadence, Metric, Reduction
from bitmar.observability.stats import Statistics, gpu_memory_bytes, process_rss_bytes, record_memory


@dataclass(frozen=True)
class Alone:
    size: int = 1
    rank: int = 0


def small(*reductions: Reduction) -> Statistics:
    return Statistics(Metric(f"Data/{r.name}", "1", r, Cadence.STEP, "for the test") for r in reductions)


def test_nothing_filled_is_nothing_logged() -> None:
    assert reduce(Statistics(), Alone()) == {}


def test_each_reduction_over_steps() -> None:
    stats = small(*Reduction)
    for value, count in ((6.0, 3), (torch.tensor(2.0), torch.tensor(1))):
        stats.add("Data/SUM", value, count)
        stats.add("Data/MEAN", value, count)
        stats.add("Data/EXP_MEAN", value, count)
    for value in (3.0, torch.tensor([-7.0]), 5):
        stats.peak("Data/MAX", value)
        stats.peak("Data/MIN", value)
        stats.same("Data/SAME", value)
    expected = {"SUM": 8.0, "MEAN": 2.0, "EXP_MEAN": math.exp(2.0), "MAX": 5.0, "MIN": -7.0, "SAME": 5.0}
    assert reduce(stats, Alone()) == {f"Data/{name}": value for name, value in expected.items()}


def test_reduce_leaves_the_statistics_and_reset_empties_them() -> None:
    stats = small(*Reduction)
    stats.add("Data/MEAN", 4.0, 2)
    stats.peak("Data/MIN", 1.0)
    stats.same("Data/SAME", 3.0)
    assert reduce(stats, Alone()) == reduce(stats, Alone()) != {}
    stats.reset()
    assert reduce(stats, Alone()) == {}


def test_zero_counts() -> None:
    stats = small(*Reduction)
    stats.add("Data/MEAN", 0.0, 0)
    stats.add("Data/SUM", 0.0, 0)
    assert reduce(stats, Alone()) == {}
    stats.add("Data/SUM", 0.0)  # seen, and none: that is a zero, not an absence
    assert reduce(stats, Alone()) == {"Data/SUM": 0.0}
    stats.add("Data/MEAN", 1.0, 0)  # a broken count shows
    assert math.isnan(reduce(stats, Alone())["Data/MEAN"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_are_kept(bad: float) -> None:
    stats = small(*Reduction)
    for kind in ("SUM", "MEAN"):
        stats.add(f"Data/{kind}", 1.0)
        stats.add(f"Data/{kind}", torch.tensor(bad))
    for kind in ("MAX", "MIN"):
        stats.peak(f"Data/{kind}", bad)
    stats.same("Data/SAME", bad)
    result = reduce(stats, Alone())
    assert len(result) == 5
    for value in result.values():
        assert value == bad or (math.isnan(value) and math.isnan(bad))


def test_nan_wins_over_any_extreme() -> None:
    stats = small(Reduction.MAX, Reduction.MIN)
    for value in (1.0, math.nan, 2.0):
        stats.peak("Data/MAX", value)
        stats.peak("Data/MIN", value)
    assert all(math.isnan(value) for value in reduce(stats, Alone()).values())


def test_perplexity_does_not_overflow() -> None:
    stats = small(Reduction.EXP_MEAN)
    stats.add("Data/EXP_MEAN", 800.0)
    assert reduce(stats, Alone())["Data/EXP_MEAN"] == math.inf


def test_values_are_detached_and_exact_in_float64() -> None:
    stats = small(Reduction.SUM)
    stats.add("Data/SUM", torch.tensor(2.0**24, requires_grad=True, dtype=torch.float32))
    stats.add("Data/SUM", torch.tensor(1.0, dtype=torch.bfloat16))
    assert reduce(stats, Alone())["Data/SUM"] == 2.0**24 + 1
    assert not stats.sums.requires_grad


def test_unknown_names_and_wrong_kinds_are_named() -> None:
    stats = small(*Reduction)
    for fill in (stats.add, stats.peak, stats.same):
        with pytest.raises(KeyError, match="Data/Other"):
            fill("Data/Other", 1.0)
    with pytest.raises(ValueError, match=r"Data/MAX.*peak\(\)"):
        stats.add("Data/MAX", 1.0)
    with pytest.raises(ValueError, match=r"Data/MEAN.*add\(\)"):
        stats.peak("Data/MEAN", 1.0)
    with pytest.raises(ValueError, match=r"Data/SAME.*same\(\)"):
        stats.add("Data/SAME", 1.0)
    with pytest.raises(ValueError, match=r"Data/SUM.*\(2,\)"):
        stats.add("Data/SUM", torch.ones(2))
    with pytest.raises(ValueError, match=r"Data/SUM"):
        small(Reduction.SUM, Reduction.SUM)


def test_the_layout_does_not_depend_on_what_was_seen() -> None:
    empty, full = Statistics(), Statistics()
    full.add("Training/Loss", 1.0)
    record_memory(full)
    for name in ("sums", "counts", "extremes", "extreme_counts", "last", "last_counts"):
        assert getattr(empty, name).shape == getattr(full, name).shape
    assert len(full.summed) + len(full.peaks) + len(full.sames) == len(SCHEMA)


def test_no_value_is_read_back_before_the_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = small(*Reduction)

    def refuse(self: torch.Tensor) -> float:
        raise AssertionError("a host sync")

    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    stats.add("Data/MEAN", torch.tensor(1.0), torch.tensor(2))
    stats.peak("Data/MAX", torch.tensor(1.0))
    stats.same("Data/SAME", torch.tensor(1.0))


def test_one_read_back_in_the_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(1) or tolist(self))
    stats = Statistics()
    record_memory(stats)
    reduce(stats, Alone())
    assert len(calls) == 1


def test_memory_of_this_process() -> None:
    assert 10e6 < process_rss_bytes() < 1e12
    assert gpu_memory_bytes("cpu") is None
    stats = Statistics()
    record_memory(stats)
    result = reduce(stats, Alone())
    assert list(result) == ["System/Memory_RSS"]
    assert result["System/Memory_RSS"] == pytest.approx(process_rss_bytes(), rel=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_statistics_on_a_gpu() -> None:
    stats = Statistics(device="cuda")
    stats.add("Training/Loss", torch.tensor(6.0, device="cuda"), 3)
    stats.peak("System/Memory_RSS", 5.0)
    stats.same("Training/Step", torch.tensor(7, device="cuda"))
    record_memory(stats)
    result = reduce(stats, Alone())
    assert result["Training/Loss"] == 2.0
    assert result["System/GPU_Memory_Peak"] >= result["System/GPU_Memory_Allocated"] > 0
