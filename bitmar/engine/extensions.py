"""Torch's C++ extensions: where they are built, and a lock that a killed build left there, before it is waited on.

torch.utils.file_baton: whoever builds an extension creates `lock` in its folder and keeps the file open until it
removes it; others wait for as long as the file is there. A build that is killed leaves it for ever.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bitmar.config import ConfigError

FOLDER = "TORCH_EXTENSIONS_DIR"
RELEASE_S = 1.0  # a builder closes the lock a moment before it removes it


def prepare_extensions() -> Path:
    """Choose the folder of built extensions unless the user has. Raises ConfigError that names a stale lock.

    One folder a host and version of torch: whether a lock's builder lives can be told on its own host only.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitmar" / "torch_extensions"
    folder = Path(os.environ.setdefault(FOLDER, str(cache / platform.node() / f"torch-{torch.__version__}")))
    stale = stale_locks(folder)
    if stale:
        raise ConfigError(
            f"{stale[0]} was left by a build of a torch extension that no process of this host is at, and would be "
            f"waited on for ever; remove its folder (unless another host builds in it now), or set {FOLDER} to another"
        )
    return folder


def stale_locks(folder: Path) -> list[Path]:
    """The locks of extensions below `folder` that no living process holds."""
    suspects = [lock for lock in sorted(folder.glob("*/lock")) if not is_held(lock)]
    if suspects:
        time.sleep(RELEASE_S)
    return [lock for lock in suspects if lock.exists() and not is_held(lock)]


def is_held(path: Path) -> bool:
    """Whether a process of this host that we may look into has the file open; a file that is gone is not."""
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return False
    return any(os.path.samestat(wanted, opened) for opened in _open_files())


def _open_files() -> Iterator[os.stat_result]:
    for process in Path("/proc").glob("[0-9]*/fd"):
        try:
            links = list(process.iterdir())
        except OSError:  # ended, or another user's
            continue
        for link in links:
            try:
                yield link.stat()
            except OSError:
                continue
