"""launch/sweep.yaml: its parameters are overrides of its recipe, and its metric is one of the schema's."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from bitmar.config import load_config
from bitmar.observability.schema import SCHEMA
from tests.support.runs import ROOT

SWEEP: dict[str, Any] = yaml.safe_load((ROOT / "launch/sweep.yaml").read_text())
RECIPE = ROOT / "launch/recipes/demo.yaml"
CHOICES = [
    f"{name}={value}"
    for name, about in SWEEP["parameters"].items()
    for value in (about.get("values") or (about["min"], about["max"]))
]


@pytest.mark.parametrize("override", CHOICES)
def test_a_parameter_is_an_override_of_the_recipe(override: str) -> None:
    load_config(RECIPE, [override])


def test_its_metric_is_logged() -> None:
    assert SWEEP["metric"]["name"] in {metric.name for metric in SCHEMA}
    assert SWEEP["metric"]["goal"] == "minimize"
    assert (ROOT / SWEEP["program"]).is_file()
    assert str(RECIPE.relative_to(ROOT)) in " ".join(SWEEP["command"])
