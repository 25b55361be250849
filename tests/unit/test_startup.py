"""The parts of a start: they follow each other without a gap, from the process's own start on."""

from __future__ import annotations

import time

import psutil
import pytest

from bitmar.startup import StartUp


def test_the_parts_follow_each_other_from_the_start_of_the_process() -> None:
    start_up = StartUp()
    assert start_up.mark("imports")
    began, ended = psutil.Process().create_time(), time.time()
    assert 0 <= start_up.parts["imports"] <= ended - began + 0.001
    time.sleep(0.02)
    assert start_up.mark("engine")
    assert list(start_up.parts) == ["imports", "engine"]
    assert start_up.parts["engine"] >= 0.02
    assert start_up.seconds == pytest.approx(sum(start_up.parts.values()), abs=0.001)
    assert start_up.seconds <= time.time() - began + 0.002


def test_a_part_ends_once() -> None:
    start_up = StartUp()
    assert start_up.mark("first_step")
    before = dict(start_up.parts)
    assert not start_up.mark("first_step")
    assert start_up.parts == before
