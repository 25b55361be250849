"""Runs over the hosts of tests/integration/hosts.py: their recipe, how they are started, watched and cleared away."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.integration.hosts import Network
from tests.support.data import pairs_shards
from tests.support.processes import processes_of
from tests.support.runs import ROOT, heed_interrupts, write_recipe

GONE_WITHIN_S = 10.0  # the promise: nothing of a run lives longer than this after its launcher has ended


def demo_recipe(shards: Path, runs: Path, steps: int) -> dict[str, Any]:
    """The demo's model over a global batch that 1, 2 and 3 ranks divide."""
    values = yaml.safe_load((ROOT / "launch/recipes/demo.yaml").read_text())
    values["run"] = {"name": "demo", "directory": str(runs)}
    values["data"] = {"shards": str(shards), "row_tokens": 48}
    values["model"]["contrastive_group"] = 4
    values["training"] = {"global_batch": 24, "micro_batch": 4, "precision": "fp32", "max_epochs": 100_000}
    values["optimizer"] = {"peak_rate": 2e-4, "second_rate": 2e-4, "warmup_steps": 2}
    values["engine"] = {"ds_config": str(ROOT / "ds_configs/zero1.json"), "threads_per_rank": 1, "timeout_s": 60}
    values["checkpoint"] = {"every_steps": 4, "keep_last": 2}
    values["validation"] = {"every_steps": 100_000, "max_samples": 24, "micro_batch": 8}
    values["wandb"] = {"log_every_n_steps": 1, "enabled": False, "create_plots": False}
    losses = {"lm": 1.0, "contrastive": 0.2}
    values["phases"] = [
        {"name": "alignment", "steps": 6, "mix": {"pairs": 1.0}, "losses": losses},
        {
            "name": "memory",
            "steps": steps - 6,
            "mix": {"pairs": 1.0},
            "losses": losses | {"recall": 0.1},
            "write_memory": True,
        },
    ]
    return values


def write_demo_recipe(folder: Path, steps: int) -> Path:
    """The recipe over real pairs where they are at hand; `folder` takes shards and runs."""
    shards, kind = pairs_shards(folder, vocabulary=4096, held_out=0.15)
    print(f"several hosts on {kind}")
    return write_recipe(folder / "demo.yaml", demo_recipe(shards, folder / "runs", steps))


def start(net: Network, said: Path, *command: str, **environment: str) -> subprocess.Popen[bytes]:
    """A command as a person starts it on the machine beside the hosts, in a session of its own."""
    with said.open("wb") as file:
        return subprocess.Popen(
            net.inside(*command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=ROOT,
            env=net.environment() | environment,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )


def steps_logged(run: Path) -> int:
    """Newest step in a run's log, 0 without one."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max((int(json.loads(line)["Training/Step"]) for line in lines), default=0)
    except (OSError, ValueError, KeyError):
        return 0


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Leave nothing behind, also of a test that failed."""
    if process.poll() is None:
        process.kill()
    process.wait()
    for left in processes_of(mark):
        left.kill()


def pdsh_below(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The pdsh that a launcher has started: not the scripts of that name that stand before it."""
    below = psutil.Process(process.pid).children(recursive=True)
    (found,) = [p for p in below if Path(p.exe()).name.startswith("pdsh")]
    return found
