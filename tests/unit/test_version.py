from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bitmar.version import ROOT, code_version


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "a.py").write_text("a = 1\n")
    (folder / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    git(folder, "remote", "add", "origin", "https://someone:canary@example.org/x.git")
    return folder


def test_commit_and_whether_tracked_files_changed(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "untracked").touch()
    assert code_version(checkout) == {"commit": commit, "dirty": False}
    code_version.cache_clear()
    (checkout / "a.py").write_text("a = 2\n")
    assert code_version(checkout) == {"commit": commit, "dirty": True}
    assert "canary" not in str(code_version(checkout))


def test_a_copy_inside_another_checkout_has_the_packages_version(checkout: Path) -> None:
    inside = checkout / "copy"
    inside.mkdir()
    assert code_version(inside) == {"version": "unknown"}
    code_version.cache_clear()
    (inside / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    assert code_version(inside) == {"version": "1.2.3"}


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(tmp_path) == {"version": "unknown"}


def test_this_code_has_one() -> None:
    assert set(code_version(ROOT)) in ({"commit", "dirty"}, {"version"})
