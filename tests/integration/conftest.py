"""A tiny generated data set, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.hosts import Network, network
from tests.support.runs import make_shards, run_tool


@pytest.fixture(scope="session")
def tiny_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated raw files in BabyLM's layout: 160 images, about 6,000 words of text."""
    out = tmp_path_factory.mktemp("tiny") / "raw"
    done = run_tool("make_demo_data.py", "--out", out, "--images", 160, "--words", 6000)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def tiny_shards(tiny_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tiny_raw, tmp_path_factory.mktemp("tiny_shards") / "shards")


@pytest.fixture(scope="session")
def other_shards(tiny_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same raw files under another tokenizer."""
    return make_shards(tiny_raw, tmp_path_factory.mktemp("other_shards") / "shards", vocabulary=400)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Three hosts."""
    with network(3, tmp_path_factory.mktemp("network")) as made:
        yield made
