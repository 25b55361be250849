r"""A page on this machine alone: captions token by token, what each word looks at, episodes written and recalled.

    python tools/demo_app.py --checkpoint runs/demo --shards data/demo/shards
    python tools/demo_app.py --checkpoint runs/demo --shards data/demo/shards --port 7860

Prints the page's address, on 127.0.0.1, and serves it until Ctrl-C. Nothing is loaded from or sent to anywhere else.
Exit code 0: ended by Ctrl-C; 2: a mistake in what was asked, a damaged checkpoint, a port in use.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitmar.config_checks import require
from bitmar.evaluation.sources import open_shards
from bitmar.loading import load_trained
from tools.demo_page.pairs import held_out

HOST = "127.0.0.1"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo_app", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="a run's folder or a checkpoint")
    add("--shards", required=True, metavar="DIR", help="whose held-out pairs can be chosen")
    add("--port", type=int, default=0, help="of 127.0.0.1 (default: a free one)")
    add("--pairs", type=int, default=200, help="held-out pairs to choose among, each of another image (default: 200)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C."""
    known = parse(arguments)
    try:
        require(known.pairs > 0, f"--pairs must be > 0, got {known.pairs}")
        port = free_port(known.port)
        loaded = load_trained(known.checkpoint)
        pairs = held_out(open_shards(loaded, known.shards), known.pairs)
        keep_to_this_machine()
        from tools.demo_page.page import Page, show  # takes seconds to import, which a mistake need not wait for
        from tools.demo_page.session import Demo

        page = Page(Demo(loaded), pairs).build()
        address = show(page, HOST, port)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
    return 0


def keep_to_this_machine() -> None:
    """Let gradio ask and tell nothing over the network; to be called before gradio is imported."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("no_proxy", "NO_PROXY"):  # gradio asks itself whether it is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))


def free_port(port: int) -> int:
    """`port`, or where it is 0 one that is free. Raises ConfigError where it cannot be had."""
    require(0 <= port < 1 << 16, f"--port must lie in 0 to {(1 << 16) - 1}, got {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that was just ended holds nothing back
        try:
            probe.bind((HOST, port))
        except OSError as error:
            require(False, f"--port {port}: {error.strerror}; give another, or none for a free one")
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
