"""Shapes and types of the model are checked at every call while tests run; no test leaves its environment behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from jaxtyping import install_import_hook

CORES = torch.get_num_threads()

# The hook must stand before the first import of what it checks, and stays for the whole session.
install_import_hook(["bitmar.batch", "bitmar.losses", "bitmar.model"], "beartype.beartype")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `--dist loadgroup` unit and numerics go file by file to whichever worker is free; the integration tests,
    which keep all cores busy on their own, one after the other to one worker."""
    for item in items:
        place = item.path.relative_to(Path(__file__).parent)
        group = place.parts[0] if place.parts[0] == "integration" else str(place)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Workers that share the cores take one each, or they would wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1 if "integration" not in item.path.parts else CORES)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Joining a process group names rank, port and network interface: no command of a later test must inherit them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
