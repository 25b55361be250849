"""Waiting for processes, finding those of a test, and the environment that a person's shell gives them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

WITHIN_S = 240.0  # a guard against a hang
LAUNCHED = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "BITMAR_LAUNCHER_PID"),
)


def shell_environment(**changes: str) -> dict[str, str]:
    """As a person's shell has it: no rank, no wandb mode of a test, no key."""
    left_out = {*LAUNCHED, "WANDB_MODE", "WANDB_API_KEY"}
    return {name: value for name, value in os.environ.items() if name not in left_out} | changes


def wait_for(condition: Callable[[], bool], within_s: float = WITHIN_S) -> bool:
    """Whether `condition()` comes true."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def processes_of(mark: str) -> list[psutil.Process]:
    """Living processes, on any host, whose command line holds `mark` (a path of this test's own)."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if any(mark in part for part in line) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found
