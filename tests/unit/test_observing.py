"""When a log is due, and when pictures are drawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bitmar.config import Config, DataConfig, PhaseConfig
from bitmar.observing import draw, is_log_due
from bitmar.probing import is_analysis_due
from bitmar.watch_config import AttentionAnalysisConfig, WandbConfig
from shards.loader import LoaderState

STEPS, EPOCHS = 40, 4.0
BOTH = ["plots", "attention_analysis"]


def run_at(step: int = 0, probes: int = 1, plots: int = 1, analysed: int = 12, heads: int = 1) -> Any:
    """Step 40 is its last; 10 steps are an epoch. What it draws comes to `drawn`."""
    phase = PhaseConfig("all", {"pairs": 1.0}, {"lm": 1.0}, steps=STEPS)
    wandb = WandbConfig(log_every_n_steps=50, attention_log_interval=9, pca_log_interval=100, plot_every_n_epochs=plots)
    analysis = AttentionAnalysisConfig(log_every_n_steps=analysed, viz_every_n_epochs=heads)
    config = Config(DataConfig("none"), (phase,), wandb=wandb, attention_analysis=analysis)
    drawn: list[tuple[int, list[str]]] = []
    board = SimpleNamespace(
        draw=lambda step, folders: drawn.append((step, folders)), pictures=lambda: (), problems=lambda: ()
    )
    watch = SimpleNamespace(probes=SimpleNamespace(heads=(None,) * probes, latents=()), board=board)
    return SimpleNamespace(
        config=config,
        watch=watch,
        last_step=STEPS,
        lengths=[STEPS],
        progress=SimpleNamespace(step=step),
        loader=SimpleNamespace(order=SimpleNamespace(epochs=lambda phase: EPOCHS)),
        drawn=drawn,
    )


def due(run: Any, what: Any) -> list[int]:
    """The steps at which a log, or an analysis, is."""
    return [step for step in range(1, STEPS + 1) if what(run, step, LoaderState(0, step - 1))]


def test_a_log_follows_each_pass_of_the_probe_set() -> None:
    run = run_at(analysed=12, heads=9)
    assert due(run, is_log_due) == [9, 12, 18, 24, 27, 36, STEPS]
    assert due(run, is_analysis_due) == [12, 24, 36]


def test_heads_are_analysed_at_the_end_of_a_drawn_epoch_where_the_cadence_has_not_come_before() -> None:
    assert due(run_at(analysed=100), is_analysis_due) == [10, 20, 30, 40]
    assert due(run_at(analysed=12), is_analysis_due) == [10, 12, 24, 36]
    assert due(run_at(analysed=25), is_analysis_due) == [10, 20, 25, 40]
    run = run_at(analysed=15, heads=2)
    assert due(run, is_analysis_due) == [15, 30]
    assert due(run, is_log_due) == [9, 15, 18, 27, 30, 36, 40]


def test_without_a_probe_set_there_is_no_analysis() -> None:
    run = run_at(probes=0)
    assert due(run, is_log_due) == [STEPS]
    assert due(run, is_analysis_due) == []


@pytest.mark.parametrize(
    ("plots", "heads", "expected"),
    [
        (1, 1, {10: BOTH, 20: BOTH, 30: BOTH}),
        (1, 2, {10: ["plots"], 20: BOTH, 30: ["plots"]}),
        (9, 3, {30: ["attention_analysis"]}),
        (9, 9, {}),
    ],
)
def test_each_folder_is_drawn_at_its_own_epochs(plots: int, heads: int, expected: dict[int, list[str]]) -> None:
    """The last step's pictures are the run's end's to wish."""
    drawn: dict[int, list[str]] = {}
    for step in range(1, STEPS + 1):
        run = run_at(step, plots=plots, heads=heads)
        draw(run, LoaderState(0, step - 1))
        drawn |= dict(run.drawn)
    assert drawn == expected
