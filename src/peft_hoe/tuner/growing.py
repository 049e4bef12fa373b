"""Experts, routers and objectives that a loaded adapter gains and loses.

All new tensors are made first; only then is anything replaced. What stays is copied bit by bit, and the configuration in use
stays the one that the model reads. New Parameters take the places of the old ones: an optimizer made before holds those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import HoEConfig
from ..errors import ExpertError, ModuleError
from ..growth import Change, with_expert, with_objective, with_router, without_expert, without_router
from ..specs import ExpertSpec, as_spec, checked_rank
from .functional import adapter_of
from .layer import HoELayer
from .parameter_sources import is_plain
from .rearranging import rearranged
from .steering import Steering

Weights = Mapping[str, Sequence[Tensor]]
_PARTS = ("hoe_A", "hoe_B", "hoe_router")


class Growing:
    """What a HoEModel offers to change its adapters; each method takes the first active adapter unless told otherwise.

    Nothing is changed while the adapter is merged, inside `use_preference` blocks, or while a router trains.
    """

    model: Any
    steering: Steering

    def add_expert(self, expert: Any, weights: Weights | None = None, *, adapter_name: str | None = None) -> None:
        """Add an expert; preferences whose cell it lies in lead to it from now on, others go on as before.

        Args:
            expert: a preference or `ExpertSpec`.
            weights: `{module: (A, B)}`, A `(r, d_in)` and B `(d_out, r)`, every scale folded into B; of a norm a tuple of the
                delta of its weight, `(d,)`, and that of its bias where it has one. It has nothing in modules that are left
                out. None where experts train: it starts with a delta of zero.
            adapter_name: of the adapter.

        Raises:
            ExpertError: its name or preference is taken, or the weights do not fit; nothing has changed.
            PreferenceError: its preference is no point of the simplex.
        """
        adapter = _changeable(self.model, adapter_name)
        ranks = _ranks(self.model, adapter, expert, weights)
        change = with_expert(adapter.config, expert, ranks)
        _carry_out(self.model, adapter.name, change, weights)

    def add_objective(
        self, name: str, expert: Any = None, weights: Weights | None = None, *, adapter_name: str | None = None
    ) -> None:
        """Add an objective, as the last one, and an expert for it.

        Every preference of the adapter, the default too, gets a 0 for it, so that all goes on as before until the new
        objective is given some weight.

        Args:
            name: of the objective.
            expert: a preference of all objectives with the new one, or `ExpertSpec`; default the new objective alone.
            weights: as in `add_expert`.
            adapter_name: of the adapter.

        Raises:
            ExpertError: the name is taken, or the expert is refused as in `add_expert`; nothing has changed.
            PreferenceError: the expert's preference is no point of the simplex.
        """
        adapter = _changeable(self.model, adapter_name)
        ranks = _ranks(self.model, adapter, expert, weights)
        change = with_objective(adapter.config, name, expert, ranks)
        _carry_out(self.model, adapter.name, change, weights)

    def add_router(self, router: Any, *, adapter_name: str | None = None) -> None:
        """Add a router, which votes as the experts' interpolation does until it is trained.

        Args:
            router: a preference or `RouterSpec`.
            adapter_name: of the adapter.

        Raises:
            ExpertError: its name or preference is taken, or it votes for experts that do not enclose it; nothing has changed.
            PreferenceError: its preference is no point of the simplex.
        """
        adapter = _changeable(self.model, adapter_name)
        _carry_out(self.model, adapter.name, with_router(adapter.config, router), None)

    def remove_expert(self, name: str, *, adapter_name: str | None = None) -> None:
        """Remove an expert and its weights.

        Raises:
            ExpertError: there is no such expert, it is the only one, or routers vote for it; nothing has changed.
        """
        adapter = _changeable(self.model, adapter_name)
        modules = [layer.module_name for layer in layers_of(self.model, adapter.name) if layer.low_rank]
        _carry_out(self.model, adapter.name, without_expert(adapter.config, name, modules), None)

    def remove_router(self, name: str, *, adapter_name: str | None = None) -> None:
        """Remove a router and its weights.

        Raises:
            ExpertError: there is no such router; nothing has changed.
        """
        adapter = _changeable(self.model, adapter_name)
        _carry_out(self.model, adapter.name, without_router(adapter.config, name), None)


def layers_of(model: nn.Module, adapter: str) -> Iterator[HoELayer]:
    """The layers of a model that hold an adapter."""
    return (module for module in model.modules() if isinstance(module, HoELayer) and adapter in module.hoe_layouts)


def own_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter in linear layers by the names of its file, without PEFT's prefix."""
    layers = (layer for layer in layers_of(model, adapter) if layer.low_rank and not layer.votes_statically)
    return {
        f"{layer.module_name}.{name}": tensor
        for layer in layers
        for name, tensor in layer.adapter_tensors(adapter).items()
    }


def _changeable(model: nn.Module, adapter_name: str | None) -> Any:
    """The adapter, seen to be one that may be changed now.

    Raises:
        ExpertError: it is merged, a block is open, or a router trains.
        ModuleError: weights are elsewhere, sharded or offloaded.
    """
    adapter = adapter_of(model, adapter_name)
    problem = None
    if Steering.of(model).blocks_open:
        problem = "a use_preference block is open; leave it first"
    for layer in layers_of(model, adapter.name):
        if adapter.name in layer.merged_adapters:
            problem = "it is merged into the base; call unmerge_adapter() first"
        elif layer.trained_rows:
            problem = "one of its routers is being trained; let the training end first"
        parts = [getattr(layer, part) for part in _PARTS]
        if not all(is_plain(part[adapter.name]) for part in parts if adapter.name in part):
            raise ModuleError(
                f"{layer.module_name} has weights that are fetched when they are needed (offloaded, sharded or wrapped), so "
                "experts cannot be added or removed; load the model on one device, change it and save it",
                module=layer.module_name,
            )
    if problem is not None:
        raise ExpertError(f"adapter {adapter.name!r} cannot be changed now: {problem}", value=adapter.name)
    return adapter


def _ranks(model: nn.Module, adapter: Any, expert: Any, weights: Weights | None) -> dict[str, int]:
    """`{module: rank of the new expert}` for all modules of the adapter, with its weights checked."""
    layers = {layer.module_name: layer for layer in layers_of(model, adapter.name)}
    spec = ExpertSpec(None) if expert is None else as_spec(expert, ExpertSpec)
    if weights is None:
        if not adapter.config.train_experts:
            raise ExpertError(
                "weights is None, and the experts of this adapter do not train, so the new one would stay the base model; give "
                "weights={module: (A, B)}, or add it to the saved adapter with `peft-hoe add-expert`",
                argument="weights",
            )
        rank = adapter.config.r if spec.r is None else checked_rank(spec.r, "the new expert's rank")
        return {module: rank for module, layer in layers.items() if layer.low_rank}
    if not isinstance(weights, Mapping) or not weights:
        raise ExpertError(
            f"weights is {weights!r}; give {{module: (A, B)}} for at least one module, such as {next(iter(layers))!r}",
            argument="weights",
            value=weights,
        )
    unknown = [module for module in weights if module not in layers]
    if unknown:
        raise ExpertError(
            f"the weights name the modules {unknown[:3]}, which the adapter does not have; its {len(layers)} modules are such "
            f"as {list(layers)[:3]}",
            argument="weights",
            value=unknown,
            allowed=list(layers),
        )
    for module, given in weights.items():
        _check_weights(layers[module], adapter.name, given, spec.r)
    low_rank = [module for module, layer in layers.items() if layer.low_rank]
    return {module: weights[module][0].shape[0] if module in weights else 0 for module in low_rank}


def _check_weights(layer: HoELayer, adapter: str, given: Any, rank: int | None) -> None:
    """See that a new expert's weights fit a layer."""
    if layer.low_rank:
        wanted = f"(A, B) with A (r, {layer.in_features}) and B ({layer.out_features}, r)"
        wanted += "" if rank is None else f", r at most {rank}"
    else:
        wanted = f"a tuple of {len(layer.adapter_tensors(adapter))} deltas ({layer.in_features},)"
    parts = list(given) if isinstance(given, (tuple, list)) else []
    tensors = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    fits = len(tensors) == len(parts) > 0 and all(bool(part.isfinite().all()) for part in tensors)
    shapes = [tuple(part.shape) for part in tensors]
    if layer.low_rank:
        r = shapes[0][0] if fits and shapes[0] else 0
        fits = fits and 0 < r <= (rank or r) and shapes == [(r, layer.in_features), (layer.out_features, r)]
    else:
        fits = fits and shapes == [(layer.in_features,)] * len(layer.adapter_tensors(adapter))
    if not fits:
        shown = [tuple(part.shape) if isinstance(part, Tensor) else part for part in parts] or given
        raise ExpertError(
            f"the weights of {layer.module_name} are {shown}; give {wanted}, finite floating-point tensors",
            argument="weights",
            value=shown,
            allowed=wanted,
        )


def _carry_out(model: nn.Module, adapter: str, change: Change, weights: Weights | None) -> None:
    """Make all new tensors, then put them in their places."""
    made: list[tuple[HoELayer, dict[str, Tensor]]] = []
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers_of(model, adapter):
            layer.check_ranks(change.after)
            added: Sequence[Tensor] | None = None
            if weights is not None and layer.module_name in weights:
                added = weights[layer.module_name]
            elif weights is None and None in change.experts and layer.low_rank:
                added = layer.fresh_factors(change.after.ranks(layer.module_name)[-1], adapter)
            made.append((layer, rearranged(layer.adapter_tensors(adapter), change, layer.module_name, added)))
        for layer, tensors in made:
            layer.take(adapter, change.after, tensors)
    config: HoEConfig = change.before
    config.become(change.after)
    Steering.of(model).adapters[adapter].renew()
