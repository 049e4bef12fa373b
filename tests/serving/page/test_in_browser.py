"""The page as a browser sees it: a preference that is dragged changes the text. Skipped without Gradio or a browser."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio")
pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
PLACE = """(() => {{ const box = document.querySelector("{0}").getBoundingClientRect();
    return [box.x, box.y, box.width, box.height] }})()"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The embedded demonstration with routers that vote by the input, and its base."""
    from peft_hoe import demo

    folder = tmp_path_factory.mktemp("page")
    model = demo.load_demo_adapter(routers=[[0.75, 0.25], [0.25, 0.75]])
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "hoe_router" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.mark_trained(["r0", "r1"])
    model.save_pretrained(folder / "adapter")
    demo.load_base().save_pretrained(folder / "base")
    demo.load_tokenizer().save_pretrained(folder / "base")
    return folder


def served(start_server, saved, adapter):
    """`peft-hoe serve --page`."""
    command = [sys.executable, "-m", "peft_hoe.cli", "serve", str(saved / adapter), "--base", str(saved / "base")]
    return start_server([*command, "--page", "--cpu", "--grace", "2"], saved / "log")


@pytest.fixture(scope="module")
def page(saved, start_server) -> Iterator[str]:
    """The address of a page that `peft-hoe serve` serves."""
    with served(start_server, saved, "adapter") as address:
        yield f"{address}/page/"


@pytest.fixture(params=[["kind", "short", "wild"], ["kind", "short", "wild", "true"]], ids=["triangle", "sliders"])
def several(request, saved, start_server) -> Iterator[str]:
    """The address of a page for more than two objectives, whose experts are random."""
    from peft import get_peft_model

    from peft_hoe import HoEConfig, demo

    config = HoEConfig(objectives=request.param, r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(demo.load_base(), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "hoe_A" in name or "hoe_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    adapter = f"adapter-{len(request.param)}"
    model.save_pretrained(saved / adapter)
    with served(start_server, saved, adapter) as address:
        yield f"{address}/page/"


def until(browser, expression, seconds=120):
    """Wait until an expression in the page is true; a pause between tries."""
    deadline = time.monotonic() + seconds
    while not (found := browser.value(expression)):
        assert time.monotonic() < deadline, browser.value("document.body.innerText")[:1500]
        time.sleep(0.3)
    return found


def text(name):
    return f"(document.querySelector('#text-{name}') || {{}}).innerText || ''"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_a_dragged_preference_changes_the_text(browser, page, tmp_path, width):
    browser.resize(width, 700)
    browser.open(page)
    # The chosen text is over when its tokens are coloured.
    until(browser, "document.querySelectorAll('#text-chosen .trace span').length > 20")
    until(browser, f"({text('base')}).length > 60")
    before = {name: browser.value(text(name)) for name in ("chosen", "of-cheerful", "of-vivid", "base")}
    assert before["chosen"].startswith("cheerful 50%, vivid 50%")
    assert len(set(before.values())) == 4

    browser.value("document.querySelector('#weight-0 input[type=range]').scrollIntoView({block: 'center'})")
    x, y, wide, high = browser.value(PLACE.format("#weight-0 input[type=range]"))
    browser.drag((x + wide / 2, y + high / 2), (x + wide * 0.745, y + high / 2))
    until(browser, f"({text('chosen')}).startsWith('cheerful 75%, vivid 25%')")  # a trained router votes here
    until(browser, "document.querySelectorAll('#text-chosen .trace span').length > 20")
    assert (
        browser.value("new Set([...document.querySelectorAll('#text-chosen .trace span')].map(s => s.title)).size") > 5
    )
    browser.picture(Path(os.environ.get("PEFT_HOE_PICTURES") or tmp_path) / f"page-{width}.png")

    browser.value("document.querySelector('#weight-0 input[type=range]').scrollIntoView({block: 'center'})")
    x, y, wide, high = browser.value(PLACE.format("#weight-0 input[type=range]"))
    browser.drag((x + wide * 0.745, y + high / 2), (x + wide - 2, y + high / 2))
    until(browser, f"({text('chosen')}).startsWith('cheerful 100%')")
    until(browser, "document.querySelectorAll('#text-chosen .trace span').length > 20")
    after = browser.value(text("chosen"))
    written = after.partition("\n")[2]
    assert before["of-cheerful"].split("\n")[-1].strip() in written.replace(
        "\n", " "
    )  # at a corner it is the corner's text
    assert written != before["chosen"].partition("\n")[2]
    assert browser.value(text("base")) == before["base"]
    assert browser.value(TOO_WIDE) <= 0
    assert browser.messages() == [], "\n".join(browser.messages())
    assert [url for url in browser.requests() if not url.startswith(page.removesuffix("page/"))] == []


@pytest.mark.slow
def test_a_triangle_is_clicked_and_sliders_are_dragged(browser, several, tmp_path):
    """Three objectives have a triangle, more have a slider each; on the width of a telephone too."""
    for width in (1280, 400):
        browser.resize(width, 700)
        browser.open(several)
        until(browser, "document.querySelectorAll('#text-chosen .trace span').length > 2")
        before = browser.value(text("chosen"))
        control = "#triangle img" if browser.value("!!document.querySelector('#triangle img')") else None
        place = control or "#weight-0 input[type=range]"
        browser.value(f"document.querySelector('{place}').scrollIntoView({{block: 'center'}})")
        x, y, wide, high = browser.value(PLACE.format(place))
        if control:
            named = f"document.elementFromPoint({x + wide / 2}, {y + high * 26 / 330}).tagName"
            assert browser.value(named) in ("IMG", "BUTTON")  # nothing lies over the name of the upper corner
            # The lower left corner is the second objective's.
            browser.drag((x + wide * 34 / 360, y + high * 296 / 330), (x + wide * 34 / 360, y + high * 296 / 330))
            until(browser, f"({text('chosen')}).startsWith('short ')")
        else:  # weights of 1, 0.25, 0.25 and 0.25
            browser.drag((x + wide * 0.25, y + high / 2), (x + wide - 2, y + high / 2))
            until(browser, f"({text('chosen')}).startsWith('kind 57%, short 14%, wild 14%, true 14%')")
        until(browser, "document.querySelectorAll('#text-chosen .trace span').length > 2")
        assert browser.value(text("chosen")).partition("\n")[2] != before.partition("\n")[2]
        browser.picture(tmp_path / f"page-{width}.png")
        assert browser.value(TOO_WIDE) <= 0
        assert browser.messages() == [], "\n".join(browser.messages())
