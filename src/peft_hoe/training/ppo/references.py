"""KL references: the models that a policy is held to.

Shapes: B rows, P prompt positions, T response positions, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ...errors import HoEError, HoEWarning
from ...generation.logits import response_logits, sequence_inputs
from ...generation.vocabulary import check_tokens
from ...tuner.functional import use_preference
from .actor_critic import ActorCritic

# Logits `(B, T, V)` of the KL reference, from ids, mask and T.
Reference = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def used_ref_model(ref_model: Any, kl_coef: float, kl_reference: str) -> Any:
    """A trainer's `ref_model`, or None where there is no KL term that it could be the reference of.

    Scripts of TRL always give one, and may not know that `kl_coef` is 0 here where they do not say it: a warning tells them.

    Raises:
        HoEError: `kl_reference` names another reference.
    """
    if ref_model is None:
        return None
    if kl_reference != "base":
        raise HoEError(
            f"ref_model is given, and kl_reference is {kl_reference!r}, which names another reference; leave one of them out",
            argument="kl_reference",
            value=kl_reference,
        )
    if kl_coef > 0:
        return ref_model
    warnings.warn(
        "ref_model is given, but kl_coef is 0 (the default of HoERouterConfig; PPOConfig's is 0.05): there is no KL term, and "
        "ref_model is not used. Set kl_coef to hold the policy to it, or leave it out",
        HoEWarning,
        stacklevel=3,
    )
    return None


def make_reference(actor_critic: ActorCritic, ref_model: Any, kind: str) -> Reference:
    """The KL reference: a model, or what of the policy `HoERouterConfig.kl_reference` names.

    Returns:
        `reference(ids, mask, length)`: of texts `(B, P + T)` and their mask, the logits `(B, T, V)` of the positions that
        predict the last T = `length` tokens.
    """
    if ref_model is not None:
        return model_reference(ref_model)
    return {"base": base_reference, "static": static_reference}[kind](actor_critic)


def base_reference(actor_critic: ActorCritic) -> Reference:
    """Logits of the base model, the adapter switched off."""

    def logits(ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        policy: Any = actor_critic.policy
        with policy.disable_adapter():
            return response_logits(policy, sequence_inputs(ids, mask), length)[0]

    return logits


def static_reference(actor_critic: ActorCritic) -> Reference:
    """Logits of the coarse interpolation: the router votes as if it were untrained."""

    def logits(ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        with use_preference(actor_critic.policy, routers="static"):
            return response_logits(actor_critic.policy, sequence_inputs(ids, mask), length)[0]

    return logits


def model_reference(model: Any) -> Reference:
    """Logits of another model."""

    def logits(ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        inputs = sequence_inputs(ids, mask)
        check_tokens(inputs["input_ids"], model, what="ref_model")
        return response_logits(model, inputs, length)[0]

    return logits
