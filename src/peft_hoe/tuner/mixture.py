"""The sum of the experts that a plan weighs, added to one module's output: one way for all cases.

    y = base(x) + B (c(w) w expanded over the ranks * A x)                                   (paper eq. 12)

Two products with the selected experts' rows of A and columns of B, and what lies between them. The votes w are static, of
a row, or of a token (`votes.py`); c is 1, or gives back the length that averaging takes (`lengths.py`). Nothing of shape
(tokens, experts, d_out) is ever made, and no operation mixes tokens, so that a row's output depends on that row alone.

What a step of decoding costs is operations more than numbers, so all that depends on the plan or on weights alone is made
once, in a `Step`. Weights that hooks or wrappers fetch (offloaded, sharded) are not there to prepare anything from: A, B and
routers are then called as modules. A compiler finds the weights and fuses what follows from them. Both reckon with all
experts, so that shapes do not depend on the preference.

Shapes: x `(..., d_in)`, T tokens of B rows; of L experts S are in play, with ranks that sum to r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .calls import THIS_THREAD
from .kernels.choice import WANTED, is_fused
from .kernels.fused import gate as fused_gate
from .kernels.fused import router_logits as fused_logits
from .kernels.gate import over_ranks, scaled, shares, token_votes, without_autocast
from .layer import HoELayer, ModuleBias
from .parameter_sources import Source, is_plain, is_there
from .plan import AdapterPlan, place_of
from .step import Step
from .votes import PlacedVotes, module_votes

_FEW_SLOTS = 32  # more are quicker as a matrix product


class ExpertMixture(HoELayer):
    """A HoE layer that can add its experts to an output."""

    def _add_experts(self, result: torch.Tensor, x: torch.Tensor, adapter: str, plan: AdapterPlan) -> torch.Tensor:
        """`result` `(..., d_out)` plus what the experts make of x `(..., d_in)`; written in place where that is safe."""
        step = None if torch.compiler.is_compiling() else self._step(adapter, plan)
        if step is None:
            return self._add_all_experts(result, x, adapter, plan)
        if x.dtype is not step.dtype and not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, step.dtype)
        tokens = x.reshape(-1, x.shape[-1])
        if step.scale_is_known:
            inners: Sequence[torch.Tensor]
            inners = [scaled(F.linear(tokens, stretch.rows), stretch.scale) for stretch in step.stretches]
            if THIS_THREAD.recorder is not None:
                self._record(adapter, step.placed.votes.mix, x, step, by_token=False)
        else:
            inners = (self._gated_at_once if step.fused else self._gated)(tokens, x, adapter, step)
        total = result if result.ndim == 2 else result.reshape(-1, result.shape[-1])
        in_place = self._may_write(result)
        for stretch, inner in zip(step.stretches, inners, strict=True):
            if (
                total.dtype is not inner.dtype or inner.dtype is not step.dtype
            ):  # weights wider than the base's, or autocast
                total = (total + inner @ stretch.columns).to(result.dtype)
            elif in_place:
                total.addmm_(inner, stretch.columns)
            else:
                total = torch.addmm(total, inner, stretch.columns)
        return total if result.ndim == 2 else total.view(result.shape)

    def _gated(self, tokens: torch.Tensor, x: torch.Tensor, adapter: str, step: Step) -> list[torch.Tensor]:
        """c(w) w A x of each stretch, `(T, r_i)`, by operations of torch."""
        if step.mixed is not None:
            return self._mixed(tokens, x, adapter, step)
        with without_autocast(x.device.type):
            votes = step.lengthened(self._votes(tokens, x, adapter, step.placed, step))
        inners = []
        for stretch in step.stretches:
            inner = F.linear(tokens, stretch.rows)
            inners.append(stretch.weighed(inner, votes if votes.dtype == inner.dtype else votes.to(inner.dtype)))
        return inners

    def _mixed(self, tokens: torch.Tensor, x: torch.Tensor, adapter: str, step: Step) -> list[torch.Tensor]:
        """As `_gated`, where all that follows the softmax is one product with what is prepared."""
        with without_autocast(tokens.device.type):
            found = shares(step.placed.votes, self._tempered_logits(tokens, adapter, step.placed, step))
            if THIS_THREAD.recorder is not None:  # no graph: a forward that checkpointing runs again does not record
                self._record(adapter, F.linear(found.detach(), step.placed.votes.mix), x, step, by_token=True)
            scale = step.scale(found)
        inner = [F.linear(tokens, stretch.rows) for stretch in step.stretches]
        scale = scale if scale.dtype == inner[0].dtype else scale.to(inner[0].dtype)
        if len(inner) == 1:
            return [inner[0] * scale]
        parts = scale.split([part.shape[1] for part in inner], dim=1)
        return [part * own for part, own in zip(inner, parts, strict=True)]

    def _gated_at_once(self, tokens: torch.Tensor, x: torch.Tensor, adapter: str, step: Step) -> Sequence[torch.Tensor]:
        """As `_gated`, by one kernel for all stretches."""
        parts = [F.linear(tokens, stretch.rows) for stretch in step.stretches]
        inner = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        inner = self._fused(inner, tokens, x, adapter, step.placed, step.gram, step.ranks, step)
        return inner.split([part.shape[1] for part in parts], dim=1) if len(parts) > 1 else (inner,)

    def _fused(
        self, inner: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor, adapter: str, placed: PlacedVotes,
        gram: torch.Tensor | None, ranks: tuple[int, ...], step: Step | None,
    ) -> torch.Tensor:  # fmt: skip
        """The gate of A x `(T, r)` by a kernel."""
        with without_autocast(x.device.type):
            logits = self._logits(tokens, adapter, placed.rows, step)
        temperature = self.hoe_layouts[adapter].temperature
        if THIS_THREAD.recorder is not None:
            self._record(adapter, token_votes(placed.votes, logits.detach() / temperature), x, step, by_token=True)
        return fused_gate(inner, logits, placed.votes, gram, ranks, temperature)

    def _votes(
        self, tokens: torch.Tensor, x: torch.Tensor, adapter: str, placed: PlacedVotes, step: Step | None
    ) -> torch.Tensor:
        """The votes for the experts in play: of each token `(T, S)`, or `(B, S)` where none depends on the token."""
        votes = placed.votes.mix
        if placed.rows is not None:
            votes = token_votes(placed.votes, self._tempered_logits(tokens, adapter, placed, step))
        if placed.modules is not None:
            added = module_votes(placed.modules, self._bias(tokens, adapter), self.hoe_layouts[adapter].temperature)
            votes = votes + _for_rows(added, len(votes))
        if THIS_THREAD.recorder is not None:
            self._record(adapter, votes, x, step, by_token=placed.rows is not None)
        return votes

    def _add_all_experts(self, result: torch.Tensor, x: torch.Tensor, adapter: str, plan: AdapterPlan) -> torch.Tensor:
        """As `_add_experts`, by calling modules, in a compiler's graph or where hooks fetch the weights."""
        part_a: Any = self.hoe_A[adapter]
        part_b: Any = self.hoe_B[adapter]
        ranks, tracing = self.hoe_layouts[adapter].ranks, torch.compiler.is_compiling()
        tokens = self._cast_input_dtype(x, part_a.weight.dtype).reshape(-1, x.shape[-1])
        inner = part_a(tokens)
        placed = plan.constant_shape.get(place_of(inner)) if tracing else None
        if placed is None:
            placed = plan.votes(inner, tuple(range(len(ranks))), every_router=tracing)
        lengths: Any = self.hoe_length._modules.get(adapter)
        by_module = placed.modules is not None
        if placed.rows is not None and is_fused(inner.device, inner.dtype, len(ranks), by_module=by_module):
            gram = None if lengths is None else lengths.gram
            inner = self._fused(inner, tokens, x, adapter, placed, gram, ranks, None)
        else:
            with without_autocast(x.device.type):
                votes = self._votes(tokens, x, adapter, placed, None)
                votes = votes if lengths is None else votes * lengths(votes)
                inner = scaled(inner, over_ranks(votes.to(inner.dtype), ranks))
        delta: torch.Tensor = part_b(inner)
        return (result + delta.view(result.shape)).to(result.dtype)

    # -- what is prepared ---

    def _step(self, adapter: str, plan: AdapterPlan) -> Step | None:
        """What the plan needs here; None where weights are fetched by calling their modules."""
        groups: Any = self._modules  # for each token: past nn.Module's search for a name
        own: Any = self.trained_rows.get(adapter) if self.trained_rows else None
        trains = own is not None
        if not trains and torch.is_grad_enabled():
            router = groups["hoe_router"]._modules.get(adapter)
            trains = router is not None and router.bias.requires_grad
        key = (adapter, plan, own is None, trains, WANTED.kernel)
        step = self._steps.get(key)
        if step is not None and step.is_current(groups["hoe_A"]._modules):
            return step
        parts: dict[str, tuple[nn.ModuleDict, str]] = {"A": (self.hoe_A, "weight"), "B": (self.hoe_B, "weight")}
        if adapter in self.hoe_length:
            parts["gram"] = self.hoe_length, "gram"
        if plan.is_live and own is None:
            parts["router"] = self.hoe_router, "weight"
        if (plan.is_live and own is None) or (plan.is_by_module and not trains):
            parts["bias"] = self.hoe_router, "bias"
        if not all((is_there if name == "gram" else is_plain)(group[adapter]) for name, (group, _) in parts.items()):
            return None
        sources = {
            name: Source.of(group, adapter, parameter, viewed=name in "AB")
            for name, (group, parameter) in parts.items()
        }
        graph, limit = torch.is_grad_enabled(), sum(sources[name].parameter.nbytes for name in "AB") // 10
        device = sources["A"].parameter.device.type
        # A later step may train, or run without autocast.
        with torch.inference_mode(False), torch.set_grad_enabled(graph), without_autocast(device):
            step = Step(plan, self.hoe_layouts[adapter], sources, fixed=not trains, limit=limit)
        if step.is_current(self.hoe_A._modules):
            self._steps.add(key, step, limit)
        return step

    # -- votes ---

    def _tempered_logits(
        self, tokens: torch.Tensor, adapter: str, placed: PlacedVotes, step: Step | None
    ) -> torch.Tensor:
        """`_logits` over the temperature, in the dtype of the votes."""
        logits, temperature = self._logits(tokens, adapter, placed.rows, step), self.hoe_layouts[adapter].temperature
        logits, dtype = logits if temperature == 1 else logits / temperature, placed.votes.mix.dtype
        return logits if logits.dtype == dtype else logits.to(dtype)

    def _logits(self, tokens: torch.Tensor, adapter: str, rows: Any, step: Step | None) -> torch.Tensor:
        """Logits `(T, slots)` of the routers whose slots are `rows` of the router linear, not yet over the temperature."""
        own: Any = self.trained_rows.get(adapter) if self.trained_rows else None
        if own is not None and isinstance(own[1], ModuleBias):
            own = None
        if own is None and step is not None and step.router is not None and not torch.is_grad_enabled():
            return _linear(tokens, *step.router, fused=step.fused)
        part: Any = self.hoe_router[adapter]
        fused = step is not None and step.fused
        if own is not None and isinstance(rows, slice) and own[0] == rows and is_plain(own[1]):
            return _linear(tokens, own[1].weight, own[1].bias, fused=fused)
        if own is not None or step is None or step.router is None:
            logits: torch.Tensor = part(self._cast_input_dtype(tokens, part.weight.dtype))
            if own is not None:
                chosen = own[1](self._cast_input_dtype(tokens, next(own[1].parameters()).dtype)).to(logits.dtype)
                logits = torch.cat([logits[:, : own[0].start], chosen, logits[:, own[0].stop :]], dim=1)
            return logits[:, rows]
        return _linear(tokens, part.weight[rows], part.bias[rows], fused=fused)

    def _bias(self, tokens: torch.Tensor, adapter: str) -> torch.Tensor:
        """The bias of all routers, `(slots,)`, with that which trains in its place."""
        part: Any = self.hoe_router[adapter]
        if is_plain(part) and not torch.compiler.is_compiling():
            bias: torch.Tensor = part.bias
        else:  # fetched by calling the module
            bias = part(tokens.new_zeros(1, tokens.shape[-1], dtype=part.weight.dtype))[0]
        own: Any = self.trained_rows.get(adapter) if self.trained_rows else None
        if own is None or not isinstance(own[1], ModuleBias):
            return bias
        return torch.cat([bias[: own[0].start].to(own[1].bias), own[1].bias, bias[own[0].stop :].to(own[1].bias)])

    def _records(self, adapter: str) -> bool:
        recorder = THIS_THREAD.recorder
        return recorder is not None and recorder[0] is self.hoe_steering and recorder[1] == adapter

    def _record(self, adapter: str, votes: torch.Tensor, x: torch.Tensor, step: Step | None, *, by_token: bool) -> None:
        """Hand the votes of tokens `(T, S)`, or of rows `(B, S)`, to `record_votes`."""
        if not self._records(adapter):
            return
        everyone = votes.new_zeros(len(votes), len(self.hoe_layouts[adapter].ranks))
        everyone[:, slice(None) if step is None else list(step.experts)] = votes.detach()
        if by_token:
            everyone = everyone.view(*x.shape[:-1], -1)
        elif len(everyone) == 1:
            everyone = everyone[0]
        else:
            everyone = everyone.repeat_interleave(x.shape[0] // len(everyone), dim=0)
            everyone = everyone.view(len(everyone), *([1] * (x.ndim - 2)), everyone.shape[-1])
        THIS_THREAD.recorder[2][self.module_name] = everyone  # type: ignore[index]

    def _may_write(self, result: torch.Tensor) -> bool:
        """Whether the base's output is nobody else's, so that the experts may be added to it in place."""
        base: Any = self._modules["base_layer"]
        return (
            not torch.is_grad_enabled()
            and type(base) in (nn.Linear, Conv1D)
            and not base._forward_hooks
            and not nn.modules.module._global_forward_hooks
            and type(result) is torch.Tensor
            and result.is_contiguous()
        )


def _linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, fused: bool) -> torch.Tensor:
    """Logits with sums in float32 or wider."""
    if weight.dtype.itemsize < 4:
        weight, bias = weight.float(), bias.float()
    if tokens.dtype == weight.dtype:
        return F.linear(tokens, weight, bias)
    if fused and len(weight) <= _FEW_SLOTS:
        return fused_logits(tokens, weight, bias)
    return F.linear(tokens.to(weight.dtype), weight, bias)


def _for_rows(added: torch.Tensor, length: int) -> torch.Tensor:
    """Votes of rows `(B, S)` for each of as many tokens; B may be 1."""
    if len(added) in (1, length):
        return added
    return added.repeat_interleave(length // len(added), dim=0)
