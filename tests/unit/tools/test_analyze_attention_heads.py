"""The analysis of attention heads as a user asks for it: what it prints and writes, of whole and of torn folders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tests.support.picture_runs import Size, write_heads
from tests.support.runs import run_tool
from tools.analyze_attention_heads import main

REPORT, SIZE = "attention_analysis_report", Size()


def a_run(folder: Path, steps: int = 8, size: Size = SIZE) -> Path:
    """The analysis directory of a run, a file every 10 steps."""
    analysis, rng = folder / "attention_analysis", np.random.default_rng(0)
    analysis.mkdir(parents=True)
    for count in range(1, steps + 1):
        write_heads(folder, size, 10 * count, rng)
    return analysis


def save(folder: Path, step: int, **arrays: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: np.array(value) for name, value in arrays.items()}
    np.savez_compressed(folder / f"heads_step_{step}.npz", step=np.array(step), **values)  # type: ignore[arg-type]


def numbers(folder: Path) -> Any:
    """The JSON report, strict."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folder / f"{REPORT}.json").read_text(encoding="utf-8"), parse_constant=refuse)


def page(folder: Path) -> str:
    return (folder / f"{REPORT}.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def table(text: str) -> list[list[str]]:
    """The rows of the first table, without its heading."""
    lines = [line for line in text.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_run_s_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analysis = a_run(tmp_path / "run")
    assert main(["--analysis_dir", str(analysis), "--create_report", "--top_k", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "run: 8 analysis steps, 10 to 80"
    assert [line.partition(":")[0] for line in printed[1:5]] == ["encoder", "decoder", "cross_modal", "memory"]
    reports = analysis / "reports"
    assert printed[5:] == [str(reports / f"{REPORT}.md"), str(reports / f"{REPORT}.json")]
    text = page(reports)
    linked = set(re.findall(r"!\[.*?\]\((.*?)\)", text))
    assert linked == {path.name for path in reports.glob("*.png")}
    assert {name.removesuffix(".png") for name in linked} == {
        *(f"consistency_{kind}" for kind in ("encoder", "decoder", "cross_modal")),
        *("stability", "layers", "rise_and_fall", "patterns"),
    }
    for name in linked:
        image = imread(reports / name)[..., :3]
        assert image.shape[1] == 1200  # 8 inches at 150 DPI
        assert image[150:].std() > 0.05, name
    told = numbers(reports)
    assert list(told["kinds"]) == ["encoder", "decoder", "cross_modal", "memory"]
    for kind in told["kinds"].values():
        assert sum(head["consistency"] for head in kind["heads"]) == pytest.approx(min(3, len(kind["heads"])))
        assert sum(layer["importance_share"] for layer in kind["layer_distribution"]) == pytest.approx(1)
    assert set(told["definitions"]) <= {key for key, says in told["definitions"].items() if says in text}
    assert not list(reports.glob("*.tmp"))


def test_the_numbers_of_a_head_by_hand(tmp_path: Path) -> None:
    analysis = tmp_path / "attention_analysis"
    for step, importance in ((10, [[4, 3], [1, 2]]), (20, [[1, 4], [3, 2]]), (30, [[np.nan, 4], [3, 2]])):
        save(analysis, step, Encoder_Importance=importance)
    out = tmp_path / "a" / "b"
    assert main(["--analysis_dir", str(analysis), "--create_report", "--top_k", "2", "--out", str(out)]) == 0
    kind = numbers(out)["kinds"]["encoder"]
    first, second, *_ = kind["heads"]
    assert first == {
        "head": "encoder.L0H0",
        "layer": 0,
        "number": 0,
        "consistency": pytest.approx(1 / 3),
        "mean_importance": 2.5,
        "mean_rank": 2.5,
        "first_top_step": 10,
        "last_top_step": 10,
        "rank_first_quarter": None,
        "rank_last_quarter": None,
        "rise": None,
        "dead_share": 0,
    }
    assert (second["consistency"], second["first_top_step"], second["last_top_step"], second["rise"]) == (1, 10, 30, 0)
    assert kind["stability"]["to_previous"] == [None, pytest.approx(-0.4), pytest.approx(1)]
    assert kind["stability"]["to_last"] == [pytest.approx(0.5), pytest.approx(1), None]
    assert (kind["rose"], kind["fell"]) == (["encoder.L1H0"], ["encoder.L1H1"])
    rows = table(section(page(out), "Consistency"))
    assert rows == [
        ["encoder.L0H1", "100 %", "3.67", "1.3", "10", "30"],
        ["encoder.L1H0", "67 %", "2.33", "2.7", "20", "30"],
        ["encoder.L0H0", "33 %", "2.5", "2.5", "10", "10"],
    ]


def test_a_torn_file_of_an_interrupted_run_is_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    analysis = a_run(tmp_path, steps=10)
    for step in (90, 100):
        path = analysis / f"heads_step_{step}.npz"
        path.write_bytes(path.read_bytes()[:-step])
    assert main(["--analysis_dir", str(analysis), "--create_report"]) == 0
    printed = capsys.readouterr().out
    assert "8 analysis steps, 10 to 80" in printed
    assert "left out: 2 of 10 files: heads_step_90.npz (cut short" in printed
    told, text = numbers(analysis / "reports"), page(analysis / "reports")
    assert [left["file"] for left in told["files"]["left_out"]] == ["heads_step_90.npz", "heads_step_100.npz"]
    assert told["files"]["read"] == 8
    assert "2 of 10 files left out" in text
    assert "heads\\_step\\_90.npz" in text


def test_one_step_has_no_stability_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analysis = a_run(tmp_path, steps=1)
    assert main(["--analysis_dir", str(analysis), "--create_report"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("stability: needs two analysis steps, there is one") == 4
    text = page(analysis / "reports")
    assert table(section(text, "Stability"))[0] == ["Encoder", "needs two analysis steps, there is one", "-", "-"]
    assert "This needs two analysis steps" in section(text, "Heads that rose and fell")
    assert not (analysis / "reports" / "stability.png").exists()
    stability = numbers(analysis / "reports")["kinds"]["encoder"]["stability"]
    assert (stability["to_previous"], stability["mean_to_previous"]) == ([None], None)


def test_a_pruned_head_is_never_in_the_top(tmp_path: Path) -> None:
    analysis = tmp_path / "attention_analysis"
    for step in (1, 2, 3, 4):
        save(analysis, step, Decoder_Importance=[[np.nan, 1.0, 0.002, 2.0]])
    assert main(["--analysis_dir", str(analysis), "--create_report", "--attention_type", "decoder"]) == 0
    kind, text = numbers(analysis / "reports")["kinds"]["decoder"], page(analysis / "reports")
    pruned = kind["heads"][0]
    assert {pruned[key] for key in ("consistency", "mean_importance", "mean_rank", "first_top_step")} == {None}
    assert "decoder.L0H0" not in text
    assert "3 of 4 heads were in the top at some step; 1 were never measured" in text
    assert kind["dead"]["every_step"] == kind["dead"]["last_step"] == ["decoder.L0H2"]
    assert "has room for all of them" in text


def test_a_kind_whose_importance_was_not_measured_still_shows_its_patterns(tmp_path: Path) -> None:
    analysis = tmp_path / "attention_analysis"
    for step, entropy in ((1, 3.0), (2, 2.0), (3, 1.0)):
        save(analysis, step, Memory_Entropy=[[entropy]], Memory_Concentration=[[np.nan]])
    assert main(["--analysis_dir", str(analysis), "--create_report", "--attention_type", "memory"]) == 0
    told, text = numbers(analysis / "reports"), page(analysis / "reports")
    assert told["patterns"]["memory"]["entropy"] == [3, 2, 1]
    assert told["patterns"]["memory"]["importance"] == [None] * 3
    assert table(section(text, "Memory over training")) == [
        ["Memory", "Entropy over the keys, nats", "3", "1", "1", "1", "3"]
    ]
    assert "was not measured" in section(text, "Consistency")
    assert [path.name for path in (analysis / "reports").glob("*.png")] == ["patterns.png"]


def test_one_kind_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analysis = a_run(tmp_path)
    assert main(["--analysis_dir", str(analysis), "--attention_type", "cross_modal"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["cross_modal"]
    assert not (analysis / "reports").exists()


def test_nothing_of_a_run_s_name_becomes_markup(tmp_path: Path) -> None:
    analysis = a_run(tmp_path / "a|b <i>*c*_[d](e)")
    assert main(["--analysis_dir", str(analysis), "--create_report"]) == 0
    heading = page(analysis / "reports").split("\n")[0]
    assert heading == "# Attention heads of a\\|b \\<i\\>\\*c\\*\\_\\[d\\]\\(e\\)"


def test_many_heads_are_cut_and_the_page_says_so(tmp_path: Path) -> None:
    analysis = a_run(tmp_path, size=Size(layers=4, heads=16))
    assert main(["--analysis_dir", str(analysis), "--create_report", "--attention_type", "encoder"]) == 0
    consistency = section(page(analysis / "reports"), "Consistency")
    assert len(table(consistency)) == 30
    assert "The table shows the first 30 of them." in consistency
    assert len(numbers(analysis / "reports")["kinds"]["encoder"]["heads"]) == 64


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--analysis_dir", "none"], "none does not exist; give a run's attention_analysis directory"),
        (["--analysis_dir", "empty"], "empty is empty: the run has not measured its attention heads yet"),
        (["--analysis_dir", "other"], "other holds no heads_step_STEP.npz; give a run's attention_analysis directory"),
        (["--analysis_dir", "run"], "run holds no heads_step_STEP.npz; give run/attention_analysis"),
        (["--analysis_dir", "run/attention_analysis", "--top_k", "0"], "--top_k must be at least 1, got 0"),
        (["--analysis_dir", "run/attention_analysis", "--out", "x"], "--out is where --create_report writes to"),
        (
            ["--analysis_dir", "run/attention_analysis", "--attention_type", "decoder"],
            "decoder heads were not measured; measured are encoder",
        ),
        (
            ["--analysis_dir", "run/attention_analysis", "--create_report", "--out", "other/file"],
            "other/file: the report cannot be written: File exists",
        ),
        (
            ["--analysis_dir", "run/attention_analysis", "--create_report", "--out", "other/file/x"],
            "other/file/x: the report cannot be written: Not a directory",
        ),
    ],
)
def test_a_user_s_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    save(tmp_path / "run" / "attention_analysis", 1, Encoder_Importance=[[1.0]])
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert says in told
    assert told.count("\n") == 1


def test_as_a_script(tmp_path: Path) -> None:
    analysis = a_run(tmp_path / "run")
    done = run_tool("analyze_attention_heads.py", "--analysis_dir", analysis, "--attention_type", "all")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("run: 8 analysis steps, 10 to 80\nencoder: 3 x 4 heads; ")
    assert run_tool("analyze_attention_heads.py", "--analysis_dir", tmp_path).returncode == 2
