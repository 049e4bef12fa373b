"""A sweep as one HTML page that needs nothing else: tables, pictures as embedded SVG, and texts to read; no scripts.

Shapes: K preferences, N objectives.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ...metrics import Interval
from ...preference import written
from ..judging.win_rates import WinRates
from ..sweeps.result import SweepResult
from .comparison import SweepComparison, compare
from .measures import measure, shown
from .plots import plot
from .tables import header, overview, rounded, rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: pre-wrap; min-width: 24rem; }
th { border-bottom: 2px solid #bbb; }
p { max-width: 62rem; }
p.note { color: #666; font-size: .9rem; }
img { display: block; max-width: 100%; height: auto; margin-bottom: 1rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; }
"""
_SHOWN_PROMPTS = 10


def write_report(
    sweep: SweepResult,
    path: Path,
    *,
    others: Sequence[SweepResult] = (),
    judged: Sequence[WinRates] = (),
    level: float = 0.95,
    compared: Sequence[SweepComparison] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page.

    Args:
        sweep: what it is about.
        path: the file; its directory is made.
        others: sweeps of the same prompts, such as baselines, to compare with.
        judged: what `win_rates` returned.
        level: of the intervals.
        compared: with each of the others, where it has been computed already.
        settings: of the experiment that the sweeps belong to, plain JSON to show.

    Returns:
        `path`.

    Raises:
        HoEError: a sweep cannot be measured, compared or drawn.
    """
    if compared is None:
        compared = [compare(sweep, other, level=level) for other in others] if sweep.has_scale else []
    parts = [
        f"<h1>Preference sweep: {escape(sweep.name)}</h1>",
        f"<p>{len(sweep.preferences)} preferences for {escape(', '.join(sweep.objectives))}, {len(sweep.prompts)} prompts.</p>",
        *_overview(sweep, compared),
        *_metrics(sweep, level),
        "<h2>Front</h2>",
        picture(plot([sweep, *others], level=level), f"front of {sweep.name}"),
        *_points(sweep, level),
        *(part for found in compared for part in _comparison(found)),
        *(part for rates in judged for part in _judged(rates)),
        *_texts(sweep),
        *_setup(sweep),
        *_settings(settings),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Preference sweep: {escape(sweep.name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def picture(figure: Any, description: str) -> str:
    """A matplotlib Figure as an embedded SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}">'


def html_table(head: Iterable[str], body: Iterable[Iterable[str]], *, text_columns: Sequence[int] = ()) -> str:
    """A table of plain texts."""

    def cells(row: Iterable[str], tag: str) -> str:
        marks = (' class="text"' if i in text_columns else "" for i in range(10_000))
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(row, marks, strict=False))

    lines = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in body)
    return f'<div class="wide"><table>\n<tr>{cells(head, "th")}</tr>\n{lines}\n</table></div>'


def _metrics(sweep: SweepResult, level: float) -> list[str]:
    if not sweep.has_scale:
        return ['<p class="note">Rewards are not normalised, so there are no hypervolumes.</p>']
    found = measure(sweep, level=level)
    return ["<h2>Metrics</h2>", _intervals(found.values), f'<p class="note">{escape(found.note())}</p>']


def _intervals(values: dict[str, Interval]) -> str:
    body = []
    for name, interval in values.items():
        estimate, _, rest = shown(interval).strip().partition("  ")
        body.append([name, estimate, rest])
    return html_table(["metric", "value", "interval"], body)


def _points(sweep: SweepResult, level: float) -> list[str]:
    body = rows(sweep, sweep.intervals(level=level))
    note = "* no other point dominates it. Brackets: interval of the mean reward. (0-1): on the payoff table's scale."
    moved = [[cells[1] + " *" * bool(cells[0]), *cells[2:]] for cells in body]
    return [html_table(header(sweep)[1:], moved), f'<p class="note">{note}</p>']


def _overview(sweep: SweepResult, compared: Sequence[SweepComparison]) -> list[str]:
    if not compared:
        return []
    head, *body = overview(sweep.name, compared)
    note = f"{compared[0].note(sweep.name)}; prompts are drawn once for both of a row."
    return ["<h2>Methods</h2>", html_table(head, body), f'<p class="note">{escape(note)}</p>']


def _comparison(found: SweepComparison) -> list[str]:
    a, b = found.names
    return [
        f"<h2>Against {escape(b)}</h2>",
        f"<p>A = {escape(a)}, B = {escape(b)}: {escape(found.verdict())}.</p>",
        _intervals(found.values),
        f'<p class="note">{escape(found.note())}</p>',
    ]


def _judged(rates: WinRates) -> list[str]:
    head, *body = rates.cells()
    title = f"<h2>Judge: {escape(rates.names[0])} against {escape(rates.names[1])}</h2>"
    return [title, html_table(head, body), f'<p class="note">{escape(rates.note())}</p>']


def _texts(sweep: SweepResult) -> list[str]:
    parts = ["<h2>Texts</h2>"]
    for p, prompt in enumerate(sweep.prompts[:_SHOWN_PROMPTS]):
        body = [
            [
                written(point),
                str(sweep.completions[0][k][p][0] if sweep.completions[0][k][p][0] is not None else ""),
                *("" if np.isnan(value) else f"{value:.3f}" for value in sweep.rewards[0, k, p, 0]),
            ]
            for k, point in enumerate(sweep.preferences)
        ]
        table = html_table(["preference", "completion", *sweep.objectives], body, text_columns=[1])
        parts.append(f"<details><summary>{escape(_shortened(prompt))}</summary>{table}</details>")
    left = len(sweep.prompts) - _SHOWN_PROMPTS
    return [*parts, f'<p class="note">{left} more prompts are in generations.jsonl.</p>'] if left > 0 else parts


def _setup(sweep: SweepResult) -> list[str]:
    parts = ["<h2>Set-up</h2>"]
    if sweep.normalizer is not None:
        names = sweep.objectives
        body = [
            [name, *(f"{value:.4f}" for value in row)] for name, row in zip(names, sweep.normalizer.payoff, strict=True)
        ]
        parts.append(
            f"<p>Payoff table ({escape(sweep.payoff_source)}): mean rewards of each single-objective expert.</p>"
        )
        parts.append(html_table(["steered to", *names], body))
        decoding = json.dumps(
            rounded({"decoding": sweep.normalizer.decoding, **sweep.normalizer.measurement}), indent=1
        )
        parts.append(f"<details><summary>its decoding</summary><pre>{escape(decoding)}</pre></details>")
    runs = json.dumps(rounded(sweep.runs), indent=1)
    parts.append(f"<details><summary>decoding, seeds and versions</summary><pre>{escape(runs)}</pre></details>")
    return parts


def _settings(settings: Mapping[str, Any] | None) -> list[str]:
    if settings is None:
        return []
    text = json.dumps(rounded(dict(settings)), indent=1)
    return [f"<details><summary>settings of the experiment</summary><pre>{escape(text)}</pre></details>"]


def _shortened(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""
    return text if len(text) <= 160 else text[:157] + "..."
