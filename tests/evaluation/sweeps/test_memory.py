"""A sweep's memory does not grow with the number of its preferences."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_hoe import Decoding, RewardNormalizer, das_dennis, sweep
from peft_hoe.evaluation import HoEMethod
from peft_hoe.preference import FloatArray

pytestmark = pytest.mark.slow


class Memory(TorchDispatchMode):
    """Counts the bytes of storages that operations have returned and that are still there, the model's weights among them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.live -= size


class Collected(HoEMethod):
    """Leaves no reference cycles to the collector, which comes when it likes."""

    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        found = super().__call__(prompts, preferences)
        gc.collect()
        return found


def peak(method: HoEMethod, preferences: int, toys: ModuleType) -> int:
    """Bytes at most of a sweep in batches of six texts of the same length."""
    with Memory() as memory:
        sweep(
            prompts=["w1 w2 w3", "w4 w5 w6"], rewards={"low": toys.low, "high": toys.high}, generate=method, batch_size=6,
            preferences=das_dennis(2, preferences - 1), payoff=RewardNormalizer(np.eye(2), ["low", "high"]), progress=False,
        )  # fmt: skip
    return memory.peak


@pytest.mark.parametrize("mixed", [True, False])
def test_it_is_flat_in_preferences(
    tokenizer: Any, toys: ModuleType, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is kept of the last batches, up to bounds; here they are reached at once."""
    for bound in ("adapter._CACHED_PLANS", "selection._CACHED", "step._MOST_STEPS"):
        monkeypatch.setattr(f"peft_hoe.tuner.{bound}", 1)
    policy = toys.make_policy().eval()
    policy.mark_trained()
    method = Collected(policy, tokenizer, decoding=Decoding(4, stop_tokens=()))
    method.mixes_rows = mixed
    peak(method, 3, toys)  # what is prepared once is there afterwards
    few, many = peak(method, 3, toys), peak(method, 24, toys)
    assert few > 10_000
    assert many <= few + 1000
