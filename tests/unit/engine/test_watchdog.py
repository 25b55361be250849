"""Which rank a watchdog blames, and the rule of the spike guard; nothing of it reads the clock of another host."""

from __future__ import annotations

import dataclasses
import math

import pytest

from bitmar.config import ConfigError, FaultsConfig
from bitmar.engine.faults import is_spike
from bitmar.engine.watchdog import Pulse, judge

PULSES = {rank: Pulse(5, 40, "training", 7) for rank in range(4)}


def later(**changes: Pulse) -> dict[int, Pulse]:
    """The next reading: every watchdog has ticked."""
    moved = {rank: dataclasses.replace(pulse, ticks=pulse.ticks + 2) for rank, pulse in PULSES.items()}
    return moved | {int(name.removeprefix("rank")): pulse for name, pulse in changes.items()}


def test_a_rank_whose_counter_stands_still_does_not_answer() -> None:
    verdict, tells = judge(PULSES, later(rank2=PULSES[2]), mine=1, size=4)
    assert verdict.startswith("rank 2 does not answer")
    assert not tells
    assert judge(PULSES, later(rank2=PULSES[2]), mine=0, size=4)[1]


def test_a_rank_that_never_told_a_pulse_does_not_answer() -> None:
    silent = {rank: pulse for rank, pulse in later().items() if rank != 0}
    verdict, tells = judge(PULSES, silent, mine=1, size=4)
    assert verdict.startswith("rank 0 does not answer")
    assert tells


def test_the_rank_that_got_least_done_is_the_slowest() -> None:
    behind = later(rank3=Pulse(9, 39, "waiting for data", 7))
    assert judge(PULSES, behind, mine=0, size=4)[0] == "rank 3 is the slowest, in waiting for data of step 7"


def test_no_rank_is_blamed_where_all_are_equal() -> None:
    assert judge(PULSES, later(), mine=0, size=4)[0] == "all ranks wait in training of step 7"


def test_a_pulse_survives_the_store() -> None:
    pulse = Pulse(3, 12, "waiting for data", 4)
    assert Pulse.decode(pulse.encoded()) == pulse


def test_a_spike_is_measured_by_the_median() -> None:
    guard = FaultsConfig(spike_factor=2.0, spike_window=5)
    losses = [3.0, 3.1, 50.0, 2.9, 3.0]  # an earlier spike in the window
    assert is_spike(6.1, losses, guard)
    assert not is_spike(5.9, losses, guard)
    assert not is_spike(6.1, losses[:4], guard), "the window is not full"
    assert not is_spike(math.inf, losses, FaultsConfig()), "off by default"


@pytest.mark.parametrize(
    "values", [{"spike_factor": 0.5}, {"max_skipped_in_a_row": 0}, {"hang_timeout_s": -1.0}, {"spike_window": 0}]
)
def test_values_that_make_no_sense_are_named(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"faults.{next(iter(values))}"):
        FaultsConfig(**values)  # type: ignore[arg-type]
