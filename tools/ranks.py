"""What a tool that runs on one rank or several does around its work."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor

from bitmar.engine.world import World, is_lost_peer, join_world, leave_world, report

USER_ERROR = 2

T = TypeVar("T")


class OtherRankError(ValueError):
    """What has gone wrong on another rank."""


class Together(World):
    """A world whose ranks, before they exchange anything, ask each other whether one has failed: where one that fails
    alone would leave the others waiting for it, all of them end. `any` and `agree` do not ask."""

    def gather(self, tensor: Tensor) -> Tensor:
        self.check()
        return super().gather(tensor)

    def gather_objects(self, value: T) -> list[T]:
        self.check()
        return super().gather_objects(value)

    def broadcast_object(self, value: T) -> T:
        self.check()
        return super().broadcast_object(value)

    def barrier(self) -> None:
        self.check()
        super().barrier()

    def check(self, problem: str | None = None) -> None:
        """Tell the others this rank's problem. Raises OtherRankError where it has none and another has."""
        if not self.any(problem is not None):
            return
        for rank, told in enumerate(super().gather_objects(problem)):
            if problem is None and told is not None:
                raise OtherRankError(f"rank {rank}: {told}")


def together(world: World, work: Callable[[World], None]) -> None:
    """Do the work on all ranks. Raises on all of them where one meets a user's mistake: that one its own error, the
    others OtherRankError."""
    shared = Together(**vars(world))
    try:
        work(shared)
    except OtherRankError:
        raise
    except (ValueError, OSError) as error:
        with contextlib.suppress(RuntimeError):  # of ranks that have gone: they need not be told
            shared.check(one_line(error))
        raise
    shared.check()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def on_ranks(work: Callable[[World], None], threads: int | None = None) -> int:
    """Do the work in the world that a launcher's environment describes, alone without one. The exit code: 0; 2 after a
    user's mistake, told in one line; 1 where another rank has gone."""
    try:
        if threads is not None and threads < 1:
            raise ValueError(f"--threads must be > 0, got {threads}")
        together(join_world(threads=threads), work)
    except (ValueError, OSError) as error:
        report(one_line(error))
        return USER_ERROR
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        report("another rank has gone")
        return 1
    finally:
        leave_world()
    return 0
