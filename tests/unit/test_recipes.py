"""Every recipe of the repository loads, reads back equal, and names files that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitmar.config import dump_config, load_config
from bitmar.engine.schedule import rates_at

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


def test_recipes_are_there() -> None:
    assert {"demo"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config
    assert (ROOT / config.engine.ds_config).is_file()
    assert config.checkpoint.resume == "auto"
    assert config.training.max_epochs <= 10
    assert config.data.words_limit <= 100_000_000


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 2])
def test_recipe_runs_on_one_and_two_ranks(path: Path, ranks: int) -> None:
    config = load_config(path)
    config.check_world(ranks)
    together = config.training.micro_batch * ranks
    assert config.accumulation_steps(ranks) * together == config.training.global_batch


def test_the_demo_analyses_its_heads_four_times_at_least() -> None:
    config = load_config(ROOT / "launch" / "recipes" / "demo.yaml")
    steps = sum(phase.steps or 0 for phase in config.phases)
    assert config.wandb.log_attention
    assert steps // config.attention_analysis.log_every_n_steps >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_warms_up_before_half_way(path: Path) -> None:
    config = load_config(path)
    total = 2 * config.optimizer.warmup_steps + 2
    peak = max(rates_at(step, total, config.optimizer).learning_rate for step in range(total))
    assert 0 < peak <= config.optimizer.peak_rate
