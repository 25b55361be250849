"""The JSON file of a checkpoint's scores, into which one task after the other is written.

    {"checkpoint": from the file's folder, "step": 20, "words": 1234, ...,
     "tasks": {"retrieval": {"data": shards or JSONL, "generated": true, "seconds": 1.5, "notes": [what was left out]}},
     "scores": [the fields of scores.Score, ...]}

Numbers that are not finite are null.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmar.evaluation.scores import Score
from shards.record import DataError

SAME = ("checkpoint", "step", "words")  # of the header: what scores of one file have in common


@dataclass(frozen=True)
class TaskScores:
    """`data`: the location of the shards, or the file, that a task was scored on. `seconds`: None in training."""

    data: str
    scores: Sequence[Score]
    generated: bool = False
    seconds: float | None = None
    notes: Sequence[str] = ()


class ScoreFile:
    """`tasks`: by name. What the file holds of the same checkpoint stays until its task is scored again; scores of
    another checkpoint go with the first write."""

    def __init__(self, path: Path, checkpoint: Path, header: dict[str, Any]) -> None:
        """`header`: `step` and `words` at least. Raises DataError where a file is there that holds no scores, OSError
        where none can be written."""
        self.path = path
        self._header = {"checkpoint": os.path.relpath(checkpoint.resolve(), path.parent.resolve()), **header}
        self.tasks = self._held()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary.touch()
        self._temporary.unlink()

    @property
    def scores(self) -> list[Score]:
        return [score for task in self.tasks.values() for score in task.scores]

    @property
    def generated(self) -> bool:
        """Whether a task was scored on generated data."""
        return any(task.generated for task in self.tasks.values())

    def add(self, name: str, task: TaskScores) -> None:
        """Put a task's scores in the place of those before, and write the file, in one move. Raises OSError."""
        self.tasks[name] = task
        told = {n: {k: v for k, v in vars(t).items() if k != "scores"} for n, t in self.tasks.items()}
        rows = [{k: _plain(v) for k, v in dataclasses.asdict(score).items()} for score in self.scores]
        text = json.dumps({**self._header, "tasks": told, "scores": rows}, indent=1, allow_nan=False)
        self._temporary.write_text(text + "\n", encoding="utf-8")
        self._temporary.replace(self.path)

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(self.path.name + ".tmp")

    def _held(self) -> dict[str, TaskScores]:
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path))
        try:
            told = json.loads(self.path.read_text(encoding="utf-8"))
            if any(told[name] != self._header[name] for name in SAME):
                return {}
            scores = [Score(**row | {"value": _number(row["value"])}) for row in told["scores"]]
            return {
                name: TaskScores(scores=[score for score in scores if name_of(score) == name], **task)
                for name, task in told["tasks"].items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{self.path} is there already and holds no scores that can be read ({type(error).__name__}: {error}); "
                "move it away"
            ) from None


def name_of(score: Score) -> str:
    """The name of a score's task in suite.TASKS."""
    return score.task.lower().replace(" ", "_")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
