"""What a `Front` answers: a preference with what it is expected to give, or how far the front reaches.

Shapes: N objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import HoEError


class UnreachableError(HoEError):
    """No preference of the front gives what is asked.

    Attributes, besides HoEError's:

        reached: the rewards nearest to it, `{objective: reward}`.
        preference: the λ that gives them, `{objective: weight}`.

    >>> from peft_hoe.evaluation import UnreachableError
    >>> UnreachableError("too much", reached={"kind": 0.5}, preference={"kind": 1.0}).reached
    {'kind': 0.5}
    """

    def __init__(self, message: str, *, reached: dict[str, float], preference: dict[str, float], **data: Any) -> None:
        super().__init__(message, **data)
        self.reached, self.preference = reached, preference


@dataclass(frozen=True)
class Solution:
    """A preference, and what it is expected to give.

    Attributes:
        preference: λ, `{objective: weight}`.
        rewards: predicted mean rewards, `{objective: reward}`.
        intervals: of these, `{objective: (low, high)}`.
        level: of the intervals.
        confidence: in which share of the bootstrap replicates λ gives all that was asked.

    >>> from peft_hoe import Sweep
    >>> from peft_hoe.evaluation import Front
    >>> rows = [([1, 0], 0, "red"), ([0, 1], 0, "glad")]
    >>> count = {"vivid": lambda p, c: ["red" in text for text in c], "happy": lambda p, c: ["glad" in text for text in c]}
    >>> front = Front(Sweep.from_generations(rows, count, prompts=["Once"]))
    >>> found = front.solve(maximize="vivid", at_least={"happy": 0.25})
    >>> {name: round(weight, 6) for name, weight in found.preference.items()}
    {'vivid': 0.75, 'happy': 0.25}
    >>> {name: round(reward, 6) for name, reward in found.rewards.items()}
    {'vivid': 0.75, 'happy': 0.25}
    """

    preference: dict[str, float]
    rewards: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    level: float
    confidence: float
