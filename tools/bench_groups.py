"""What the command lines of the benchmarks with several groups of rows share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence


def read_groups(description: str, groups: Iterable[str], arguments: Sequence[str] | None) -> tuple[list[str], bool]:
    """(the groups to measure, all where none is named; whether it must be quick). Bad ones exit as argparse does."""
    names = list(groups)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(names)}; none: all")
    parser.add_argument("--quick", action="store_true", help="smaller and shorter: under a minute")
    known = parser.parse_args(arguments)
    unknown = [name for name in known.groups if name not in names]
    if unknown:
        parser.error(f"no group {unknown[0]!r}: choose from {', '.join(names)}")
    return known.groups or names, known.quick
