"""wandb's dashboard and report of a run, built from the schema: a section a category, every chart over Training/Step.

They are made with the package wandb-workspaces, which is imported where one is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bitmar.observability.schema import SCHEMA, STEP_METRIC, Metric

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import Report
    from wandb_workspaces.workspaces import Workspace

WORKSPACE_NAME = "BitMar"
OPEN_SECTIONS = ("Training", "Validation")  # the others are folded in


def categories(schema: Iterable[Metric] = SCHEMA) -> dict[str, list[Metric]]:
    """Category -> its metrics, both in the schema's order, without the axis."""
    found: dict[str, list[Metric]] = {}
    for metric in schema:
        if metric.name != STEP_METRIC:
            found.setdefault(metric.name.split("/")[0], []).append(metric)
    return found


def build_workspace(entity: str, project: str, name: str = WORKSPACE_NAME) -> Workspace:
    """The dashboard, unsaved."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=category, panels=_charts(metrics), is_open=category in OPEN_SECTIONS)
        for category, metrics in categories().items()
    ]
    pictures = wr.MediaBrowser(title="plots", media_keys=["Plots"])
    sections.append(ws.Section(name="Plots", panels=[pictures]))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP_METRIC),
        auto_generate_panels=True,  # of what has no section: histograms, metrics of one's own
    )


def workspace_fields(workspace: Workspace) -> dict[str, Any]:
    """What is sent to wandb for a workspace, as plain values."""
    return workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def build_report(entity: str, project: str, run_name: str, run_id: str, url: str) -> Report:
    """A report of one run, unsaved: a grid of charts a category."""
    import wandb_workspaces.reports.v2.interface as wr
    from wandb_workspaces import expr

    runs = wr.Runset(entity=entity, project=project, name=run_name, filters=[expr.Metric("ID") == run_id])
    blocks: list[Any] = [wr.MarkdownBlock(text=f"The run [{run_name}]({url}).")]
    for category, metrics in categories().items():
        blocks += [wr.H2(text=category), wr.PanelGrid(runsets=[runs], panels=_charts(metrics))]
    return wr.Report(entity=entity, project=project, title=f"BitMar: {run_name}", blocks=blocks)


def save_report(entity: str, project: str, run_name: str, run_id: str, url: str) -> str:
    """Build and upload the report of a run; returns its address. Raises whatever the network and wandb do."""
    report = build_report(entity, project, run_name, run_id, url)
    report.save()
    return report.url


def _charts(metrics: list[Metric]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(title=metric.name.partition("/")[2], x=STEP_METRIC, y=[metric.name], title_y=metric.unit)
        for metric in metrics
    ]
