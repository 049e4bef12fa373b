"""What an export reads: one HoE adapter, from its files or from a model in memory.

Shapes: L experts of ranks that sum to r in a module; A `(r, d_in)`, B `(d_out, r)`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..config import HoEConfig
from ..errors import CheckpointError
from ..experts.checkpoints import Checkpoint, fetch
from ..files import ADAPTER_CONFIG, hoe_settings
from ..tuner.functional import adapter_of
from ..tuner.layer import HoELayer
from ..tuner.lengths import ExpertLengths
from .base_parts import BaseParts, parts_of_files, parts_of_model

PREFIX = "base_model.model."  # of every key in a PEFT adapter's file
_OURS = re.compile(r"(?P<module>.+)\.(?P<part>hoe_[^.]+\.[^.]+)")


@dataclass(frozen=True)
class AdapterSource:
    """A HoE adapter whose tensors are read when they are asked for.

    Attributes:
        label: how errors call it.
        name: of a model's adapter; "" for files.
        directory: where its files are; None for a model in memory.
        config: resolved.
        modules: names of the modules whose experts are of low rank: linear ones, embeddings and heads.
        stored_transposed: whether the base keeps these modules' weights as (d_in, d_out); None where files do not tell.
    """

    label: str
    name: str
    directory: Path | None
    config: HoEConfig
    modules: list[str]
    stored_transposed: bool | None
    _keys: dict[str, Callable[[], Tensor]] = field(repr=False)
    _base: Callable[[], BaseParts] = field(repr=False)

    @property
    def apart(self) -> list[str]:
        """What the configuration calls the embeddings, heads and norms with experts, where no router votes."""
        return [*(self.config.target_embeddings or ()), *(self.config.target_norms or ())]

    @cached_property
    def base(self) -> BaseParts:
        """What those experts need of the base; nothing is read where there are none.

        Raises:
            CheckpointError: the base cannot be read.
        """
        return self._base() if self.apart else BaseParts()

    @property
    def objectives(self) -> list[str]:
        """The N names."""
        return list(self.config.objectives or [])

    def ranks(self, module: str) -> list[int]:
        """Rank of each expert in a module, `(L,)`; 0 where it has nothing there."""
        return self.config.ranks(module)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A and B of a module, experts one after the other.

        Raises:
            CheckpointError: the shapes are not the configuration's, or a value is not finite.
        """
        a, b = self._tensor(f"{module}.hoe_A.weight"), self._tensor(f"{module}.hoe_B.weight")
        total = sum(self.ranks(module))
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != total or b.shape[1] != total:
            raise CheckpointError(
                f"{self.label}: {module} has A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)}, but the "
                f"configuration asks for a rank of {total}; the weights and {ADAPTER_CONFIG} do not belong together",
                path=self.directory, tensor=f"{module}.hoe_A.weight", value=(tuple(a.shape), tuple(b.shape)),
                allowed=f"a rank of {total}",
            )  # fmt: skip
        return a, b

    def norm_deltas(self, module: str, parameter: str) -> Tensor:
        """The experts' deltas `(L, d)` of a norm's weight or bias.

        Raises:
            CheckpointError: they are missing, or do not belong to the configuration.
        """
        deltas, n_experts = self._tensor(f"{module}.hoe_norm.{parameter}"), len(self.config.expert_names)
        if deltas.ndim != 2 or len(deltas) != n_experts:
            raise CheckpointError(
                f"{self.label}: {module} has deltas of shape {tuple(deltas.shape)}, but the configuration has {n_experts} "
                f"experts; the weights and {ADAPTER_CONFIG} do not belong together",
                path=self.directory, tensor=f"{module}.hoe_norm.{parameter}", value=tuple(deltas.shape),
                allowed=f"{n_experts} experts",
            )  # fmt: skip
        return deltas

    def router_bias(self, module: str) -> Tensor:
        """Biases of all routers of a module, one after the other."""
        return self._tensor(f"{module}.hoe_router.bias")

    def length_factor(self, module: str, votes: Tensor) -> Tensor:
        """The factor c `(1,)` of votes `(L,)` in a module; 1 unless the adapter keeps lengths (`interpolation="norm"`)."""
        gram = self.gram(module)
        if gram is None:
            return votes.new_ones(1)
        lengths = ExpertLengths(len(votes))
        lengths.gram = nn.Parameter(gram.to(votes.dtype), requires_grad=False)
        factor: Tensor = lengths(votes)
        return factor

    def gram(self, module: str) -> Tensor | None:
        """Inner products `(L, L)` of a module's experts; None unless the adapter keeps lengths (`interpolation="norm"`)."""
        return self._tensor(f"{module}.hoe_length.gram") if self.config.interpolation == "norm" else None

    def router(self, module: str) -> tuple[Tensor, Tensor]:
        """Weight `(slots, d_in)` and bias `(slots,)` of a module's routers, one router's slots after another's."""
        return self._tensor(f"{module}.hoe_router.weight"), self.router_bias(module)

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor of every module that the adapter saves whole (`modules_to_save`)."""
        return ((key, self._tensor(key)) for key in self._keys if _OURS.fullmatch(key) is None)

    def _tensor(self, key: str) -> Tensor:
        if key not in self._keys:
            raise CheckpointError(
                f"{self.label}: the tensor {key!r} is missing; save or download the adapter again",
                path=self.directory, tensor=key,
            )  # fmt: skip
        tensor = self._keys[key]().detach()
        if tensor.device.type == "meta" or hasattr(tensor, "ds_id"):
            raise CheckpointError(
                f"{self.label}: the tensor {key!r} is not in memory (offloaded or sharded); save the adapter, and export it "
                "from its directory",
                path=self.directory, tensor=key,
            )  # fmt: skip
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self.label}: the tensor {key!r} holds NaN or infinity", path=self.directory, tensor=key
            )
        return tensor.cpu()


def adapter_from_files(source: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> AdapterSource:
    """An adapter's directory, or its Hub id (`id` or `id@revision`).

    Args:
        source: the adapter.
        base: where the base is, for experts of embeddings and norms; default what the adapter names. It is read for these only.

    Raises:
        CheckpointError: there is no HoE adapter.
    """
    directory, label = fetch(source, weights=True), f"adapter {os.fspath(source)!r}"
    hoe_settings(directory, label)
    config = HoEConfig.from_pretrained(directory)
    weights = Checkpoint(directory, label)
    keys = {name.removeprefix(PREFIX): _reader(weights, name) for name in weights.names}
    matches = [match for key in keys if (match := _OURS.fullmatch(key))]
    modules = list(dict.fromkeys(match["module"] for match in matches if not match["part"].startswith("hoe_norm.")))
    where = base or config.base_model_name_or_path

    def parts() -> BaseParts:
        if not where:
            raise CheckpointError(
                f"{label} has experts of {[*(config.target_embeddings or ()), *(config.target_norms or ())]}, for which its "
                "base is looked at, but names no base model; give it as base= (--base)",
                path=directory / ADAPTER_CONFIG, argument="base", value=base,
            )  # fmt: skip
        return parts_of_files(where, config)

    return AdapterSource(label, "", directory, config, modules, None, keys, parts)


def base_of(source: str | os.PathLike[str]) -> str:
    """The base model that an adapter names.

    Raises:
        CheckpointError: it names none.
    """
    directory, label = fetch(source, weights=False), f"adapter {os.fspath(source)!r}"
    base = hoe_settings(directory, label).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"{label} does not name its base model; give --base",
            path=directory / ADAPTER_CONFIG, argument="base_model_name_or_path", value=base,
        )  # fmt: skip
    return str(base)


def _reader(weights: Checkpoint, name: str) -> Callable[[], Tensor]:
    return lambda: weights.tensor(name)


def adapter_from_model(model: nn.Module, adapter_name: str | None = None) -> AdapterSource:
    """An adapter of a model that carries HoE layers, however it came by them.

    Args:
        model: the model.
        adapter_name: default the first active adapter.

    Raises:
        PreferenceError: the model has no such adapter.
    """
    served = adapter_of(model, adapter_name)
    adapter, config = served.name, served.config
    keys: dict[str, Callable[[], Tensor]] = {}
    modules, transposed, root = [], [], ""
    for path, layer in model.named_modules():
        if isinstance(layer, HoELayer) and adapter in layer.hoe_layouts:
            root = path.removesuffix(layer.module_name)  # where the base model begins
            if layer.low_rank:
                modules.append(layer.module_name)
            if not layer.votes_statically:
                transposed.append(bool(getattr(layer, "fan_in_fan_out", False)))
            whole: Any = layer
            for name, parameter in whole.named_parameters():
                part, _, rest = name.partition(".")
                if part.startswith("hoe_") and rest.startswith(f"{adapter}."):
                    keys[f"{layer.module_name}.{part}.{rest.removeprefix(f'{adapter}.')}"] = _holder(parameter)
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save:
            saved: Any = wrapper.modules_to_save[adapter]
            for name, tensor in saved.state_dict().items():
                keys[f"{path.removeprefix(root)}.{name}"] = _holder(tensor)
    label, stored_transposed = f"adapter {adapter!r}", bool(transposed) and all(transposed)
    return AdapterSource(
        label, adapter, None, config, modules, stored_transposed, keys, lambda: parts_of_model(model, adapter, root)
    )


def _holder(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor
