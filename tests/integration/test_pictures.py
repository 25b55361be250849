"""Pictures of real runs: made by a process beside the training, told to the sinks, and never the run's end."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from matplotlib.image import imread

from bitmar.observability.records import read_lines
from bitmar.observability.schema import STEP_METRIC
from tests.support.mirror import home_variables, rows, told, wandb_files
from tests.support.picture_runs import PICTURES, head_pictures
from tests.support.processes import wait_for
from tests.support.runs import STEPS, recipe, write_recipe
from tests.support.trainers import trainers

pytestmark = pytest.mark.slow

DRAWER = "bitmar.observability.plots"


def write_run(folder: Path, shards: Path, name: str) -> tuple[Path, Path]:
    """(recipe, the run's folder, which has spaces in its name)."""
    values = recipe(shards, folder / "runs of mine", name)
    values["wandb"] |= {"create_plots": True}
    return write_recipe(folder / "recipe.yaml", values), folder / "runs of mine" / name


def drawers(parent: int) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(parent).children(recursive=True) if DRAWER in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def images(run_dir: Path) -> list[dict[str, Any]]:
    return told(run_dir, "image")


def test_training_goes_on_while_pictures_are_made(tmp_path: Path, tiny_shards: Path) -> None:
    path, run_dir = write_run(tmp_path, tiny_shards, "a long run")

    def step() -> int:
        return max((int(line[STEP_METRIC]) for line in read_lines(run_dir / "metrics.jsonl")), default=0)

    with trainers(path, 1, "phases.2.steps=100000", "training.max_epochs=100000") as started:
        process = started.processes[0]
        assert wait_for(lambda: bool(drawers(process.pid))), started.said(0)
        assert wait_for(lambda: bool(images(run_dir))), started.said(0)
        seen = step()
        assert wait_for(lambda: step() > seen)
        assert process.poll() is None
        started.signal(0, signal.SIGTERM)
        started.codes()
    for image in images(run_dir):
        assert image["name"] == f"Plots/{re.sub('_step_[0-9]+$', '', Path(image['path']).stem)}"
        assert imread(run_dir / image["path"]).shape[1] == 1200
    steps = {image["step"] for image in images(run_dir)}
    assert all(step in (4, 8) or step > 8 for step in steps)  # the ends of its first phases, and epochs of the last
    assert told(run_dir, "warning") == []


def test_the_end_of_a_run_has_every_picture(tmp_path: Path, tiny_shards: Path) -> None:
    """In the sinks too: wandb has each, also those that were ready after later steps had been sent. Those of heads have
    a cadence of their own."""
    path, run_dir = write_run(tmp_path, tiny_shards, "whole")
    options = ("wandb.enabled=true", "wandb.offline=true", "attention_analysis.save_head_patterns=true")
    options += ("attention_analysis.viz_every_n_epochs=1000",)
    with trainers(path, 1, *options, extra={0: home_variables(tmp_path / "home")}) as started:
        assert started.codes() == [0], started.said(0)
    last = [image["name"] for image in images(run_dir) if image["step"] == STEPS]
    heads = head_pictures(STEPS)
    assert last == [f"Plots/{name}" for name in (*PICTURES, *(h.removesuffix(f"_step_{STEPS}") for h in heads))]
    assert sorted(file.stem for file in (run_dir / "plots").glob("*.png")) == sorted(PICTURES)
    assert sorted(file.stem for file in (run_dir / "attention_analysis").glob("*.png")) == sorted(heads)
    (file,) = wandb_files(run_dir)
    shown = [name.removesuffix("/_type") for row in rows(file) for name in row if name.endswith("/_type")]
    assert shown == [image["name"] for image in images(run_dir)]
    assert [start["data"] for start in told(run_dir, "start")] == ["generated"]


def test_a_drawing_that_fails_is_a_warning(tmp_path: Path, tiny_shards: Path) -> None:
    path, run_dir = write_run(tmp_path, tiny_shards, "no pictures")
    (run_dir / "plots" / "schedule.png").mkdir(parents=True)  # where a picture should go
    with trainers(path, 1) as started:
        assert started.codes() == [0], started.said(0)
    assert json.loads((run_dir / "summary.json").read_text())["step"] == STEPS
    messages = [warning["message"] for warning in told(run_dir, "warning")]
    assert messages
    assert all("pictures: " in message and "schedule.png" in message for message in messages)
    assert {image["name"] for image in images(run_dir)} == {"Plots/losses", "Plots/throughput"}


def test_no_picture_where_none_is_wished(tmp_path: Path, tiny_shards: Path) -> None:
    path, run_dir = write_run(tmp_path, tiny_shards, "none")
    with trainers(path, 1, "wandb.create_plots=false", "training.max_steps=5") as started:
        assert started.codes() == [0], started.said(0)
    assert images(run_dir) == []
    assert not (run_dir / "plots").exists()


def test_a_run_that_is_killed_leaves_no_drawing_behind(tmp_path: Path, tiny_shards: Path) -> None:
    path, _ = write_run(tmp_path, tiny_shards, "killed")
    with trainers(path, 1, "phases.2.steps=100000", "training.max_epochs=100000") as started:
        parent = started.processes[0].pid
        assert wait_for(lambda: bool(drawers(parent)), 120)
        (drawer,) = drawers(parent)
        started.signal(0, signal.SIGKILL)
        assert wait_for(lambda: not drawer.is_running() or drawer.status() == psutil.STATUS_ZOMBIE, 60)
