"""The report in a real browser: Chromium opens the file, draws every curve, and has nothing to complain of."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Browser, Page, chromium
from tests.support.logged_runs import died_run, finished_run
from tests.support.runs import run_tool

pytestmark = pytest.mark.slow

PHONE = (390, 844)
DRAW_ALL = "dispatchEvent(new Event('beforeprint'))"
ALL_DRAWN = "[...document.querySelectorAll('[data-chart]')].every(box => box.dataset.drawn === 'yes')"
# of each chart: lines and points that have an extent or a place on the screen
CURVES = """[...document.querySelectorAll('[data-chart]')].map(box => {
    const paths = [...box.querySelectorAll('.scatterlayer path')];
    const seen = paths.filter(path => (path.getAttribute('d') || '').length > 2);
    const size = box.querySelector('svg.main-svg').getBoundingClientRect();
    return [seen.length, Math.round(size.width), Math.round(size.height)];
})"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
PICTURES = "[...document.images].map(image => image.complete && image.naturalWidth > 100)"
VISIBLE = "[...document.querySelectorAll('[data-chart]')].map(box => box.data.map(line => line.visible))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The runs of each report: one, three of different lengths, died ones, and one with hostile names."""
    made = tmp_path_factory.mktemp("runs")
    three = [finished_run(made / f"seed-{seed}", seed, steps=200 * seed) for seed in (1, 2)]
    three.append(died_run(made / "died"))
    return {
        "one": three[:1],
        "three": three,
        "died": three[2:],
        "nothing": [died_run(made / "nothing", "missing")],
        "empty": [died_run(made / "empty", "empty")],
        "long": [finished_run(made / ("<b>a<b>&%{x}-" + "long" * 20), steps=20_000, every=4)],
    }


@pytest.fixture(scope="module")
def pages(runs: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of each, written as a user does, in a folder without anything else."""
    folder = tmp_path_factory.mktemp("pages")
    for name, folders in runs.items():
        done = run_tool("report.py", *folders, "--out", folder / f"{name}.html")
        assert (done.returncode, done.stderr) == (0, "")
    return {name: folder / f"{name}.html" for name in runs}


def open_drawn(browser: Browser, path: Path, width: int = 1280, height: int = 900, mobile: bool = False) -> Page:
    page = browser.open(path, width, height, mobile)
    page.evaluate(DRAW_ALL)
    page.wait_for(ALL_DRAWN)
    return page


def check_nothing_is_wrong(page: Page) -> None:
    assert page.problems == []
    assert [url[:60] for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in page.requests if url.startswith("file:")]) == 1


@pytest.mark.parametrize("screen", ["desktop", "phone"])
@pytest.mark.parametrize("name", ["one", "three", "died", "nothing", "empty", "long"])
def test_the_report_opens(browser: Browser, pages: dict[str, Path], name: str, screen: str, tmp_path: Path) -> None:
    width, height = PHONE if screen == "phone" else (1280, 900)
    page = open_drawn(browser, pages[name], width, height, mobile=screen == "phone")
    curves = page.evaluate(CURVES)
    assert bool(curves) == (name not in ("nothing", "empty"))
    for drawn, wide, high in curves:
        assert drawn > 0
        assert 200 < wide <= width
        assert high > 150
    assert page.evaluate(OVERFLOW) <= 0
    assert all(page.evaluate(PICTURES))
    assert len(page.evaluate(PICTURES)) == {"one": 3, "three": 6, "long": 3}.get(name, 0)
    page.screenshot(tmp_path / "page.png")
    picture = (tmp_path / "page.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24])[1] > height
    check_nothing_is_wrong(page)


def test_curves_are_drawn_as_they_come_near(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.open(pages["one"])
    page.wait_for("document.querySelector('[data-chart]').dataset.drawn === 'yes'")
    last = "[...document.querySelectorAll('[data-chart]')].at(-1)"
    assert page.evaluate(f"{last}.dataset.drawn") is None
    page.evaluate(f"{last}.scrollIntoView()")
    page.wait_for(f"{last}.dataset.drawn === 'yes'")
    check_nothing_is_wrong(page)


def middle(page: Page, chart: int) -> tuple[float, float, float]:
    """x and y of the middle of a chart's axes on the screen, and half its width."""
    box = f"document.querySelectorAll('[data-chart]')[{chart}]"
    page.evaluate(f"{box}.scrollIntoView({{block: 'center'}})")
    place = page.evaluate(
        f"(r => [r.x + r.width / 2, r.y + r.height / 2, r.width / 2])"
        f"({box}.querySelector('.nsewdrag').getBoundingClientRect())"
    )
    return place[0], place[1], place[2]


def test_hover_tells_values_and_dragging_zooms(browser: Browser, pages: dict[str, Path]) -> None:
    page = open_drawn(browser, pages["three"])
    x, y, half = middle(page, 0)
    page.hover(x - 5, y)
    page.hover(x, y)
    page.wait_for("document.querySelector('[data-chart] .hoverlayer').textContent.includes('seed-2')")
    span = "(r => r[1] - r[0])(document.querySelector('[data-chart]').layout.xaxis.range)"
    before = page.evaluate(span)
    page.drag((x - half / 2, y), (x + half / 2, y))
    page.wait_for(f"{span} < {before * 0.6}")
    check_nothing_is_wrong(page)


def test_runs_are_switched_off_and_axes_made_logarithmic(browser: Browser, pages: dict[str, Path]) -> None:
    page = open_drawn(browser, pages["three"])
    page.evaluate("document.querySelector('input[data-run=\"1\"]').click()")
    lines = "document.querySelector('[data-chart]').data"
    page.wait_for(f"{lines}.length === 3 && {lines}[1].visible === false")
    assert page.evaluate(f"{lines}.map(line => line.visible)") == [True, False, True]
    page.evaluate("document.querySelector('button.log').click()")
    page.wait_for("document.querySelector('[data-chart]').layout.yaxis.type === 'log'")
    page.evaluate("document.querySelector('input[data-run=\"1\"]').click()")
    page.wait_for(f"{lines}[1].visible === true")
    assert set(map(tuple, page.evaluate(VISIBLE))) <= {(True,) * count for count in range(1, 10)}
    check_nothing_is_wrong(page)


def test_a_finger_on_a_chart_scrolls_the_page(browser: Browser, pages: dict[str, Path]) -> None:
    page = open_drawn(browser, pages["one"], *PHONE, mobile=True)
    x, y, _ = middle(page, 0)
    before = page.evaluate("scrollY")
    page.swipe_up(x, y, 200)
    page.wait_for(f"scrollY > {before + 100}")
    check_nothing_is_wrong(page)


def test_names_of_runs_are_not_markup(browser: Browser, pages: dict[str, Path]) -> None:
    page = open_drawn(browser, pages["long"])
    assert page.evaluate("document.querySelector('h1').textContent").startswith("<b>a<b>&%{x}-long")
    assert page.evaluate("document.querySelectorAll('h1 b').length") == 0
    check_nothing_is_wrong(page)


def test_the_browser_notes_what_a_bad_page_does(browser: Browser, tmp_path: Path) -> None:
    """Else the tests above would find nothing."""
    bad = "<script>console.error('one'); setTimeout(() => none(), 0); fetch('http://host.invalid/')</script>"
    (tmp_path / "bad.html").write_text(f"<!DOCTYPE html><link rel=icon href=data:,><div style='width:900px'>wide{bad}")
    page = browser.open(tmp_path / "bad.html", *PHONE)
    page.wait_for("new Promise(done => setTimeout(() => done(true), 500))")
    told = " ".join(page.problems)
    assert "one" in told
    assert "none is not defined" in told
    assert "failed" in told
    assert "http://host.invalid/" in page.requests
    assert page.evaluate(OVERFLOW) > 0
