from __future__ import annotations

import json
from typing import Any

import pytest

from bitmar.observability.schema import SCHEMA, STEP_METRIC
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
    shown = [(name, config["metrics"]) for name, config in charts]
    wanted = [(metric.name.split("/")[0], [metric.name]) for metric in SCHEMA if metric.name != STEP_METRIC]
    assert sorted(shown) == sorted(wanted)
    assert sections[-1]["panels"][0]["viewType"] == "Media Browser"


@pytest.mark.parametrize("project", ["bitmar", "/bitmar", "team/", "team/bitmar/x"])
def test_a_project_without_its_entity_is_refused(project: str) -> None:
    done = run_tool("wandb_workspace.py", project, "--dry-run")
    assert done.returncode == 2
    assert "expected ENTITY/PROJECT" in done.stderr
