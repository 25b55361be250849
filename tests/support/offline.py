"""Transformers without a network, and with a cache of its own. To be imported before transformers, which reads these
settings once."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile

_HOME = tempfile.mkdtemp(prefix="hf-")  # where loaded code is copied to: never the user's own cache
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {"HF_HOME": _HOME, "HF_HUB_OFFLINE": "1"}
sys.modules["torchvision"] = None  # type: ignore[assignment]  # litdata brings one that a CPU's torch cannot load
