"""The running mean of a router's weights: the iterate that the convergence theory is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class RunningMean:
    """Mean of the state dicts added so far, in float32 or wider."""

    def __init__(self) -> None:
        self.count = 0
        self.values: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take one more into the mean."""
        self.count += 1
        for name, value in values.items():
            if name not in self.values:
                self.values[name] = torch.zeros_like(value)
            self.values[name] += (value - self.values[name]) / self.count

    def state_dict(self) -> dict[str, Any]:
        """Count and mean."""
        return {"count": self.count, "values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any], device: Any) -> None:
        """Continue from `state_dict`."""
        self.count = state["count"]
        self.values = {name: value.to(device) for name, value in state["values"].items()}
