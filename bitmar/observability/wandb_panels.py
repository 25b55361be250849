"""wandb's dashboard and report of a run, built from the schema: a section a category, every chart over Training/Step.

They are made with the package wandb-workspaces, which is imported where one is built.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from bitmar.head_names import KINDS
from bitmar.observability.schema import STEP_METRIC, Metric, charts

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import Report
    from wandb_workspaces.workspaces import Workspace

Chart = tuple[Metric, str | None]  # a metric, or a template and the pattern of its names

WORKSPACE_NAME = "BitMar"
OPEN_SECTIONS = ("Training", "Validation")  # the others are folded in


def categories() -> dict[str, list[Chart]]:
    """Category -> its charts, both in the schema's order, without the axis."""
    found: dict[str, list[Chart]] = {}
    for metric, pattern in charts():
        if metric.name != STEP_METRIC:
            found.setdefault(metric.name.split("/")[0], []).append((metric, pattern))
    return found


def picture_keys() -> list[str]:
    """Under which wandb has a run's pictures."""
    from bitmar.observability.plots import PICTURES  # here, because it takes matplotlib

    of_heads = [f"{what}_{kind}" for what in ("attention_heads", "head_patterns") for kind in KINDS]
    return [f"Plots/{name}" for name in (*PICTURES, "attention_timeline", *of_heads)]


def build_workspace(entity: str, project: str, name: str = WORKSPACE_NAME) -> Workspace:
    """The dashboard, unsaved."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=category, panels=_panels(of), is_open=category in OPEN_SECTIONS)
        for category, of in categories().items()
    ]
    sections.append(ws.Section(name="Plots", panels=[_pictures()]))
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


def build_report(entity: str, project: str, run_name: str, run_id: str, url: str | None = None) -> Report:
    """A report of one run, unsaved: a grid of charts a category, and the pictures."""
    import wandb_workspaces.reports.v2.interface as wr
    from wandb_workspaces import expr

    runs = wr.Runset(entity=entity, project=project, name=run_name, filters=[expr.Metric("ID") == run_id])
    blocks: list[Any] = [wr.MarkdownBlock(text=f"The run [{run_name}]({url})." if url else f"The run {run_name}.")]
    for category, panels in [*((name, _panels(of)) for name, of in categories().items()), ("Plots", [_pictures()])]:
        blocks += [wr.H2(text=category), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(entity=entity, project=project, title=f"BitMar: {run_name}", blocks=blocks)


def save_report(entity: str, project: str, run_name: str, run_id: str, url: str | None = None) -> str:
    """Build and upload the report of a run; returns its address. Raises whatever the network and wandb do."""
    report = build_report(entity, project, run_name, run_id, url)
    report.save()
    return report.url


def _panels(of: list[Chart]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(
            title=re.sub(r"\{\w+\}", "*", metric.name.partition("/")[2]),
            x=STEP_METRIC,
            y=[metric.name] if pattern is None else [],
            metric_regex=pattern,
            title_y=metric.unit,
        )
        for metric, pattern in of
    ]


def _pictures() -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.MediaBrowser(title="plots", media_keys=picture_keys())
