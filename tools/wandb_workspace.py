"""Build wandb's dashboard for a project: a section a category of metrics, every chart over Training/Step.

    python tools/wandb_workspace.py ENTITY/PROJECT [--name NAME] [--dry-run]

It needs the key that `wandb login` keeps, and prints the dashboard's address. `--dry-run` prints what would be sent, as
JSON, and needs neither key nor network.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.observability.wandb_panels import WORKSPACE_NAME, build_workspace, workspace_fields

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and save the dashboard, or print it."""
    lines = (__doc__ or "").strip().split("\n\n")
    parser = argparse.ArgumentParser(description=lines[0], epilog=lines[2])
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="a user or team, and its project")
    parser.add_argument("--name", default=WORKSPACE_NAME, help="of the saved view (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print it as JSON, send nothing")
    given = parser.parse_args(arguments)
    entity, slash, project = given.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        parser.error(f"expected ENTITY/PROJECT, got {given.project!r}")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        workspace = build_workspace(entity, project, given.name)
        if given.dry_run:
            print(json.dumps(workspace_fields(workspace), indent=1))
            return 0
        workspace.save()
        print(workspace.url)
    except ImportError as error:
        print(f"error: {error}; pip install -r requirements.txt", file=sys.stderr)
        return USER_ERROR
    # no list of what the service's client raises: no key, no such project, no network
    except Exception as error:
        print(f"error: the dashboard was not saved: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
