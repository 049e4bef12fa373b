"""How an adapter's experts and routers lie in one module's tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertLayout:
    """How one adapter's experts and routers lie in the layer's tensors.

    Attributes:
        ranks: of each expert, 0 where it has nothing here.
        slots: number of voting slots of each router.
        by_module: whether each votes once for the module, by its bias alone.
        temperature: T of the routers' softmax.
        train_experts: whether A and B train.
    """

    ranks: tuple[int, ...]
    slots: tuple[int, ...]
    by_module: tuple[bool, ...]
    temperature: float
    train_experts: bool

    @property
    def unread_rows(self) -> list[int]:
        """The rows of the router linear's weight that are 0, because their router votes by its bias alone."""
        pairs = zip(self.slots, self.by_module, strict=True)
        whose = [by_module for count, by_module in pairs for _ in range(count)]
        return [row for row, by_module in enumerate(whose) if by_module]
