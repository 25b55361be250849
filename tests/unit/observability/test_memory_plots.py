from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmar.observability.board import Arrays
from bitmar.observability.drawing import About
from bitmar.observability.memory_plots import (
    fewer_cells,
    read_mass,
    read_order,
    reads_figure,
    slot_grid,
    timeline_figure,
    usage_figure,
)

ABOUT = About("run", 40)


def record(step: int, usage: list[float], written: list[bool] | None = None) -> Arrays:
    values = np.array(usage)
    return {
        "step": np.array(step),
        "usage": values,
        "age": np.arange(len(usage)),
        "written": np.array(written) if written is not None else np.ones(len(usage), bool),
    }


@given(st.integers(1, 5000))
def test_slots_lie_in_a_near_square_grid(slots: int) -> None:
    grid = slot_grid(np.arange(slots, dtype=np.float64))
    rows, columns = grid.shape
    assert 0 <= columns - rows <= 1
    assert grid[np.isfinite(grid)].tolist() == list(range(slots))
    assert not np.isfinite(grid.ravel()[slots:]).any()
    assert rows * columns - slots < columns  # only the last row has places left


@pytest.mark.parametrize("slots", [1, 5, 37, 64, 512])
def test_heatmaps_show_usage_and_age_of_written_slots(slots: int) -> None:
    written = np.arange(slots) % 3 != 1
    row = record(40, np.linspace(1, 9, slots).tolist(), written.tolist())
    figure = usage_figure(ABOUT, row)
    assert figure is not None
    for axis, key in zip(figure.axes[:2], ("usage", "age"), strict=True):
        shown = np.ma.filled(np.ma.asarray(axis.images[0].get_array()).astype(float), np.nan).ravel()[:slots]
        np.testing.assert_array_equal(shown, np.where(written, row[key], np.nan))
    assert {axis.get_xlabel() for axis in figure.axes[2:]} == {"read mass", "optimizer steps"}


def test_no_picture_before_the_first_write() -> None:
    empty = record(10, [0.0, 0.0], [False, False])
    assert usage_figure(ABOUT, empty) is None
    assert reads_figure(ABOUT, empty) is None
    assert timeline_figure(ABOUT, [empty, empty]) is None
    assert timeline_figure(ABOUT, []) is None


def test_read_mass_between_logs_is_by_step() -> None:
    edges, mass = read_mass([record(10, [20.0, 0.0]), record(12, [30.0, 4.0]), record(20, [30.0, 12.0])])
    assert edges.tolist() == [0.0, 10.0, 12.0, 20.0]
    assert mass.tolist() == [[2.0, 5.0, 0.0], [0.0, 2.0, 1.0]]


def test_a_log_at_step_0_has_no_width() -> None:
    edges, mass = read_mass([record(0, [0.0]), record(5, [10.0])])
    assert (edges.tolist(), mass.tolist()) == ([0.0, 5.0], [[2.0]])
    figure = timeline_figure(ABOUT, [record(0, [0.0])])
    assert figure is not None
    assert figure.axes[0].texts[0].get_text() == "one log at step 0 only"


@given(st.integers(1, 900), st.integers(1, 700), st.integers(0, 2**31))
def test_fewer_cells_keep_the_mass_of_the_slot_that_has_most(logs: int, slots: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = np.concatenate([[0.0], rng.integers(1, 9, logs).cumsum()])
    steps, rows, cells = fewer_cells(edges, np.ones((slots, logs)))
    assert cells.shape == (min(slots, 512), min(logs, 300)) == (len(rows) - 1, len(steps) - 1)
    np.testing.assert_allclose(cells, 1.0)
    mass = np.zeros((slots, logs))
    mass[rng.integers(slots), :] = 3.0
    _, _, cells = fewer_cells(edges, mass)
    np.testing.assert_allclose(cells.max(0), 3.0)


def test_the_timeline_shows_the_cells() -> None:
    records = [record(10 * (i + 1), [10.0 * i * k for k in range(5)], [k <= i for k in range(5)]) for i in range(6)]
    figure = timeline_figure(ABOUT, records)
    assert figure is not None
    cells = np.ma.asarray(figure.axes[0].collections[0].get_array())
    np.testing.assert_allclose(cells[:, 1:], np.outer(np.arange(5), np.ones(5)))
    assert np.asarray(figure.axes[1].lines[0].get_ydata()).tolist() == [1, 2, 3, 4, 5, 5]


def test_slots_by_falling_read_mass() -> None:
    slots, shares = read_order(record(5, [1.0, 9.0, 6.0, 4.0], [True, False, True, True]))
    assert slots.tolist() == [2, 3, 0]
    np.testing.assert_allclose(shares, [6 / 11, 4 / 11, 1 / 11])
    figure = reads_figure(ABOUT, record(5, [1.0, 9.0, 6.0, 4.0], [True, False, True, True]))
    assert figure is not None
    top, bottom = figure.axes
    np.testing.assert_allclose([bar.get_height() for bar in top.patches], 100 * shares)  # type: ignore[attr-defined]
    assert [bar.get_height() for bar in bottom.patches] == [2, 3, 0]  # type: ignore[attr-defined]
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["2", "3", "0"]


def test_nothing_read_yet_is_drawn() -> None:
    figure = reads_figure(ABOUT, record(5, [0.0, 0.0]))
    assert figure is not None
    figure.canvas.draw()
