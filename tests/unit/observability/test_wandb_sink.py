"""What the mirror takes and leaves out, without wandb; the rest is in tests/integration/test_wandb.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitmar.config import WandbConfig
from bitmar.observability.wandb_identity import identify
from bitmar.observability.wandb_sink import WandbSink


class Unstarted(WandbSink):
    """Takes calls, and never works them off."""

    def _work(self) -> None:
        return


class Told:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


def test_the_oldest_go_from_a_full_queue_with_one_warning(tmp_path: Path) -> None:
    told = Told()
    sink = Unstarted(tmp_path, identify(WandbConfig(), "n", "id1", {}), {}, WandbConfig(), told, queue_length=3)
    for step in range(10):
        sink.log(step, {"Training/Loss": float(step)})
    assert [job.args[0] for job in sink._jobs] == [7, 8, 9]  # type: ignore[attr-defined]
    assert sink._dropped == 7
    ((kind, fields),) = told.events
    assert kind == "warning"
    assert "does not keep up" in fields["message"]
    sink.close()


def test_what_is_told_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee-canary")
    monkeypatch.setenv("HF_TOKEN", "hf-canary-1")
    told = Told()
    sink = Unstarted(tmp_path, identify(WandbConfig(), "n", "id1", {}), {}, WandbConfig(), told)
    sink._warn("lost", ConnectionResetError("https://c0ffee-canary@example.org?t=hf-canary-1"))
    sink.close()
    message = "lost: ConnectionResetError: https://***@example.org?t=***"
    assert told.events == [("warning", {"message": message})]


def test_a_missing_image_and_a_wrong_histogram_are_named(tmp_path: Path) -> None:
    sink = Unstarted(tmp_path, identify(WandbConfig(), "n", "id1", {}), {}, WandbConfig(), Told())
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        sink.image(1, "Plots/X", tmp_path / "none.png")
    with pytest.raises(ValueError, match="3 counts need 4 edges, got 3"):
        sink.histogram(1, "Weights/X", [1, 2, 3], [0, 1, 2])
    sink.close()


def test_log_interval_holds_back_step_metrics_alone(tmp_path: Path) -> None:
    options = WandbConfig(log_every_n_steps=5, log_interval=20)
    sink = Unstarted(tmp_path, identify(options, "n", "id1", {}), {}, options, Told())
    of_steps = {"Training/Loss": 1.0, "Data/Source_Share_web": 0.5, "System/Node_1_Memory_RSS": 3.0}
    attention = {"Attention/Encoder_layer_9_Entropy": 1.5}
    for step in (5, 15, 20):
        sink.log(step, of_steps | attention)
        sink.log(step, {"Validation/Loss": 2.0})
        sink.histogram(step, "Gradients/Histogram_Encoder", [1, 2], [0, 1, 2])
    sent = [job.args for job in sink._jobs]  # type: ignore[attr-defined]
    assert sent == [
        (5, attention),
        (5, {"Validation/Loss": 2.0}),
        (15, attention),
        (15, {"Validation/Loss": 2.0}),
        (20, of_steps | attention),
        (20, {"Validation/Loss": 2.0}),
        (20, "Gradients/Histogram_Encoder", [1, 2], [0, 1, 2]),
    ]
    sink.close()
