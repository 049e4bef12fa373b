"""Budget: how much may be spent on experts and routers."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

from ..errors import HoEError


@dataclass(frozen=True)
class Budget:
    """What `place` may spend; one of the two at least.

    Args:
        parameters: of all that it adds and keeps together.
        seconds: after which it begins nothing more. What has begun is finished.

    Raises:
        HoEError: neither is given, or one is not above 0.

    >>> from peft_hoe.placing import Budget
    >>> Budget(parameters=100_000)
    Budget(parameters=100000, seconds=None)
    """

    parameters: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given: dict[str, Any] = {"parameters": self.parameters, "seconds": self.seconds}
        if all(value is None for value in given.values()):
            raise HoEError("the budget is empty; give parameters=, seconds= or both", argument="budget")
        for name, value in given.items():
            right = isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
            if value is not None and not right:
                raise HoEError(
                    f"the budget of {name} is {value!r}; it must be a number above 0, and finite",
                    argument=name,
                    value=value,
                    allowed="above 0",
                )
        if self.parameters is not None and int(self.parameters) != self.parameters:
            raise HoEError(
                f"the budget of parameters is {self.parameters}; give a whole number",
                argument="parameters",
                value=self.parameters,
            )

    def used(self, parameters: int, seconds: float) -> str | None:
        """What of it is used up, in words; None while there is some of both."""
        if self.parameters is not None and parameters >= self.parameters:
            return f"the budget of {self.parameters:,} parameters is used"
        if self.seconds is not None and seconds >= self.seconds:
            return f"the budget of {self.seconds:,.0f} seconds is used"
        return None
