"""A user's script, which is type-checked and never run: every name is there, and a misspelt one is caught.

mypy reads it with the package. An "ignore" that nothing asked for is an error, so each one below says that mypy complains
there.
"""

from typing import Any

import peft_hoe
from peft_hoe import (
    HoEConfig,
    HoEDistillationConfig,
    HoEDPOTrainer,
    HoEGRPOTrainer,
    HoERouterConfig,
    HoERouterTrainer,
    ObjectiveWeights,
    RewardNormalizer,
    Sweep,
    build_adapter,
    metrics,
    payoff_table,
    sweep,
    train_routers,
)


def steer(model: Any, tokenizer: Any, prompts: list[str], rewards: dict[str, Any]) -> Sweep:
    """What a script does with a model."""
    config = HoEConfig(objectives=["helpful", "harmless"], r=8)
    config.expert_namess  # type: ignore[attr-defined]  # noqa: B018
    normalizer: RewardNormalizer = payoff_table(model, prompts, rewards, processing_class=tokenizer)
    found: Sweep = sweep(model, tokenizer, prompts, rewards, payoff=normalizer)
    found.metrcs()  # type: ignore[attr-defined]
    metrics.hypervolume(found.points, reference_point=0.0)
    peft_hoe.sweeep(model)  # type: ignore[attr-defined]
    weights = ObjectiveWeights([0.5, 0.5])
    weights.update("high")
    return found


def train(model: Any) -> list[Any]:
    """The trainers are known by name, whatever TRL is installed."""
    from peft_hoe import HoERouterTrainerr  # type: ignore[attr-defined]

    build_adapter(model, {"helpful": "policy"}, "adapter", overwritee=True)  # type: ignore[call-arg]
    trainers = [HoERouterTrainer, HoERouterTrainerr, HoEDPOTrainer, HoEGRPOTrainer]
    return [*trainers, HoERouterConfig, HoEDistillationConfig, train_routers]
