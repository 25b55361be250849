"""The demo page's functions as its listeners call them: fields that are empty or wrong, sessions at the same time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from bitmar.loading import Loaded
from tests.support.demos import CAPTIONS, image, made, untrained
from tools.demo_app import HOST, free_port, keep_to_this_machine
from tools.demo_page.pairs import Pair
from tools.demo_page.session import Demo, SessionMemory, Word

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """tools.demo_page.page, imported as tools/demo_app.py does."""
    before = dict(os.environ)
    keep_to_this_machine()
    from tools.demo_page import page

    yield page
    os.environ.clear()
    os.environ |= before


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return made(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def functions(page: Any, demo: Demo) -> Any:
    return page.Page(demo, [Pair(image(number), text, f"key-{number}") for number, text in enumerate(CAPTIONS)])


def settings(page: Any, demo: Demo, **changes: Any) -> dict[str, Any]:
    plain = {"source": page.HELD_OUT, "number": 1, "file": None, "prompt": "", "temperature": 0.5, "top_p": 0.9}
    return plain | {"seed": 1, "remembers": True, "memory": demo.memory_at_start(), "head": page.MEAN} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": None}, "The seed is empty: give a whole number from 0 to 2147483647."),
        ({"seed": 1 << 31}, "seed must lie in"),
        ({"number": None}, "No pair is chosen"),
        ({"source": "own vector"}, "No file: give a .npy"),
        ({"temperature": None}, "The temperature is empty"),
        ({"top_p": None}, "Top-p is empty"),
        ({"head": None}, "No head is chosen"),
    ],
)
def test_a_field_that_is_empty_or_wrong_is_told_of(
    page: Any, demo: Demo, functions: Any, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(page.gr.Error, match=words):
        next(functions.generate(**settings(page, demo, **changes)))


def test_what_is_empty_does_not_matter_where_it_is_not_asked_for(page: Any, demo: Demo, functions: Any) -> None:
    known = settings(page, demo, number=None, source=page.NONE, temperature=0.0, top_p=None)
    assert "data-done" in list(functions.generate(**known))[-1][0]
    assert functions.pair_card(page.HELD_OUT, None) == ("", "")
    assert CAPTIONS[0] in functions.pair_card(page.HELD_OUT, 0)[0]
    memory = demo.memory_at_start()
    for ask in (
        lambda: functions.remember(page.HELD_OUT, None, None, "a dog", memory),
        lambda: functions.recall(page.HELD_OUT, None, None, True, memory),
    ):
        with pytest.raises(page.gr.Error, match="No pair is chosen"):
            ask()
    with pytest.raises(page.gr.Error, match="No head is chosen"):
        functions.redraw(None, [])


class Noted(Demo):
    """A demo that notes when it is asked, and takes its time for a caption."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self.events: list[str] = []
        self.begun = threading.Event()

    def write(self, *arguments: Any, **known: Any) -> Iterator[Word]:
        self.events.append("a caption begins")
        self.begun.set()
        for word in super().write(*arguments, **known):
            time.sleep(0.05)
            yield word
        self.events.append("a caption ends")

    def remember(self, *arguments: Any) -> tuple[SessionMemory, int]:
        self.events.append("an episode")
        return super().remember(*arguments)


def two_sessions(folder: str) -> dict[str, Any]:
    """Of a page that is served: its seed's limits, the groups of its listeners, and what its model was asked for by one
    session while it wrote for another."""
    keep_to_this_machine()
    from gradio import Number
    from gradio_client import Client

    from tools.demo_page.page import HELD_OUT, MEAN, Page, show

    demo = Noted(untrained(Path(folder)))
    page = Page(demo, [Pair(image(1), CAPTIONS[0], "key")]).build()
    address = show(page, HOST, free_port(0))
    one, other = (Client(address, verbose=False) for _ in range(2))
    caption = one.submit(HELD_OUT, 0, None, "", 0, 1, 0, True, MEAN, api_name="/generate")
    assert demo.begun.wait(30)
    assert "Written to" in other.predict(HELD_OUT, 0, None, "a dog", api_name="/remember")[1]
    assert 'data-done="1"' in caption.result(30)[0]
    (seed,) = (block for block in page.blocks.values() if isinstance(block, Number) and block.label == "Seed")
    groups = {function.concurrency_id for function in page.fns.values()}
    return {"events": demo.events, "seed": (seed.minimum, seed.maximum), "groups": groups}


def test_two_sessions_are_answered_one_after_the_other(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:  # gradio leaves sockets open
        told = elsewhere.submit(two_sessions, str(tmp_path)).result(120)
    assert told["events"] == ["a caption begins", "a caption ends", "an episode"]
    assert told["groups"] == {"model"}
    assert told["seed"] == (0, (1 << 31) - 1)
