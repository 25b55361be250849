from __future__ import annotations

import subprocess
import sys

from tests.support.runs import ROOT


def test_pyright_finds_nothing() -> None:
    """A test, so that other workers go on beside the minute of one core that it takes."""
    done = subprocess.run([sys.executable, "-m", "pyright"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
