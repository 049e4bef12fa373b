"""What a build reads: the base's architecture, its weights where they are needed, and the policies."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ..errors import ExpertError
from .architecture import Architecture, read_architecture
from .checkpoints import fetch
from .lora_policy import LoraPolicy, is_adapter
from .task_vectors import Weights

Source = str | os.PathLike[str]


@dataclass
class Sources:
    """Everything opened, nothing read but names and shapes.

    Attributes:
        architecture: of the base.
        base: its weights; None when all policies are LoRA adapters, which need none.
        policies: by objective.
        dtype: what an adapter is written in unless told otherwise: the base's, or a LoRA policy's where that is wider
            (its factors are taken exactly).
        directories: every directory that is read.
    """

    architecture: Architecture
    base: Weights | None
    policies: dict[str, Weights | LoraPolicy]
    dtype: torch.dtype
    directories: list[Path]


def open_sources(
    base: Source,
    policies: Mapping[str, Source],
    *,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
    task_type: str | None,
    allow_pickle: bool,
    revision: str | None,
    token: str | bool | None,
) -> Sources:
    """Open base and policies and check that they fit.

    Raises:
        ExpertError: there is no policy.
        CheckpointError: something cannot be fetched or read, or does not fit the base.
    """
    if not policies:
        raise ExpertError("policies is empty; give at least one, as {objective: directory or Hub id}")
    common: dict[str, Any] = {"allow_pickle": allow_pickle, "token": token}
    settings = fetch(base, weights=False, revision=revision, **common)
    architecture = read_architecture(
        settings, target_modules=target_modules, exclude_modules=exclude_modules, task_type=task_type
    )
    lora = {name: is_adapter(fetch(source, weights=False, **common)) for name, source in policies.items()}
    base_weights = None
    if not all(lora.values()):
        directory = fetch(base, weights=True, revision=revision, **common)
        base_weights = Weights(directory, "the base", architecture, allow_pickle=allow_pickle)
    opened: dict[str, Weights | LoraPolicy] = {}
    directories = [settings]
    for name, source in policies.items():
        directory = fetch(source, weights=True, **common)
        kind = LoraPolicy if lora[name] else Weights
        opened[name] = kind(directory, f"policy {name!r}", architecture, allow_pickle=allow_pickle)
        directories.append(directory)
    start = base_weights.dtype if base_weights is not None else architecture.dtype or torch.float32
    factors = [policy.dtype for policy in opened.values() if isinstance(policy, LoraPolicy)]
    dtype = reduce(torch.promote_types, factors, start)
    return Sources(
        architecture, base_weights, opened, min(dtype, torch.float32, key=lambda kind: kind.itemsize), directories
    )
