"""When a run is evaluated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bitmar.config import ConfigError, EvaluationConfig
from bitmar.evaluating import is_evaluation_due


def run_at(step: int, every: int) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(evaluation=EvaluationConfig(every_steps=every)), progress=SimpleNamespace(step=step)
    )


def test_at_its_cadence_and_at_milestones_where_it_is_on() -> None:
    assert [step for step in range(1, 10) if is_evaluation_due(run_at(step, 4))] == [4, 8]
    assert is_evaluation_due(run_at(3, 4), milestones=(1000,))
    assert not is_evaluation_due(run_at(4, 0))
    assert not is_evaluation_due(run_at(3, 0), milestones=(1000,))


def test_a_cadence_below_0_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.every_steps must be >= 0"):
        EvaluationConfig(every_steps=-1)
