from __future__ import annotations

import json
import re
from typing import Any

import pytest

from bitmar.config import ModelConfig
from bitmar.observability.plots import PICTURES
from bitmar.observability.schema import STEP_METRIC, Layout, schema_of
from bitmar.observability.wandb_panels import categories
from tests.support.runs import run_tool


def test_every_metric_has_one_chart_in_its_category_over_the_step() -> None:
    done = run_tool("wandb_workspace.py", "team/bitmar", "--name", "mine", "--dry-run")
    assert done.returncode == 0, done.stderr
    view: dict[str, Any] = json.loads(done.stdout)
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "bitmar", "mine")
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [*categories(), "Plots"]
    charts = [(section["name"], panel["config"]) for section in sections[:-1] for panel in section["panels"]]
    assert {config["xAxis"] for _, config in charts} == {STEP_METRIC}
    large = Layout(ModelConfig(encoder_layers=9, decoder_layers=12, fusion_layers=2), 16, 2, ("captions", "text/web"))
    for metric in (metric for metric in schema_of(large) if not metric.of and metric.name != STEP_METRIC):
        shown_in = [category for category, config in charts if shows(config, metric.name)]
        assert shown_in == [metric.name.split("/")[0]], metric.name
    (pictures,) = sections[-1]["panels"]
    assert pictures["viewType"] == "Media Browser"
    assert set(pictures["config"]["mediaKeys"]) >= {f"Plots/{name}" for name in PICTURES}


def shows(chart: dict[str, Any], name: str) -> bool:
    if chart.get("useMetricRegex"):
        return re.search(chart["metricRegex"], name) is not None
    return chart["metrics"] == [name]


def test_a_report_is_made_by_wandb_alone() -> None:
    done = run_tool("wandb_workspace.py", "team/bitmar", "--report", "abc123", "--dry-run")
    assert done.returncode == 2
    assert "--dry-run is of the dashboard" in done.stderr


@pytest.mark.parametrize("project", ["bitmar", "/bitmar", "team/", "team/bitmar/x"])
def test_a_project_without_its_entity_is_refused(project: str) -> None:
    done = run_tool("wandb_workspace.py", project, "--dry-run")
    assert done.returncode == 2
    assert "expected ENTITY/PROJECT" in done.stderr
