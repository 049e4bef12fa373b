"""The page of a sweep as a browser sees it. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peft_hoe import preference_grid
from peft_hoe.evaluation import win_rates

pytestmark = pytest.mark.slow

PICTURES = """[...document.querySelectorAll("img, svg")].map(item => item.tagName == "IMG"
    ? [item.naturalWidth, item.naturalHeight] : [item.getBBox().width, item.getBBox().height])"""
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


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
    browser.resize(width)
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
    browser.resize(400)
    browser.open(page)
    found = {
        "messages": browser.messages() != [],
        "requests": browser.requests() != [],
        "pictures": browser.value(PICTURES) == [[0, 0]],
        "width": browser.value(TOO_WIDE) > 0,
    }
    assert found[seen]
