from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitmar.observability import board
from bitmar.observability.board import Board, append, cut_torn, read_records
from tests.support.picture_runs import PICTURES, Size, write_run


def steps(path: Path) -> list[int]:
    return [int(record["step"]) for record in read_records(path)]


def add(path: Path, step: int) -> None:
    append(path, {"step": np.array(step), "usage": np.arange(5.0)})


@pytest.mark.parametrize("left", [1, 60, 127, 128, 200, 400])
def test_records_after_a_torn_one_are_read(tmp_path: Path, left: int) -> None:
    path = tmp_path / "x.npys"
    cut_torn(path)  # there is none yet
    add(path, 1)
    whole = path.stat().st_size
    add(path, 2)
    path.write_bytes(path.read_bytes()[: whole + left])
    assert steps(path) == [1]
    cut_torn(path)
    assert path.stat().st_size == whole
    add(path, 3)
    assert steps(path) == [1, 3]


def test_a_run_that_went_back(tmp_path: Path) -> None:
    path = tmp_path / "x.npys"
    for step in (1, 2, 3, 2, 4):
        add(path, step)
    assert steps(path) == [1, 2, 4]


def test_a_resumed_run_mends_its_files(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "data" / "memory.npys"
    path.parent.mkdir(parents=True)
    add(path, 1)
    path.write_bytes(path.read_bytes() + b"\x93NUMPY torn")
    taken = Board(tmp_path, str, ())
    taken.take(2, {}, {"usage": np.arange(5.0)})
    taken.take(3, {}, {"usage": np.arange(5.0)})
    taken.close()
    assert steps(path) == [1, 2, 3]


def test_pictures_come_from_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the folder is relative and has spaces in its name."""
    write_run(tmp_path / "a run" / "of mine", Size(logs=2))
    monkeypatch.chdir(tmp_path)
    taken = Board(Path("a run/of mine"), str, ())
    taken.draw(20)
    taken.close()
    assert list(taken.problems()) == []
    folder = (tmp_path / "a run" / "of mine").resolve()
    assert list(taken.pictures()) == [(20, folder / "plots" / f"{name}.png") for name in PICTURES]


def test_a_drawing_that_fails_is_a_problem(tmp_path: Path) -> None:
    taken = Board(tmp_path, str, ())
    taken.draw(1)
    taken.close()
    assert list(taken.pictures()) == []
    (problem,) = taken.problems()
    assert "no metrics to plot" in problem


@pytest.mark.parametrize("error", [OSError("no nice"), subprocess.TimeoutExpired("python", 5)])
def test_a_drawing_that_cannot_start_or_end_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(board.subprocess, "run", run)
    taken = Board(tmp_path, str, ())
    taken.draw(1)
    taken.take(2, {}, {"usage": np.arange(5.0)})  # goes on
    taken.close()
    assert len(list(taken.problems())) == 1
    assert steps(tmp_path / "plots" / "data" / "memory.npys") == [2]


def test_wishes_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    drawn: list[int] = []
    go_on, begun = threading.Event(), threading.Event()

    def draw(self: Board, step: int) -> None:
        drawn.append(step)
        begun.set()
        assert go_on.wait(60)

    monkeypatch.setattr(Board, "_draw", draw)
    taken = Board(tmp_path, str, ())
    taken.draw(1)
    assert begun.wait(60)
    for step in (2, 3, 4):
        taken.draw(step)
    go_on.set()
    taken.close()
    assert drawn == [1, 4]


def test_a_drawing_that_outlasts_the_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    go_on = threading.Event()
    monkeypatch.setattr(board, "WAIT_S", 0.05)
    monkeypatch.setattr(Board, "_draw", lambda self, step: go_on.wait(60))
    taken = Board(tmp_path, str, ())
    taken.draw(1)
    taken.close()
    go_on.set()
    (problem,) = taken.problems()
    assert "not ready" in problem
