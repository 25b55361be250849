"""The demo page in a real browser: a caption token by token, its pictures, the memory, an episode recalled."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bitmar.generation.generate import generate
from bitmar.generation.sampling import Sampling
from bitmar.loading import load_trained
from bitmar.model.packed import freeze
from shards.loader import ShardSet
from shards.tokenizer import BOS, TextTokenizer
from tests.support.browser import Browser, Page, chromium
from tests.support.runs import ROOT, heed_interrupts, make_shards
from tools.demo_app import main
from tools.demo_page.pairs import Pair, held_out

pytestmark = pytest.mark.slow

# imported by every Python that has its folder in PYTHONPATH: notes who is contacted besides this machine
WATCH = """
import os, sys
def note(event, args):
    place = {"socket.connect": 1, "socket.sendto": 1, "socket.bind": 1, "socket.getaddrinfo": 0}.get(event)
    if place is not None:
        address = args[place]
        host = address[0] if isinstance(address, tuple) else address
        if isinstance(address, tuple | None) or event == "socket.getaddrinfo":
            with open(os.environ["CONTACTS"], "a") as file:
                print(event, host, file=file)
sys.addaudithook(note)
"""
# of gradio's own: about its translations, and at every message of a mistake
WARNINGS = ("console.warning: [svelte-i18n]", "console.warning: Method not implemented.")
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
RECORD = """window.told = []; new MutationObserver(() => {
    const caption = document.querySelector('#written .caption');
    if (caption && window.told.at(-1) !== caption.textContent) window.told.push(caption.textContent);
}).observe(document.querySelector('#written'), {childList: true, subtree: true, characterData: true})"""
WRITTEN = "document.querySelector('#written .caption[data-done=\"1\"]') !== null"


@pytest.fixture(scope="module")
def pairs(tiny_shards: Path) -> list[Pair]:
    return held_out(ShardSet.open(tiny_shards), 200)


@pytest.fixture(scope="module")
def contacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the served program notes whom it contacts."""
    folder = tmp_path_factory.mktemp("watch")
    (folder / "sitecustomize.py").write_text(WATCH)
    return folder / "contacts"


@pytest.fixture(scope="module")
def address(brief_run: Path, tiny_shards: Path, contacts: Path) -> Iterator[str]:
    """The page, served as a user does, until Ctrl-C."""
    command = [sys.executable, str(ROOT / "tools" / "demo_app.py"), "--checkpoint", str(brief_run)]
    paths = os.pathsep.join(filter(None, [str(contacts.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "CONTACTS": str(contacts)}
    with subprocess.Popen(
        [*command, "--shards", str(tiny_shards)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        preexec_fn=heed_interrupts,
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        line = server.stdout.readline()
        try:
            assert line.startswith("http://127.0.0.1:"), server.stderr.read()
            yield line.split()[0]
        finally:
            server.send_signal(signal.SIGINT)
            out, told = server.communicate(timeout=60)
        assert (server.returncode, out, told) == (0, "", "")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A new browser session's."""
    opened = open_page(browser, address)
    yield opened
    opened.close()


def open_page(browser: Browser, address: str) -> Page:
    opened = browser.open(address)
    opened.wait_for("!!document.querySelector('#generate')")
    return opened


def text_of(page: Page, place: str) -> str:
    return page.evaluate(f"(document.querySelector({json.dumps(place)})?.textContent ?? '').trim()")


def click(page: Page, place: str) -> None:
    page.evaluate(f"document.querySelector({json.dumps(place)}).click()")


def open_tab(page: Page, name: str) -> None:
    page.evaluate(f"[...document.querySelectorAll('[role=tab]')].find(t => t.textContent.includes('{name}')).click()")


def fill(page: Page, place: str, text: str) -> None:
    page.evaluate(
        f"(field => {{ field.value = {json.dumps(text)}; field.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
        f"(document.querySelector({json.dumps(place)}))"
    )


def choose(page: Page, place: str, option: str) -> None:
    """An entry of a list that drops down."""
    page.evaluate(f"document.querySelector('{place} input').focus()")
    found = f"[...document.querySelectorAll('{place} [role=option]')].find(o => o.textContent.includes('{option}'))"
    page.wait_for(f"!!{found}")
    page.evaluate(f"{found}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")


def picture(page: Page, place: str) -> str:
    """A picture that is drawn: its data."""
    page.wait_for(f"(document.querySelector('{place} img')?.naturalWidth ?? 0) > 500")
    return page.evaluate(f"document.querySelector('{place} img').src")


def write_caption(page: Page) -> str:
    before = page.evaluate("document.querySelector('#memory-attention img')?.src ?? ''")
    click(page, "#generate")
    page.wait_for(f"(document.querySelector('#memory-attention img')?.src ?? '') !== {json.dumps(before)} && {WRITTEN}")
    return text_of(page, "#written .caption")


def complaint(page: Page) -> str:
    """The message that a mistake brings up; taken away again."""
    page.wait_for("!!document.querySelector('.toast-body.error')")
    told = text_of(page, ".toast-body.error")
    click(page, ".toast-close")
    page.wait_for("!document.querySelector('.toast-body.error')")
    return told


def check_nothing_is_wrong(page: Page) -> None:
    assert [problem for problem in page.problems if not problem.startswith(WARNINGS)] == []
    own = ("data:", "blob:", "http://127.0.0.1:")
    assert [url[:80] for url in page.requests if not url.startswith(own)] == []
    assert page.evaluate(OVERFLOW) <= 0


def expected(brief_run: Path, pair: Pair, prompt: str) -> str:
    loaded = load_trained(brief_run)
    tokenizer = TextTokenizer(loaded.tokenizer)
    begin = [BOS, *tokenizer.encode_batch([prompt]).tokens.tolist()]
    (found,) = generate(freeze(loaded.model), loaded.memory, [begin], pair.vector[None], Sampling(), 32)
    return tokenizer.decode([*begin[1:], *found.tokens])


def test_a_caption_is_written_token_by_token(page: Page, brief_run: Path, pairs: list[Pair]) -> None:
    assert pairs[0].caption in text_of(page, "#card")
    assert pairs[0].key in text_of(page, "#card")
    page.evaluate(RECORD)
    fill(page, "#prompt textarea", "a dog")
    caption = write_caption(page)
    assert caption == expected(brief_run, pairs[0], "a dog").strip()
    told = page.evaluate("window.told")
    assert len(told) > 5
    assert all(later.startswith(sooner.rstrip("\ufffd")) for sooner, later in itertools.pairwise(told))
    whole, memory = picture(page, "#image-attention"), picture(page, "#memory-attention")
    choose(page, "#head", "head 1")
    page.wait_for(f"document.querySelector('#image-attention img').src !== {json.dumps(whole)}")
    assert picture(page, "#memory-attention") == memory
    check_nothing_is_wrong(page)


def test_another_pair_and_drawn_captions(page: Page, pairs: list[Pair], brief_run: Path) -> None:
    choose(page, "#pair", pairs[3].caption[:40])
    page.wait_for(f"document.querySelector('#card').textContent.includes({json.dumps(pairs[3].key)})")
    greedy = write_caption(page)
    assert greedy == expected(brief_run, pairs[3], "").strip()
    fill(page, "#temperature input[type=number]", "1.5")
    page.evaluate("document.querySelector('#temperature input[type=number]').dispatchEvent(new Event('change'))")
    drawn = write_caption(page)
    assert drawn != greedy
    check_nothing_is_wrong(page)


def test_memory_on_and_off(page: Page) -> None:
    write_caption(page)
    on = picture(page, "#memory-attention")
    image = picture(page, "#image-attention")
    click(page, "#memory input")
    write_caption(page)
    off = picture(page, "#memory-attention")
    assert off != on
    click(page, "#memory input")
    write_caption(page)
    assert picture(page, "#memory-attention") == on
    assert picture(page, "#image-attention") == image
    check_nothing_is_wrong(page)


def recall(page: Page) -> str:
    page.evaluate("document.querySelector('#answer').querySelectorAll('p').forEach(p => p.remove())")
    click(page, "#recall")
    page.wait_for("!!document.querySelector('#answer p') && !!document.querySelector('#recalled .caption')")
    return text_of(page, "#answer")


def test_an_episode_is_written_and_recalled(
    page: Page, browser: Browser, address: str, pairs: list[Pair], brief_run: Path
) -> None:
    trained = int(load_trained(brief_run).memory.written.sum())
    open_tab(page, "write and recall")
    assert f"{trained} of 7 slots hold an episode, 0 of them of this session" in text_of(page, "#episodes")
    click(page, "#empty")
    page.wait_for("document.querySelector('#episodes').textContent.includes('0 of 7')")
    assert "nothing" in recall(page)
    fill(page, "#episode textarea", "<i>a blue</i> dog")
    click(page, "#write")
    page.wait_for("document.querySelector('#message').textContent.includes('slot 0')")
    assert "1 of 7 slots hold an episode, 1 of them of this session" in text_of(page, "#episodes")
    assert pairs[0].key in text_of(page, "#episodes")
    told = recall(page)
    assert "slot 0" in told
    assert "<i>a blue</i> dog" in told
    picture(page, "#recall-picture")
    assert text_of(page, "#recalled .caption")
    click(page, "#memory input")
    assert "off or empty" in recall(page)
    other = open_page(browser, address)
    open_tab(other, "write and recall")
    assert "0 of them of this session" in text_of(other, "#episodes")
    other.close()
    click(page, "#reset")
    page.wait_for(f"document.querySelector('#episodes').textContent.includes('{trained} of 7')")
    check_nothing_is_wrong(page)


def give_file(page: Page, path: Path) -> None:
    root = page.ask("DOM.getDocument")["root"]["nodeId"]
    page.wait_for("!!document.querySelector('#file input[type=file]')")
    field = page.ask("DOM.querySelector", nodeId=root, selector="#file input[type=file]")["nodeId"]
    page.ask("DOM.setFileInputFiles", nodeId=field, files=[str(path)])
    page.wait_for(f"document.querySelector('#file').textContent.includes('{path.stem}')")


def test_a_vector_of_ones_own(page: Page, pairs: list[Pair], brief_run: Path, tmp_path: Path) -> None:
    for name, vector in (("own", pairs[5].vector.numpy()), ("wide", np.zeros(5, np.float32))):
        np.save(tmp_path / f"{name}.npy", vector)
    page.evaluate("document.querySelectorAll('#source input')[1].click()")
    page.wait_for("!!document.querySelector('#file')")
    click(page, "#generate")
    assert "give a .npy of one image vector" in complaint(page)
    give_file(page, tmp_path / "own.npy")
    assert write_caption(page) == expected(brief_run, pairs[5], "").strip()
    click(page, "#file [aria-label='Clear']")
    give_file(page, tmp_path / "wide.npy")
    click(page, "#generate")
    assert "one vector of 768 finite numbers would do" in complaint(page)
    page.evaluate("document.querySelectorAll('#source input')[2].click()")
    fill(page, "#seed input", "")
    click(page, "#generate")
    assert "The seed is empty" in complaint(page)
    fill(page, "#seed input", "5")
    fill(page, "#prompt textarea", "dog " * 40)
    click(page, "#generate")
    assert "trained on rows of 32" in complaint(page)
    open_tab(page, "write and recall")
    click(page, "#recall")
    assert "choose an image" in complaint(page)
    check_nothing_is_wrong(page)


def test_nobody_else_is_contacted(page: Page, contacts: Path) -> None:
    told = contacts.read_text().split("\n")[:-1]
    assert any(line.startswith("socket.bind 127.0.0.1") for line in told), "the watch notes what happens"
    assert [line for line in told if line.split()[1] not in ("127.0.0.1", "None")] == []


def test_mistakes(
    brief_run: Path,
    tiny_raw: Path,
    tiny_shards: Path,
    other_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "train_50M.zip").symlink_to((tiny_raw / "train_50M.zip").resolve())
    bare = make_shards(text, tmp_path / "shards", tokenizer=brief_run / "tokenizer.json")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            "neither a run's folder": (tmp_path, tiny_shards),
            "validation split holds no pairs": (brief_run, bare),
            "have another tokenizer than": (brief_run, other_shards),
            "nowhere": (brief_run, tmp_path / "nowhere"),
            f"--port {port}: Address already in use": (brief_run, tiny_shards, "--port", port),
            "--port must lie in 0 to 65535": (brief_run, tiny_shards, "--port", 99999),
            "--pairs must be > 0": (brief_run, tiny_shards, "--pairs", 0),
        }
        for words, (checkpoint, shards, *more) in cases.items():
            arguments = ["--checkpoint", checkpoint, "--shards", shards, *more]
            assert main([str(argument) for argument in arguments]) == 2, words
            out, told = capsys.readouterr()
            assert (out, told[:7], told.count("\n")) == ("", "error: ", 1)
            assert words in told
