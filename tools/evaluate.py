"""Score a trained model: a table, RUN/evaluation/step_X.json and a picture, each score with a 95 % interval and chance.

    python tools/evaluate.py --checkpoint runs/demo --shards data/demo/shards --tasks all
    deepspeed --num_accelerators 2 tools/evaluate.py --checkpoint runs/demo --shards DIR --tasks perplexity,retrieval
    python tools/evaluate.py --checkpoint runs/demo --tasks minimal_pairs --minimal_pairs blimp.jsonl

Any number of ranks gives the same scores. The file keeps the scores of tasks that are not scored this time, where they
are of the same checkpoint. An exported directory names no shards and is not written into: give --shards and --out. The
JSONL files of choice tasks are described in bitmar/evaluation/items.py.
Exit code 0: done; 2: a mistake in what was asked, or a damaged checkpoint, which is named.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from bitmar.config_checks import ConfigError, require
from bitmar.engine.world import World, leave
from bitmar.evaluation.plots import draw_scores
from bitmar.evaluation.score_file import ScoreFile, TaskScores
from bitmar.evaluation.scores import Score, path_of
from bitmar.evaluation.sources import check_exported
from bitmar.evaluation.suite import FROM_FILES, OWN, TASKS, Subject, open_subject
from bitmar.observability.drawing import About
from tools.ranks import on_ranks

ALL = "all"
CHECKPOINT = "a run's folder, a checkpoint, or an exported directory"
FILES = (*FROM_FILES, "distractors")
PICTURE = ".png"
PLAIN_WIDTH = 160  # of the table where no terminal tells its own


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help=CHECKPOINT)
    parser.add_argument("--shards", metavar="DIR", help="whose validation split is scored; default: the run's own")
    parser.add_argument(
        "--tasks", default=ALL, help=f"of {', '.join(TASKS)}, with commas; default: all that there is data for"
    )
    for name in FILES:
        parser.add_argument(f"--{name}", type=Path, metavar="JSONL")
    parser.add_argument(
        "--max_samples", type=int, default=2048, help="held-out captions and texts: %(default)s; retrieval takes all"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a rank; default: cores over ranks")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/evaluation/step_X.json, and .png beside")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def chosen_tasks(known: argparse.Namespace) -> list[str]:
    """The tasks asked for, in their order. Raises ConfigError for one that is unknown or lacks its file."""
    asked = [name.strip() for name in known.tasks.split(",")]
    for name in asked:
        if name not in (*TASKS, ALL):
            raise ConfigError(f"unknown task {name!r}; there are {', '.join(TASKS)} and {ALL}")
    lacking = [name for name in FROM_FILES if getattr(known, name) is None]
    for name in asked:
        if name in lacking:
            raise ConfigError(f"task {name} needs a file: --{name} FILE.jsonl")
    return [name for name in TASKS if name in asked or (ALL in asked and name not in lacking)]


def evaluate(known: argparse.Namespace, world: World) -> None:
    """Run the tasks; rank 0 writes the scores of each as it ends, and tells of all."""
    require(known.max_samples > 0, f"--max_samples must be > 0, got {known.max_samples}")
    require(
        known.out is None or known.out.suffix != PICTURE,
        f"--out {known.out}: the picture gets this ending; give another",
    )
    tasks = chosen_tasks(known)
    files = {name: getattr(known, name) for name in FILES if getattr(known, name) is not None}
    shards = (known.shards or OWN) if any(task not in files for task in tasks) else None
    needed = {"out": known.out} if shards is None else {"shards": known.shards, "out": known.out}
    check_exported(known.checkpoint, **needed)
    subject = open_subject(known.checkpoint, shards, world, files, known.max_samples)
    file = open_file(known.out, subject) if world.is_first else None
    found = list[Score]()
    for task in tasks:
        world.barrier()
        started, noted = time.perf_counter(), len(subject.notes)
        scores = TASKS[task](subject)
        world.barrier()
        seconds = round(time.perf_counter() - started, 3)
        opened = None if task in files else subject.shards
        data = str(files[task]) if opened is None else opened.location
        if not scores:
            subject.notes.append(f"{task} is left out: {data} holds nothing out for it")
        found += scores
        if file is not None:
            generated = opened is not None and opened.generated
            file.add(task, TaskScores(data, scores, generated, seconds, subject.notes[noted:]))
    if file is not None:
        tell(subject, found, file, tasks)


def open_file(out: Path | None, subject: Subject) -> ScoreFile:
    """Where the scores go. Raises DataError, OSError where they cannot."""
    loaded = subject.loaded
    header = {
        "step": loaded.progress.step,
        "words": loaded.progress.words,
        "ranks": subject.world.size,
        "device": subject.world.device.type,
    }
    return ScoreFile(out or path_of(loaded.run_directory, loaded.progress.step), loaded.checkpoint, header)


def tell(subject: Subject, scores: list[Score], file: ScoreFile, tasks: Sequence[str]) -> None:
    """Print the table, and draw what the file holds."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)

    def say(line: object) -> None:
        console.print(str(line), markup=False, soft_wrap=True)

    console.print(table_of(scores))
    for note in subject.notes:
        say(note)
    say(file.path)
    kept = [name for name in file.tasks if name not in tasks]
    if kept:
        say(f"beside scores that it held already: {', '.join(kept)}")
    about = About(subject.loaded.config.run.name, subject.loaded.progress.step, file.generated)
    picture = draw_scores(about, file.scores, file.path.with_suffix(PICTURE))
    if picture is not None:
        say(picture)


def table_of(scores: Sequence[Score]) -> Table:
    """A line a score."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (("task", "left"), ("score", "left"), *((n, "right") for n in ("value", "95 %", "chance"))):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("measure", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    last = None
    for s in scores:
        spread = "" if s.low is None or s.high is None else f"{number(s.low)} to {number(s.high)}"
        task = "" if s.task == last else s.task
        last = s.task
        chance = "" if s.chance is None else number(s.chance)
        table.add_row(task, s.name, number(s.value), spread, chance, s.measure, f"{s.count:,} {s.unit}s")
    return table


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def main(arguments: Sequence[str] | None = None) -> int:
    known = parse(arguments)
    return on_ranks(lambda world: evaluate(known, world), known.threads)


if __name__ == "__main__":
    leave(main())
