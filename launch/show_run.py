"""Print what a finished run reached, from its summary.json, and where its files are: show_run.py RUN_DIRECTORY."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NUMBERS = (
    ("loss before training", "loss_initial", "{:.4f} nats/token, held-out captions with their own image vectors"),
    ("loss", "loss_final", "{:.4f} nats/token, the same captions after training"),
    ("loss, permuted vectors", "loss_shuffled_vision", "{:.4f} nats/token, each caption with another image's vector"),
    ("loss, text", "loss_text", "{:.4f} nats/token, held-out text"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("parameters", "parameters", "{:,}"),
    ("words trained", "words", "{:,}"),
    ("optimizer steps", "step", "{:,}"),
    ("training time", "seconds", "{:.1f} s, without validation and start-up"),
    ("samples per second", "samples_per_second", "{:.1f}"),
)
FILES = (("log", "log.txt"), ("metrics", "metrics.jsonl"), ("plots", "plots"), ("wandb", "wandb"))


def lines(directory: Path, summary: dict[str, Any]) -> list[str]:
    """The report: a line a number that the run has, then a line a file that is there."""
    data = "GENERATED data: these losses say nothing about real captions" if summary["data"] == "generated" else ""
    rows = [("data", data)] if data else []
    rows += [(label, form.format(summary[key])) for label, key, form in NUMBERS if summary.get(key) is not None]
    checkpoints = sorted((directory / "checkpoints").glob("step_*"))
    paths = [(label, directory / name) for label, name in FILES]
    paths += [("checkpoint", path) for path in checkpoints[-1:]]
    paths += [("these numbers", directory / "summary.json")]
    rows += [(label, str(path)) for label, path in paths if path.exists()]
    width = max(len(label) for label, _ in rows) + 2
    return [f"{label:<{width}}{value}" for label, value in rows]


def main(arguments: list[str]) -> int:
    """Returns 0, or 2 where there is no finished run."""
    if len(arguments) != 1:
        print("usage: show_run.py RUN_DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(arguments[0])
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"error: {directory} holds no finished run: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(directory, summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
