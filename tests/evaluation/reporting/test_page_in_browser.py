"""The page of a sweep as a browser sees it: headless Chromium, asked over its debugging pipe. Skipped where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_hoe import preference_grid
from peft_hoe.evaluation import win_rates

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for found in map(shutil.which, NAMES) if found), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
]  # fmt: skip
PICTURES = """[...document.querySelectorAll("img, svg")].map(item => item.tagName == "IMG"
    ? [item.naturalWidth, item.naturalHeight] : [item.getBBox().width, item.getBBox().height])"""
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")


class Browser:
    """Chromium with one tab. Commands of the DevTools protocol go in, events come out: JSON that ends with a 0 byte."""

    def __init__(self, profile: str) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4; sh may not know descriptors of two digits
        command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.commands, self.answers = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb")
        self.number, self.session, self.events = 0, {}, []
        tab = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]}
        for part in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{part}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a command returns; events that come before are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        self.commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while not text.endswith(b"\0"):
            byte = self.answers.read(1)
            assert byte, "Chromium has ended"
            text += byte
        return json.loads(text[:-1])

    def open(self, page: Path) -> None:
        """Wait until the page and its pictures are there."""
        self.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """Of an expression in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def messages(self) -> list[str]:
        """Errors, warnings and all else that the console shows, and exceptions."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """What the page asked for beside itself, without what it carries."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls[1:] if not url.startswith("data:")]

    def close(self) -> None:
        """End the process."""
        self.commands.write(b'{"id": 0, "method": "Browser.close"}\0')
        self.process.wait(timeout=30)
        self.commands.close()
        self.answers.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        found = Browser(profile)
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(make_sweep, tmp_path_factory) -> dict[int, Path]:
    """Reports with all their parts: another sweep, a judge, and a text that could break a page; by number of objectives."""
    folder = tmp_path_factory.mktemp("pages")

    def page(n: int) -> Path:
        grid = preference_grid(n)
        sweep = make_sweep(np.sqrt(grid), preferences=grid, noise=0.1)
        other = make_sweep(0.8 * np.sqrt(grid), preferences=grid, noise=0.1, name="<soup>")
        sweep.completions[0][0][0][0] = "<script>console.error('ran')</script><img src=http://127.0.0.1:9/a.png>"
        judged = win_rates(sweep, other, lambda prompt, first, second: "A", progress=False)
        return sweep.report(folder / f"{n}.html", others=[other] if n == 2 else [], judged=[judged])

    return {n: page(n) for n in (2, 3)}


@pytest.mark.parametrize("n", [2, 3])
def test_the_page_in_a_browser(browser, pages, n):
    browser.open(pages[n])
    assert browser.messages() == []
    assert browser.requests() == []
    sizes = browser.value(PICTURES)
    assert len(sizes) == 1
    assert min(sizes[0]) > 300
    assert browser.value("document.querySelector('h1').innerText") == "Preference sweep: A"
    assert browser.value("document.querySelector('td.text').textContent").startswith(
        "<script>console.error('ran')</script>"
    )
    assert browser.value("document.compatMode") == "CSS1Compat"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_the_window(browser, pages, width):
    """Wide tables scroll by themselves."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.ask("Emulation.setDeviceMetricsOverride", **size)
    browser.open(pages[3])
    browser.value("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.value(TOO_WIDE) == 0
    browser.ask("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize(
    ("before", "after", "seen"),
    [
        ("</h1>", "</h1><script>console.error('ran')</script>", "messages"),
        ("</h1>", "</h1><script>missing()</script>", "messages"),
        ("</h1>", "</h1><img src='http://127.0.0.1:9/a.png'>", "requests"),
        ("</h1>", "</h1><link rel=stylesheet href=other.css>", "requests"),
        ('src="data:image/svg+xml;base64,', 'src="data:image/svg+xml;base64,AAAA', "pictures"),
        (".wide { overflow-x: auto; }", "", "width"),
    ],
)
def test_a_broken_page_is_seen(browser, pages, tmp_path, before, after, seen):
    """So that the tests above can fail."""
    text = pages[2].read_text(encoding="utf-8")
    page = tmp_path / "broken.html"
    page.write_text(text.replace(before, after, 1), encoding="utf-8")
    browser.ask("Emulation.setDeviceMetricsOverride", width=400, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(page)
    found = {
        "messages": browser.messages() != [],
        "requests": browser.requests() != [],
        "pictures": browser.value(PICTURES) == [[0, 0]],
        "width": browser.value(TOO_WIDE) > 0,
    }
    assert found[seen]
