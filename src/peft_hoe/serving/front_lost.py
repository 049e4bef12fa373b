"""What an export costs along the whole front: the hypervolume of the adapter's sweep less that of its LoRAs.

The LoRA of every preference of the sweep writes the sweep's prompts again, decoded and rewarded as there. Where the LoRA is the
adapter exactly, the sweep's own rewards stand. Shapes: K preferences, P prompts, T texts, N objectives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import HoEError
from ..evaluation.front.own_sweep import check_own_sweep
from ..evaluation.sweeps.batches import BatchedMethod
from ..evaluation.sweeps.scoring import score, text_rewards
from ..evaluation.sweeps.sweep import Sweep
from ..generation.completer import Completer
from ..generation.settings import evaluating
from ..preference import FloatArray
from ..rewards.sources import Rewards
from ..tuner.layer import HoELayer
from .frozen_model import frozen
from .lora_factors import LoraFactors

# The factors and norms of a preference's LoRA, and whether it is the adapter exactly.
Exported = tuple[Mapping[str, LoraFactors], Mapping[str, Tensor], bool]
LEVEL = 0.95
_SAME_REWARD = 1e-3  # of the rewards' spread: what batching may change in a reward model's number


@dataclass(frozen=True)
class HypervolumeLost:
    """Hypervolumes on the sweep's scale, and their difference.

    Attributes:
        adapter: of the sweep.
        exported: of the LoRAs at the same preferences.
        lost: the first less the second.
        low: lower end of the 95 % interval of `lost`, over prompts.
        high: upper end.
        preferences: K.
        swept: at how many of them the LoRA is not the adapter exactly.
        prompts: P.
    """

    adapter: float
    exported: float
    lost: float
    low: float
    high: float
    preferences: int
    swept: int
    prompts: int


class FrontLost:
    """A sweep of the adapter, and what measures its LoRAs in the same way.

    Args:
        model: carries the adapter.
        tokenizer: the model's.
        sweep: a `Sweep` of the adapter with its routers, or its directory.
        rewards: a Rewards, or what makes one; the sweep's.
        batch_size: completions at once.

    Raises:
        HoEError: the sweep is of another adapter, of several runs, without its routers, or without a scale; or metrics are not
            installed.
        RewardError: a reward is missing, fails, or is not the sweep's.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, sweep: Any, rewards: Any, *, batch_size: int = 128) -> None:
        try:
            from ..evaluation.reporting import comparison  # noqa: F401  # before the work, not after
        except ImportError as error:
            raise HoEError(str(error), argument="sweep") from None
        if tokenizer is None:
            raise HoEError(
                "a sweep was given without a tokenizer; pass the base model's as tokenizer=", argument="tokenizer"
            )
        self.sweep = Sweep.load(sweep) if isinstance(sweep, (str, os.PathLike)) else sweep
        if not isinstance(self.sweep, Sweep):
            raise HoEError(f"sweep is a {type(sweep).__name__}; give a Sweep, or its directory", argument="sweep")
        check_own_sweep(model, self.sweep)
        _check_repeatable(self.sweep)
        self.rewards = _own_rewards(self.sweep, rewards)
        self.model, self.batch_size = model, batch_size
        self.completer = Completer(model, tokenizer, self.sweep.runs[0]["decoding"])

    def measure(self, export: Callable[[Sequence[float]], Exported]) -> HypervolumeLost:
        """Sweep the LoRAs.

        Args:
            export: what a preference's LoRA holds.
        """
        from ..evaluation.reporting.comparison import compare

        sweep = self.sweep
        rewards, completions, swept = sweep.rewards.copy(), [list(texts) for texts in sweep.completions[0]], 0
        for k, preference in enumerate(sweep.preferences):
            factors, norms, exact = export(preference.tolist())
            if exact:
                continue
            swept += 1
            found = self._complete(preference, factors, norms)
            rewards[0, k], completions[k] = score(self.rewards, sweep.prompts, [found])[0], found
        exported = replace(sweep, name="exported", rewards=rewards, completions=[completions])
        values = compare(sweep, exported, level=LEVEL).values
        difference = values["hypervolume A - B"]
        return HypervolumeLost(
            adapter=float(values["hypervolume A"].estimate),
            exported=float(values["hypervolume B"].estimate),
            lost=float(difference.estimate),
            low=float(difference.low),
            high=float(difference.high),
            preferences=len(sweep.preferences),
            swept=swept,
            prompts=len(sweep.prompts),
        )

    def _complete(self, preference: FloatArray, factors: Mapping[str, LoraFactors], norms: Mapping[str, Tensor]) -> Any:
        """Texts `(P, T)` of a preference's LoRA."""
        layers = [module for module in self.model.modules() if isinstance(module, HoELayer)]
        written = {module: (each.a, each.b) for module, each in factors.items()}
        method = _Frozen(self.model, self.completer)
        run = BatchedMethod(
            method, "exported", self.sweep.rewards.shape[3], int(self.sweep.runs[0]["seed"]), self.batch_size,
            progress=False, overwrite=False,
        )  # fmt: skip
        with evaluating(self.model), torch.no_grad(), frozen(layers, written, norms):
            return run.complete(self.sweep.prompts, preference[None], self.sweep.objectives, None)[0]


@dataclass(frozen=True)
class _Frozen:
    """The model as it stands, as a method of a sweep."""

    model: Any
    completer: Completer

    @property
    def decoding(self) -> dict[str, Any]:
        """The sweep's, as a sweep records it."""
        return self.completer.decoding.record

    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        return self.completer.complete(self.model, prompts)


def _check_repeatable(sweep: Sweep) -> None:
    """See that a sweep says how it was made, with the adapter as it is, once."""
    if len(sweep.runs) != 1:
        raise HoEError(
            f"the sweep of {sweep.name!r} is of {len(sweep.runs)} runs of training; give the sweep of this adapter alone",
            argument="sweep",
        )
    run = sweep.runs[0]
    if not run.get("calibrates") or not run.get("decoding") or "seed" not in run:
        raise HoEError(
            f"the sweep of {sweep.name!r} does not say how its texts were written, so they cannot be written again; sweep this "
            "adapter with peft-hoe sweep",
            argument="sweep",
        )
    routers = run.get("settings", {}).get("routers", "keep")
    if routers != "keep":
        raise HoEError(
            f"the sweep of {sweep.name!r} was made with routers={routers!r}, and what freezing them loses is asked; sweep with "
            "the routers as they are",
            argument="sweep",
            value=routers,
            allowed=["keep"],
        )
    if not sweep.has_scale:
        raise HoEError(
            f"the sweep of {sweep.name!r} has no scale for hypervolumes; sweep with the preferences of every objective alone, "
            "or with payoff prompts",
            argument="sweep",
        )


def _own_rewards(sweep: Sweep, rewards: Any) -> Rewards:
    """Rewards that score the texts of the sweep's first preference as the sweep did."""
    scorer = text_rewards(rewards, sweep.objectives)
    found, stored = score(scorer, sweep.prompts, sweep.completions[0][:1])[0], sweep.rewards[0, 0]
    spread = np.nanmax(sweep.rewards, axis=(0, 1, 2, 3)) - np.nanmin(sweep.rewards, axis=(0, 1, 2, 3))
    off = np.nanmax(np.abs(found - stored), axis=(0, 1)) > _SAME_REWARD * np.maximum(spread, 1e-9)
    if off.any():
        wrong = [name for name, differs in zip(sweep.objectives, off, strict=True) if differs]
        raise HoEError(
            f"the rewards of {wrong} do not score the sweep's texts as the sweep did; give those that it was made with",
            argument="rewards",
            value=wrong,
        )
    return scorer
