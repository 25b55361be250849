"""A lock that a killed build left is told from one whose builder lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bitmar.config import ConfigError
from bitmar.engine.extensions import FOLDER, prepare_extensions, stale_locks
from tests.support.processes import wait_for

BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("building", flush=True)
sys.stdin.readline()
baton.release()
"""


@pytest.mark.slow
def test_a_living_builder_is_no_stale_lock_and_a_killed_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    pipe = subprocess.PIPE
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, str(lock)], stdin=pipe, stdout=pipe)
    try:
        assert builder.stdout is not None
        assert builder.stdout.readline() == b"building\n"
        assert stale_locks(tmp_path) == []
        assert prepare_extensions() == tmp_path
    finally:
        builder.kill()
        builder.communicate()
    assert stale_locks(tmp_path) == [lock]
    with pytest.raises(ConfigError, match=f"{lock} was left by a build"):
        prepare_extensions()
    lock.unlink()
    assert prepare_extensions() == tmp_path


def test_a_build_that_ends_leaves_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILDER, str(lock)], input=b"\n", check=True, capture_output=True)
    assert done.stdout == b"building\n"
    assert wait_for(lambda: not lock.exists())
    assert stale_locks(tmp_path) == []
