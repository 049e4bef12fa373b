"""Experts of embeddings and output heads: low rank, weighed by the preference alone.

    embedding:  y = E[ids] + (c(w) w over the ranks * A[:, ids]) B^T          A (r, vocabulary), B (d, r)
    head:       y = W x + B (c(w) w over the ranks * A x)                     A (r, d), B (vocabulary, r)

An embedding's input is a number, which no router can look at, so here all routers vote as before their training
(`AdapterPlan.fixed`); a head that `target_modules` names is an ordinary linear module and has routers.

A head that is tied to the embeddings follows them: what a policy changed in the shared weight, it changed in both. `TiedHead`
has no tensors of its own, and a merged pair stays tied.

Shapes: L experts of ranks that sum to r; T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import HoEConfig
from ..errors import ModuleError
from .calls import THIS_THREAD
from .kernels.gate import over_ranks, scaled
from .layer import HoELayer
from .linear import HoELinear
from .parameter_sources import is_plain
from .plan import AdapterPlan
from .rows import check_rows
from .steering import Steering


class HoEHead(HoELinear):
    """HoE around an output head whose experts `target_embeddings` names."""

    votes_statically = True

    def _add_experts(self, result: torch.Tensor, x: torch.Tensor, adapter: str, plan: AdapterPlan) -> torch.Tensor:
        part_a: Any = self.hoe_A[adapter]
        record_fixed(self, adapter, plan, x)
        inner = part_a(self._cast_input_dtype(x, part_a.weight.dtype).reshape(-1, x.shape[-1]))
        return _added(self, result, self.hoe_B[adapter](scaled(inner, fixed_scale(self, adapter, plan, inner))))


class HoEEmbedding(HoELinear):
    """HoE around nn.Embedding; its weight is stored (in, out)."""

    votes_statically = True

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: HoEConfig, name: str, steering: Steering
    ) -> None:
        self.tied_heads: list[TiedHead] = []
        super().__init__(base_layer, adapter_name, config, name, steering)

    def _measure(self, config: HoEConfig) -> None:
        self.in_features, self.out_features = embedding_features(self.get_base_layer(), self.module_name)
        self.fan_in_fan_out = True

    @staticmethod
    def _in_rows(x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(-1)

    def _add_experts(self, result: torch.Tensor, x: torch.Tensor, adapter: str, plan: AdapterPlan) -> torch.Tensor:
        part_a: Any = self.hoe_A[adapter]
        ids = x.reshape(-1)
        record_fixed(self, adapter, plan, self._in_rows(x))
        if torch.compiler.is_compiling() or is_plain(part_a):
            inner = F.embedding(ids, part_a.weight.t())
        else:  # hooks or wrappers fetch the weight where the module is called
            inner = part_a(F.one_hot(ids, self.in_features).to(part_a.weight.dtype))
        delta = self.hoe_B[adapter](scaled(inner, fixed_scale(self, adapter, plan, inner)))
        return _added(self, result, delta * getattr(self.get_base_layer(), "embed_scale", 1.0))

    def _set_base_weight(self, weight: torch.Tensor) -> None:
        super()._set_base_weight(weight)
        for head in self.tied_heads:
            head.base_layer.weight = self._base_weight()

    def unmerge(self) -> None:
        """Subtract again what `merge` added; heads that are tied stay so."""
        super().unmerge()
        for head in self.tied_heads:
            head.base_layer.weight = self._base_weight()


class TiedHead(nn.Module, HoELayer):
    """A head whose weight is the embeddings', with the embeddings' experts."""

    adapter_layer_names = ()

    def __init__(self, base_layer: nn.Module, name: str, embedding: HoEEmbedding) -> None:
        super().__init__()
        HoELayer.__init__(self, base_layer, name, embedding.hoe_steering)
        self._embedding = (embedding,)  # no submodule: its tensors are the embeddings'
        self._active_adapter = list(embedding.active_adapters)
        embedding.tied_heads.append(self)

    @property
    def embedding(self) -> HoEEmbedding:
        """The embeddings that it follows."""
        return self._embedding[0]

    @property
    def weight(self) -> torch.Tensor:
        """The base weight."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x) plus the deltas of the active adapters, `(..., vocabulary)` in the base's dtype."""
        embedding = self.embedding
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters or embedding.merged_adapters:
            return result
        plan, call = self._plan()
        if plan.rows is not None:
            check_rows(x, plan, call, self.module_name)
        for adapter in embedding.active_adapters:
            if adapter in embedding.hoe_layouts and adapter in plan.adapters:
                result = self._add_experts(result, x, adapter, plan.adapters[adapter])
        if call is not None and call.grad and call is not THIS_THREAD.forward and result.requires_grad:
            call.tie_to([result])  # no root does it
        return result

    def _add_experts(self, result: torch.Tensor, x: torch.Tensor, adapter: str, plan: AdapterPlan) -> torch.Tensor:
        embedding = self.embedding
        parts = embedding.hoe_A[adapter], embedding.hoe_B[adapter]
        if not torch.compiler.is_compiling() and not all(map(is_plain, parts)):
            raise ModuleError(
                f"{self.module_name} is tied to {embedding.module_name}, whose experts are fetched when they are needed "
                "(offloaded, sharded or wrapped), so the head cannot read them; load the model on one device, or without "
                "target_embeddings",
                module=self.module_name,
            )
        weight_a, weight_b = embedding.factors(adapter)
        record_fixed(self, adapter, plan, x)
        scale = fixed_scale(embedding, adapter, plan, weight_b)
        tokens = self._cast_input_dtype(x, weight_b.dtype).reshape(-1, x.shape[-1])
        inner = F.linear(tokens, weight_b.t().to(x.device))  # a model may lie on several devices
        inner = scaled(inner, scale.to(x.device))
        return _added(self, result, F.linear(inner, weight_a.t().to(x.device)))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: the embeddings' merge changes the weight of both."""

    def unmerge(self) -> None:
        """Nothing: see `merge`."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing: it has no tensors."""


def fixed_scale(layer: HoELayer, adapter: str, plan: AdapterPlan, like: torch.Tensor) -> torch.Tensor:
    """c(w) w over the ranks of a layer's experts, `(rows, r)`, where routers vote statically."""
    votes = plan.fixed_votes(like)
    if adapter in layer.hoe_length:
        votes = votes * layer.hoe_length[adapter](votes)
    return over_ranks(votes, layer.hoe_layouts[adapter].ranks).to(like.dtype)


def record_fixed(layer: HoELayer, adapter: str, plan: AdapterPlan, x: torch.Tensor) -> None:
    """Hand the votes of the rows of x `(..., features)` to `record_votes`."""
    recorder = THIS_THREAD.recorder
    if recorder is None or recorder[0] is not layer.hoe_steering or recorder[1] != adapter:
        return
    votes = plan.fixed.to(x.device)
    if len(votes) == 1:
        recorder[2][layer.module_name] = votes[0]
    else:
        repeated = votes.repeat_interleave(x.shape[0] // len(votes), dim=0)
        recorder[2][layer.module_name] = repeated.view(len(repeated), *[1] * (x.ndim - 2), votes.shape[1])


def _added(layer: HoELayer, result: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return (result + delta.view(result.shape)).to(result.dtype)


def embedding_features(base: Any, name: str) -> tuple[int, int]:
    """(vocabulary, d) of an embedding.

    Raises:
        ModuleError: it is none, or does more than look rows up; names it.
    """
    plain = isinstance(base, nn.Embedding) and (
        type(base).forward is nn.Embedding.forward or hasattr(base, "embed_scale")
    )
    if not plain or base.max_norm is not None:
        what = " with max_norm" if isinstance(base, nn.Embedding) and base.max_norm is not None else ""
        raise ModuleError(
            f"target_embeddings names {name}, a {type(base).__name__}{what}; HoE adapts embeddings that look rows up, and "
            "output heads. Leave it out",
            module=name,
        )
    return int(base.num_embeddings), int(base.embedding_dim)


def follows_embeddings(head: nn.Module, model: nn.Module, config: HoEConfig) -> bool:
    """Whether a module's weight is that of embeddings that `target_embeddings` names too, so that `tie_heads` sees to it."""
    return type(head) is nn.Linear and any(
        isinstance(module, nn.Embedding)
        and module.weight is head.weight
        and config.votes_statically(name.removesuffix(".base_layer"))
        for name, module in model.named_modules()
    )


def tie_heads(model: nn.Module, adapter: str) -> None:
    """Give every linear module whose weight is that of adapted embeddings their experts.

    Raises:
        ModuleError: something else than a plain linear module shares the weight, so the experts would act on a part of it.
    """
    layers = [
        module for module in model.modules() if isinstance(module, HoEEmbedding) and adapter in module.hoe_layouts
    ]
    for embedding in layers:
        base = embedding.get_base_layer()
        owned = {id(base), *(id(head.base_layer) for head in embedding.tied_heads)}
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if name.endswith("base_layer") or getattr(module, "weight", None) is not base.weight:
                continue
            if module is embedding or isinstance(module, TiedHead):
                continue
            if type(module) is not nn.Linear or id(module) in owned:
                raise ModuleError(
                    f"{embedding.module_name} has experts by target_embeddings, but {name} ({type(module).__name__}) shares "
                    "its weight without following them; leave the embeddings out of target_embeddings, or the other out of "
                    "target_modules",
                    module=name,
                )
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], TiedHead(module, name, embedding))
