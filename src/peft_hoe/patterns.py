"""Regular expressions from a configuration, which may be a stranger's: matched with a limit of time.

Some patterns take years on a short name, because a match backtracks: `(a+)+b` on `aaaa...`. The standard library cannot stop
that; `regex`, which transformers needs too, can, and reads the same patterns.
"""

from __future__ import annotations

import regex  # type: ignore[import-untyped]

from .errors import ExpertError

_SECONDS = 1.0
_LONGEST = 10_000  # characters


def matches(pattern: str, name: str, argument: str) -> bool:
    """Whether a pattern matches a whole module name.

    Args:
        pattern: a regular expression.
        name: of a module.
        argument: what the pattern was given as, for errors.

    Raises:
        ExpertError: the pattern is none, or takes too long.
    """
    if len(pattern) > _LONGEST:
        raise ExpertError(
            f"{argument} is a pattern of {len(pattern)} characters; at most {_LONGEST} are matched",
            argument=argument,
            value=pattern,
        )
    try:
        return regex.fullmatch(pattern, name, timeout=_SECONDS) is not None
    except TimeoutError:
        reason = (
            f"takes more than {_SECONDS:g} s on {name!r}: it backtracks. Write module names, or repeat nothing twice"
        )
    except regex.error as error:
        reason = f"is no regular expression: {error}"
    raise ExpertError(f"{argument}: the pattern {pattern[:200]!r} {reason}", argument=argument, value=pattern) from None
