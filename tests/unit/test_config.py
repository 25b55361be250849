"""Recipes: overrides, conversion of values, checks across sections. Messages: tests/integration/test_bad_input.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitmar.config import Config, ConfigError, DataConfig, ModelConfig, PhaseConfig, dump_config, load_config

PHASE = {"name": "all", "steps": 5, "mix": {"pairs": 1}, "losses": {"lm": 1}}


def load(tmp_path: Path, values: dict[str, Any], *overrides: str) -> Config:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": {"shards": "s"}, "phases": [PHASE]} | values), encoding="utf-8")
    return load_config(path, overrides)


def test_sections_that_are_left_out_take_their_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, {}) == Config(DataConfig("s"), (PhaseConfig("all", {"pairs": 1.0}, {"lm": 1.0}, steps=5),))


def test_overrides_win_reach_lists_and_make_sections(tmp_path: Path) -> None:
    overrides = ("model.width=512", "model.heads=8", "phases.0.steps=7", "phases.0.mix.text=0.5", "run.name=other")
    config = load(tmp_path, {"model": {"width": 128, "heads": 4}}, *overrides)
    assert (config.model.width, config.model.heads, config.run.name) == (512, 8, "other")
    assert config.phases[0].steps == 7
    assert config.phases[0].mix == {"pairs": 1.0, "text": 0.5}


def test_the_last_of_two_overrides_wins(tmp_path: Path) -> None:
    assert load(tmp_path, {}, "run.seed=2", "run.seed=3").run.seed == 3


def test_an_override_takes_a_list_and_null(tmp_path: Path) -> None:
    config = load(tmp_path, {}, "phases.0.train=[vision, fusion]", "phases.0.steps=null", "phases.0.words=9")
    assert config.phases[0].train == ("vision", "fusion")
    assert (config.phases[0].steps, config.phases[0].words) == (None, 9)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("3", 3.0), ("0.5", 0.5), ("'2e-3'", 2e-3)])
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    config = load(tmp_path, {}, f"optimizer.peak_rate={text}")
    assert config.optimizer.peak_rate == value
    assert type(config.optimizer.peak_rate) is float


@pytest.mark.parametrize(
    "override",
    ["model.width=3.5", "model.width=true", "model.quantization=1", "run.name=7", "optimizer.peak_rate=true"],
)
def test_no_value_is_bent_into_another_type(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load(tmp_path, {}, override)


@pytest.mark.parametrize("override", ["phases.3.steps=1", "phases.first.steps=1", "run.name.first=x", "=3", "run.seed"])
def test_overrides_that_lead_nowhere(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load(tmp_path, {"run": {"name": "a"}}, override)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b"])
def test_a_run_name_is_a_plain_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        load(tmp_path, {"run": {"name": name}})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "width", -1),
        ("model", "vision_tokens", 1),
        ("model", "memory_alpha", 0.0),
        ("model", "memory_match", 1.5),
        ("model", "dropout", 1.0),
        ("model", "text_latent_size", 12),
        ("model", "memory_addressing", "nearest"),
        ("training", "gradient_clip", 0.0),
        ("training", "precision", "fp16"),
        ("training", "max_steps", 0),
        ("optimizer", "beta2", 1.0),
        ("checkpoint", "keep_last", 0),
        ("wandb", "enabled", "sometimes"),
        ("wandb", "log_interval", 7),
        ("wandb", "probe_samples", 10**6),
    ],
)
def test_each_section_names_the_value_it_refuses(tmp_path: Path, section: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.{name}"):
        load(tmp_path, {section: {name: value}})


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load(tmp_path, {"model": {"memory_addressing": "larimar"}, "training": {"max_steps": 3}})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(("ranks", "fits"), [(1, True), (2, True), (4, True), (32, True), (3, False), (64, False)])
def test_ranks_must_divide_the_global_batch(tmp_path: Path, ranks: int, fits: bool) -> None:
    config = load(tmp_path, {"training": {"global_batch": 32, "micro_batch": 16}})
    if fits:
        config.check_world(ranks)
        assert config.micro_batch(ranks) == min(16, 32 // ranks)
        assert config.accumulation_steps(ranks) * config.micro_batch(ranks) * ranks == 32
    else:
        with pytest.raises(ConfigError, match=f"{ranks} ranks"):
            config.check_world(ranks)


def test_a_contrastive_group_lies_within_one_forward_pass(tmp_path: Path) -> None:
    phase = PHASE | {"losses": {"lm": 1, "contrastive": 1}}
    training = {"global_batch": 32, "micro_batch": 8}
    config = load(tmp_path, {"phases": [phase], "training": training, "model": {"contrastive_group": 16}})
    config.check_world(2)
    with pytest.raises(ConfigError, match="contrastive_group 16"):
        config.check_world(1)


def test_a_rank_has_a_recall_group_at_least(tmp_path: Path) -> None:
    phase = PHASE | {"losses": {"lm": 1, "recall": 1}}
    config = load(
        tmp_path,
        {"phases": [phase], "training": {"global_batch": 32, "micro_batch": 16}, "model": {"recall_group": 8}},
    )
    config.check_world(4)
    with pytest.raises(
        ConfigError,
        match=r"micro_batch 4 \(or a rank's share of the batch\) must be a multiple of model.recall_group 8",
    ):
        config.check_world(8)


def test_two_phases_need_two_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names of their own"):
        load(tmp_path, {"phases": [PHASE, PHASE]})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().width = 3  # type: ignore[misc]
