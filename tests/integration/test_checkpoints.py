"""Checkpoints of whole trainings: other worlds and stages, kill -9 inside a save, a full disk, what is kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bitmar.config import Config
from bitmar.engine.fragments import damage, read_parameters, read_state
from bitmar.engine.progress import checkpoint_directories
from bitmar.engine.world import World, join_world
from bitmar.observability.records import EVENTS_FILE, read_lines
from bitmar.train import TrainingError, train
from tests.support.disks import small_disk
from tests.support.ranks import run_ranks
from tests.support.runs import (
    ROOT,
    STEPS,
    checkpoint_progress,
    checkpoint_tensors,
    differing,
    metrics,
    newest,
    tiny_config,
)

pytestmark = pytest.mark.slow

# (ranks, ds_config, last step): 24 rows in micro-batches of 4 fit them all
CHAIN = ((2, "zero2", 6), (1, "zero3", 10), (3, "zero1", 15), (2, "zero3-offload", STEPS))
EXACT = ("model.quantization=false", "training.global_batch=24")
MILESTONES = (150, 900)


def start(world: World, folder: str, shards: str, name: str, overrides: list[str]) -> str:
    """Train; what a TrainingError says, "" where the run comes to its end."""
    try:
        train(config_of(folder, shards, name, *overrides, rank=world.rank), world)
    except TrainingError as error:
        return str(error)
    return ""


def config_of(folder: str, shards: str, name: str, *overrides: str, rank: int = 0) -> Config:
    return tiny_config(Path(folder) / f"recipes{rank}", Path(shards), Path(folder) / "runs", name, *overrides)


def ds_config(name: str) -> str:
    return f"engine.ds_config={ROOT / 'ds_configs' / name}.json"


def undisturbed_and_first(world: World, folder: str, shards: str) -> None:
    keeps = ["checkpoint.keep_best=1", f"checkpoint.word_milestones=[{MILESTONES[0]},{MILESTONES[1]}]"]
    start(world, folder, shards, "straight", [*EXACT, *keeps, ds_config("zero2")])
    first = [*EXACT, ds_config(CHAIN[0][1]), f"training.max_steps={CHAIN[0][2]}"]
    start(world, folder, shards, "chain", first)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """Runs `straight`, 2 ranks under ZeRO-2, and `chain`, the same training on four worlds one after the other."""
    folder = tmp_path_factory.mktemp("chain")
    run_ranks(2, folder / "first", undisturbed_and_first, str(folder), str(tiny_shards))
    for ranks, name, last in CHAIN[1:]:
        overrides = [*EXACT, ds_config(name), f"training.max_steps={last}"]
        run_ranks(ranks, folder / name, start, str(folder), str(tiny_shards), "chain", overrides)
    return folder / "runs"


def test_a_run_goes_on_in_any_world_and_stage(chain: Path) -> None:
    """The losses of an undisturbed run within 1e-5, its rows and words one by one. Rounding is off."""
    straight, moved = (
        [line for line in metrics(chain / name) if "Training/Loss" in line] for name in ("straight", "chain")
    )
    assert [line["Training/Step"] for line in moved] == list(range(1, STEPS + 1))
    for expected, line in zip(straight, moved, strict=True):
        assert line["Training/Loss"] == pytest.approx(expected["Training/Loss"], rel=1e-5), line["Training/Step"]
        for name in ("Training/Words", "Training/Learning_Rate", "Training/Weight_Decay", "Training/Phase"):
            assert line[name] == expected[name]
    ends = [checkpoint_progress(newest(chain / name)) for name in ("straight", "chain")]
    for end in ends:
        del end["initial_loss"]
    assert ends[0] == ends[1]
    one, other = (checkpoint_tensors(newest(chain / name)) for name in ("straight", "chain"))
    for name in ("age", "image_ids", "written"):
        assert torch.equal(one[f"memory.{name}"], other[f"memory.{name}"]), name
    assert bool(one["memory.written"].any())


def test_the_worlds_were_those(chain: Path) -> None:
    starts = [event["world"] for event in read_lines(chain / "chain" / EVENTS_FILE) if event["kind"] == "start"]
    assert starts == [ranks for ranks, _, _ in CHAIN]
    assert read_state(newest(chain / "chain"))["world"] == {"ranks": 2, "zero_stage": 3}
    assert len(list(newest(chain / "chain").glob("parameters-*"))) == 2


def test_weights_can_be_read_without_an_engine(chain: Path) -> None:
    assert not dist.is_initialized()
    for name in ("straight", "chain"):
        tensors = checkpoint_tensors(newest(chain / name))
        weights = dict(read_parameters(newest(chain / name)))
        assert list(weights) == [key.removeprefix("model.") for key in tensors if key.startswith("model.")]
        assert differing({f"model.{key}": weight for key, weight in weights.items()}, {
            key: tensor for key, tensor in tensors.items() if key.startswith("model.")
        }) == []  # fmt: skip


def test_the_last_the_best_and_the_milestones_are_kept(chain: Path) -> None:
    lines = metrics(chain / "straight")
    words = {line["Training/Step"]: line["Training/Words"] for line in lines if "Training/Words" in line}
    passing = {min(step for step, count in words.items() if count >= milestone) for milestone in MILESTONES}
    assert not passing & {5, 10, 15, 20}, "a milestone needs a step of its own"
    losses = {line["Training/Step"]: line["Validation/Loss"] for line in lines if "Validation/Loss" in line}
    best = min((step for step in losses if step > 0), key=lambda step: losses[step])
    kept = {int(path.name.removeprefix("step_")): path for path in checkpoint_directories(chain / "straight")}
    assert set(kept) == {15, STEPS, best} | passing
    for step, path in kept.items():
        keep = read_state(path)["keep"]
        assert keep["milestone_words"] == [m for m in MILESTONES if words.get(step - 1, 0) < m <= words[step]]
        assert keep["validation_loss"] == losses.get(step)


# An audit event and a part of its first argument: right before this is done, the process is killed.
MOMENTS = {
    "the folder is made": ("os.mkdir", ".partial"),
    "the parameters are hashed": ("open", ".partial/parameters-00000"),
    "the memory is hashed": ("open", ".partial/memory"),
    "state.json is written": ("open", ".partial/state.json"),
    "the folder gets its name": ("os.rename", ".partial"),
    "an older one loses its name": ("os.rename", "checkpoints/step_"),
    "an older one is removed": ("shutil.rmtree", ".removed"),
}


def train_alone(folder: str, shards: str, name: str, moment: tuple[str, str] | None) -> None:
    """Train in a process of its own, which ends itself by kill -9 when it comes to `moment` for the third time."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if moment is not None and event == moment[0] and moment[1] in str(arguments[0]):
            seen += os.path.exists(arguments[0]) or event in ("os.mkdir", "open")
            if seen == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    world = join_world(300, 1)
    train(config_of(folder, shards, name, "checkpoint.every_steps=1", ds_config("zero1")), world)


def test_a_kill_inside_a_save_leaves_the_old_or_the_new(tmp_path: Path, tiny_shards: Path) -> None:
    """At several moments of a save, one after the other; the end is that of an undisturbed run to the bit."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bitmar.train", "tests.support.runs"])

    def run(name: str, moment: tuple[str, str] | None) -> int | None:
        process = context.Process(target=train_alone, args=(str(tmp_path), str(tiny_shards), name, moment))
        process.start()
        process.join()
        return process.exitcode

    assert run("straight", None) == 0
    done = 0
    for meaning, moment in MOMENTS.items():
        assert run("killed", moment) == -signal.SIGKILL, meaning
        found = checkpoint_directories(tmp_path / "runs" / "killed")
        for directory in found:
            files = read_state(directory)["files"]
            assert damage(directory, files, files) is None, meaning
        step = int(found[0].name.removeprefix("step_"))
        assert step > done, meaning
        done = step
    assert run("killed", None) == 0
    straight, killed = (newest(tmp_path / "runs" / name) for name in ("straight", "killed"))
    assert straight.name == killed.name == f"step_{STEPS:08d}"
    assert differing(checkpoint_tensors(straight), checkpoint_tensors(killed)) == []
    assert checkpoint_progress(straight) == checkpoint_progress(killed)
    assert metrics(tmp_path / "runs" / "killed") == metrics(tmp_path / "runs" / "straight")
    names = [path.name for path in killed.parent.iterdir()]
    assert sorted(names) == [f"step_{STEPS - 1:08d}", f"step_{STEPS:08d}"]


def fill_and_go_on(world: World, folder: str, shards: str) -> list[str]:
    """Train, fill the disk of the checkpoints, train on, make room, train to the end."""
    disk = Path(folder) / "runs" / "full" / "checkpoints"
    said = [start(world, folder, shards, "full", ["training.max_steps=6"])]
    ballast = disk / "ballast"
    if world.is_first:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast.write_bytes(bytes(free - 200_000))
    world.barrier()
    said.append(start(world, folder, shards, "full", ["training.max_steps=16"]))
    if world.is_first:
        said.append(json.dumps(sorted(path.name for path in disk.iterdir())))
        ballast.unlink()
    world.barrier()
    said.append(start(world, folder, shards, "full", []))
    start(world, folder, shards, "roomy", [])
    return said


def test_a_full_disk_takes_nothing_away_and_does_not_stop_training(tmp_path: Path, tiny_shards: Path) -> None:
    run = tmp_path / "runs" / "full"
    with small_disk(run / "checkpoints", "16m"):
        said, _ = run_ranks(2, tmp_path / "ranks", fill_and_go_on, str(tmp_path), str(tiny_shards))
        assert said[0] == said[3] == ""
        assert "the last checkpoint could not be written" in said[1]
        assert json.loads(said[2]) == ["ballast", "step_00000005", "step_00000006"]
        events = list(read_lines(run / EVENTS_FILE))
        failed = [event for event in events if event["kind"] == "checkpoint_failed"]
        assert [event["step"] for event in failed] == [10, 15, 16]
        assert all("No space left" in event["problem"] for event in failed)
        assert differing(checkpoint_tensors(newest(run)), checkpoint_tensors(newest(run.with_name("roomy")))) == []
    full, roomy = ([x for x in metrics(path) if "Training/Loss" in x] for path in (run, run.with_name("roomy")))
    assert full == roomy
