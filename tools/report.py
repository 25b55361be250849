"""One HTML page of a run, or of several beside each other: curves, plots, events, configuration.

    python tools/report.py runs/demo                          # writes runs/demo/report.html
    python tools/report.py runs/a runs/b --out compared.html --csv curves.csv

The page needs no network, and may be opened while a run trains or after it died. --csv writes every point of every
curve: run, step, metric, value, unit; the value is empty where it was not finite. Exit code 0: written; 2: a mistake in
what was asked, or a damaged file, which is named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.report_page.curves import write_csv
from tools.report_page.page import build_page
from tools.report_page.redaction import Redactor
from tools.report_page.runs import RUN_FILES, ReportError, read_runs

REPORT_FILE = "report.html"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as runs/demo")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"default: RUN/{REPORT_FILE}; of several runs {REPORT_FILE} here"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the curves: run,step,metric,value,unit")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report, and print where it is."""
    known = parse(arguments)
    try:
        for path in report(known.runs, known.out, known.csv):
            print(path)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def report(folders: Sequence[Path], out: Path | None, csv: Path | None) -> list[Path]:
    """Write the page, and the curves where `csv` is given; returns their paths. Raises ReportError, ValueError."""
    out = out or (folders[0] / REPORT_FILE if len(folders) == 1 else Path(REPORT_FILE))
    files = [out] if csv is None else [out, csv]
    redactor = Redactor(os.environ)
    runs = read_runs(folders, redactor)
    check_outputs(files)
    contents = [build_page(runs, time.time())]
    if csv is not None:
        table = io.StringIO()
        write_csv(table, runs)
        contents.append(table.getvalue())
    for path, content in zip(files, contents, strict=True):
        write(path, content)
    return files


def check_outputs(files: Sequence[Path]) -> None:
    """Refuse, before the work, files that cannot be written or that hold a run. Raises ReportError."""
    for path in files:
        if path.is_dir():
            raise ReportError(f"{path} is a folder; give a file to write")
        if not path.absolute().parent.is_dir():
            raise ReportError(f"{path} cannot be written: its folder does not exist")
        if path.name in RUN_FILES:
            raise ReportError(f"{path} has the name of a run's own file; give another")
    if len({path.absolute() for path in files}) < len(files):
        raise ReportError(f"--out and --csv both name {files[0]}; give two files")


def write(path: Path, content: str) -> None:
    """Write in one move: a reader sees the old file or the new one. Raises ReportError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where it cannot even be named, there is none
            temporary.unlink(missing_ok=True)
        raise ReportError(f"{path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
