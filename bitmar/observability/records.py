"""metrics.jsonl and events.jsonl: one JSON object a line, strict JSON, appended and flushed.

JSON knows neither NaN nor infinity: such a value becomes null, and the key "nonfinite" lists the names, so
that a diverged run is seen as one and any JSON reader still reads the file.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from bitmar.observability.schema import STEP_METRIC

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"


def encode_line(fields: Mapping[str, Any]) -> str:
    """One line of strict JSON with its newline; paths and other objects become their str()."""
    nonfinite: list[str] = []
    clean = {key: _clean(value, key, nonfinite) for key, value in fields.items()}
    if nonfinite:
        clean["nonfinite"] = nonfinite
    return json.dumps(clean, allow_nan=False, default=str, ensure_ascii=False) + "\n"


def _clean(value: Any, name: str, nonfinite: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    if isinstance(value, Mapping):
        return {str(key): _clean(item, f"{name}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, f"{name}[{index}]", nonfinite) for index, item in enumerate(value)]
    return value


def open_for_append(path: Path) -> IO[str]:
    """Open a line file for appending, first cutting off a last line that a killed run left unfinished."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(path, whole)
    return path.open("a", encoding="utf-8", newline="\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a line file, in order; a missing file has none.

    An unfinished last line (the run is being written, or was killed) is left out. Raises ValueError that
    names file and line for any other line that is no JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:  # as bytes: an unfinished line may end within a character
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                fields = json.loads(line.decode("utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg}); mend or remove the line") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason}); mend or remove the line") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{path}:{number}: not a JSON object; mend or remove the line")
            yield fields


def truncate_metrics_after(path: Path, step: int) -> int:
    """Cut the lines of a metrics file whose step is greater than `step`; returns how many were cut.

    The file is replaced in one move, so that a kill leaves the old file or the new one.
    """
    lines = list(read_lines(path))
    kept = [fields for fields in lines if fields[STEP_METRIC] <= step]
    if len(kept) == len(lines):
        return 0
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(encode_line(fields) for fields in kept)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
    return len(lines) - len(kept)


class JsonlSink:
    """metrics.jsonl and events.jsonl of a run's directory: the truth, flushed line by line."""

    def __init__(self, run_dir: Path) -> None:
        """Append to the run's files, which a resumed run already has."""
        self._run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = open_for_append(run_dir / METRICS_FILE)
        self._events = open_for_append(run_dir / EVENTS_FILE)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append {"Training/Step": step, "time": UNIX seconds, **values}."""
        first = {STEP_METRIC: step, "time": round(time.time(), 3)}
        self._metrics.write(encode_line({**first, **values, STEP_METRIC: step}))
        self._metrics.flush()

    def event(self, kind: str, **fields: Any) -> None:
        """Append {"time": UNIX seconds, "kind": kind, **fields}."""
        self._events.write(encode_line({"time": round(time.time(), 3), "kind": kind, **fields}))
        self._events.flush()

    def image(self, step: int, name: str, path: Path) -> None:
        """Append an event that tells where the image lies, relative to the run's directory if inside it."""
        path, root = path.resolve(), self._run_dir.resolve()
        shown = path.relative_to(root) if path.is_relative_to(root) else path
        self.event("image", step=step, name=name, path=shown.as_posix())

    def histogram(self, step: int, name: str, counts: Sequence[float], edges: Sequence[float]) -> None:
        """Do nothing."""

    def artifact(self, kind: str, name: str, paths: Sequence[Path]) -> None:
        """Do nothing."""

    def truncate_after(self, step: int) -> int:
        """Cut metrics of steps greater than `step`, so that a resumed run is one rising curve.

        Events stay: they are a history. Returns the number of lines cut.
        """
        self._metrics.close()
        cut = truncate_metrics_after(self._run_dir / METRICS_FILE, step)
        self._metrics = open_for_append(self._run_dir / METRICS_FILE)
        return cut

    def close(self, exit_code: int = 0) -> None:
        """Close the files."""
        self._metrics.close()
        self._events.close()
