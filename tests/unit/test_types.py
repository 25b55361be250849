from __future__ import annotations

import subprocess

from tests.support.runs import ROOT


def test_pyright_finds_nothing() -> None:
    """Here and not before the tests: it takes one core for a minute, beside which others run."""
    done = subprocess.run(["pyright"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
