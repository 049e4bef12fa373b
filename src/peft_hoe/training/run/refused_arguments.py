"""Arguments of trainers that cannot mean anything to the training of a router: refused by name, never ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from ...errors import HoEError

# Fields of TrainingArguments that no trainer of routers takes, and why.
REFUSED_BY_ALL = {
    "auto_find_batch_size": "a run that begins anew with a smaller batch would keep what the router and the weights of "
    "objectives have learnt; set per_device_train_batch_size and gradient_accumulation_steps",
    "label_smoothing_factor": "the loss has no labels that could be smoothed",
    "optim_target_modules": "the optimizer holds the router's own Parameters, and no other module",
    "parallelism_config": "it shards the router, which is read and written whole; launch plain processes",
    "save_only_model": "a checkpoint is an adapter and the state that resuming needs, which is small",
    "use_liger_kernel": "its kernels replace modules of the model for good, and its losses go past the model's own forward",
}
# Where evaluation has a loss and metrics of its own; transformers reads these where there are predictions and labels.
NO_PREDICTIONS = dict.fromkeys(
    (
        "batch_eval_metrics",
        "eval_accumulation_steps",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "include_for_metrics",
        "label_names",
        "prediction_loss_only",
    ),
    "evaluation has a loss and metrics of its own, and no predictions or labels",
)


def refuse_changed(args: Any, reasons: Mapping[str, str]) -> None:
    """Refuse fields of a configuration that have another value than by default; fields that it does not have are left out.

    Args:
        args: a dataclass, before its other checks.
        reasons: by field, the rest of "... is not supported: ".

    Raises:
        HoEError: one has another value.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, reason in reasons.items():
        value = getattr(args, name, None)
        if name in defaults and _kept(value) != _kept(defaults[name]):
            raise HoEError(f"{name}={value!r} is not supported: {reason}. Leave it out", argument=name, value=value)


def _kept(value: Any) -> Any:
    """A value, or None where it says nothing; TrainingArguments writes some of these in place of others."""
    return None if value in (None, False, "", "no", [], dataclasses.MISSING, AcceleratorConfig()) else value


def refuse_arguments(given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Refuse arguments of a trainer of TRL that ours does not take; None is no argument.

    Raises:
        HoEError: one is given; says why it cannot work.
        TypeError: there is no such argument.
    """
    for name, value in given.items():
        if name not in reasons:
            raise TypeError(f"there is no argument {name!r}")
        if value is not None:
            raise HoEError(f"{name} is not supported: {reasons[name]}", argument=name, value=value)


def check_given(**required: Any) -> None:
    """See that a trainer has what it cannot do without.

    Raises:
        HoEError: one is None.
    """
    for name, value in required.items():
        if value is None:
            raise HoEError(f"{name} is None, but it is required", argument=name)
