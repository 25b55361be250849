"""What a run's attention heads did over training: which matter, how stable that is, who rose, fell or died.

    python tools/analyze_attention_heads.py --analysis_dir runs/NAME/attention_analysis --attention_type all \\
        --create_report

prints a summary; --create_report writes attention_analysis_report.md and .json and their pictures into the folder
`reports` of the analysis directory, or into --out. It may run while the run trains or after it died: files that are
damaged are named and left out. Exit code 0: done; 2: a mistake in what was asked, told in one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.analysis.head_page import write_report
from bitmar.analysis.head_report import ALL, HeadReport, build, summary
from bitmar.head_names import KINDS


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="analyze_attention_heads", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--analysis_dir", type=Path, required=True, metavar="DIR", help="such as runs/NAME/attention_analysis"
    )
    parser.add_argument("--attention_type", choices=(*KINDS, ALL), default=ALL, help="default: %(default)s")
    parser.add_argument("--top_k", type=int, default=10, metavar="K", help="heads in the top of a kind: %(default)s")
    parser.add_argument("--create_report", action="store_true", help="write the report and its pictures")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to; default: DIR/reports of the analysis directory"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the summary, then the paths of what was written."""
    known = parse(arguments)
    try:
        if known.out is not None and not known.create_report:
            raise ValueError("--out is where --create_report writes to; give both")
        report = build(known.analysis_dir, known.attention_type, known.top_k)
        print("\n".join(summary(report)))
        if known.create_report:
            for path in write(report, known.out or known.analysis_dir / "reports"):
                print(path)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def write(report: HeadReport, folder: Path) -> list[Path]:
    """Raises ValueError where the folder cannot be written."""
    try:
        return write_report(report, folder)
    except OSError as error:
        raise ValueError(f"{folder}: the report cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
