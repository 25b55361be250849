"""What a tool that runs on one rank or several does around its work."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.engine.world import World, is_lost_peer, join_world, leave_world

USER_ERROR = 2
OTHER_RANK_WAIT_S = 2.0  # rank 0 tells of a mistake that all ranks meet; one that lives on after this tells its own


def on_ranks(work: Callable[[World], None], threads: int | None = None) -> int:
    """Do the work in the world that a launcher's environment describes, alone without one. The exit code: 0; 2 after a
    user's mistake, told in one line; 1 where another rank has gone."""
    try:
        if threads is not None and threads < 1:
            raise ValueError(f"--threads must be > 0, got {threads}")
        work(join_world(threads=threads))
    except (ValueError, OSError) as error:
        report(" ".join(str(error).split()))
        return USER_ERROR
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        report("another rank has gone")
        return 1
    finally:
        leave_world()
    return 0


def report(problem: str) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(OTHER_RANK_WAIT_S)
    print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{problem}", file=sys.stderr, flush=True)
