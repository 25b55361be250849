"""Shapes and types of the model are checked at every call while tests run; no test leaves its environment behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that share the cores would wait for each other's threads
    torch.set_num_threads(1)

# No example has a deadline: a machine may be busy. `quick`: 25 examples where a test sets no max_examples.
_USUAL = settings.get_profile(settings.get_current_profile_name())
settings.register_profile("unhurried", _USUAL, deadline=None)
settings.register_profile("quick", _USUAL, deadline=None, max_examples=25)
settings.load_profile("unhurried")

# The hook must stand before the first import of what it checks, and stays for the whole session.
install_import_hook(["bitmar.batch", "bitmar.losses", "bitmar.model"], "beartype.beartype")


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Joining a process group names rank, port and network interface: no command of a later test must inherit them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
