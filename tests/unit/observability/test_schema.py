from __future__ import annotations

import dataclasses
import re

import pytest

from bitmar.observability.schema import SCHEMA, STEP_METRIC, Cadence, Metric, Reduction, select

GROUPS = {
    "Training",
    "Validation",
    "Memory",
    "Attention",
    "Features",
    "Quantization",
    "Gradients",
    "Model",
    "Throughput",
    "System",
    "Data",
}


def test_names_are_unique_and_grouped() -> None:
    names = [metric.name for metric in SCHEMA]
    assert len(set(names)) == len(names)
    for name in names:
        group, _, rest = name.partition("/")
        assert group in GROUPS
        assert re.fullmatch(r"[A-Z][A-Za-z]*(_[A-Z][A-Za-z]*)*", rest), name


def test_every_metric_says_what_it_is() -> None:
    for metric in SCHEMA:
        assert metric.unit
        assert metric.meaning


def test_cadences_split_the_schema() -> None:
    step, validation = select(Cadence.STEP), select(Cadence.VALIDATION)
    assert set(step) | set(validation) == set(SCHEMA)
    assert {metric.name.split("/")[0] for metric in validation} == {"Validation"}
    assert STEP_METRIC in {metric.name for metric in step}


def test_a_metric_is_frozen() -> None:
    metric = Metric("A/B", "s", Reduction.SUM, Cadence.STEP, "seconds")
    with pytest.raises(dataclasses.FrozenInstanceError):
        metric.name = "C/D"  # pyright: ignore[reportAttributeAccessIssue]
