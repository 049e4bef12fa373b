"""The baselines of an experiment, from the same base, policies, decoding and rank as HoE."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from ..errors import HoEError
from ..evaluation.baselines import BASELINES
from ..inputs import load_tokenizer
from .inputs import Prompts
from .plan import Plan
from .training import ppo_settings

FOLDER = "baselines"  # of the adapters that baselines build


def make_baseline(
    name: str, plan: Plan, prompts: Prompts, rewards: Any, device: str, *, progress: bool, seed: int | None = None
) -> Any:
    """A method for `sweep`; `seed` is that of its training, one of several, or None for the plan's own.

    Raises:
        HoEError: it cannot be made.
    """
    make = BASELINES[name].make
    taken = inspect.signature(make).parameters
    options: dict[str, Any] = {"model_options": {"device_map": device}}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):  # of build_adapter
        options |= {"r": plan.rank, "seed": plan.seed}
    if "train_dataset" in taken:
        if not prompts.train:
            raise HoEError(
                f"the baseline {name!r} is trained, and there are no training prompts; leave it out of baselines",
                argument="baselines", value=name,
            )  # fmt: skip
        trained = replace(plan, report_to=(), seed=plan.seed if seed is None else seed)  # reports are of the routers
        training = ppo_settings(trained, progress)
        training["learning_rate"] = plan.learning_rate
        options |= {"rewards": rewards, "train_dataset": prompts.train, "training": training}
    folder = plan.folder / FOLDER
    return make(
        plan.base, plan.policies, tokenizer=load_tokenizer(plan.base), decoding=plan.decoding,
        folder=folder if seed is None else folder / f"seed{seed}", **options,
    )  # fmt: skip
