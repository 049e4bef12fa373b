"""An expert for an adapter that is there: built alone, with the settings that the adapter was built with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..specs import ExpertSpec
from .builder import build_adapter
from .checkpoints import PathOrHubId
from .devices import CPU
from .option_groups import Merging, Pruning, Ranks, TaskSVD
from .saved_adapter import SavedAdapter, expert_weights, open_adapter

ADDED = "added"  # the expert's name while it is alone
_CAPTURED = {"embeddings": "target_embeddings", "norms": "target_norms"}


class WeightsOnDisk(Mapping[str, Sequence[Tensor]]):
    """One expert's weights by module, each read when it is asked for; an expert of a large model is never in memory whole.

    Args:
        saved: the adapter that has the expert, which must stay where it is.
        index: of the expert.
    """

    def __init__(self, saved: SavedAdapter, index: int) -> None:
        self._saved, self._index = saved, index
        low_rank = set(saved.low_rank)
        self.ranks = {module: saved.config.ranks(module)[index] for module in saved.modules if module in low_rank}
        self._modules = [module for module in saved.modules if self.ranks.get(module, 1)]

    def __getitem__(self, module: str) -> Sequence[Tensor]:
        if module not in self._modules:
            raise KeyError(module)
        return expert_weights(self._saved, module, self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@dataclass(frozen=True)
class NewExpert:
    """A new expert's weights, and its part of a build report."""

    weights: WeightsOnDisk
    name: str
    report: dict[str, Any]

    def ranks(self, modules: Sequence[str]) -> dict[str, int]:
        """Its rank in each of the modules."""
        return {module: self.weights.ranks.get(module, 0) for module in modules}


def expert_key(saved: SavedAdapter, spec: ExpertSpec, base: PathOrHubId | None) -> str:
    """Says which expert is added to which adapter, by the sizes and times of its files."""
    files = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in saved.directory.iterdir()
        if path.is_file()
    )
    return repr([str(saved.directory.resolve()), files, asdict(spec), None if base is None else str(base)])


def build_expert(
    saved: SavedAdapter,
    spec: ExpertSpec,
    base: PathOrHubId | None,
    folder: Path,
    device: torch.device | str = CPU,
) -> NewExpert:
    """Build an expert alone, as the adapter's others were built.

    Args:
        saved: the adapter.
        spec: the expert, with its policy if it has one.
        base: directory or Hub id; default the one that the adapter names.
        folder: where it is built, and its weights stay; one that was killed goes on there.
        device: where it is computed.

    Raises:
        CheckpointError: something cannot be read or found.
        ExpertError: the device is none for a build.
    """
    base = base or saved.config.base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"adapter {os.fspath(saved.given)!r} does not name its base model; give base= (--base)",
            argument="base", path=saved.directory,
        )  # fmt: skip
    policies: dict[str, PathOrHubId] = {"policy": spec.policy}
    experts = [ExpertSpec([1.0], r=spec.r)]
    if spec.policy is None:
        policies, experts = _reported_policies(saved), [replace(spec, name=ADDED)]
    linear = [module for module in saved.low_rank if not saved.config.votes_statically(module)]
    capture = [name for name, field in _CAPTURED.items() if getattr(saved.config, field)]
    output = folder / "expert"
    build_adapter(
        base, policies, output, experts=experts, target_modules=linear, capture=capture, interpolation="linear",
        dtype=saved.dtype, device=device, overwrite=True, progress=False, **_settings(saved.report),
    )  # fmt: skip
    alone = open_adapter(output)
    name = ADDED if spec.policy is None else "policy"
    return NewExpert(WeightsOnDisk(alone, alone.config.expert_names.index(name)), name, alone.report)


def _reported_policies(saved: SavedAdapter) -> dict[str, PathOrHubId]:
    reported, objectives = saved.report.get("policies", {}), saved.config.objectives or []
    missing = [name for name in objectives if name not in reported]
    if missing:
        raise CheckpointError(
            f"adapter {os.fspath(saved.given)!r} has no build report that names the policies of {missing}, so nothing can be "
            "merged; give the expert a policy of its own: ExpertSpec(preference, policy=...), or --expert PREFERENCE=PATH",
            argument="policy", path=saved.directory,
        )  # fmt: skip
    return {name: reported[name]["source"] for name in objectives}


def _settings(report: dict[str, Any]) -> dict[str, Any]:
    """The settings of an earlier build that make an expert what it is; the defaults where there is no report."""
    options = report.get("options")
    if options is None:
        return {}
    merging = replace(Merging.of(options["merging"]), experts={})  # those of other experts
    return {
        "r": Ranks(**options["r"]), "pruning": Pruning(**options["pruning"]), "merging": merging,
        "svd": TaskSVD(**options["svd"]), "rescale": options["rescale"], "seed": options["seed"],
    }  # fmt: skip
