from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from bitmar.config import load_config
from bitmar.observability.reduce import payload, reduce
from bitmar.observability.schema import Cadence, Layout, Metric, Reduction, schema_of
from bitmar.observability.stats import Statistics
from bitmar.observability.system import SystemProbe
from tests.support.runs import ROOT
from tools.observability_bench.costs import payload_bytes


@dataclass(frozen=True)
class Alone:
    size: int = 1
    rank: int = 0


def small(*reductions: Reduction) -> Statistics:
    return Statistics(Metric(f"Data/{r.name}", "1", r, Cadence.STEP, "for the test") for r in reductions)


def numbers(stats: Statistics) -> dict[str, float]:
    return reduce(stats, Alone()).numbers


def test_nothing_filled_is_nothing_logged() -> None:
    assert numbers(Statistics()) == {}


def test_each_reduction_over_steps() -> None:
    stats = small(*Reduction)
    for value, count in ((6.0, 3), (torch.tensor(2.0), torch.tensor(1))):
        stats.add("Data/SUM", value, count)
        stats.add("Data/MEAN", value, count)
        stats.add("Data/EXP_MEAN", value, count)
        stats.add("Data/ROOT_SUM", value, count)
        stats.add("Data/ROOT_MEAN", value, count)
        stats.add("Data/STD", value, count, 10.0)
    for value in (3.0, torch.tensor([-7.0]), 5):
        stats.peak("Data/MAX", value)
        stats.peak("Data/MIN", value)
        stats.same("Data/SAME", value)
    expected = {"SUM": 8.0, "MEAN": 2.0, "EXP_MEAN": math.exp(2.0), "MAX": 5.0, "MIN": -7.0, "SAME": 5.0}
    expected |= {"ROOT_SUM": math.sqrt(8.0), "ROOT_MEAN": math.sqrt(2.0), "STD": 1.0}  # 20 / 4 - 2^2
    assert numbers(stats) == pytest.approx({f"Data/{name}": value for name, value in expected.items()})


def test_reduce_leaves_the_statistics_and_reset_empties_them() -> None:
    stats = small(*Reduction)
    stats.add("Data/MEAN", 4.0, 2)
    stats.peak("Data/MIN", 1.0)
    stats.same("Data/SAME", 3.0)
    assert numbers(stats) == numbers(stats) != {}
    stats.reset()
    assert numbers(stats) == {}


def test_zero_counts() -> None:
    stats = small(*Reduction)
    stats.add("Data/MEAN", 0.0, 0)
    stats.add("Data/SUM", 0.0, 0)
    assert numbers(stats) == {}
    stats.add("Data/SUM", 0.0)  # seen, and none: that is a zero, not an absence
    assert numbers(stats) == {"Data/SUM": 0.0}
    stats.add("Data/MEAN", 1.0, 0)  # a broken count shows
    assert math.isnan(numbers(stats)["Data/MEAN"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_are_kept(bad: float) -> None:
    stats = small(*Reduction)
    for kind in ("SUM", "MEAN"):
        stats.add(f"Data/{kind}", 1.0)
        stats.add(f"Data/{kind}", torch.tensor(bad))
    for kind in ("MAX", "MIN"):
        stats.peak(f"Data/{kind}", bad)
    stats.same("Data/SAME", bad)
    result = numbers(stats)
    assert len(result) == 5
    for value in result.values():
        assert value == bad or (math.isnan(value) and math.isnan(bad))


def test_nan_wins_over_any_extreme() -> None:
    stats = small(Reduction.MAX, Reduction.MIN)
    for value in (1.0, math.nan, 2.0):
        stats.peak("Data/MAX", value)
        stats.peak("Data/MIN", value)
    assert all(math.isnan(value) for value in numbers(stats).values())


def test_perplexity_does_not_overflow() -> None:
    stats = small(Reduction.EXP_MEAN)
    stats.add("Data/EXP_MEAN", 800.0)
    assert numbers(stats)["Data/EXP_MEAN"] == math.inf


def test_values_are_detached_and_exact_in_float64() -> None:
    stats = small(Reduction.SUM)
    stats.add("Data/SUM", torch.tensor(2.0**24, requires_grad=True, dtype=torch.float32))
    stats.add("Data/SUM", torch.tensor(1.0, dtype=torch.bfloat16))
    assert numbers(stats)["Data/SUM"] == 2.0**24 + 1
    assert not stats.sums.total().requires_grad


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


def test_the_layout_does_not_depend_on_what_was_seen(tmp_path: Path) -> None:
    empty, full = Statistics(), Statistics()
    full.add("Training/Loss", 1.0)
    SystemProbe(tmp_path, torch.device("cpu"), 0).fill(full)
    for one, other in zip(payload(empty), payload(full), strict=True):
        assert one.shape == other.shape
    schema = schema_of(Layout())
    derived = [metric for metric in schema if metric.reduction is Reduction.DERIVED]
    assert len(full.summed) + len(full.peaks) + len(full.sames) == len(schema) - len(derived)


def test_arrays_reduce_element_by_element_with_one_count() -> None:
    kinds = (Reduction.SUM, Reduction.MEAN, Reduction.SAME)
    stats = Statistics(Metric(f"Data/{r.name}", "1", r, Cadence.STEP, "test", ("x", "y"), (2, 3)) for r in kinds)
    value = torch.arange(6.0).view(2, 3)
    for _ in range(2):
        stats.add("Data/SUM", value)
        stats.add("Data/MEAN", value, 4)
        stats.same("Data/SAME", value)
    arrays = reduce(stats, Alone()).arrays
    assert arrays["Data/SUM"].tolist() == (2 * value).tolist()
    assert arrays["Data/MEAN"].tolist() == (value / 4).tolist()
    assert arrays["Data/SAME"].tolist() == value.tolist()
    with pytest.raises(ValueError, match=r"Data/SUM.*\(2, 3\).*\(3, 2\)"):
        stats.add("Data/SUM", value.T)


def test_many_at_once_are_as_one_by_one() -> None:
    names = [f"Gradients/{part}_Std" for part in ("Encoder", "Vision", "Decoder")]
    values, counts, squares = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 2, 5]), torch.tensor([9.0, 8, 7])
    once, singly = Statistics(), Statistics()
    once.add_all(names, values, counts, squares)
    for name, value, count, square in zip(names, values, counts, squares, strict=True):
        singly.add(name, value, count, square)
    assert numbers(once) == numbers(singly) != {}


def test_many_peaks_at_once_are_as_one_by_one() -> None:
    names = [f"Gradients/{part}_Max" for part in ("Encoder", "Vision", "Decoder")]
    once, singly = Statistics(), Statistics()
    for values in ([1.0, -2, 3], [0.5, -1, math.inf], [2.0, -3, 4]):
        once.peak_all(names, torch.tensor(values))
        for name, value in zip(names, values, strict=True):
            singly.peak(name, value)
    assert numbers(once) == numbers(singly) == dict(zip(names, [2.0, -1, math.inf], strict=True))
    once.peak_all(names[:1], torch.tensor([math.nan]))
    assert math.isnan(numbers(once)[names[0]])
    with pytest.raises(ValueError, match="Gradients/Encoder_Norm"):
        once.peak_all(["Gradients/Encoder_Norm"], torch.tensor([1.0]))


@pytest.mark.parametrize("values", [(1.0, torch.tensor(2.0)), (torch.tensor(math.nan), 2.0), (math.nan, 1, 2.0)])
def test_the_last_value_counts_whichever_kind_it_is(values: tuple[float | torch.Tensor, ...]) -> None:
    stats = small(Reduction.SAME)
    for value in values:
        stats.same("Data/SAME", value)
    assert numbers(stats) == {"Data/SAME": 2.0}


def test_an_extreme_of_nothing_is_absent() -> None:
    stats = small(Reduction.MAX, Reduction.MIN)
    stats.peak("Data/MAX", torch.tensor(-math.inf), torch.tensor(0))
    stats.peak("Data/MIN", torch.tensor(math.inf), torch.tensor(0))
    assert numbers(stats) == {}
    stats.peak("Data/MIN", 3.0)
    assert numbers(stats) == {"Data/MIN": 3.0}


def test_no_value_is_read_back_before_the_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = small(*Reduction)

    def refuse(self: torch.Tensor) -> float:
        raise AssertionError("a host sync")

    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    stats.add("Data/MEAN", torch.tensor(1.0), torch.tensor(2))
    stats.peak("Data/MAX", torch.tensor(1.0))
    stats.same("Data/SAME", torch.tensor(1.0))


def test_one_read_back_in_the_reduction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    whole = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: calls.append(1) or whole(self))
    stats = Statistics()
    SystemProbe(tmp_path, torch.device("cpu"), 0).fill(stats)
    reduce(stats, Alone())
    assert len(calls) == 1


def test_the_system_metrics_are_of_this_process(tmp_path: Path) -> None:
    stats = Statistics()
    SystemProbe(tmp_path, torch.device("cpu"), 0).fill(stats)
    result = numbers(stats)
    names = ("Memory_RSS", "CPU_Percent", "Open_Files", "Disk_Free")
    assert set(result) == {f"System/{name}" for name in names}
    assert result["System/Memory_RSS"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert result["System/Disk_Free"] == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.1)
    assert 0 < result["System/Open_Files"] < 10_000


def test_a_log_of_many_ranks_is_small() -> None:
    """What each of 1,024 sends of the largest recipe, of which 8 KiB are times of ranks; with histograms too."""
    path = ROOT / "launch/recipes/bitmar-700m.yaml"
    plain, more = (
        payload_bytes(load_config(path, [f"wandb.log_histograms={wish}"]), 1024) for wish in ("false", "true")
    )
    assert 8 * 1024 < plain < more <= 64 * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_statistics_on_a_gpu(tmp_path: Path) -> None:
    stats = Statistics(device="cuda")
    stats.add("Training/Loss", torch.tensor(6.0, device="cuda"), 3)
    stats.peak("System/Memory_RSS", 5.0)
    stats.same("Training/Step", torch.tensor(7, device="cuda"))
    SystemProbe(tmp_path, torch.device("cuda"), 0).fill(stats)
    result = numbers(stats)
    assert result["Training/Loss"] == 2.0
    assert 0 < result["System/GPU_Memory_Percent"] <= 100
    assert result["System/GPU_Memory_Peak"] >= result["System/GPU_Memory_Allocated"] > 0
