"""Build wandb's dashboard for a project, or a report of one of its runs: a section a category of metrics, every chart
over Training/Step.

    python tools/wandb_workspace.py ENTITY/PROJECT [--name NAME] [--dry-run]
    python tools/wandb_workspace.py ENTITY/PROJECT --report RUN_ID [--name NAME]

It needs the key that `wandb login` keeps, and prints the address of what it made. `--dry-run` prints the dashboard that
would be sent, as JSON, and needs neither key nor network.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.observability.wandb_panels import WORKSPACE_NAME, build_workspace, save_report, workspace_fields

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and save the dashboard or report, or print it."""
    lines = (__doc__ or "").strip().split("\n\n")
    parser = argparse.ArgumentParser(description=lines[0], epilog=lines[2])
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="a user or team, and its project")
    parser.add_argument("--report", metavar="RUN_ID", help="of this run, instead of the dashboard")
    parser.add_argument(
        "--name", help=f"of the saved view (default: {WORKSPACE_NAME}), or what the report calls the run"
    )
    parser.add_argument("--dry-run", action="store_true", help="print it as JSON, send nothing")
    given = parser.parse_args(arguments)
    entity, slash, project = given.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        parser.error(f"expected ENTITY/PROJECT, got {given.project!r}")
    if given.report and given.dry_run:
        parser.error("--dry-run is of the dashboard: wandb is asked for what a report holds")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        if given.report:
            print(save_report(entity, project, given.name or given.report, given.report))
            return 0
        made = build_workspace(entity, project, given.name or WORKSPACE_NAME)
        if given.dry_run:
            print(json.dumps(workspace_fields(made), indent=1))
            return 0
        made.save()
        print(made.url)
    except ImportError as error:
        print(f"error: {error}; pip install -r requirements.txt", file=sys.stderr)
        return USER_ERROR
    # no list of what the service's client raises: no key, no such project, no network
    except Exception as error:
        print(f"error: nothing was saved: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
