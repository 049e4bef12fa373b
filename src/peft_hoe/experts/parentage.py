"""Whether the policies are children of this base: what speaks against it is said in the report.

Lengths are estimated from some rows of every module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_json
from .architecture import LinearModule
from .build_inputs import BuildInputs
from .lora_policy import LoraPolicy
from .model_weights import ModelWeights
from .pieces import sampled

_LONG = 1.0  # a task vector longer than this part of the base's weights is hardly a fine-tune's
_COMMON = 0.9  # cosine of every pair above which the policies share a parent that is not the base
_ROUNDED = 0.1  # share of a squared task vector that rounding may be
# What in a configuration changes what the weights mean
_MEANING = re.compile(
    r"rope|norm|head|_act|activation|scal|window|tie_|_bias|layer_types|multiplier|partial_rotary|softcap"
)


def sampled_rows(base: ModelWeights, policy: ModelWeights, target: LinearModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of one module, as they are stored: the base's and the policy's."""
    for i in sampled(target.shape[0]):
        yield base.rows(target.weight, i, i + 1), policy.rows(target.weight, i, i + 1)


def parentage_notes(inputs: BuildInputs, pairs: list[dict[str, Any]]) -> list[str]:
    """What speaks against the base.

    Args:
        inputs: base and policies.
        pairs: agreement of the policies' task vectors.
    """
    notes = []
    for name, policy in inputs.policies.items():
        if isinstance(policy, LoraPolicy):
            notes += _declared_base(name, policy, inputs)
        elif inputs.base is not None:
            notes += _lengths(name, inputs.base, policy, inputs)
            notes += _configurations(name, inputs)
    cosines = [pair["cosine"] for pair in pairs]
    if cosines and min(cosines) > _COMMON and max(cosines) < 1 - 1e-6:
        notes.append(
            f"all policies changed the base in nearly the same direction (cosines of at least {min(cosines):.3f}): they "
            "probably have a common parent that is not this base; pass that as the base"
        )
    return notes


def _declared_base(name: str, policy: LoraPolicy, inputs: BuildInputs) -> list[str]:
    declared, base = policy.config.get("base_model_name_or_path"), inputs.base_given
    if not declared or _last(declared) == _last(base) or Path(declared).resolve() == Path(base).resolve():
        return []
    return [
        f"policy {name!r} says that it was trained on {declared!r}, but the base is {base!r}; is that the same model?"
    ]


def _last(path: str) -> str:
    return Path(path.partition("@")[0]).name.lower()


def _lengths(name: str, base: ModelWeights, policy: ModelWeights, inputs: BuildInputs) -> list[str]:
    before = change = rounding = 0.0
    for target in inputs.architecture.linear:
        for one, other in sampled_rows(base, policy, target):
            start = one.double()
            before += float(start.square().sum())
            change += float((other.double() - start).square().sum())
            rounding += _squared_rounding(other)
    notes = []
    if change > _LONG**2 * before:
        notes.append(
            f"policy {name!r} is farther from the base than the base is from zero (lengths {change**0.5:.3g} and "
            f"{before**0.5:.3g} in sampled rows): it is hardly a fine-tune of this base"
        )
    if change and rounding > _ROUNDED * change:
        kind = str(policy.dtype).removeprefix("torch.")
        notes.append(
            f"rounding to {kind} is about {min(rounding / change, 1):.0%} of what policy {name!r} changed (squared); a "
            "checkpoint in float32 has less noise"
        )
    return notes


def _squared_rounding(rows: Tensor) -> float:
    """The expected squared error of rounding to the dtype in which rows are stored: a twelfth of the squared spacing."""
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    magnitudes = rows.double().abs().clamp_min(torch.finfo(rows.dtype).tiny)
    spacing = torch.finfo(rows.dtype).eps * 2.0 ** torch.log2(magnitudes).floor()
    return float(spacing.square().sum()) / 12


def _configurations(name: str, inputs: BuildInputs) -> list[str]:
    """The settings in which a policy's config.json differs from the base's, where they change what weights mean."""
    before, after = (_settings(inputs.places[key]) for key in (None, name))
    if not before or not after:
        return []
    differing = [
        f"{key} is {after.get(key)!r} (the base's is {before.get(key)!r})"
        for key in sorted(before.keys() | after.keys())
        if _MEANING.search(key) and before.get(key) != after.get(key)
    ]
    if not differing:
        return []
    return [f"policy {name!r} has another configuration than the base: {'; '.join(differing[:5])}"]


def _settings(directory: Path) -> Mapping[str, Any]:
    path = directory / "config.json"
    return read_json(path) if path.is_file() else {}
