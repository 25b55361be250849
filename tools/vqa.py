"""Answer questions about images by choosing among candidate answers: accuracy, and every answer.

    python tools/vqa.py --checkpoint runs/demo --data vqa.jsonl [--memory off] [--out answers.jsonl]

A line of --data: {"image": {"file": "vectors.npy", "row": 0}, "question": "...", "candidates": ["...", ...],
"answer": 0}, see bitmar/evaluation/items.py. A line of --out, in the same order: {"item": 1, "chosen": 0, "answer": 0,
"log_probabilities": [...]}. The likeliest candidate is chosen. Any number of ranks gives the same answers.
Exit code 0: done; 2: a mistake in what was asked, or a damaged checkpoint, which is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from bitmar.engine.world import World, leave
from bitmar.evaluation.choices import vqa_scores
from bitmar.evaluation.likelihood import Choice, by_item
from bitmar.evaluation.perplexity import empty_memory
from bitmar.evaluation.suite import open_subject
from tools.evaluate import PLAIN_WIDTH, table_of
from tools.ranks import on_ranks


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vqa", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="a run's folder or a checkpoint")
    parser.add_argument("--data", type=Path, required=True, metavar="JSONL")
    parser.add_argument("--memory", choices=("on", "off"), default="on", help="off: an empty one")
    parser.add_argument("--out", type=Path, metavar="JSONL", help="where every answer goes")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a rank; default: cores over ranks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def answer(known: argparse.Namespace, world: World) -> None:
    subject = open_subject(known.checkpoint, None, world, {}, 1)
    if known.memory == "off":
        subject = dataclasses.replace(subject, memory=empty_memory(subject.memory))
    items = subject.reader.vqa(known.data)
    scores, values = vqa_scores(subject.scorer, items, "VQA")
    if not world.is_first:
        return
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False).print(table_of(scores))
    if known.out is not None:
        known.out.write_text("".join(lines(items, values)), encoding="utf-8")
        print(known.out)


def lines(items: Sequence[Choice], values: np.ndarray) -> list[str]:
    """Every answer as a line of JSON."""
    told = []
    for number, (item, mine) in enumerate(zip(items, by_item(values, items), strict=True), start=1):
        row = {"item": number, "chosen": int(mine.argmax()), "answer": item.answer, "log_probabilities": mine.tolist()}
        told.append(json.dumps(row) + "\n")
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    known = parse(arguments)
    return on_ranks(lambda world: answer(known, world), known.threads)


if __name__ == "__main__":
    leave(main())
