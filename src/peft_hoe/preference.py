"""Preferences: points of the simplex that say how much each objective matters.

Shapes: N objectives, B rows. A preference is `(N,)`; one preference per row is `(B, N)`. The last axis is objectives.
Knows numpy only; tensors are recognised by their `tolist` method.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import PreferenceError

FloatArray = NDArray[np.float64]

# People write [.33, .33, .33] and [.35, .28, .35]; both are in the paper (E.5 and Figure 10).
SUM_TOLERANCE = 0.025
_ROUNDING = 1e-12
_SHOWN = 500  # characters of a value in an error


def parse_preference(value: Any, objectives: Sequence[str], *, rows: bool = False) -> FloatArray:
    """Turn what a user wrote into a point of the simplex, or several.

    Args:
        value: a sequence of N numbers, a tensor or array, or `{objective: weight}` (objectives left out weigh 0).
            With `rows=True` also a sequence of such values or an array `(B, N)`.
        objectives: the N names, in the order of the result.
        rows: whether one preference per row is allowed.

    Returns:
        float64 `(N,)`, or `(B, N)` where `value` held rows; each sums to 1 exactly up to rounding.

    Raises:
        PreferenceError: wrong length, unknown objective, a negative, infinite or missing number, or a sum further than
            2.5 % from 1.

    >>> from peft_hoe import parse_preference
    >>> parse_preference({"helpful": 0.7, "harmless": 0.3}, ["harmless", "helpful"]).tolist()
    [0.3, 0.7]
    """
    if isinstance(value, Mapping):
        return _normalise(_from_mapping(value, objectives), value, objectives)
    listed = _listed(value, objectives)
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Sequence):
        raise _refused(
            value,
            f"is a {type(value).__name__}; expected {len(objectives)} numbers for {list(objectives)} or a mapping such as "
            f"{example(objectives)}",
            objectives,
        )
    if not any(_is_row(item) for item in listed):
        return _normalise(listed, value, objectives)
    if not rows:
        raise _refused(
            value,
            "holds several rows where one preference is expected; pass one preference per row with the call: "
            "model.generate(..., preference=[...])",
            objectives,
        )
    return np.stack([_parse_row(item, value, objectives) for item in listed])


def _listed(value: Any, objectives: Sequence[str]) -> Any:
    """The numbers of a tensor or an array as lists; anything else as it is."""
    if not hasattr(value, "tolist"):
        return value
    try:
        return value.detach().tolist() if hasattr(value, "detach") else value.tolist()
    except (RuntimeError, TypeError, ValueError) as error:  # on the meta device, sparse, nested
        reason = str(error).split("\n")[0]
        raise _refused(
            value, f"has numbers that cannot be read ({reason}); pass a dense tensor or a list", objectives
        ) from error


def _parse_row(item: Any, value: Any, objectives: Sequence[str]) -> FloatArray:
    if not isinstance(item, Mapping) and _is_row(item) and any(_is_row(inner) for inner in _listed(item, objectives)):
        raise _refused(value, "is nested too deeply; give one preference, or a list of them, one per row", objectives)
    return parse_preference(item, objectives)


def _is_row(item: Any) -> bool:
    if isinstance(item, (int, float)):  # nearly all are
        return False
    return (isinstance(item, (Sequence, Mapping)) and not isinstance(item, str)) or getattr(item, "ndim", 0) > 0


def _refused(value: Any, reason: str, objectives: Sequence[str]) -> PreferenceError:
    shown = repr(dict(value) if isinstance(value, Mapping) else value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return PreferenceError(f"preference {shown} {reason}", argument="preference", value=value, allowed=list(objectives))


def example(objectives: Sequence[str]) -> dict[str, float]:
    """A preference to show to a user: the uniform one, short enough to read."""
    return {name: round(1 / len(objectives), 4) for name in objectives}


def _from_mapping(value: Mapping[str, Any], objectives: Sequence[str]) -> list[Any]:
    unknown = [name for name in value if name not in objectives]
    if unknown:
        raise _refused(value, f"names {unknown}; the objectives are {list(objectives)}", objectives)
    return [value.get(name, 0.0) for name in objectives]


def _normalise(numbers: Sequence[Any], value: Any, objectives: Sequence[str]) -> FloatArray:
    try:
        point = np.asarray([float(number) for number in numbers], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise _refused(value, f"holds something that is not a number: {error}", objectives) from None
    if point.shape != (len(objectives),):
        raise _refused(
            value,
            f"has {len(point)} numbers, but there are {len(objectives)} objectives: {list(objectives)}",
            objectives,
        )
    if not np.isfinite(point).all():
        raise _refused(value, "holds NaN or infinity; all weights must be finite", objectives)
    if (point < 0).any():
        raise _refused(value, "holds a negative weight; all weights must be at least 0", objectives)
    total = float(point.sum())
    if abs(total - 1) > SUM_TOLERANCE + _ROUNDING:
        raise _refused(
            value,
            f"sums to {total:.6g}; it must sum to 1 (within {SUM_TOLERANCE:.1%}). Divide it by its sum if you meant "
            "proportions",
            objectives,
        )
    return point if abs(total - 1) <= _ROUNDING else point / total  # a parsed preference parses to itself


def read_preference(text: str) -> list[float] | dict[str, float]:
    """Read a preference from a command line: `0.7,0.3`, `helpful=0.7,harmless=0.3` or JSON.

    Raises:
        PreferenceError: neither of these forms, or an objective twice.
    """
    try:
        if text.lstrip().startswith(("[", "{")):
            parsed: list[float] | dict[str, float] = json.loads(text, object_pairs_hook=_each_once)
            return parsed
        if "=" in text:
            return _read_named(text)
        if not text.strip():
            raise ValueError
        return [float(part) for part in text.split(",") if part.strip()]
    except PreferenceError:
        raise
    except ValueError:
        raise PreferenceError(
            f"cannot read the preference {text!r}; write it as 0.7,0.3 or as helpful=0.7,harmless=0.3",
            argument="preference",
            value=text,
        ) from None


def _read_named(text: str) -> dict[str, float]:
    """`name=number,name=number`: a name goes up to the last `=` before a number, so that it may hold commas and blanks."""
    pairs: list[tuple[str, float]] = []
    pending: list[str] = []  # pieces of a name with commas
    for part in text.split(","):
        before, equals, after = part.rpartition("=")
        if equals and _is_number(after):
            pairs.append((",".join([*pending, before]).strip(), float(after)))
            pending = []
        elif part.strip() or pending:
            pending.append(part)
    if pending:
        raise ValueError(f"{','.join(pending)!r} has no weight")
    return _each_once(pairs)


def _each_once(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PreferenceError(
            f"the preference names {twice} twice; give each objective one weight", argument="preference", value=twice
        )
    return dict(pairs)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def written(preference: Sequence[float] | FloatArray) -> str:
    """A preference as a person writes it, to three digits: `0.3, 0.7`."""
    return ", ".join(f"{float(weight):.3g}" for weight in preference)


def uniform(n: int) -> FloatArray:
    """The centroid of the simplex of `n` objectives, `(n,)`."""
    return np.full(n, 1.0 / n)


def one_hot(index: int, n: int) -> FloatArray:
    """The corner of the simplex where objective `index` of `n` is all that matters, `(n,)`."""
    point = np.zeros(n)
    point[index] = 1.0
    return point


# Appendix E.5 of the paper, its thirds written exactly.
_PAPER_GRID_3 = (
    (0.0, 0.0, 1.0),
    (0.0, 1.0, 0.0),
    (0.1, 0.1, 0.8),
    (0.1, 0.8, 0.1),
    (0.2, 0.2, 0.6),
    (0.2, 0.4, 0.4),
    (0.2, 0.6, 0.2),
    (1 / 3, 1 / 3, 1 / 3),
    (0.4, 0.4, 0.2),
    (0.4, 0.2, 0.4),
    (0.6, 0.2, 0.2),
    (0.8, 0.1, 0.1),
    (1.0, 0.0, 0.0),
)


def das_dennis(n: int, partitions: int) -> FloatArray:
    """All points of the simplex whose coordinates are multiples of `1 / partitions` (Das and Dennis 1998).

    Returns:
        `(K, n)` with `K = C(partitions + n - 1, n - 1)`, in descending lexicographic order.

    >>> from peft_hoe import das_dennis
    >>> das_dennis(2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]
    """

    def compositions(left: int, parts: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (left,)
            return
        for first in range(left, -1, -1):
            for rest in compositions(left - first, parts - 1):
                yield (first, *rest)

    if n < 1 or partitions < 1:
        raise PreferenceError(
            f"a grid needs at least 1 objective and 1 partition, got {n} and {partitions}",
            argument="n" if n < 1 else "partitions",
            value=n if n < 1 else partitions,
            allowed="at least 1",
        )
    return np.asarray(list(compositions(partitions, n)), dtype=np.float64) / partitions


def preference_grid(n: int) -> FloatArray:
    """The preferences that fronts are measured at.

    2 objectives: the 11 points 0, 0.1 ... 1 of the first weight; 3: the 13 points of the paper's appendix E.5; otherwise
    Das-Dennis with the most partitions that give at most 100 points.

    Returns:
        `(K, n)`; for two objectives the second objective's corner comes first.

    >>> from peft_hoe import preference_grid
    >>> preference_grid(2)[:3].tolist()
    [[0.0, 1.0], [0.1, 0.9], [0.2, 0.8]]
    """
    if n == 2:
        return np.asarray([[i / 10, (10 - i) / 10] for i in range(11)])
    if n == 3:
        return np.asarray(_PAPER_GRID_3)
    chosen = das_dennis(n, 1)
    for partitions in itertools.count(2):
        denser = das_dennis(n, partitions)
        if n == 1 or len(denser) > 100:
            return chosen
        chosen = denser
    raise AssertionError("unreachable")  # itertools.count does not end
