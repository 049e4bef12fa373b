"""What several commands do with their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import HoEError


def read_pairs(items: Sequence[str] | None, option: str, form: str) -> dict[str, str]:
    """Options of the form NAME=VALUE, each name once.

    Raises:
        HoEError: an item of another form, or a name twice.
    """
    pairs: dict[str, str] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise HoEError(f"{option} is {item!r}; write {form}")
        if name in pairs:
            raise HoEError(f"{option} names {name!r} twice; give each name once")
        pairs[name] = value
    return pairs


def read_number(text: str, kind: type[int] | type[float]) -> Any:
    """A number where the text is one; else the text, such as "auto", which whoever gets it checks."""
    try:
        return kind(text)
    except ValueError:
        return text
