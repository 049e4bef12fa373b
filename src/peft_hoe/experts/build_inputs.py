"""What a build reads: the base's architecture, its weights where they are needed, and the policies."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ..errors import ExpertError
from .architecture import Architecture, read_architecture
from .checkpoints import PathOrHubId, fetch, read_index
from .hub_shards import HubShards
from .lora_policy import LoraPolicy, is_adapter
from .model_weights import ModelWeights
from .option_groups import Loading
from .weight_files import SAFETENSORS, SAFETENSORS_FILE, SAFETENSORS_INDEX


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
        shards: the models whose files are fetched one at a time.
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
    shards: list[HubShards]
    dtype: torch.dtype

    @property
    def directories(self) -> list[Path]:
        """Every directory that is read."""
        return list(self.places.values())

    def put_shards_in(self, folder: Path) -> None:
        """Say where files are put that are fetched one at a time."""
        for number, shards in enumerate(self.shards):
            shards.put_in(folder / str(number))

    def runs(self, indices: Iterable[int]) -> list[list[int]]:
        """Targets in their order, split where one lies in another fetched file than the target before it."""
        key = functools.partial(self._files, self._weights())
        return [list(run) for _, run in itertools.groupby(indices, key)]

    def bring(self, index: int) -> None:
        """Have the files of one target on this disk."""
        for weights in self._weights():
            weights.bring(self.architecture.targets[index].weight)

    def _weights(self) -> list[ModelWeights]:
        return [weights for weights in (self.base, *self.policies.values()) if isinstance(weights, ModelWeights)]

    def _files(self, models: Sequence[ModelWeights], index: int) -> list[str | None]:
        return [weights.shard(self.architecture.targets[index].weight) for weights in models]


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
        raise ExpertError(
            "policies is empty; give at least one, as {objective: directory or Hub id}",
            argument="policies", value=policies, allowed="at least one",
        )  # fmt: skip
    objectives, policies = list(policies), {**policies, **(own or {})}
    hub: dict[str, Any] = {"allow_pickle": loading.allow_pickle, "token": loading.token}
    settings = fetch(base, weights=False, revision=loading.revision, **hub)
    architecture = read_architecture(
        settings, target_modules=target_modules, exclude_modules=exclude_modules, task_type=loading.task_type,
        capture=capture,
    )  # fmt: skip
    lora = {name: is_adapter(fetch(source, weights=False, **hub)) for name, source in policies.items()}
    shards: list[HubShards] = []
    base_weights = None
    if not all(lora.values()) or architecture.heads:
        base_weights, _ = _open_weights(base, "the base", architecture, loading, shards, loading.revision)
    opened: dict[str, ModelWeights | LoraPolicy] = {}
    places: dict[str | None, Path] = {None: settings}
    for name, source in policies.items():
        label = f"policy {name!r}"
        if lora[name]:
            places[name] = fetch(source, weights=True, **hub)
            opened[name] = LoraPolicy(places[name], label, architecture, allow_pickle=loading.allow_pickle)
        else:
            opened[name], places[name] = _open_weights(source, label, architecture, loading, shards)
    return BuildInputs(
        architecture=architecture,
        base=base_weights,
        objectives=objectives,
        policies=opened,
        given={name: str(source) for name, source in policies.items()},
        base_given=str(base),
        places=places,
        shards=shards,
        dtype=_written_dtype(base_weights, opened, architecture),
    )


def _open_weights(
    source: PathOrHubId,
    label: str,
    architecture: Architecture,
    loading: Loading,
    shards: list[HubShards],
    revision: str | None = None,
) -> tuple[ModelWeights, Path]:
    """Weights and the directory of their configuration; adds to `shards` where their files are fetched one at a time."""
    hub: dict[str, Any] = {"allow_pickle": loading.allow_pickle, "token": loading.token, "revision": revision}
    place = fetch(source, weights=False, **hub)
    if not shards_to_fetch(source, place, loading):
        place = fetch(source, weights=True, **hub)
        return ModelWeights(place, label, architecture, allow_pickle=loading.allow_pickle), place
    name = str(source).partition("@")[0]
    found = HubShards(name, place.name, label, loading.token)
    weights = ModelWeights(place, label, architecture, open_shard=found.open)
    shards.append(found)
    return weights, place


def shards_to_fetch(source: PathOrHubId, place: Path, loading: Loading) -> list[Path]:
    """The files of a model's weights that a build fetches one at a time; empty where it does not.

    It does where the weights are several safetensors files on the Hub, unless its cache has them all or is to keep them.

    Args:
        source: directory or Hub id.
        place: the directory of its configuration.
        loading: how it is read.

    Raises:
        CheckpointError: an index that may not be followed.
    """
    index = place / SAFETENSORS_INDEX
    if loading.keep_shards or Path(source).is_dir() or not index.is_file() or (place / SAFETENSORS_FILE).is_file():
        return []
    files = sorted(set(read_index(index, repr(str(source)), loading.allow_pickle).values()))
    ours = len(files) > 1 and all(file.suffix == SAFETENSORS for file in files)
    return files if ours and not all(map(Path.is_file, files)) else []


def _written_dtype(
    base: ModelWeights | None, policies: Mapping[str, ModelWeights | LoraPolicy], architecture: Architecture
) -> torch.dtype:
    """The base's dtype, or a LoRA policy's where that is wider; never more than float32."""
    start = base.dtype if base is not None else architecture.dtype or torch.float32
    factors = [policy.dtype for policy in policies.values() if isinstance(policy, LoraPolicy)]
    dtype = reduce(torch.promote_types, factors, start)
    return min(dtype, torch.float32, key=lambda kind: kind.itemsize)
