"""Which numbers a configuration may hold: others would fail deep in a run, or train something that nobody meant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import HoEError
from ...generation.checks import whole


def check_whole(settings: Any, least: Mapping[str, int]) -> None:
    """See that fields are whole numbers.

    Args:
        settings: a configuration; a field that is None or not there says nothing.
        least: by field, the smallest number that it may be.

    Raises:
        HoEError: one is not.
    """
    for name, smallest in least.items():
        value = getattr(settings, name, None)
        if value is not None:
            whole(name, value, smallest)


def check_range(settings: Any, limits: Mapping[str, tuple[float, float]]) -> None:
    """See that fields are finite numbers within their limits.

    Args:
        settings: as in `check_whole`.
        limits: by field, the smallest and the largest number that it may be.

    Raises:
        HoEError: one is not.
    """
    for name, (smallest, largest) in limits.items():
        value = getattr(settings, name, None)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not smallest <= value <= largest:
            allowed = f"at least {smallest:g}" if largest == math.inf else f"from {smallest:g} to {largest:g}"
            raise HoEError(f"{name} is {value!r}; it must be {allowed}", argument=name, value=value, allowed=allowed)
