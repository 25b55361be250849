"""The file of scores: it keeps the tasks that are not scored again, of the same checkpoint alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitmar.evaluation.score_file import ScoreFile, TaskScores
from bitmar.evaluation.scores import Score, fraction
from shards.record import DataError

STEP = {"step": 5, "words": 70}
HALF = fraction("minimal pairs", "accuracy", np.array([True, False]), "pair", 0.5)
NAN = Score("VQA", "x", math.nan, None, None, None, "u", 1)


def opened(run: Path, checkpoint: str = "step_5", **changes: int) -> ScoreFile:
    return ScoreFile(run / "evaluation" / "step_5.json", run / "checkpoints" / checkpoint, STEP | changes)


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation" / "step_5.json").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Whose file holds two tasks."""
    file = opened(tmp_path / "run")
    file.add("minimal_pairs", TaskScores("blimp.jsonl", [HALF], seconds=1.5))
    file.add("vqa", TaskScores("shards", [NAN], generated=True, notes=["one note"]))
    return tmp_path / "run"


def test_the_file_holds_every_field(run: Path) -> None:
    told = read(run)
    assert (told["checkpoint"], told["step"], told["words"]) == ("../checkpoints/step_5", 5, 70)
    assert told["tasks"] == {
        "minimal_pairs": {"data": "blimp.jsonl", "generated": False, "seconds": 1.5, "notes": []},
        "vqa": {"data": "shards", "generated": True, "seconds": None, "notes": ["one note"]},
    }
    first = {"task": "minimal pairs", "name": "accuracy", "value": 0.5, "low": 0.0, "high": 1.0, "chance": 0.5}
    assert told["scores"][0] == first | {"unit": "pair", "count": 2, "measure": "fraction"}
    assert told["scores"][1]["value"] is None
    assert [p.name for p in (run / "evaluation").iterdir()] == ["step_5.json"]


def test_other_tasks_stay_also_where_the_run_has_moved(run: Path) -> None:
    moved = run.rename(run.with_name("moved"))
    file = opened(moved)
    better = fraction("minimal pairs", "accuracy", np.array([True, True]), "pair", 0.5)
    file.add("minimal_pairs", TaskScores("other.jsonl", [better]))
    assert file.scores[0] == better
    assert math.isnan(file.scores[1].value)
    assert file.generated
    told = read(moved)
    assert [score["value"] for score in told["scores"]] == [1.0, None]
    assert {name: task["data"] for name, task in told["tasks"].items()} == {
        "minimal_pairs": "other.jsonl",
        "vqa": "shards",
    }
    opened(moved).add("vqa", TaskScores("shards", []))
    assert [score["task"] for score in read(moved)["scores"]] == ["minimal pairs"]


@pytest.mark.parametrize("other", [{"checkpoint": "step_6"}, {"step": 6}, {"words": 71}])
def test_scores_of_another_checkpoint_go(run: Path, other: dict[str, Any]) -> None:
    file = opened(run, **other)
    assert len(read(run)["scores"]) == 2, "until there are new ones"
    file.add("minimal_pairs", TaskScores("blimp.jsonl", [HALF]))
    assert read(run)["tasks"].keys() == {"minimal_pairs"}


@pytest.mark.parametrize("text", ["a letter", "[1]", "{}", json.dumps({"checkpoint": "../checkpoints/step_5", **STEP})])
def test_what_holds_no_scores_is_not_written_over(run: Path, text: str) -> None:
    path = run / "evaluation" / "step_5.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"step_5\.json is there already and holds no scores that can be read"):
        opened(run)
    assert path.read_text() == text


def test_what_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "evaluation").write_text("a file")
    with pytest.raises(OSError, match="evaluation"):
        opened(tmp_path)
    (tmp_path / "run" / "evaluation" / "step_5.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        opened(tmp_path / "run")
