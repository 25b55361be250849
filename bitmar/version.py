"""Which code a run is trained with: the git commit of this checkout, else the package's version."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "bitmar-trainer"
_TIMEOUT_S = 10.0


@functools.cache
def code_version(root: Path = ROOT) -> dict[str, str | bool]:
    """{"commit": hash, "dirty": whether tracked files differ from it}, or {"version": ...} where `root` is no checkout.

    A checkout that merely lies around `root` (a home folder under git) does not count. Nothing is asked of remotes."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is not None and Path(top).resolve() == root.resolve():
        commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
        if commit:
            return {"commit": commit, "dirty": bool(changes)}
    return {"version": _package_version(root)}


def _git(root: Path, *arguments: str) -> str | None:
    """What git answers; None where there is no git, no checkout, or no answer in time."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # reads only: another git may be at work here
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _package_version(root: Path) -> str:
    """From pyproject.toml beside the code, else of the installed package."""
    try:
        return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    except (OSError, ValueError, KeyError):
        pass
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
