"""Pictures and the page: what is drawn is what was measured."""

from __future__ import annotations

import base64
import builtins
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from peft_hoe import das_dennis, preference_grid
from peft_hoe.errors import HoEError
from peft_hoe.evaluation import win_rates


def swept(make_sweep, n, **changes):
    grid = preference_grid(n) if n < 4 else das_dennis(n, 2)
    return make_sweep(np.sqrt(grid), preferences=grid, noise=0.1, **changes)


def test_two_objectives_are_a_plane_with_intervals(make_sweep):
    sweep, other = swept(make_sweep, 2), make_sweep([[0.2, 0.3], [0.4, 0.1]], name="soup")
    axes, bar = sweep.plot(others=[other]).axes
    dots = {collection.get_label(): collection for collection in axes.collections if collection.get_label()[0] != "_"}
    assert set(dots) == {"A", "soup"}
    np.testing.assert_allclose(dots["A"].get_offsets(), sweep.points)
    np.testing.assert_allclose(dots["A"].get_array(), sweep.preferences[:, 0])
    np.testing.assert_allclose(dots["soup"].get_offsets(), other.points)
    whiskers = [line for line in axes.collections if line.get_label()[0] == "_"]
    lengths = {round(float(np.ptp(segment[:, 0])), 6) for segment in whiskers[-2].get_segments()}
    interval = sweep.intervals()
    assert lengths == set((interval.high - interval.low)[:, 0].round(6))
    assert axes.get_xlabel() == "mean reward: a"
    assert bar.get_ylabel() == "weight of a"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["A", "soup"]


def test_eight_methods_look_different(make_sweep):
    """Each has a colour and a marker of its own, none close to another or to the white that it stands on."""
    sweeps = [make_sweep([[0.1 * i, 0.3], [0.4, 0.1 * i]], name=f"method {i}") for i in range(8)]
    axes = sweeps[0].plot(others=sweeps[1:]).axes[0]
    dots = [collection for collection in axes.collections if collection.get_label()[0] != "_"]
    colours = np.array([[*_lab(dot.get_edgecolor()[0][:3])] for dot in dots] + [[100.0, 0.0, 0.0]])
    assert len(colours) == 9
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1000 * np.eye(9)
    assert distances.min() > 25  # in CIELAB, where 2.3 is just noticeable
    assert len({dot.get_paths()[0].vertices.tobytes() for dot in dots}) == 8


def _lab(colour):
    """sRGB to CIELAB, D65."""
    linear = np.where(
        np.asarray(colour) > 0.04045, ((np.asarray(colour) + 0.055) / 1.055) ** 2.4, np.asarray(colour) / 12.92
    )
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_three_objectives_are_triangles_and_planes(make_sweep):
    sweep = swept(make_sweep, 3)
    figure = sweep.plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == [f"A: mean reward {name}" for name in "abc"]
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes if axes.get_ylabel().startswith("mean")]
    assert labels == [(f"mean reward: {x}", f"mean reward: {y}") for x, y in ("ab", "ac", "bc")]
    spots = figure.axes[0].collections[-1]
    np.testing.assert_allclose(spots.get_array(), sweep.points[:, 0])
    corner = spots.get_offsets()[sweep.preferences[:, 2].argmax()]
    np.testing.assert_allclose(corner, [0.5, np.sqrt(3) / 2])


def test_more_objectives_are_parallel_coordinates(make_sweep):
    sweep = swept(make_sweep, 4)
    axes, second = sweep.plot(others=[swept(make_sweep, 4, name="soup")]).axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
    assert len(lines) == 10
    np.testing.assert_allclose([line.get_ydata() for line in lines], sweep.points)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c", "d"]
    assert second.get_title() == "soup"


def test_plots_without_a_scale_run_from_worst_to_best(make_sweep):
    sweep = make_sweep(7 * np.eye(4) + 3, preferences=np.eye(4), normalizer=None)
    ydata = [line.get_ydata() for line in sweep.plot().axes[0].lines if len(line.get_xdata()) == 4]
    np.testing.assert_allclose(ydata, np.eye(4))


@pytest.mark.parametrize("n", [2, 3])
def test_few_preferences_can_be_drawn(make_sweep, tmp_path, n):
    make_sweep(np.eye(n)[:1]).plot(tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn(make_sweep, monkeypatch):
    with pytest.raises(HoEError, match="at least two objectives"):
        make_sweep([[1.0]]).plot()
    with pytest.raises(HoEError, match="has objectives"):
        swept(make_sweep, 2).plot(others=[swept(make_sweep, 3)])
    there = builtins.__import__

    def without_matplotlib(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return there(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(HoEError, match=r'pip install "peft-hoe\[eval\]"'):
        swept(make_sweep, 2).plot()


def test_a_page_without_a_scale(make_sweep, tmp_path):
    sweep, other = swept(make_sweep, 2, normalizer=None), swept(make_sweep, 2, name="B")
    text = sweep.report(tmp_path / "report.html", others=[other]).read_text()
    assert "Rewards are not normalised" in text
    assert "Against B" not in text
    assert "data:image/svg+xml" in text


class Page(HTMLParser):
    """Tags that are open, and what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.references = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_needs_nothing_else(make_sweep, tmp_path):
    sweep, other = swept(make_sweep, 2, prompts=12), swept(make_sweep, 2, name="<soup>", prompts=12)
    sweep.completions[0][0][0][0] = "<script>alert(1)</script>"
    judged = win_rates(sweep, other, lambda prompt, first, second: "A" if first < second else "B", progress=False)
    path = sweep.report(tmp_path / "deep" / "report.html", others=[other], judged=[judged])
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.seen
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert len(page.references) == 1
    assert page.references[0].startswith("data:image/svg+xml;base64,")
    svg = base64.b64decode(page.references[0].partition(",")[2]).decode()
    assert "<svg" in svg
    assert not re.search(r'(href|src)="(?!#|data:)', svg)
    for part in (
        "Against &lt;soup&gt;",
        "reference point -0.1",
        "hypervolume",
        "Judge: A against",
        "Payoff table (given)",
    ):
        assert part in text
    assert text.count("<details>") == 10 + 2  # prompts that are shown, and the set-up
    assert "2 more prompts are in generations.jsonl" in text
    value = float(sweep.metrics().values["hypervolume"].estimate)
    assert f"<td>{value:.4f}</td>" in text


def test_the_page_opens_with_all_methods(make_sweep, tmp_path):
    """By hand: with reference point -0.1, one point (1, 1) encloses 1.21 and (0.4, 0.9) encloses 0.5."""
    sweep, other = make_sweep([[1.0, 1.0]], name="HoE"), make_sweep([[0.4, 0.9]], name="soup")
    text = sweep.report(tmp_path / "report.html", others=[other]).read_text()
    table = text[text.index("<h2>Methods</h2>") : text.index("<h2>Metrics</h2>")]
    cells = [re.findall(r"<td>(.*?)</td>", line) for line in table.splitlines() if "<td>" in line]
    assert [row[:3] for row in cells] == [
        ["HoE", "1.210 [1.210, 1.210]", ""],
        ["soup", "0.500 [0.500, 0.500]", "0.710 [0.710, 0.710]"],
    ]
    assert "reference point -0.1 on HoE&#x27;s scale" in table


def test_a_seventh_sweep_looks_like_no_other(make_sweep):
    first, *others = (make_sweep([[0.1 * i, 0.3]], name=str(i)) for i in range(9))
    dots = [found for found in first.plot(others=others).axes[0].collections if found.get_label()[0] != "_"]
    looks = {(found.get_paths()[0].vertices.tobytes(), found.get_edgecolor().tobytes()) for found in dots}
    assert len(looks) == 9
