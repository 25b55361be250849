"""Debian's Chromium without a window, told what to do over a pipe (Chrome DevTools Protocol)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.runs import cannot_run

PATIENCE_S = 120.0  # a guard against hangs, not a measure
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--no-default-browser-check", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # a page that needs the network must fail
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)


class Page:
    """One page: what it logged, threw and asked for, and what is in it."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        self.problems: list[str] = []
        self.requests: list[str] = []

    def take(self, event: dict[str, Any]) -> None:
        """Note an event of this page."""
        params = event["params"]
        match event["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Network.loadingFailed" if not params.get("canceled"):  # by the page itself
                self.problems.append(f"failed: {params['errorText']}")
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.problems.append(str(details.get("exception", {}).get("description", details["text"])))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                told = (str(each.get("value", each.get("description"))) for each in params["args"])
                self.problems.append(f"console.{params['type']}: {' '.join(told)}")
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.problems.append(f"{params['entry']['level']}: {params['entry']['text']}")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.ask(method, params, self._session)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        limit = time.monotonic() + PATIENCE_S
        while not self.evaluate(expression):
            assert time.monotonic() < limit, f"never true: {expression}; problems: {self.problems}"
            time.sleep(0.05)

    def close(self) -> None:
        """As a person closes a tab. A browser keeps six connections to a server, of which an open page may hold one."""
        self._browser.ask("Target.closeTarget", {"targetId": self._target})

    def drag(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        """Press the mouse at one place and release it at another."""
        ways = (("mouseMoved", start), ("mousePressed", start), ("mouseMoved", stop), ("mouseReleased", stop))
        for kind, (x, y) in ways:
            button = "none" if kind == "mouseMoved" and (x, y) == start else "left"
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def swipe_up(self, x: float, y: float, distance: float) -> None:
        """Put a finger there and move it up."""
        self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        for part in range(1, 11):
            place = {"x": x, "y": y - distance * part / 10}
            self.ask("Input.dispatchTouchEvent", type="touchMove", touchPoints=[place])
        self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def hover(self, x: float, y: float) -> None:
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the whole page, or of what is on the screen."""
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


class Browser:
    """A running Chromium."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._number, self._rest = 0, b""
        self._pages: dict[str, Page] = {}

    def ask(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        """Send a command and return its result, taking the events that come before it."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        os.write(self._to, json.dumps(command | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            page = self._pages.get(answer.get("sessionId", ""))
            if page is not None and "method" in answer:
                page.take(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], PATIENCE_S)
            assert ready, "Chromium does not answer"
            part = os.read(self._back, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, place: Path | str, width: int = 1280, height: int = 900, mobile: bool = False) -> Page:
        """Open a local file, or an address, in a screen of this size, and wait until it is loaded."""
        address = place if isinstance(place, str) else place.resolve().as_uri()
        target = self.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        page.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        page.ask("Emulation.setTouchEmulationEnabled", enabled=mobile)
        page.ask("Page.navigate", url=address)
        page.wait_for(f"document.readyState === 'complete' && location.href === {json.dumps(address)}")
        return page


def _high_pipe() -> tuple[int, int]:
    """A pipe whose descriptors are none of 3 and 4, which the browser is to have."""
    low = os.pipe()
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in low]
    for each in low:
        os.close(each)
    return high[0], high[1]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A Chromium with an empty profile, ended with the context. Skips, or in CI fails, where none is installed."""
    program = shutil.which("chromium")
    if program is None:
        cannot_run("chromium is missing (apt-get install chromium)")
    here, there = _high_pipe(), _high_pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        # it reads commands from descriptor 3 and answers on 4
        joined = f'exec "$0" "$@" 3<&{here[0]} 4>&{there[1]}'
        command = ["bash", "-c", joined, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with (Path(profile) / "log").open("w") as log:
            process = subprocess.Popen(command, pass_fds=(here[0], there[1]), stdout=log, stderr=log)
        os.close(here[0])
        os.close(there[1])
        try:
            browser = Browser(here[1], there[0])
            yield browser
            browser.ask("Browser.close", {})
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()
            os.close(here[1])
            os.close(there[0])
