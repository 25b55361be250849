"""Shapes and types of the model are checked at every call while tests run."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# The hook must stand before the first import of what it checks, and stays for the whole session.
install_import_hook(["bitmar.batch", "bitmar.losses", "bitmar.model"], "beartype.beartype")
