from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bitmar.head_names import HeadName
from bitmar.observability import board
from bitmar.observability.board import Board, append, cut_torn, read_records
from bitmar.observability.probes import Caption
from bitmar.watch_config import AttentionAnalysisConfig
from tests.support.picture_runs import PICTURES, Size, head_pictures, write_run
from tests.support.processes import processes_of


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


@pytest.mark.slow
def test_pictures_come_from_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the folder is relative and has spaces in its name."""
    write_run(tmp_path / "a run" / "of mine", Size(logs=2))
    monkeypatch.chdir(tmp_path)
    taken = Board(Path("a run/of mine"), str, (), step=20)
    taken.draw(20)
    taken.close()
    assert list(taken.problems()) == []
    folder = (tmp_path / "a run" / "of mine").resolve()
    plots = [folder / "plots" / f"{name}.png" for name in PICTURES]
    heads = [folder / "attention_analysis" / f"{name}.png" for name in head_pictures(20)]
    assert list(taken.pictures()) == [(20, path) for path in (*plots, *heads)]


@pytest.mark.slow
def test_one_process_makes_all_drawings_and_ends_with_the_run(tmp_path: Path) -> None:
    write_run(tmp_path, Size(logs=2))
    taken = Board(tmp_path, str, (), step=20)
    seen = set[int]()
    for folder in ("plots", "attention_analysis"):
        taken.draw(20, [folder])
        assert taken.wait(120)
        assert {path.parent.name for _, path in taken.pictures()} == {folder}
        seen |= {process.pid for process in processes_of(str(tmp_path))}
    assert len(seen) == 1
    (asleep,) = processes_of(str(tmp_path))
    asleep.kill()  # a new one takes its place
    asleep.wait(60)
    taken.draw(20, ["plots"])
    assert taken.wait(120)
    assert {path.parent.name for _, path in taken.pictures()} == {"plots"}
    taken.close()
    assert (processes_of(str(tmp_path)), list(taken.problems())) == ([], [])


@pytest.mark.slow
def test_a_drawing_goes_on_after_one_that_failed(tmp_path: Path) -> None:
    """Which has ended its process: the next one has its own."""
    write_run(tmp_path, Size(logs=2))
    in_its_place = tmp_path / "plots" / "losses.png"
    in_its_place.mkdir(parents=True)
    taken = Board(tmp_path, str, (), step=20)
    taken.draw(20)
    assert taken.wait(120)
    (problem,) = taken.problems()
    assert "losses.png" in problem
    in_its_place.rmdir()
    taken.draw(20)
    taken.close()
    assert list(taken.problems()) == []
    assert len(list(taken.pictures())) == len((*PICTURES, *head_pictures(20)))


def test_a_drawing_that_fails_is_a_problem(tmp_path: Path) -> None:
    taken = Board(tmp_path, str, ())
    taken.draw(1)
    taken.close()
    assert list(taken.pictures()) == []
    (problem,) = taken.problems()
    assert "no metrics to plot" in problem


TELLS_ITS_CLASS = """#!{python}
import os, pathlib, time
told = pathlib.Path("{told}")
while os.sched_getscheduler(0) != os.SCHED_IDLE:
    time.sleep(0.01)
told.touch()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the class is Linux's")
def test_a_drawing_takes_only_what_is_left_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its start, by what the board does: the program that would start it waits for that."""
    program = tmp_path / "programs" / "nice"
    program.parent.mkdir()
    program.write_text(TELLS_ITS_CLASS.format(python=sys.executable, told=tmp_path / "told"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    taken = Board(tmp_path, str, ())
    taken.draw(1)
    taken.close()
    assert (tmp_path / "told").exists()


STANDS_STILL = """#!/bin/sh
kill -STOP $$
"""


@pytest.mark.parametrize(
    ("starter", "told"), [(None, "FileNotFoundError"), (STANDS_STILL, "not drawn within 0.2 s")], ids=["start", "end"]
)
def test_a_drawing_that_cannot_start_or_end_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starter: str | None, told: str
) -> None:
    """`nice`, which starts it, is not there, or stands still until it is killed."""
    programs = tmp_path / "programs"
    programs.mkdir()
    if starter is not None:
        (programs / "nice").write_text(starter)
        (programs / "nice").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(board, "DRAW_S", 0.2)
    taken = Board(tmp_path, str, ())
    taken.draw(1)
    taken.take(2, {}, {"usage": np.arange(5.0)})  # goes on
    taken.close()
    (problem,) = taken.problems()
    assert told in problem
    assert list(taken.pictures()) == []
    assert processes_of(str(tmp_path)) == []
    assert steps(tmp_path / "plots" / "data" / "memory.npys") == [2]


def test_wishes_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    drawn: list[tuple[int, list[str]]] = []
    go_on, begun = threading.Event(), threading.Event()

    def draw(self: Board, step: int, folders: list[str]) -> None:
        drawn.append((step, folders))
        begun.set()
        assert go_on.wait(60)

    monkeypatch.setattr(Board, "_draw", draw)
    taken = Board(tmp_path, str, ())
    taken.draw(1)
    assert begun.wait(60)
    for step in (2, 3):
        taken.draw(step)
    taken.draw(4, ["plots"])
    go_on.set()
    taken.close()
    wished = [(step, folders) for step, folders in drawn if folders]
    assert wished == [(1, ["plots", "attention_analysis"]), (3, ["attention_analysis"]), (4, ["plots"])]


def test_a_drawing_that_outlasts_the_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    go_on = threading.Event()
    monkeypatch.setattr(board, "WAIT_S", 0.05)
    monkeypatch.setattr(Board, "_draw", lambda self, step, folders: go_on.wait(60))
    taken = Board(tmp_path, str, ())
    taken.draw(1)
    taken.close()
    go_on.set()
    (problem,) = taken.problems()
    assert "not ready" in problem


def test_heads_are_written_without_pictures_too(tmp_path: Path) -> None:
    taken = Board(tmp_path, "t{}".format, (), makes_pictures=False)
    taken.take(5, {}, {"usage": np.arange(5.0)})
    taken.take_captions(5, np.ones((1, 2), np.int64), np.ones((1, 2, 3)))
    taken.take_latents(5, {"text": np.ones((2, 2))})
    importance = np.array([[1.0, 3.0, 2.0]])
    weights = {HeadName("encoder", 0, head): torch.full((2, 2), 1.0 + head) for head in range(3)}
    caption = Caption(torch.tensor([7, 8]), weights)
    config = AttentionAnalysisConfig(track_top_k=2)
    taken.take_heads(4, {}, config, None)  # a log without a pass
    taken.take_heads(5, {"Attention/Heads_Encoder_Importance": importance}, config, caption)
    taken.draw(5)
    taken.close()
    assert (list(taken.pictures()), list(taken.problems())) == ([], [])
    assert [path.name for path in tmp_path.iterdir()] == ["attention_analysis"]
    found = {path.name: np.load(path, allow_pickle=False) for path in (tmp_path / "attention_analysis").iterdir()}
    top, patterns = "top_heads_encoder_step_5.npy", "head_patterns_encoder_step_5.npz"
    assert found.keys() == {"heads_step_5.npz", top, patterns}
    assert found["heads_step_5.npz"]["Encoder_Importance"].tolist() == importance.tolist()
    assert found[top].tolist() == [[0, 1], [0, 2]]
    assert found[patterns]["words"].tolist() == ["t7", "t8"]
    assert found[patterns]["weights"][:, 0, 0].tolist() == [2.0, 3.0]


def test_what_an_earlier_start_left_of_later_steps_is_removed(tmp_path: Path) -> None:
    write_run(tmp_path, Size(logs=3))
    folder = tmp_path / "attention_analysis"
    for name in ("attention_timeline_step_30.png", "attention_timeline_step_20.png", "notes_step_30.txt"):
        (folder / name).touch()
    Board(tmp_path, str, (), step=20).close()
    left = {path.name for path in folder.iterdir()}
    assert {name.rpartition("_")[2].partition(".")[0] for name in left} == {"10", "20", "30"}
    assert {name for name in left if "_30" in name} == {"notes_step_30.txt"}
    assert "attention_timeline_step_20.png" in left


def test_a_picture_that_a_run_has_left_behind_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attention_analysis").mkdir()

    def draw(self: Board, step: int, folders: list[str]) -> None:
        for step in (10, 30):
            path = tmp_path / "attention_analysis" / f"attention_timeline_step_{step}.png"
            path.touch()
            self._drawn.put((30, path))

    monkeypatch.setattr(Board, "_draw", draw)
    taken = Board(tmp_path, str, ())
    taken.draw(30)
    taken.go_back(20)
    taken.close()
    assert [path.stem for _, path in taken.pictures()] == ["attention_timeline_step_10"]
