"""A tiny generated data set, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmar.engine.world import World
from bitmar.train import train
from tests.integration.hosts import Network, network
from tests.support.ranks import run_ranks
from tests.support.runs import make_shards, run_tool, tiny_config

LONGEST = ("test_learning.py", "test_supervise.py", "test_train.py", "test_engine.py", "test_wandb_training.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These behind all others, the longest files first: a file is one worker's, and none should wait for the last."""

    def place(item: pytest.Item) -> tuple[bool, bool]:
        return Path(__file__).parent in item.path.parents, item.path.name not in LONGEST

    items.sort(key=place)


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


def train_briefly(world: World, folder: str, shards: str) -> None:
    train(tiny_config(Path(folder), Path(shards), Path(folder) / "runs", "run"), world)


@pytest.fixture(scope="session")
def brief_run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A run of 20 steps: 2 encoder, 2 decoder layers and a fusion layer of 2 heads each. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("brief")
    run_ranks(1, folder / "ranks", train_briefly, str(folder), str(tiny_shards))
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Three hosts."""
    with network(3, tmp_path_factory.mktemp("network")) as made:
        yield made
