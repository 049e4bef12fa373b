"""What a build reads: the base's architecture, its weights where they are needed, and the policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ..errors import ExpertError
from .architecture import Architecture, read_architecture
from .checkpoints import PathOrHubId, fetch
from .lora_policy import LoraPolicy, is_adapter
from .model_weights import ModelWeights
from .options import Loading


@dataclass(frozen=True)
class BuildInputs:
    """Everything opened, nothing read but names and shapes.

    Attributes:
        architecture: of the base.
        base: its weights; None when all policies are LoRA adapters, which need none but those of task heads.
        objectives: names of the policies of one objective each.
        policies: those by objective, then the policies of single experts by the expert's name.
        given: `{name of a policy: the directory or Hub id that was given}`.
        base_given: the same of the base.
        places: `{name of a policy: its directory}`; that of the base under None.
        dtype: what an adapter is written in unless told otherwise: the base's, or a LoRA policy's where that is wider
            (its factors are taken exactly).
    """

    architecture: Architecture
    base: ModelWeights | None
    objectives: list[str]
    policies: dict[str, ModelWeights | LoraPolicy]
    given: dict[str, str]
    base_given: str
    places: dict[str | None, Path]
    dtype: torch.dtype

    @property
    def directories(self) -> list[Path]:
        """Every directory that is read."""
        return list(self.places.values())


def open_inputs(
    base: PathOrHubId,
    policies: Mapping[str, PathOrHubId],
    *,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
    loading: Loading,
    own: Mapping[str, PathOrHubId] | None = None,
    capture: Sequence[str] = (),
) -> BuildInputs:
    """Open base and policies and check that they fit.

    Args:
        base: directory or Hub id.
        policies: by objective.
        target_modules: as in `read_architecture`.
        exclude_modules: likewise.
        loading: how all is read.
        own: policies of single experts, by the expert's name.
        capture: as in `read_architecture`.

    Raises:
        ExpertError: there is no policy.
        CheckpointError: something cannot be fetched or read, or does not fit the base.
    """
    if not policies:
        raise ExpertError("policies is empty; give at least one, as {objective: directory or Hub id}")
    objectives, policies = list(policies), {**policies, **(own or {})}
    hub: dict[str, Any] = {"allow_pickle": loading.allow_pickle, "token": loading.token}
    settings = fetch(base, weights=False, revision=loading.revision, **hub)
    architecture = read_architecture(
        settings, target_modules=target_modules, exclude_modules=exclude_modules, task_type=loading.task_type,
        capture=capture,
    )  # fmt: skip
    lora = {name: is_adapter(fetch(source, weights=False, **hub)) for name, source in policies.items()}
    base_weights = None
    if not all(lora.values()) or architecture.heads:
        directory = fetch(base, weights=True, revision=loading.revision, **hub)
        base_weights = ModelWeights(directory, "the base", architecture, allow_pickle=loading.allow_pickle)
    opened: dict[str, ModelWeights | LoraPolicy] = {}
    places: dict[str | None, Path] = {None: settings}
    for name, source in policies.items():
        directory = fetch(source, weights=True, **hub)
        kind = LoraPolicy if lora[name] else ModelWeights
        opened[name] = kind(directory, f"policy {name!r}", architecture, allow_pickle=loading.allow_pickle)
        places[name] = directory
    return BuildInputs(
        architecture=architecture,
        base=base_weights,
        objectives=objectives,
        policies=opened,
        given={name: str(source) for name, source in policies.items()},
        base_given=str(base),
        places=places,
        dtype=_written_dtype(base_weights, opened, architecture),
    )


def _written_dtype(
    base: ModelWeights | None, policies: Mapping[str, ModelWeights | LoraPolicy], architecture: Architecture
) -> torch.dtype:
    """The base's dtype, or a LoRA policy's where that is wider; never more than float32."""
    start = base.dtype if base is not None else architecture.dtype or torch.float32
    factors = [policy.dtype for policy in policies.values() if isinstance(policy, LoraPolicy)]
    dtype = reduce(torch.promote_types, factors, start)
    return min(dtype, torch.float32, key=lambda kind: kind.itemsize)
