"""Rescaling: what pruning, truncation and averaging took from a task vector's length is given back.

Averaging two nearly orthogonal task vectors of equal norm loses 30 % of their length, so merged experts gain most. The
paper tuned one number on test scores; here the factor follows from norms, per module.
"""

from __future__ import annotations

from typing import Any

from ..errors import ExpertError
from ..tuner.kernels.gate import MAX_FACTOR

MODES = ("norm", "policy_norm")


def check_rescale(rescale: Any) -> str | float | None:
    """A mode, a number or None, from what a user wrote.

    Raises:
        ExpertError: anything else.
    """
    if rescale is None or rescale in MODES:
        return rescale  # type: ignore[no-any-return]
    if rescale == "none":
        return None
    try:
        number = float(rescale)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(rescale, bool) or not 0 < number < float("inf"):
        allowed = f"{list(MODES)}, a number above 0, or None for none"
        raise ExpertError(
            f"rescale is {rescale!r}; allowed are {allowed}", argument="rescale", value=rescale, allowed=allowed
        )
    return number


def rescale_factor(rescale: str | float | None, kept: float, norm: float, policy_norm: float) -> float:
    """The factor for one expert in one module.

    Args:
        rescale: "norm" is `norm / kept` and "policy_norm" is `policy_norm / kept`, both at most 3. A number is used as
            it is; None is 1.
        kept: |BA|.
        norm: |tau| of the expert's task vector before pruning and truncation; of the merged one for a merge.
        policy_norm: sum_i lambda_i |tau_i| over the policies.
    """
    if rescale is None:
        return 1.0
    if not isinstance(rescale, str):
        return float(rescale)
    if kept == 0:
        return 1.0  # nothing to scale
    if rescale == "norm":
        return min(norm / kept, MAX_FACTOR)
    return min(policy_norm / kept, MAX_FACTOR)
