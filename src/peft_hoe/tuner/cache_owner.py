"""A key-value cache belongs to the preference that filled it: keys and values of another one are those of another model.

The cache itself carries the mark, so that it goes where the cache goes, also through a copy. What cannot carry one (the tuples
of old models), and caches of rows, which may have come together since, are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import PreferenceError
from .plan import Plan

_MARK = "_hoe_preference"


def cache_name(names: Iterable[str]) -> str:
    """What a forward with arguments of these names calls its cache: `cache` since transformers 5.24, and before
    `past_key_values`.
    """
    return "past_key_values" if "past_key_values" in names else "cache"


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's keyword arguments; None without one. Old names are taken by new versions too."""
    return arguments.get(cache_name(arguments))


def returned_cache(output: Any) -> Any:
    """The cache in what a forward returned; None without one."""
    return output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)


def check_cache(name: str, cache: Any, plan: Plan) -> None:
    """See that a cache that a forward was given is empty, or was filled by the same plan.

    Args:
        name: of the argument that brought it.
        cache: any; those without a mark are not looked at.
        plan: of this forward.

    Raises:
        PreferenceError: it was filled at another preference.
    """
    if not hasattr(cache, "get_seq_length"):
        return
    key = _key(plan)
    known = getattr(cache, _MARK, None)
    if key is not None and known is not None and known != key and int(cache.get_seq_length()) > 0:
        raise PreferenceError(
            f"{name} was filled at another preference, or with other routers; begin with a new cache, or reset() this one, and "
            "read the text again",
            argument=name,
        )


def mark_cache(cache: Any, plan: Plan) -> None:
    """Mark the cache that a forward has filled."""
    if hasattr(cache, "get_seq_length"):
        setattr(cache, _MARK, _key(plan))


def _key(plan: Plan) -> Any:
    return plan.key if plan.rows is None else None
