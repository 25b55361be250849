"""The CPU cores of a rank. At every step the ranks wait for the slowest: one that shares its core for a while with
another, or with what draws pictures, holds up all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")


def allowed_cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def machine() -> tuple[str, str]:
    """What tells this machine from others: the system's name, and of its start where it tells that."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        start = ""
    return socket.gethostname(), start


def share(allowed: Sequence[Sequence[int]], topology: Path = TOPOLOGY) -> list[list[int]]:
    """The cores of each rank of a machine, given those that each may use.

    An even share; the first rank, which has processes of its own beside it, also has those left over. None where there
    are fewer cores than ranks. What a launcher has shared out already (ranks may use different ones) stays as it is.
    """
    if any(list(mine) != list(allowed[0]) for mine in allowed):
        return [list(mine) for mine in allowed]
    cores = sorted(allowed[0], key=lambda core: _place_of(core, topology))
    size, left = divmod(len(cores), len(allowed))
    if not size:
        return [[] for _ in allowed]
    starts = [0, *range(left + size, len(cores), size)]
    return [sorted(cores[start:stop]) for start, stop in itertools.pairwise([*starts, len(cores)])]


def bind(cores: Iterable[int]) -> None:
    """Keep this process's threads, and the threads and processes that they start, on some cores; on Linux alone.

    Raises OSError for cores that it may not use.
    """
    if sys.platform != "linux":
        return
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def _place_of(core: int, topology: Path) -> tuple[int, int, int]:
    """(package, physical core, core): the hardware threads of a physical core lie side by side."""
    told = [topology / f"cpu{core}" / "topology" / name for name in ("physical_package_id", "core_id")]
    try:
        package, physical = (int(path.read_text()) for path in told)
    except (OSError, ValueError):
        return 0, core, core
    return package, physical, core
