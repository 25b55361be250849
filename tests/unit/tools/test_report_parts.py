"""The report's pure parts: thinning, charts, units, CSV, comparing, pictures, striking out secrets."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmar.observability.run_folder import read_series
from bitmar.observability.schema import SCHEMA, find
from tests.support.logged_runs import LAYERS, finished_run
from tools.report_page import curves
from tools.report_page.configs import differences
from tools.report_page.curves import charts, thin, write_csv
from tools.report_page.data import shade
from tools.report_page.headline import span
from tools.report_page.pictures import read_album
from tools.report_page.redaction import Redactor
from tools.report_page.runs import Run, Series, labels, read_run

NOTHING = Redactor({})
PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 100 + b"IEND\xae\x42\x60\x82"


def read(folder: Path, redactor: Redactor = NOTHING) -> Run:
    return read_run(folder, folder.name, redactor)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=600), st.integers(5, 80))
def test_thinning_keeps_extremes_ends_gaps_and_order(values: list[float], most: int) -> None:
    whole = Series(np.arange(len(values)) * 10, np.array(values, dtype=np.float64))
    drawn = thin(whole, most)
    assert len(drawn.steps) <= max(most, 0) or len(values) <= most
    assert len(drawn.steps) == len(drawn.values)
    assert (np.diff(drawn.steps) > 0).all()
    np.testing.assert_array_equal(drawn.values, whole.values[drawn.steps // 10])
    if values:
        assert drawn.steps[[0, -1]].tolist() == whole.steps[[0, -1]].tolist()
        assert np.isnan(drawn.values).any() == np.isnan(whole.values).any()
    if np.isfinite(whole.values).any():
        assert np.nanmin(drawn.values) == np.nanmin(whole.values)
        assert np.nanmax(drawn.values) == np.nanmax(whole.values)


def test_a_short_curve_is_not_touched() -> None:
    series = Series(np.arange(5), np.ones(5))
    assert thin(series, 5) is series


def test_find_knows_the_schema() -> None:
    assert all(find(metric.name) == metric for metric in SCHEMA)
    assert find("Novel/Never_Heard_Of") is None


def test_charts_have_units_families_and_unknown_names(tmp_path: Path) -> None:
    made = charts([read(finished_run(tmp_path / "a", plots=False))])
    loss = next(chart for chart in made["Training"] if chart.metric == "Training/Loss")
    assert (loss.unit, loss.members) == ("nats/token", ())
    assert "objective" in loss.meaning
    (family,) = made["Attention"]
    assert family.metric == "Attention/Encoder_layer_#_Entropy"
    assert family.members == tuple(f"layer {layer}" for layer in range(LAYERS))
    (novel,) = made["Novel"]
    assert novel.unit == curves.UNKNOWN_UNIT
    assert not any(chart.metric == "Training/Step" for group in made.values() for chart in group)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    series = {f"Gradients/Layer_{n}": Series(np.arange(2), np.ones(2)) for n in (10, 9, 2)}
    (chart,) = charts([Run("a", Path("a"), series)])["Gradients"]
    assert chart.members == ("Layer 2", "Layer 9", "Layer 10")


def test_csv_holds_every_point(tmp_path: Path) -> None:
    folders = [finished_run(tmp_path / "a", plots=False), finished_run(tmp_path / "b", seed=2, plots=False)]
    out = io.StringIO()
    write_csv(out, [read(folder) for folder in folders])
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    for folder in folders:
        wanted = read_series(folder / "metrics.jsonl")
        del wanted["Training/Step"]
        mine = [row for row in rows if row["run"] == folder.name]
        assert {row["metric"] for row in mine} == set(wanted)
        for name, (steps, values) in wanted.items():
            found = [row for row in mine if row["metric"] == name]
            assert [int(row["step"]) for row in found] == steps.tolist()
            written = [float(row["value"]) if row["value"] else math.nan for row in found]
            np.testing.assert_array_equal(written, values)
            metric = find(name)
            assert {row["unit"] for row in found} == {metric.unit if metric else ""}
    assert sum(row["value"] == "" for row in rows) == 2  # not finite, once a run


@pytest.mark.parametrize(
    ("seconds", "told"), [(12.34, "12.3 s"), (245, "4 min 05 s"), (11220, "3 h 07 min"), (183600, "2 d 03 h")]
)
def test_spans(seconds: float, told: str) -> None:
    assert span(seconds) == told


def test_differences_of_configurations() -> None:
    one = {"run": {"seed": 1}, "phases": [{"name": "text", "steps": 5, "train": ["a", "b"]}], "x": None}
    other = {"run": {"seed": 2}, "phases": [{"name": "text", "steps": 5, "train": ["a"]}], "x": None, "y": True}
    assert differences([one, one]) == []
    assert differences([one, other, None]) == [
        ("run.seed", ["1", "2", "absent"]),
        ("phases[text].name", ["text", "text", "absent"]),
        ("phases[text].steps", ["5", "5", "absent"]),
        ("phases[text].train", ["a, b", "a", "absent"]),
        ("x", ["null", "null", "absent"]),
        ("y", ["absent", "true", "absent"]),
    ]


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "z"]
    assert labels(folders) == ["x/run", "y/run", "z"]


def test_the_newest_picture_of_each_kind(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "attention_analysis").mkdir()
    for step in (90, 100, 1000):
        (tmp_path / "attention_analysis" / f"heads_step_{step}.png").write_bytes(PNG)
    for layer in (1, 2):
        (tmp_path / "plots" / f"layer_{layer}.png").write_bytes(PNG)
    (tmp_path / "plots" / "torn.png").write_bytes(PNG[:-4])
    (tmp_path / "plots" / "vast.png").write_bytes(PNG * 10)
    album = read_album(tmp_path, most=4 * len(PNG))
    assert {p.name for p in album.pictures} == {
        *("attention_analysis/heads_step_1000.png", "plots/layer_1.png", "plots/layer_2.png"),
    }
    assert (album.older, album.damaged, album.no_room) == (2, ("plots/torn.png",), ("plots/vast.png",))


def test_shades_end_with_the_runs_colour() -> None:
    assert shade("#0072B2", 4, 5) == shade("#0072B2", 0, 1) == "#0072b2"
    assert shade("#000000", 0, 3) > shade("#000000", 1, 3) > shade("#000000", 2, 3)


@pytest.mark.parametrize(
    ("told", "hidden"),
    [
        ("https://me:secret@host/a", "https://***@host/a"),
        ("s3://a/b?X-Amz-Signature=abc&part=1", "s3://a/b?X-Amz-Signature=***&part=1"),
        ("vision_tokens: 4, http://host/a?page=2", "vision_tokens: 4, http://host/a?page=2"),
    ],
)
def test_credentials_of_urls_are_struck_out(told: str, hidden: str) -> None:
    assert NOTHING.text(told) == hidden


def test_short_and_public_variables_are_left_alone() -> None:
    redactor = Redactor({"A_KEY": "true", "TOKENIZERS_PARALLELISM": "parallelism", "MY_TOKEN": "  "})
    assert redactor.text("true parallelism  ") == "true parallelism  "
