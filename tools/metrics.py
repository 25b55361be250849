"""Print the list of what a run measures: name, unit, how it is reduced over ranks, when it is logged, what it means.

A part in braces stands for one metric for each layer, component, source or node. --markdown prints a table for a page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitmar.observability.schema import TEMPLATES

COLUMNS = ("metric", "unit", "over ranks", "logged", "meaning")


def rows(group: str | None = None) -> list[tuple[str, ...]]:
    """A row a metric that is logged, those of one group where it is named. Raises ValueError for an unknown group."""
    groups = list(dict.fromkeys(template.name.partition("/")[0] for template in TEMPLATES))
    if group is not None and group not in groups:
        raise ValueError(f"no group {group!r}: choose from {', '.join(groups)}")
    return [
        (t.name, t.unit, t.reduction.value, t.cadence.value, t.meaning)
        for t in TEMPLATES
        if not t.of and group in (None, t.name.partition("/")[0])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; an unknown group is one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("group", nargs="?", help="Training, Memory, ...; none: all")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    try:
        found = rows(options.group)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        for row in (COLUMNS, ("---",) * len(COLUMNS), *found):
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        return 0
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for row in found:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
