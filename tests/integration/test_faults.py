"""Losses and gradients that are not finite, and losses that spike, on 2 real ranks started once.

Faults are brought in by hooks on the model of rank 1's own process; rank 0 must follow by agreement alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitmar import train
from bitmar.assembly import Run, assemble
from bitmar.batch import Batch
from bitmar.config import COMPONENTS, Config, DataConfig, EngineConfig, PhaseConfig, TrainingConfig
from bitmar.engine.faults import TrainingError
from bitmar.engine.schedule import Rates
from bitmar.engine.step import train_step
from bitmar.engine.world import World
from bitmar.engine.zero import ZeroEngine
from bitmar.model.bitmar import BitMar, Outputs
from bitmar.model.memory import MemoryState
from bitmar.observability.records import EVENTS_FILE, read_lines
from shards.loader import LoaderState
from tests.support.batches import caption_batch, slice_batch, small_model
from tests.support.ranks import run_ranks
from tests.support.runs import STEPS, checkpoint_progress, differing, metrics, newest, tiny_config

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
FAULTS = ("loss", "gradient")
GLOBAL_BATCH = 16  # of tiny_config
NAN_STEP, SPIKE_STEP = 7, 13  # counted from 0
LATER = f"attention_analysis/heads_step_{STEPS + 5}.npz"
LOSSES = {"lm": 1.0, "contrastive": 0.5, "recall": 0.3}

Change = Callable[[Outputs], Outputs]


def nan_loss(outputs: Outputs) -> Outputs:
    return dataclasses.replace(outputs, loss=outputs.loss * float("nan"))


def nan_gradient(outputs: Outputs) -> Outputs:
    if outputs.loss.requires_grad:
        outputs.loss.register_hook(lambda gradient: gradient * float("nan"))
    return outputs


def spike(outputs: Outputs) -> Outputs:
    return dataclasses.replace(outputs, loss=outputs.loss * 100)


def change_outputs(model: BitMar, change: Change, wanted: Callable[[Batch], bool]) -> None:
    """Pass the outputs of wanted training batches through `change`, for as long as the model lives."""

    def hook(module: BitMar, inputs: tuple[Any, ...], outputs: Outputs) -> Outputs:
        return change(outputs) if module.training and wanted(inputs[0]) else outputs

    model.register_forward_hook(hook)


# --- the engine alone -------------------------------------------------------------------------------------------------


def engine_config(stage: int) -> Config:
    """Two ranks and two micro-batches a step."""
    return Config(
        DataConfig("none"),
        (PhaseConfig("all", {"pairs": 1.0}, LOSSES, write_memory=True, steps=10),),
        model=small_model(),
        training=TrainingConfig(global_batch=8, micro_batch=2),
        engine=EngineConfig(ds_config=f"ds_configs/zero{stage}.json"),
    )


def snapshot(engine: ZeroEngine, memory: MemoryState) -> dict[str, torch.Tensor]:
    """This rank's pieces of weights and moments, the memory and the optimiser's step."""
    held = {f"memory.{name}": tensor.clone() for name, tensor in memory.tensors().items()}
    for fragment in engine.fragments():
        held |= {f"{fragment.name}.{kind}": part.clone() for kind, part in fragment.tensors.items()}
    return held | {"adam": torch.tensor([engine.adam_step()])}


def engine_case(world: World, stage: int, fault: str | None) -> dict[str, Any]:
    """Three steps, of which the second meets the fault on rank 1, in its first micro-batch; None: it is not there."""
    config = engine_config(stage)
    torch.manual_seed(0)
    model = BitMar(config.model, seed=1)
    if fault is not None and world.rank == 1:
        change = {"loss": nan_loss, "gradient": nan_gradient}[fault]
        change_outputs(model, change, lambda batch: int(batch.rows[0]) == 8 + 2)
    engine = ZeroEngine(model, config, world)
    memory = MemoryState.empty(config.model.memory_size, config.model.episode_dim)
    engine.set_rates(Rates(1e-3, 0.1), COMPONENTS)
    taken, skipped = [], []
    for step in (0, 1, 2) if fault else (0, 2):
        batch = caption_batch(rows=8, seed=step, first_row=step * 8)
        mine = [slice_batch(batch, s, s + 2) for s in (2 * world.rank, 4 + 2 * world.rank)]
        result = train_step(engine, mine, memory, config.phases[0], config, world, step)
        memory = result.memory
        taken.append(snapshot(engine, memory))
        skipped.append(result.skipped)
    found: dict[str, Any] = {"skipped": skipped, "last": taken[-1]}
    if fault:
        found["changed by the fault"] = differing(taken[0], taken[1])
        found["changed after"] = len(differing(taken[1], taken[2]))
    return found


# --- whole runs -------------------------------------------------------------------------------------------------------


def first_row(run: Run, step: int) -> int:
    """The number of this rank's first row of optimizer step `step`, counted from 0."""
    for phase, length in enumerate(run.lengths):
        if step < length:
            return int(run.loader.step_rows(LoaderState(phase, step))[0].rows[0])
        step -= length
    raise AssertionError("the run is shorter")


def faulty_run(world: World, config: Config, change: Change, steps: list[int]) -> dict[str, Any]:
    """Train with the fault on rank 1 at `steps` (counted from 0); how it ended, and where each rank stands. The fault
    finds an analysis of a later step, as a run that goes back leaves some behind."""
    run = assemble(config, world)
    wanted = {first_row(run, step) for step in steps}

    def faulty(outputs: Outputs) -> Outputs:
        path = config.run_directory / LATER
        path.parent.mkdir(exist_ok=True)
        path.touch()
        return change(outputs)

    if world.rank == 1:
        change_outputs(run.engine.module, faulty, lambda batch: int(batch.rows[0]) in wanted)
    ended = ""
    try:
        train.loop(run)
        train.finish(run)
    except TrainingError as error:
        ended = str(error)
    run.sinks.close(0)
    progress = dataclasses.asdict(run.progress)
    return {"ended": ended} | {k: v for k, v in progress.items() if k not in ("seconds", "run_id", "initial_loss")}


def scenario(world: World, folder: str, shards: str) -> dict[str, Any]:
    def config(name: str, *overrides: str, stage: int = 1) -> Config:
        return tiny_config(
            Path(folder) / f"recipes{world.rank}", Path(shards), Path(folder), name, *overrides, stage=stage
        )

    found: dict[str, Any] = {}
    for stage in STAGES:
        found[f"none {stage}"] = engine_case(world, stage, None)
        for fault in FAULTS:
            found[f"{fault} {stage}"] = engine_case(world, stage, fault)
    found["once"] = faulty_run(world, config("once"), nan_loss, [NAN_STEP])
    found["due"] = faulty_run(world, config("due", stage=2), nan_gradient, [9, 10])
    row = ["faults.max_skipped_in_a_row=3"]
    found["row"] = faulty_run(world, config("row", *row, stage=3), nan_loss, [NAN_STEP, NAN_STEP + 1, NAN_STEP + 2])
    guard = ["faults.spike_factor=2", "faults.spike_window=4", "faults.spike_max_rewinds=1"]
    for stage in (1, 3):
        found[f"spike {stage}"] = faulty_run(world, config(f"spike{stage}", *guard, stage=stage), spike, [SPIKE_STEP])
    found["spikes"] = faulty_run(world, config("spikes", *guard), spike, [SPIKE_STEP, SPIKE_STEP + 4])
    half = [*guard, "training.max_steps=16"]
    found["half"] = faulty_run(world, config("resumed", *half), spike, [SPIKE_STEP])
    found["resumed"] = faulty_run(world, config("resumed", *guard), spike, [])
    return found


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> tuple[Path, list[dict[str, Any]]]:
    """(folder of the runs, what each rank found)."""
    folder = tmp_path_factory.mktemp("faulty")
    return folder, run_ranks(2, folder / "ranks", scenario, str(folder), str(tiny_shards))


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / EVENTS_FILE) if line["kind"] == kind]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_an_update_that_is_not_finite_on_one_rank_changes_no_bit_on_any(
    faulty: tuple[Path, list[dict[str, Any]]], stage: int, fault: str
) -> None:
    for rank in faulty[1]:
        case = rank[f"{fault} {stage}"]
        assert case["skipped"] == [False, True, False]
        assert case["changed by the fault"] == []
        assert case["changed after"] > 0


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_of_a_left_out_gradient_reaches_the_next_step(
    faulty: tuple[Path, list[dict[str, Any]]], stage: int, fault: str
) -> None:
    for rank in faulty[1]:
        assert differing(rank[f"{fault} {stage}"]["last"], rank[f"none {stage}"]["last"]) == []


def test_a_run_goes_on_after_a_loss_that_is_not_finite(faulty: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = faulty
    assert ranks[0]["once"] == ranks[1]["once"]
    assert ranks[0]["once"]["ended"] == ""
    assert (ranks[0]["once"]["step"], ranks[0]["once"]["skipped"]) == (STEPS, 1)
    lines = {line["Training/Step"]: line for line in metrics(folder / "once") if "Training/Words" in line}
    assert sorted(lines) == list(range(1, STEPS + 1))
    assert [step for step, line in lines.items() if "Training/Loss" not in line] == [NAN_STEP + 1]
    assert [line["Training/Skipped_Updates"] for line in lines.values()] == [0] * NAN_STEP + [1] * (STEPS - NAN_STEP)
    (event,) = events(folder / "once", "skipped_update")
    assert (event["step"], event["not_finite"]) == (NAN_STEP + 1, "loss of ranks [1]")
    assert checkpoint_progress(newest(folder / "once"))["adam_step"] == STEPS - 1


def test_a_checkpoint_waits_while_updates_are_left_out(faulty: tuple[Path, list[dict[str, Any]]]) -> None:
    """Due at steps 5, 10, ...; the updates of steps 10 and 11 are left out."""
    folder, ranks = faulty
    assert ranks[0]["due"]["ended"] == ""
    assert [event["step"] for event in events(folder / "due", "checkpoint")] == [5, 12, 15, 20]
    assert {event["not_finite"] for event in events(folder / "due", "skipped_update")} == {"gradient"}


def test_too_many_in_a_row_end_the_run_with_its_batches(faulty: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = faulty
    last = NAN_STEP + 3
    assert ranks[0]["row"] == ranks[1]["row"]
    ended = ranks[0]["row"]["ended"]
    assert f"the loss of ranks [1] was not finite by step {last}, 3 steps in a row" in ended
    assert "\n" not in ended
    rows = []
    for rank in (0, 1):
        saved = load_file(folder / "row" / "nonfinite" / f"step_{last}_rank_{rank}.safetensors")
        assert saved["0.tokens"].shape[0] == 4
        assert {name.split(".")[0] for name in saved} == {"0", "1"}  # micro-batches
        rows += saved["0.rows"].tolist() + saved["1.rows"].tolist()
    assert len(set(rows)) == GLOBAL_BATCH
    assert newest(folder / "row").name == "step_00000005"


@pytest.mark.parametrize("stage", [1, 3])
def test_a_spike_is_undone_and_its_batches_left_out(faulty: tuple[Path, list[dict[str, Any]]], stage: int) -> None:
    folder, ranks = faulty
    run, found = folder / f"spike{stage}", ranks[0][f"spike {stage}"]
    assert found == ranks[1][f"spike {stage}"]
    assert (found["ended"], found["step"], found["rewinds"]) == ("", STEPS, 1)
    (seen,), (back,) = events(run, "loss_spike"), events(run, "went_back")
    assert seen["step"] == SPIKE_STEP + 1
    assert seen["loss"] > 2 * seen["median"]
    assert (back["step"], back["steps_left_out"]) == (10, [SPIKE_STEP, SPIKE_STEP + 1])
    lines = {line["Training/Step"]: line for line in metrics(run) if "Training/Words" in line}
    assert sorted(lines) == list(range(1, STEPS + 1)), "one line a step, though steps 11 to 13 were trained twice"
    assert [step for step, line in lines.items() if "Training/Loss" not in line] == back["steps_left_out"]
    assert all(line["Training/Loss"] < seen["loss"] / 2 for line in lines.values() if "Training/Loss" in line)
    assert (folder / "once" / LATER).exists()
    assert not (run / LATER).exists()


def test_a_resumed_run_leaves_out_the_same_batches(faulty: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = faulty
    assert ranks[0]["half"]["step"] == 16
    assert ranks[0]["resumed"] == ranks[0]["spike 1"]
    state = json.loads((newest(folder / "resumed") / "state.json").read_text())
    assert state["progress"]["left_out"] == [SPIKE_STEP - 1, SPIKE_STEP]
    assert metrics(folder / "resumed")[-1]["Training/Step"] == STEPS


def test_spikes_that_do_not_stop_end_the_run(faulty: tuple[Path, list[dict[str, Any]]]) -> None:
    _, ranks = faulty
    assert ranks[0]["spikes"] == ranks[1]["spikes"]
    assert f"the loss spiked at step {SPIKE_STEP + 5}" in ranks[0]["spikes"]["ended"]
    assert "faults.spike_max_rewinds" in ranks[0]["spikes"]["ended"]
