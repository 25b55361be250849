from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from bitmar.observability.alerts import Watch, find_alerts
from bitmar.observability.records import read_lines
from bitmar.observability.sinks import AlertSink, JsonlSink

GIB = 2**30
OTHERS = {"Gradients/Total_Norm_Max": {"Gradients/Total_Norm": 1.0}}  # what a log has beside
STEADY = {"Throughput/Step_Seconds": 1.0, "Data/Wait_Seconds": 0.1}


def kinds(
    logs: Sequence[Mapping[str, float]], watch: Watch | None = None, events: Sequence[Mapping[str, Any]] | None = None
) -> list[list[str]]:
    """The kinds of the alerts of each log in turn."""
    watch = watch or Watch.of_fresh_run()
    told = []
    for index, values in enumerate(logs):
        alerts, watch = find_alerts(watch, values, events[index] if events else None)
        told.append([alert.kind for alert in alerts])
    return told


@pytest.mark.parametrize(
    ("name", "levels", "told"),
    [
        ("Training/Skipped_Updates", [0, 1, 2, 2, 3], [0, 1, 0, 0, 1]),  # told again only after a log without a rise
        ("Attention/Dead_Heads", [0, 2, 2, 1, 3], [0, 1, 0, 0, 1]),
        ("Gradients/Total_Norm", [1.0, 10.0, 10.5, 40.0, 5.0, 11.0], [0, 0, 1, 0, 0, 1]),
        ("Gradients/Total_Norm", [1e-3, 9e-4, math.nan, 1.0, math.nan], [0, 1, 0, 0, 1]),
        ("Gradients/Total_Norm_Max", [5.0, 11.0, 12.0, 9.0, math.nan], [0, 1, 0, 0, 1]),
        ("System/Disk_Free", [6 * GIB, 5 * GIB - 1, 4 * GIB, 5 * GIB, GIB], [0, 1, 0, 0, 1]),
    ],
)
def test_an_alert_is_given_once_until_it_clears(name: str, levels: list[float], told: list[int]) -> None:
    assert [len(alerts) for alerts in kinds([OTHERS.get(name, {}) | {name: level} for level in levels])] == told


def test_a_log_without_the_metric_clears_nothing() -> None:
    low = {"System/Disk_Free": 0.0}
    assert kinds([low, {}, low]) == [["disk"], [], []]


def test_a_resumed_run_is_not_told_of_what_happened_before() -> None:
    counts = [{"Training/Skipped_Updates": 3.0, "Attention/Dead_Heads": 2.0}] * 2
    more = {"Training/Skipped_Updates": 4.0, "Attention/Dead_Heads": 3.0}
    assert kinds([*counts, more], Watch()) == [[], [], ["skipped_updates", "dead_heads"]]
    assert kinds(counts) == [["skipped_updates", "dead_heads"], []]


def test_steps_are_slow_against_the_median_of_the_latest_logs() -> None:
    slow = {**STEADY, "Throughput/Step_Seconds": 5.5}
    assert kinds([slow, slow]) == [[], []]  # there is nothing yet to compare with
    assert kinds([STEADY] * 5 + [slow, slow, STEADY, slow]) == [[]] * 5 + [["slow_steps"], [], [], ["slow_steps"]]
    assert kinds([STEADY] * 5 + [{**STEADY, "Throughput/Step_Seconds": 5.0}])[-1] == []


def test_waiting_for_data_is_told_but_for_the_first_batch() -> None:
    waits = {**STEADY, "Data/Wait_Seconds": 0.51}
    assert kinds([waits, waits]) == [[], ["data_stall"]]
    assert kinds([STEADY, {**STEADY, "Data/Wait_Seconds": 0.5}]) == [[], []]


def test_events_are_told_at_once_and_the_log_after_them_does_not_repeat() -> None:
    skipped = {"skipped_update": {"step": 7, "not_finite": "gradient"}}
    failed = {"checkpoint_failed": {"step": 10, "problem": "disk full"}}
    assert kinds(
        [{}, {"Training/Skipped_Updates": 1}, {}, {}, {}, {}],
        events=[skipped, {}, failed, failed, {"checkpoint": {"step": 20}}, failed],
    ) == [["skipped_updates"], [], ["checkpoint"], [], [], ["checkpoint"]]


def test_a_hang_is_told_with_what_is_known_of_it() -> None:
    (alert,), _ = find_alerts(Watch(), {}, {"hung": {"problem": "rank 1 does not answer"}})
    assert (alert.kind, alert.level, alert.text) == ("hang", "ERROR", "rank 1 does not answer")


def test_titles_fit_into_wandb_and_texts_hold_the_numbers() -> None:
    worst = {
        "Training/Skipped_Updates": 2.0,
        "Gradients/Total_Norm": 123.4,
        "Attention/Dead_Heads": 5.0,
        "System/Disk_Free": GIB,
        "Throughput/Step_Seconds": 9.0,
        "Data/Wait_Seconds": 8.0,
    }
    alerts, _ = find_alerts(Watch(skipped=0.0, dead_heads=0.0, step_seconds=(1.0,) * 5), worst)
    assert len({alert.kind for alert in alerts}) == 6
    for alert, number in zip(alerts, ("2", "123", "9", "8", "5", "1.00"), strict=True):
        assert len(alert.title) < 64
        assert number in alert.text


def test_the_sink_sends_alerts_on_as_events(tmp_path: Any) -> None:
    files = JsonlSink(tmp_path)
    sink = AlertSink(files, Watch.of_fresh_run())
    sink.log(40, {"Gradients/Total_Norm": 50.0})
    sink.event("skipped_update", step=41, not_finite="gradient")
    sink.event("checkpoint", step=50)
    sink.close()
    files.close()
    first, second = read_lines(tmp_path / "events.jsonl")
    assert (first["kind"], first["step"], first["level"]) == ("alert", 40, "WARN")
    assert "50" in first["text"]
    assert (second["level"], second["text"]) == ("ERROR", "step 41: not finite: gradient")
