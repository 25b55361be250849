"""Whole trainings on packed captions: any split of a step is one step, and resuming in mid-epoch changes no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmar.assembly import open_loader, open_shards
from bitmar.config import Config
from bitmar.engine.fragments import CheckpointError
from bitmar.engine.progress import Progress
from bitmar.engine.world import World
from bitmar.losses import contrastive_loss
from bitmar.model.bitmar import Outputs
from bitmar.train import train
from shards.loader import Loader
from tests.support.batches import caption_batch, packed_captions
from tests.support.ranks import run_ranks
from tests.support.runs import checkpoint_progress, checkpoint_tensors, differing, metrics, newest, tiny_config

pytestmark = pytest.mark.slow

STEPS = {"phases.0.steps": 1, "phases.1.steps": 3, "phases.2.steps": 6}
STOP = 7
PACKED = ("data.pack_captions=true", *(f"{key}={value}" for key, value in STEPS.items()))
EXACT = ("model.quantization=false", "validation.every_steps=100")
COMPARED = {"Training/Loss_LM", "Training/Loss_Contrastive", "Training/Loss_Recall", "Gradients/Total_Norm"}
ROWS = [[3, 0, 7], [1], [4, 5, 2, 6], [8, 10], [], [9, 11, 12], [13], [14, 15]]
SPANNING = "model.contrastive_group=8"  # of four rows a rank: a block lies on two ranks


def config_of(folder: Path, shards: Path, name: str, *overrides: str) -> Config:
    return tiny_config(folder / "recipes", shards, folder / "runs", name, *PACKED, *overrides)


def scenario(world: World, folder: str, shards: str) -> dict[str, Any]:
    """Trainings on this many ranks, each in a folder of its own."""
    base = Path(folder) / str(world.size)
    recipes = base / f"recipes{world.rank}"

    def start(name: str, *overrides: str, stage: int = 1) -> None:
        train(tiny_config(recipes, Path(shards), base / "runs", name, *PACKED, *overrides, stage=stage), world)

    start("small", *EXACT)
    start("spanning", *EXACT, SPANNING, f"training.micro_batch={8 // world.size}")
    if world.size == 2:
        start("taken_apart", *EXACT, stage=3)
        start("straight")
        start("resumed", f"training.max_steps={STOP}")
        start("resumed")
    return {"contrastive": contrastive_parts(world)}


def contrastive_parts(world: World) -> dict[str, Tensor]:
    """Loss of this rank's captions of a block of eight rows, and what its gradient gives the leaves of all of them."""
    g = torch.Generator().manual_seed(1)
    count = sum(map(len, ROWS))
    text, image = (torch.randn(count, 5, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    temperature = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    own = 8 // world.size
    mine = ROWS[world.rank * own : (world.rank + 1) * own]
    first = sum(map(len, ROWS[: world.rank * own]))
    here = slice(first, first + sum(map(len, mine)))
    batch, nothing = packed_captions(caption_batch(rows=17, length=6), mine, 24, slots=4), torch.zeros(0)
    latents = (None, text[here], image[here], temperature)
    outputs = Outputs(nothing, nothing, nothing, *latents, nothing, nothing, nothing, nothing, None, nothing, {})
    loss = contrastive_loss(outputs, batch, world, group=8)
    loss.backward()
    grads = {"text": text.grad, "image": image.grad, "temperature": temperature.grad}
    return {"loss": world.sum(loss.detach()), **{name: world.sum(grad) for name, grad in grads.items()}}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> dict[int, tuple[Path, dict[str, Tensor]]]:
    """(the folder of the runs, the parts of a contrastive loss) on so many ranks."""
    folder = tmp_path_factory.mktemp("packed")
    results = {}
    for size in (1, 2):
        ranks = run_ranks(size, folder / f"ranks{size}", scenario, str(folder), str(tiny_shards))
        results[size] = folder / str(size) / "runs", ranks[-1]["contrastive"]
    return results


@pytest.fixture(scope="module")
def runs(found: dict[int, tuple[Path, dict[str, Tensor]]]) -> dict[int, Path]:
    return {size: folder for size, (folder, _) in found.items()}


def trained(run: Path) -> list[dict[str, Any]]:
    """The training metrics of each step."""
    return [line for line in metrics(run) if "Training/Loss" in line]


def loader_of(config: Config) -> Loader:
    return open_loader(config, open_shards(config), Progress("none"), World(0, 1, 0, 1, torch.device("cpu")))


def test_a_contrastive_block_may_lie_on_two_ranks(found: dict[int, tuple[Path, dict[str, Tensor]]]) -> None:
    (_, one), (_, two) = found[1], found[2]
    assert all(part.abs().sum() > 0 for part in one.values())
    for name, part in one.items():
        torch.testing.assert_close(two[name], part, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("alone", "together"), [("small", "small"), ("spanning", "spanning"), ("small", "taken_apart")]
)
def test_one_rank_is_two_ranks(runs: dict[int, Path], alone: str, together: str) -> None:
    """Four micro-batches on one rank, two on each of two; blocks of one rank and of two; ZeRO-3. Rounding is off."""
    one, two = trained(runs[1] / alone), trained(runs[2] / together)
    assert len(one) == len(two) == sum(STEPS.values())
    for mine, other in zip(one, two, strict=True):
        assert mine.keys() == other.keys()
        for metric in mine.keys() & COMPARED:
            bound = 1e-4 if metric == "Gradients/Total_Norm" else 1e-5  # of weights that were trained differently
            assert mine[metric] == pytest.approx(other[metric], rel=bound), (metric, mine["Training/Step"])
        assert mine["Training/Words"] == other["Training/Words"]
    assert set().union(*one) >= COMPARED
    memory = [checkpoint_tensors(newest(path)) for path in (runs[1] / alone, runs[2] / together)]
    for part in ("age", "image_ids", "written"):
        assert torch.equal(memory[0][f"memory.{part}"], memory[1][f"memory.{part}"]), part
    assert memory[0]["memory.written"].any()


def test_a_block_of_other_size_is_another_loss(runs: dict[int, Path]) -> None:
    small, spanning = (trained(runs[1] / name)[-1]["Training/Loss_Contrastive"] for name in ("small", "spanning"))
    assert small != pytest.approx(spanning, rel=1e-2)


def test_stop_and_resume_in_mid_epoch_changes_no_bit(runs: dict[int, Path]) -> None:
    straight, resumed = newest(runs[2] / "straight"), newest(runs[2] / "resumed")
    assert differing(checkpoint_tensors(straight), checkpoint_tensors(resumed)) == []
    assert checkpoint_progress(straight) == checkpoint_progress(resumed)
    assert trained(runs[2] / "resumed") == trained(runs[2] / "straight")


def test_captions_and_words_are_counted(runs: dict[int, Path], tmp_path: Path, tiny_shards: Path) -> None:
    """Those that the loader gives out, whatever the split."""
    config = config_of(tmp_path, tiny_shards, "count")
    words = samples = captions = 0
    for _, micro in loader_of(config):
        for rows in micro:
            words += int(rows.words.sum())
            samples += rows.samples
            captions += int(rows.has_vision.sum()) if rows.modality == "pairs" else int(rows.valid.sum())
            assert rows.slots > 1 or rows.modality == "text"
    assert samples == captions
    for size in (1, 2):
        progress = checkpoint_progress(newest(runs[size] / "small"))
        assert (progress["words"], progress["samples"]) == (words, samples)


def test_another_layout_does_not_go_on(runs: dict[int, Path], tmp_path: Path, tiny_shards: Path) -> None:
    """A checkpoint that names no layout is of one caption a row."""
    chosen = newest(runs[2] / "resumed")
    state = json.loads((chosen / "state.json").read_text())
    assert state["identity"]["order"]["data.pack_captions"] is True
    refused = run_ranks(1, tmp_path / "ranks", refusal, str(tmp_path), str(tiny_shards), str(chosen))[0]
    assert "data.pack_captions is True there and False here" in refused


def refusal(world: World, folder: str, shards: str, chosen: str) -> str:
    overrides = ("data.pack_captions=false", f"checkpoint.resume={chosen}")
    try:
        train(config_of(Path(folder), Path(shards), "other", *overrides), world)
    except CheckpointError as error:
        return str(error)
    return ""
