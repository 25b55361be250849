"""The two-stage schedule against its formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmar.config import OptimizerConfig
from bitmar.engine.schedule import rates_at

CONFIG = OptimizerConfig(peak_rate=1.5e-3, second_rate=1.0e-3, final_rate=1e-5, warmup_steps=10, weight_decay=0.1)


def test_warm_up_rises_linearly_to_the_line() -> None:
    total = 1000
    for step in range(CONFIG.warmup_steps):
        line = CONFIG.peak_rate * (1 - step / total)
        assert rates_at(step, total, CONFIG).learning_rate == pytest.approx(line * (step + 1) / 11)
    assert rates_at(10, total, CONFIG).learning_rate == pytest.approx(CONFIG.peak_rate * 0.99)


def test_rate_and_decay_drop_at_half_way() -> None:
    before, after = rates_at(499, 1000, CONFIG), rates_at(500, 1000, CONFIG)
    assert before.learning_rate == pytest.approx(1.5e-3 * 0.501)
    assert after.learning_rate == pytest.approx(1.0e-3 * 0.5)
    assert (before.weight_decay, after.weight_decay) == (0.1, 0.0)


def test_half_way_of_an_odd_run_belongs_to_the_first_half() -> None:
    assert [rates_at(step, 5, CONFIG).weight_decay for step in range(5)] == [0.1, 0.1, 0.1, 0.0, 0.0]


def test_rate_ends_at_the_final_rate() -> None:
    assert rates_at(999, 1000, CONFIG).learning_rate == CONFIG.final_rate


@given(st.integers(1, 3000), st.integers(0, 500), st.data())
def test_rate_stays_between_zero_and_the_peak(total: int, warmup: int, data: st.DataObject) -> None:
    config = OptimizerConfig(warmup_steps=warmup)
    step = data.draw(st.integers(0, total - 1))
    assert 0 < rates_at(step, total, config).learning_rate <= config.peak_rate


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} lies outside a run of 10 steps"):
        rates_at(step, 10, CONFIG)
