"""Reports as a user makes them, read without a browser: how runs ended, what a page tells, markup, secrets."""

from __future__ import annotations

import html
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bitmar.observability.records import JsonlSink
from tests.support.logged_runs import LAYERS, LONG_AGO, died_run, finished_run
from tools import report
from tools.report_page import curves, sections
from tools.report_page.curves import charts
from tools.report_page.data import page_data
from tools.report_page.headline import headline
from tools.report_page.page import build_page
from tools.report_page.redaction import Redactor
from tools.report_page.runs import Run, read_run, state_of

CANARY = "canary-4f1d0c66a9e24b7b"
NOTHING = Redactor({})
PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 100 + b"IEND\xae\x42\x60\x82"


def read(folder: Path, redactor: Redactor = NOTHING) -> Run:
    return read_run(folder, folder.name, redactor)


def number(run: Run, label: str) -> str:
    return next(n.value for n in headline(run) if n.label == label)


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def without_library(page: str) -> str:
    """The page without its scripts of code."""
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


class Tags(HTMLParser):
    """Names and attributes of the elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs


def test_a_single_spike_of_a_large_run_is_drawn_and_thinning_is_told(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "large")
    for step in range(4000):
        sink.log(step, {"Training/Loss": 99.0 if step == 1234 else 2.0})
    sink.close()
    page = build_page([read(tmp_path / "large")], LONG_AGO)
    (line,) = data_of(page)["charts"][0]["lines"]
    assert len(line["x"]) <= curves.MAX_POINTS
    assert line["y"][line["x"].index(1234)] == 99.0
    assert "thinned to 1,000 points at most (the longest has 4,000)" in page


def test_a_page_without_long_curves_says_nothing_of_thinning(tmp_path: Path) -> None:
    assert "thinned" not in without_library(build_page([read(finished_run(tmp_path / "a"))], LONG_AGO))


def test_not_finite_is_a_gap_and_is_told(tmp_path: Path) -> None:
    run = read(finished_run(tmp_path / "a", plots=False))
    page = build_page([run], LONG_AGO)
    (chart,) = [c for c in charts([run])["Training"] if c.metric == "Training/Loss"]
    data = json.loads(page_data([run], [chart]))
    (line,) = data["charts"][0]["lines"]
    assert line["y"][line["x"].index(200)] is None
    assert "NOT FINITE, drawn as gaps: step 200" in page


@pytest.mark.parametrize(
    "hostile", ['<script>alert(1)</script>"><img src=x onerror=alert(2)>', "</script><b>", "'\"&lt;%{x}"]
)
def test_nothing_of_a_run_becomes_markup(tmp_path: Path, hostile: str) -> None:
    folder = tmp_path / hostile.replace("/", "\N{FRACTION SLASH}")
    sink = JsonlSink(folder)
    sink.event("start", step=0, world=hostile)
    sink.event(hostile, **{hostile: hostile, "step": hostile})
    sink.log(1, {f"{hostile}/{hostile}": 1.0, f"Training/{hostile}": 2.0})
    sink.log(2, {f"{hostile}/{hostile}": math.nan})
    sink.close()
    (folder / "config.yaml").write_text(json.dumps({"run": {hostile: hostile}, "phases": [{"name": hostile}]}))
    (folder / "summary.json").write_text(json.dumps({"step": hostile, "data": hostile, "words": hostile}))
    (folder / "plots").mkdir()
    (folder / "plots" / f"{hostile.replace('/', '-')}.png").write_bytes(PNG)
    other = finished_run(tmp_path / "plain", plots=False)
    pages = [build_page([read(folder)], LONG_AGO), build_page([read(folder), read(other)], LONG_AGO)]
    for page in pages:
        tags = Tags()
        tags.feed(page)
        assert tags.names.count("script") == 3
        assert "<img src=x" not in without_library(page)
        assert "<b></" not in without_library(page)
        assert not any(name.startswith("on") for name, _ in tags.attributes)
        assert html.escape(folder.name) in page
        data_of(page)


@pytest.mark.parametrize(
    ("metrics", "says"), [("torn", "unfinished"), ("empty", "is empty"), ("missing", "is missing")]
)
def test_a_run_that_died_in_step_3(tmp_path: Path, metrics: str, says: str) -> None:
    run = read(died_run(tmp_path / "died", metrics))
    state = state_of(run, LONG_AGO + 86400)
    assert state.word == "died"
    assert ("after step 2;" if metrics == "torn" else "after step 0;") in state.text
    page = build_page([run], LONG_AGO + 86400)
    assert says in page
    assert "no plots" in page
    assert len(data_of(page)["charts"]) == (len(run.series) - LAYERS + 1 if metrics == "torn" else 0)


def test_a_run_that_just_wrote_may_be_running(tmp_path: Path) -> None:
    run = read(died_run(tmp_path / "young"))
    assert state_of(run, LONG_AGO + 60).word == "running"


def test_a_run_that_logs_rarely_is_not_taken_for_dead() -> None:
    run = Run("a", Path("a"), log_times=(0.0, 3600.0), written=3600.0)
    assert state_of(run, 3600.0 + 7200).word == "running"
    assert state_of(run, 3600.0 + 12000).word == "died"


@pytest.mark.parametrize(
    ("events", "word"),
    [
        ([("start", {"step": 0}), ("stopped", {"step": 5, "reason": "SIGTERM"})], "stopped"),
        ([("start", {"step": 0}), ("data_error", {"step": 5, "problem": "x"}), ("checkpoint", {"step": 5})], "failed"),
        ([("start", {"step": 0}), ("not_finite", {"step": 5})], "failed"),
        ([("start", {"step": 0}), ("stopped", {"step": 5}), ("start", {"step": 5})], "died"),
    ],
)
def test_the_events_of_the_last_start_tell_how_it_ended(
    tmp_path: Path, events: list[tuple[str, dict[str, Any]]], word: str
) -> None:
    sink = JsonlSink(tmp_path)
    for kind, fields in events:
        sink.event(kind, **fields)
    sink.close()
    state = state_of(read(tmp_path), 1e11)
    assert state.word == word
    assert "after step 5" in state.text


def test_a_finished_run_that_was_made_longer_is_not_finished(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a", plots=False)
    assert state_of(read(folder), 1e11).word == "finished"
    sink = JsonlSink(folder)
    sink.log(500, {"Training/Loss": 2.0})
    sink.close()
    assert state_of(read(folder), 1e11).word == "died"


def test_key_numbers(tmp_path: Path) -> None:
    run = read(finished_run(tmp_path / "a", plots=False))
    assert number(run, "Validation loss") == "2.2700"
    assert number(run, "Words") == "1,160,000"
    assert number(run, "Samples a second") == "110.4"
    assert number(run, "Training time") == "3 min 52 s"
    assert number(run, "Ranks") == "2"
    (tmp_path / "a" / "summary.json").unlink()
    run = read(tmp_path / "a")
    loss = next(n for n in headline(run) if n.label == "Validation loss")
    assert loss.about == "nats/token, step 400"
    assert number(run, "Parameters") == "2,363,876"


def test_generated_data_is_told(tmp_path: Path) -> None:
    run = read(finished_run(tmp_path / "a", plots=False))
    assert sections.GENERATED.format("") in build_page([run], LONG_AGO)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text()) | {"data": "given"}
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    assert sections.GENERATED.format("") not in build_page([read(tmp_path / "a")], LONG_AGO)


def test_phases_have_their_names(tmp_path: Path) -> None:
    run = read(finished_run(tmp_path / "a", plots=False))
    assert run.phases() == [("text", 5), ("pairs", 75)]
    assert "by the first step logged: text 5, pairs 75" in build_page([run], LONG_AGO)


def test_many_events_are_shortened_and_it_is_told() -> None:
    events = [{"time": 1e9, "kind": f"kind{n}", "step": n} for n in range(1000)]
    shown = sections.events(Run("a", Path("a"), events=events))
    assert "600 events in the middle are left out" in shown
    assert ("kind49<" in shown, "kind50<" in shown, "kind649<" in shown, "kind650<" in shown) == (
        True,
        False,
        False,
        True,
    )


def test_no_secret_of_the_environment_reaches_page_or_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("HF_TOKEN", f'q"<&{CANARY}')
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}-long")
    folder = finished_run(tmp_path / "a", plots=False)
    sink = JsonlSink(folder)
    sink.event("warning", message=f"login failed with {CANARY}", nested={"url": [f"https://u:{CANARY}@host/x"]})
    sink.event(CANARY, **{CANARY: f'q"<&{CANARY}', "other": f"{CANARY}-long"})
    sink.log(401, {f"Training/{CANARY}": 1.0})
    sink.close()
    (folder / "config.yaml").write_text(f"run:\n  name: {CANARY}\ndata:\n  shards: s3://{CANARY}/x\n")
    named = finished_run(tmp_path / f"run-{CANARY}", plots=False)
    (named / "config.yaml").write_text(f"no: yaml: {CANARY}\n")
    files = [tmp_path / "report.html", tmp_path / "curves.csv"]
    assert report.main([str(folder), str(named), "--out", str(files[0]), "--csv", str(files[1])]) == 0
    for file in files:
        content = file.read_text(encoding="utf-8")
        assert CANARY not in content
        assert "***" in content
    assert not any(value in files[0].read_text() for name, value in os.environ.items() if name.endswith("_KEY"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert report.main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    return told.err


def test_a_users_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path / "a", plots=False)
    (tmp_path / "empty").mkdir()
    assert "is no folder" in refused(capsys, tmp_path / "none")
    assert "is no folder" in refused(capsys, run / "metrics.jsonl")
    assert "holds no run" in refused(capsys, tmp_path / "empty")
    assert "given twice" in refused(capsys, run, run / ".." / "a", "--out", tmp_path / "x.html")
    assert "is a folder" in refused(capsys, run, "--out", tmp_path)
    assert "does not exist" in refused(capsys, run, "--out", tmp_path / "none" / "x.html")
    assert "own file" in refused(capsys, run, "--csv", run / "metrics.jsonl")
    assert "two files" in refused(capsys, run, "--out", tmp_path / "x", "--csv", tmp_path / "x")
    assert "cannot be written" in refused(capsys, run, "--out", tmp_path / ("x" * 250))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_a_damaged_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path / "a", plots=False)
    whole = (run / "metrics.jsonl").read_text()
    for line in ("[1]", "torn", '{"Training/Loss": 1}', '{"Training/Step": 1, "Training/Loss": "x"}'):
        (run / "metrics.jsonl").write_text(f"{line}\n{whole}")
        assert "metrics.jsonl" in refused(capsys, run)
    (run / "metrics.jsonl").write_text(whole)
    for content in ("{", "[]"):
        (run / "summary.json").write_text(content)
        assert "summary.json" in refused(capsys, run)
    assert not (run / "report.html").exists()


def test_where_reports_go_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (finished_run(tmp_path / name, plots=False) for name in ("a", "b"))
    monkeypatch.chdir(tmp_path)
    assert report.main([str(one)]) == 0
    assert report.main([str(one), str(other)]) == 0
    assert capsys.readouterr().out.split() == [str(one / "report.html"), "report.html"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    page = build_page([read(finished_run(tmp_path / "a"))], LONG_AGO)
    tags = Tags()
    tags.feed(page)
    addresses = [value or "" for name, value in tags.attributes if name in ("src", "href")]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert sum(address.startswith("data:image/png") for address in addresses) == 3
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
