"""Work spread over processes; with one, it is done here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from types import TracebackType
from typing import Any

from shards.record import DataError


class Crew:
    """Up to `jobs` processes, started when they are first needed; they end with this one, however it ends."""

    def __init__(self, jobs: int) -> None:
        """Raises DataError on a number below 1."""
        if jobs < 1:
            raise DataError(f"--jobs must be >= 1, got {jobs}")
        self._jobs = jobs
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (number of the task, function(*task)) as they are done.

        Raises what a task raises, and ChildProcessError when a process was ended from outside.
        """
        if self._jobs == 1 or len(tasks) < 2:
            for number, task in enumerate(tasks):
                yield number, function(*task)
            return
        if self._pool is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["shards.blocks"])
            self._pool = ProcessPoolExecutor(self._jobs, context, initializer=_begin)
        futures = {self._pool.submit(function, *task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process of the conversion was ended from outside (out of memory?): give it fewer --jobs, and go on "
                "with --resume"
            ) from None


def _begin() -> None:
    """Ctrl-C is the first process's to handle; without it there is nothing left to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
