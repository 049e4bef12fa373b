"""A trace as HTML: tokens on stripes of their experts' colours."""

from __future__ import annotations

import html
from collections.abc import Sequence

# Okabe and Ito's palette, which colour-blind readers can tell apart, lightened so that black text can be read on it.
COLOURS = ("#8fc1e3", "#f0a878", "#82d1b6", "#e0b3cf", "#f2cf7e", "#b3def5", "#bdbdbd", "#c79ab0")
_STYLE = (
    "body{font:16px/2.1 system-ui,sans-serif;color:#000;background:#fff;max-width:60em;margin:1.5em auto;padding:0 1em}"
    ".trace span{padding:.25em 0;border-radius:.2em;white-space:pre-wrap}.legend{font-size:.85em;line-height:1.6}"
    ".legend i{display:inline-block;width:1em;height:1em;margin:0 .35em 0 1em;vertical-align:-.15em}"
)


def page(texts: Sequence[str], votes: Sequence[Sequence[float]], experts: Sequence[str], title: str) -> str:
    """A whole page.

    Args:
        texts: T pieces.
        votes: `(T, L)`.
        experts: L names.
        title: what the votes are of.
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Experts of each token</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{fragment(texts, votes, experts, title)}</body></html>\n"
    )


def fragment(texts: Sequence[str], votes: Sequence[Sequence[float]], experts: Sequence[str], title: str) -> str:
    """Tokens and legend, to be put into a page; arguments as for `page`."""
    tokens = "".join(_token(text, vote, experts) for text, vote in zip(texts, votes, strict=True))
    legend = "".join(f'<i style="background:{colour(j)}"></i>{html.escape(name)}' for j, name in enumerate(experts))
    return f'<p class="legend">{html.escape(title)}:{legend}</p><p class="trace">{tokens}</p>'


def colour(expert: int) -> str:
    """Of the expert of that number."""
    return COLOURS[expert % len(COLOURS)]


def _token(text: str, votes: Sequence[float], experts: Sequence[str]) -> str:
    """One token, on stripes one above the other, each as high as its vote; the numbers show when a pointer rests on it."""
    stops, start = [], 0.0
    for j, vote in enumerate(votes):
        if vote > 0:
            stops.append(f"{colour(j)} {start:.1%} {start + vote:.1%}")
            start += vote
    told = ", ".join(f"{name} {vote:.0%}" for name, vote in zip(experts, votes, strict=True) if vote >= 0.005)
    background = f"linear-gradient(to top,{','.join(stops)})" if stops else "none"
    return f'<span style="background:{background}" title="{html.escape(told, quote=True)}">{html.escape(text)}</span>'
