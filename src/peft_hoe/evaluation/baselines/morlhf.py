"""MORLHF: one policy for each preference, trained on Σ_i λ_i R_i alone (`evaluation.policy_training` trains them).

It answers at the preferences that it was trained for and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import HoEError
from ...generation.completer import Completer
from ...preference import FloatArray, written
from ..methods.fingerprints import Source
from .adapters import load_base
from .per_preference import PerPreference, sources_identity

_CLOSE = 1e-6


def morlhf(
    base: Source,
    policies: Mapping[tuple[float, ...], Source],
    *,
    tokenizer: Any,
    folder: Source | None = None,
    objectives: Sequence[str] | None = None,
    decoding: Any = None,
    model_options: Mapping[str, Any] | None = None,
) -> TrainedPolicies:
    """One policy for each preference.

    Args:
        base: whose stop tokens count, and which LoRA policies stand on.
        policies: `{λ: directory or Hub id}`, λ a tuple of N weights; full models or LoRA adapters.
        tokenizer: the policies'.
        folder: not used.
        objectives: the N names; default those of the rewards.
        decoding: what `Decoding.of` takes; default greedy, 64 new tokens.
        model_options: of `from_pretrained`.

    Raises:
        HoEError: there are no policies, or their preferences differ in length. The method raises one for a preference that has
            no policy; it names those that have one.
    """
    if not policies or len({len(point) for point in policies}) > 1:
        raise HoEError(
            f"policies are for {list(policies)}; give {{λ: directory}}, every λ a tuple of N weights",
            argument="policies", value=list(policies), allowed="{λ: directory}, every λ a tuple of N weights",
        )  # fmt: skip
    completer = Completer(load_base(base, model_options), tokenizer, decoding)
    return TrainedPolicies(base, policies, objectives, completer, model_options)


class TrainedPolicies(PerPreference):
    """The policy of the last preference is kept."""

    def __init__(
        self,
        base: Source,
        policies: Mapping[tuple[float, ...], Source],
        objectives: Sequence[str] | None,
        completer: Completer,
        model_options: Mapping[str, Any] | None,
    ) -> None:
        super().__init__("MORLHF", objectives, completer, sources_identity(base, policies))
        self.policies, self.model_options = dict(policies), model_options
        self._last: tuple[tuple[float, ...], Any] | None = None

    @contextlib.contextmanager
    def at(self, preference: FloatArray) -> Iterator[Any]:
        """The policy of a preference `(N,)`."""
        key = self._nearest(preference)
        if self._last is None or self._last[0] != key:
            self._last = None  # never two models at once
            self._last = key, load_base(self.policies[key], self.model_options)
        yield self._last[1]

    def _nearest(self, preference: FloatArray) -> tuple[float, ...]:
        for point in self.policies:
            if len(point) == len(preference) and np.abs(np.asarray(point) - preference).max() < _CLOSE:
                return point
        raise HoEError(
            f"there is no policy for the preference [{written(preference)}]; there are policies for "
            f"[{'], ['.join(map(written, self.policies))}]: sweep with preferences= these, or train "
            "one (policies.train_policy)",
            argument="preferences", value=preference.tolist(), allowed=list(self.policies),
        )  # fmt: skip
