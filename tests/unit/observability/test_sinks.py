from __future__ import annotations

import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from bitmar.config import WandbConfig
from bitmar.observability.console import ConsoleSink, TimeLeft, duration, summary
from bitmar.observability.records import JsonlSink, encode_line, read_lines
from bitmar.observability.sinks import MultiSink, NullSink, TextSink, open_sinks

ABOUT: dict[str, Any] = {"wandb": WandbConfig(enabled=False), "name": "n", "run_id": "id1", "config": {"a": 1}}


def refuse_constant(text: str) -> None:
    raise AssertionError(f"{text} is not strict JSON")


def test_jsonl_lines_are_strict_and_flushed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "run")
    sink.log(10, {"Training/Loss": math.nan, "Training/Step": 10.0, "Data/Wait_Seconds": 0.5})
    sink.event("odd", step=10, path=tmp_path / "x", nested={"rate": math.inf, "list": [1.0, -math.inf]})
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()  # before close: flushed
    metrics = json.loads(lines[0], parse_constant=refuse_constant)
    assert metrics.pop("time") > 1.6e9
    assert metrics == {
        "Training/Step": 10,
        "Training/Loss": None,
        "Data/Wait_Seconds": 0.5,
        "nonfinite": ["Training/Loss"],
    }
    event = json.loads((tmp_path / "run/events.jsonl").read_text(), parse_constant=refuse_constant)
    assert event["kind"] == "odd"
    assert event["path"] == str(tmp_path / "x")
    assert event["nested"] == {"rate": None, "list": [1.0, None]}
    assert event["nonfinite"] == ["nested.rate", "nested.list[1]"]
    sink.close()


def test_images_are_events_relative_to_the_run(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.image(5, "Plots/Losses", tmp_path / "plots" / "losses.png")
    sink.close()
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["step"], event["name"], event["path"]) == (5, "Plots/Losses", "plots/losses.png")


def test_truncation_makes_one_rising_curve(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for step in range(0, 60, 10):
        sink.log(step, {"Training/Loss": math.inf if step == 20 else float(step)})
    sink.event("kept", step=50)
    sink.close()
    resumed = JsonlSink(tmp_path)
    assert resumed.truncate_after(30) == 2
    assert resumed.truncate_after(30) == 0
    for step in (40, 50, 60):
        resumed.log(step, {"Training/Loss": float(step)})
    resumed.close()
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["Training/Step"] for line in lines] == [0, 10, 20, 30, 40, 50, 60]
    assert lines[2]["nonfinite"] == ["Training/Loss"]  # the note survives the rewrite
    assert len(list(read_lines(tmp_path / "events.jsonl"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def test_a_torn_last_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(encode_line({"Training/Step": 1}) + '{"Training/Step": 2, "Trai')
    assert [line["Training/Step"] for line in read_lines(path)] == [1]
    sink = JsonlSink(tmp_path)
    sink.log(3, {})
    sink.close()
    assert [line["Training/Step"] for line in read_lines(path)] == [1, 3]


def test_a_line_torn_within_a_character_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode_line({"kind": "é"}).encode() + encode_line({"kind": "é"}).encode()[:-4])
    assert [line["kind"] for line in read_lines(path)] == ["é"]


@pytest.mark.parametrize("line", [b"not json\n", b"[1]\n", b'{"a": "\xff"}\n'])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode_line({"Training/Step": 1}).encode() + line)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not"):
        list(read_lines(path))


def test_text_sink_takes_packages_logs_until_it_closes(tmp_path: Path) -> None:
    sink = TextSink(tmp_path, total_steps=400)
    sink.log(50, {"Training/Loss": 5.2131})
    sink.event("warning", message="mind the gap")
    logging.getLogger("bitmar.engine.zero").info("from a module")
    sink.close()
    logging.getLogger("bitmar.engine.zero").warning("too late")
    text = (tmp_path / "log.txt").read_text()
    assert "INFO bitmar.run: step 50/400  loss 5.213" in text
    assert "WARNING bitmar.run: warning  message=mind the gap" in text
    assert "INFO bitmar.engine.zero: from a module" in text
    assert "too late" not in text
    assert logging.getLogger("bitmar").handlers == []


def test_plain_console_line() -> None:
    times = iter([0.0, 6.0, 12.0])
    stream = io.StringIO()
    sink = ConsoleSink(total_steps=400, stream=stream, clock=lambda: next(times))
    values = {
        "Training/Loss": 5.2131,
        "Training/Learning_Rate": 1.2e-3,
        "Throughput/Samples_Per_Second": 811.6,
    }
    sink.log(0, values)
    sink.log(50, values)
    sink.event("checkpoint", step=50)
    sink.close()
    assert stream.getvalue().splitlines() == [
        "step 0/400  loss 5.213  lr 1.2e-03  812 samples/s",
        "step 50/400  loss 5.213  lr 1.2e-03  812 samples/s  left 0:42",
        "checkpoint  step=50",
    ]


def test_time_left_after_a_resume_ignores_earlier_steps() -> None:
    times = iter([100.0, 110.0, 120.0])
    left = TimeLeft(total_steps=1000, clock=lambda: next(times))
    assert left(900) == ""
    assert left(950) == "left 0:10"
    assert left(1000) == "left 0:00"
    assert TimeLeft(None)(10) == ""


def test_durations_and_summaries() -> None:
    assert [duration(s) for s in (42, 725, 11229)] == ["0:42", "12:05", "3:07:09"]
    assert summary({"Validation/Loss": 4.0, "Validation/Vision_Gain": 0.12}) == (
        "validation loss 4.000  vision gain +0.1200"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_console_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    sink = ConsoleSink(total_steps=20, start_step=5, stream=stream)
    sink.log(10, {"Training/Loss": 3.25})
    sink.log(10, {"Validation/Loss": 3.5})
    sink.event("checkpoint", path="[bold]10[/bold]")  # no markup in what is shown
    sink.close()
    text = stream.getvalue()
    assert "step 10/20" in text
    assert "loss 3.250" in text
    assert "validation loss 3.500" in text
    assert "checkpoint  path=[bold]10[/bold]" in text


class Recorder(NullSink):
    def __init__(self, calls: list[str], name: str, fails: bool = False) -> None:
        self.calls, self.name, self.fails = calls, name, fails

    def close(self, exit_code: int = 0) -> None:
        self.calls.append(f"{self.name} {exit_code}")
        if self.fails:
            raise OSError("disk full")


def test_multi_sink_closes_all_in_order_though_one_fails() -> None:
    calls: list[str] = []
    sink = MultiSink([Recorder(calls, "a", fails=True), Recorder(calls, "b")])
    with pytest.raises(OSError, match="disk full"):
        sink.close(3)
    assert calls == ["a 3", "b 3"]


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    sink = open_sinks(tmp_path / "run", 1, **ABOUT)
    sink.log(1, {"Training/Loss": 1.0})
    sink.event("x")
    sink.close()
    assert isinstance(sink, NullSink)
    assert list(tmp_path.iterdir()) == []


def test_rank_0_writes_all_files_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for resume_step, steps in ((None, (10, 20, 30)), (10, (20, 30, 40))):
        sink = open_sinks(tmp_path, 0, **ABOUT, total_steps=40, resume_step=resume_step)
        for step in steps:
            sink.log(step, {"Training/Loss": 1.0})
        sink.close()
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["Training/Step"] for line in lines] == [10, 20, 30, 40]
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["step"], event["lines_cut"]) == ("resume", 10, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "log.txt", "metrics.jsonl"]
    assert "step 40/40  loss 1.000" in capsys.readouterr().out


def test_a_start_that_left_no_checkpoint_leaves_no_metrics_either(tmp_path: Path) -> None:
    for steps in ((0, 1, 2, 3), (0, 1)):
        sink = open_sinks(tmp_path, 0, **ABOUT)
        for step in steps:
            sink.log(step, {"Training/Loss": 1.0})
        sink.close()
    assert [line["Training/Step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1]
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["lines_cut"]) == ("warning", 4)
