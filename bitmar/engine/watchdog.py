"""Finds a run that hangs: every rank counts what it gets done, publishes the count, and ends when it stands still.

All ranks beat at the same points of the program, so the number of beats orders them by progress, and the rank with
the fewest is the one that the others wait for. The clocks of hosts are never compared: a reader judges by its own
monotonic clock whether another rank's counters still change.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

HUNG = 76  # exit code of a rank that its watchdog ended
FOLDER = "hangs"  # of a run's directory: rank_N.txt with the stacks of every thread of rank N
MOST_INTERVAL_S, LEAST_INTERVAL_S = 10.0, 0.5  # between two publications of a rank
STORE_TIMEOUT_S = 5.0
START_UP_S = 900.0  # what a stage of the start may take in any case: ranks begin apart, shards are fetched


@dataclass(frozen=True)
class Pulse:
    """What a rank tells of itself: `ticks` grow while its watchdog lives, `beats` while it gets something done."""

    ticks: int
    beats: int
    stage: str
    step: int

    def encoded(self) -> str:
        return f"{self.ticks} {self.beats} {self.step} {self.stage}"

    @classmethod
    def decode(cls, text: str) -> Pulse:
        ticks, beats, step, stage = text.split(" ", 3)
        return cls(int(ticks), int(beats), stage, int(step))


class Pulses:
    """The pulses of all ranks in the key-value store that the launcher's environment names; rank 0 keeps it.

    A thread and a client of its own: a call to a store whose process is stopped does not come back, whatever its time
    limit (torch 2.13).
    """

    def __init__(self, rank: int, size: int, address: str, port: int) -> None:
        self.rank, self.size = rank, size
        self._address, self._port = address, port
        self._wishes: queue.SimpleQueue[Pulse | queue.SimpleQueue[dict[int, Pulse] | None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="pulses", daemon=True).start()

    def publish(self, pulse: Pulse) -> None:
        """Tell this rank's pulse, unless the store still has not taken earlier ones."""
        if self._wishes.qsize() < 2:
            self._wishes.put(pulse)

    def read(self) -> dict[int, Pulse] | None:
        """The pulses of the ranks that have told one; None where the store does not answer."""
        answer: queue.SimpleQueue[dict[int, Pulse] | None] = queue.SimpleQueue()
        self._wishes.put(answer)
        try:
            return answer.get(timeout=STORE_TIMEOUT_S)
        except queue.Empty:
            return None

    def _serve(self) -> None:
        store: TCPStore | None = None
        while True:
            wish = self._wishes.get()
            try:
                store = store or self._connect()
                if isinstance(wish, Pulse):
                    store.set(_key(self.rank), wish.encoded())
                else:
                    told = [rank for rank in range(self.size) if store.check([_key(rank)])]
                    wish.put({rank: Pulse.decode(store.get(_key(rank)).decode()) for rank in told})
            except (DistError, RuntimeError):
                store = None
                if not isinstance(wish, Pulse):
                    wish.put(None)

    def _connect(self) -> TCPStore:
        limit = timedelta(seconds=STORE_TIMEOUT_S)
        return TCPStore(self._address, self._port, is_master=False, timeout=limit, wait_for_workers=False)


def _key(rank: int) -> str:
    return f"bitmar/pulse/{rank}"


class Watchdog:
    """The watch over one rank. `beat` is called by the run; `tick` by a thread, every `interval_s`."""

    def __init__(self, timeout_s: float, run_directory: Path, pulses: Pulses | None) -> None:
        """`pulses`: None where this rank is alone."""
        self.timeout_s = timeout_s
        self.interval_s = min(MOST_INTERVAL_S, max(LEAST_INTERVAL_S, timeout_s / 10))
        self.ending = threading.Event()
        self._folder = run_directory / FOLDER
        self._pulses = pulses
        self.tell: Callable[[str], None] | None = None  # of a hang, before the process ends
        self._pulse = Pulse(0, 0, "start-up", 0)
        self._patience_s = START_UP_S
        self._ticks = 0
        self._seen, self._stood_s, self._last = -1, 0.0, time.monotonic()

    def beat(self, stage: str, step: int, patience_s: float) -> None:
        """Something was got done: `stage` of optimizer step `step` begins, which may take `timeout_s`, or `patience_s`
        where that is more. All ranks beat at the same points."""
        self._patience_s = patience_s
        self._pulse = Pulse(0, self._pulse.beats + 1, stage, step)

    def tick(self) -> None:
        """Publish, and end the process where nothing was got done for `timeout_s`. Time in which this process itself
        was stopped does not count."""
        pulse, now = self._pulse, time.monotonic()
        self._stood_s += min(now - self._last, 2 * self.interval_s)
        self._last = now
        if pulse.beats != self._seen:
            self._seen, self._stood_s = pulse.beats, 0.0
        if self._stood_s >= max(self.timeout_s, self._patience_s):
            self._end(pulse)
        self._publish(pulse)

    def _publish(self, pulse: Pulse) -> None:
        self._ticks += 1
        if self._pulses is not None and pulse.beats > 0:  # before the first, ranks join, and the store may not be there
            self._pulses.publish(Pulse(self._ticks, pulse.beats, pulse.stage, pulse.step))

    def _end(self, pulse: Pulse) -> None:
        """Write the stacks, find out who is to blame, tell it, and end the process."""
        self.ending.set()
        rank = 0 if self._pulses is None else self._pulses.rank
        path = self._folder / f"rank_{rank}.txt"
        head = f"rank {rank}: nothing was done for {self._stood_s:.0f} s in {pulse.stage} of step {pulse.step}"
        kept = _write_stacks(path, head)
        verdict, tells = self._judge(pulse)
        if kept:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n{verdict}\n")
        if tells:
            where = f"stacks: {self._folder}" if kept else f"{self._folder} cannot be written"
            print(f"error: {head}; {verdict}; {where}", file=sys.stderr, flush=True)
        if self.tell is not None:  # on a thread of its own: what it tells may be what hangs
            threading.Thread(target=self.tell, args=(f"{head}; {verdict}",), daemon=True).start()
        self._stay(2)  # while others still judge: rank 0 keeps the store, and all must be seen alive
        os._exit(HUNG)

    def _judge(self, pulse: Pulse) -> tuple[str, bool]:
        """Which rank the run waits for, and whether this rank is the one to tell it."""
        if self._pulses is None:
            return "it runs alone", True
        before = self._pulses.read()
        self._stay(2.5)
        after = self._pulses.read()
        if before is None or after is None:
            first_here = os.environ.get("LOCAL_RANK", "0") == "0" or self._pulses.rank == 1
            return "rank 0, which keeps the ranks' pulses, does not answer", first_here
        return judge(before, after, self._pulses.rank, self._pulses.size)

    def _stay(self, intervals: float) -> None:
        until = time.monotonic() + intervals * self.interval_s
        while time.monotonic() < until:
            self._publish(self._pulse)
            time.sleep(self.interval_s / 2)


def judge(before: dict[int, Pulse], after: dict[int, Pulse], mine: int, size: int) -> tuple[str, bool]:
    """(which rank the run waits for, whether rank `mine` is the lowest of those that answer) from two readings."""
    silent = [r for r in range(size) if r != mine and (r not in after or after[r] == before.get(r))]
    answering = [r for r in range(size) if r not in silent]
    if silent:
        shown = ", ".join(map(str, silent[:8])) + (" and others" if len(silent) > 8 else "")
        verdict = f"rank {shown} does not answer: stopped, or its host is lost"
    else:
        slowest = min(after, key=lambda r: (after[r].beats, r))
        pulse = after[slowest]
        ahead = max(p.beats for p in after.values()) - pulse.beats
        verdict = f"rank {slowest} is the slowest, in {pulse.stage} of step {pulse.step}"
        if ahead == 0:
            verdict = f"all ranks wait in {pulse.stage} of step {pulse.step}"
    return verdict, mine == min(answering)


def _write_stacks(path: Path, head: str) -> bool:
    """The stack of every thread; False where the folder cannot be written, and then on standard error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{head}\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
    except OSError:
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        return False
    return True
