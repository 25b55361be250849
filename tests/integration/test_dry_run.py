"""--dry-run, --max-steps and run.seed: what a start does before it trains, and what it trains by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitmar import train
from bitmar.engine.faults import Guard
from bitmar.engine.world import World
from tests.support.processes import shell_environment
from tests.support.ranks import run_ranks
from tests.support.runs import ROOT, checkpoint_tensors, differing, metrics, newest, recipe, tiny_config, write_recipe

pytestmark = pytest.mark.slow


def scenario(world: World, folder: str, shards: str) -> list[dict[str, float]]:
    """Runs of equal and other seeds, and a dry run in the folder of one that could go back and on."""
    base, runs = Path(folder), Path(folder) / "runs"
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        overrides = ["training.max_steps=6", f"run.seed={seed}"]
        train.train(tiny_config(base / f"recipes{world.rank}", Path(shards), runs, name, *overrides), world)
    world.barrier()
    before = snapshot(runs)
    earlier = f"checkpoint.resume={runs / 'one' / 'checkpoints' / 'step_00000005'}"
    train.rehearse(tiny_config(base / f"recipes{world.rank}", Path(shards), runs, "one", earlier), world, Guard())
    train.rehearse(tiny_config(base / f"recipes{world.rank}", Path(shards), runs, "new"), world, Guard())
    return [before, snapshot(runs)]


def snapshot(folder: Path) -> dict[str, float]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("rehearsed")
    return folder / "runs", run_ranks(2, folder / "ranks", scenario, str(folder), str(tiny_shards))


def test_a_dry_run_leaves_the_disk_as_it_is(runs: tuple[Path, list[Any]]) -> None:
    for before, after in runs[1]:
        assert before
        assert after == before


def test_a_seed_decides_over_everything(runs: tuple[Path, list[Any]]) -> None:
    folder = runs[0]
    assert metrics(folder / "one") == metrics(folder / "same")
    one, same, other = (checkpoint_tensors(newest(folder / name)) for name in ("one", "same", "other"))
    assert differing(one, same) == []
    unlike = set(differing(one, other))
    assert {name for name in one if name.startswith("model.") and one[name].ndim > 1} <= unlike


def test_the_command_line_stops_and_rehearses(tmp_path: Path, tiny_shards: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe(tiny_shards, tmp_path / "runs", "told"))
    command = [sys.executable, "-m", "bitmar.train", "--config", str(path), "--max-steps", "7", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=shell_environment())
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.split()}
    assert lines["taken"][1] == "7"
    assert lines["ranks"][1:3] == ["1,", "ZeRO-1;"]
    assert "trained" in lines["dry"]
    assert not (tmp_path / "runs").exists()
