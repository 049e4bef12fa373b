"""Whether a sweep is one of this adapter, as it is now: what is read from a front must be the front of the model at hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...adapter_sample import differing
from ...config import HoEConfig
from ...errors import HoEError
from ...experts.checkpoints import PEFT_PREFIX
from ...experts.saved_adapter import SavedAdapter
from ...tuner.functional import adapter_of
from ..methods.fingerprints import model_fingerprint
from ..sweeps.result import SweepResult


def check_is_sweep(sweep: Any) -> None:
    """See that a sweep is one.

    Raises:
        HoEError: it is something else, such as its directory.
    """
    if not isinstance(sweep, SweepResult):
        raise HoEError(
            f"sweep is {sweep!r}; give what peft_hoe.sweep returned, or read its directory with peft_hoe.Sweep.load",
            argument="sweep",
            value=sweep,
        )


def routers_of(sweep: SweepResult) -> str:
    """What its routers did, of `ROUTERS`; "keep" where it does not say. Of several runs the first that says otherwise."""
    said = ((run.get("settings") or {}).get("routers", "keep") for run in sweep.runs)
    return next((routers for routers in said if routers != "keep"), "keep")


def check_own_sweep(model: Any, sweep: SweepResult) -> HoEConfig:
    """The adapter's configuration, if the sweep may be the adapter's.

    What a sweep does not say of itself, such as one of texts from elsewhere, is not compared.

    Args:
        model: a model with a HoE adapter, the adapter's files from `open_adapter`, or its `HoEConfig`, which knows no weights.
        sweep: of it.

    Raises:
        HoEError: the sweep is empty, has other objectives, or was made with other experts, trained routers or weights; or there
            is one objective only.
    """
    config = _configuration(model)
    check_is_sweep(sweep)
    names = list(config.objectives or ())
    if names != list(sweep.objectives):
        raise HoEError(
            f"the sweep is of another adapter: its objectives are {list(sweep.objectives)}, the adapter's {names}",
            argument="sweep",
            value=list(sweep.objectives),
            allowed=names,
        )
    if len(names) < 2:
        raise HoEError(f"the adapter has the one objective {names}; there is no dial", argument="model", value=names)
    made = [run["calibrates"] for run in sweep.runs if run.get("calibrates")]
    if made and config.calibrates() not in made:
        raise HoEError(
            "the sweep is of another adapter: its experts or trained routers are not these, or are averaged in another way; "
            "sweep this one",
            argument="sweep",
            value=made,
            allowed=config.calibrates(),
        )
    if not sweep.prompts or not len(sweep.preferences) or not np.isfinite(sweep.points).all():
        raise HoEError(f"the sweep of {sweep.name!r} is empty, or lacks rewards; sweep again", argument="sweep")
    if isinstance(model, SavedAdapter):
        _check_files(model, sweep)
    elif config is not model:
        _check_weights(model, sweep)
    return config


def _configuration(model: Any) -> HoEConfig:
    if isinstance(model, HoEConfig):
        return model
    return model.config if isinstance(model, SavedAdapter) else adapter_of(model).config


def _check_files(saved: SavedAdapter, sweep: SweepResult) -> None:
    known = [run["sample"] for run in sweep.runs if run.get("sample")]
    linear = [module for module in saved.low_rank if not saved.config.votes_statically(module)]
    names = [name.removeprefix(PEFT_PREFIX) for module in linear for name in saved.modules[module].values()]
    if known and all(differing(one, names, lambda name: saved.weights.tensor(PEFT_PREFIX + name)) for one in known):
        raise HoEError(
            f"the sweep is of another adapter: {saved.given} has other weights; sweep this one",
            argument="sweep",
            value=str(saved.given),
        )


def _check_weights(model: Any, sweep: SweepResult) -> None:
    known = [run["fingerprint"] for run in sweep.runs if run.get("calibrates") and run.get("fingerprint")]
    if known and model_fingerprint(model, adapter_of(model).name) not in known:
        raise HoEError(
            "the sweep is of another model: its base or its adapter has other weights; sweep this one", argument="sweep"
        )
