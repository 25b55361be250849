"""A process that logs through the sinks as a run does, and what it leaves on the disk."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

from bitmar.observability.records import EVENTS_FILE, read_lines
from tests.support.runs import ROOT
from tests.unit.observability.wandb_file import history, wandb_records

CANARY = "c0ffee" * 7  # as long as a wandb key, and never one
WITHIN_S = 300  # a guard against hangs

PRELUDE = """
import json, sys
from pathlib import Path
from bitmar.config import WandbConfig
from bitmar.observability.schema import SCHEMA
from bitmar.observability.sinks import open_sinks

run_dir, picture, wandb, resume_step = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
sink = open_sinks(run_dir, 0, wandb=WandbConfig(**wandb), name="try", run_id="abc123",
                  config={"model": {"width": 64}, "note": "x" * 40_000}, total_steps=40, resume_step=resume_step)
"""  # noqa: E501
LOGS = """
for step in range(0 if resume_step is None else resume_step + 10, 40, 10):
    sink.log(step, {metric.name: step + index / 64 for index, metric in enumerate(SCHEMA)})
sink.image(40, "Plots/Losses", picture)
sink.event("done", step=40)
sink.close(0)
"""


def home_variables(home: Path) -> dict[str, str]:
    """What makes `home` the home, which knows no key and no wandb."""
    paths = {"HOME": str(home), "NETRC": str(home / "netrc")}
    return paths | {f"WANDB_{kind.upper()}_DIR": str(home / kind) for kind in ("cache", "config", "data")}


def own_environment(home: Path, **environment: str) -> dict[str, str]:
    """This process's environment but for wandb's variables, with another home."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**clean, "PYTHONPATH": str(ROOT), **home_variables(home), **environment}


def mirror(
    run_dir: Path,
    home: Path,
    script: str = LOGS,
    resume_step: int | None = None,
    prelude: str = "",
    wandb: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    code: int = 0,
) -> str:
    """Log as `script` says, in a process of its own that ends with `code`; returns all it printed."""
    home.mkdir(exist_ok=True)
    picture = home / "picture.png"
    write_png(picture)
    arguments = [str(run_dir), str(picture), json.dumps(wandb or {}), json.dumps(resume_step)]
    done = subprocess.run(
        [sys.executable, "-c", prelude + PRELUDE + script, *arguments],
        env=own_environment(home, **environment or {}),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def write_png(path: Path) -> None:
    """A 2 x 2 grey PNG."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"\0\x00\xff\0\xff\x00")
    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", pixels) + part(b"IEND", b""))


def wandb_files(run_dir: Path) -> list[Path]:
    """The offline parts of a run, by the time of their start."""
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)


def records(file: Path, kind: str) -> list[Any]:
    """The records of one kind of a .wandb file: run, history, metric, alert, ..."""
    return [getattr(record, kind) for record in wandb_records(file) if record.WhichOneof("record_type") == kind]


def rows(file: Path, *, killed: bool = False) -> list[dict[str, Any]]:
    """What was logged, a row a call."""
    return [history(record) for record in wandb_records(file, killed) if record.WhichOneof("record_type") == "history"]


def told(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind, in order."""
    return [event for event in read_lines(run_dir / EVENTS_FILE) if event["kind"] == kind]
