"""The sum of the experts that a plan weighs.

Shapes: x `(..., d_in)`; L experts of ranks r_1 ... r_L with sum r; A `(r, d_in)` and B `(d_out, r)` hold the experts one
after the other, every scale folded into B; V voting slots; votes w `(..., L)`, at least 0 and summing to 1 per token.

    w(x) = static + sum over live routers of weight * scatter softmax((W x + b) / T)        (paper eq. 11)
    y    = base(x) + c(w) B (w(x) expanded over the ranks * A x)                             (paper eq. 12)

The paper prints raw logits in eq. 11; those cannot be mixed with the one-hot votes of LoRA experts, so each router votes
with its softmax. c is 1, or gives back the length that averaging takes (`lengths.py`). Nothing of shape (tokens, experts,
d_out) is ever made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .calls import THIS_THREAD
from .layer import HoELayer
from .plan import AdapterPlan, over_ranks
from .rows import per_row


class ExpertMixture(HoELayer):
    """A HoE layer that makes deltas of inputs."""

    def _votes(self, x: torch.Tensor, adapter: str, plan: AdapterPlan, repeat: int) -> torch.Tensor:
        """w: `(L,)` where it is the same for all tokens, else `(..., L)` to be broadcast over x's tokens."""
        votes = per_row(plan.placed("static", x), repeat, x.ndim)
        # A compiled graph keeps its shape: there routers are read as soon as some preference has a use for one.
        if plan.may_be_live if torch.compiler.is_compiling() else plan.is_live:
            votes = votes + self._router_votes(x, adapter, plan, repeat)
        if self._records(adapter):
            THIS_THREAD.recorder[2][self.module_name] = votes.detach()  # type: ignore[index]
        return votes

    def _records(self, adapter: str) -> bool:
        recorder = THIS_THREAD.recorder
        return recorder is not None and recorder[0] is self.hoe_steering and recorder[1] == adapter

    def _router_votes(self, x: torch.Tensor, adapter: str, plan: AdapterPlan, repeat: int) -> torch.Tensor:
        live = per_row(plan.placed("live", x), repeat, x.ndim)
        layout = self.hoe_layouts[adapter]
        router: Any = self.hoe_router[adapter]
        logits = router(self._cast_input_dtype(x, router.weight.dtype))
        if adapter in self.trained_rows:
            rows, own = self.trained_rows[adapter]
            chosen = own(self._cast_input_dtype(x, next(own.parameters()).dtype)).to(logits.dtype)
            logits = torch.cat([logits[..., : rows.start], chosen, logits[..., rows.stop :]], dim=-1)
        logits = logits.to(live.dtype) / layout.temperature
        votes = [
            choice.softmax(-1) * live[..., r : r + 1] for r, choice in enumerate(logits.split(layout.slots, dim=-1))
        ]
        return torch.cat(votes, dim=-1) @ plan.placed("scatter", x)

    def _delta(self, x: torch.Tensor, adapter: str, plan: AdapterPlan, repeat: int) -> torch.Tensor:
        """B (w * A x), `(..., d_out)`."""
        weight_a, weight_b = self.factors(adapter)
        x = self._cast_input_dtype(x, weight_a.dtype)
        if self._calls_modules(adapter):
            votes = self._votes(x, adapter, plan, repeat)
            return self._delta_by_modules(x, adapter, self._lengthened(votes, adapter))
        selection = plan.selection(self.hoe_layouts[adapter].ranks)
        if plan.is_shared and not self._records(adapter):
            scale = self._shared_scale(x, adapter, plan)
        else:
            votes = self._votes(x, adapter, plan, repeat)
            scale = over_ranks(selection.votes(votes), selection.ranks)
            if adapter in self.hoe_length:
                scale = scale * self._length_factor(x, adapter, plan, repeat, votes)
        inner = F.linear(x, selection.rows(weight_a))
        return F.linear(inner * scale.to(inner.dtype), selection.columns(weight_b))

    def _lengthened(self, votes: torch.Tensor, adapter: str) -> torch.Tensor:
        """The votes w times c(w)."""
        return votes * self.hoe_length[adapter](votes) if adapter in self.hoe_length else votes

    def _shared_scale(self, x: torch.Tensor, adapter: str, plan: AdapterPlan) -> torch.Tensor:
        """What multiplies A x where all tokens have the same votes, `(r,)` over the selected experts' ranks."""
        scale = plan.shared_scale(self.hoe_layouts[adapter].ranks, x)
        if adapter not in self.hoe_length:
            return scale
        lengths: Any = self.hoe_length[adapter]
        key = (self.module_name, x.device, x.dtype)
        return plan.derived(key, lengths.gram, lambda: scale * lengths(plan.placed("static", x)[0]))

    def _length_factor(
        self, x: torch.Tensor, adapter: str, plan: AdapterPlan, repeat: int, votes: torch.Tensor
    ) -> torch.Tensor:
        """The factor c of the votes, to be broadcast over them; kept with the plan where rows differ but not tokens."""
        lengths: Any = self.hoe_length[adapter]
        if plan.is_live or plan.is_shared:
            factor: torch.Tensor = lengths(votes)
            return factor
        key = (self.module_name, x.device, x.dtype)
        factor = plan.derived(key, lengths.gram, lambda: lengths(plan.placed("static", x)))
        return per_row(factor, repeat, x.ndim)

    def _delta_by_modules(self, x: torch.Tensor, adapter: str, votes: torch.Tensor) -> torch.Tensor:
        """The same over all experts, which keeps shapes constant, through A's and B's own forwards."""
        inner = self.hoe_A[adapter](x)
        scale = over_ranks(votes, self.hoe_layouts[adapter].ranks).to(inner.dtype)
        delta: torch.Tensor = self.hoe_B[adapter](inner * scale)
        return delta

    def _calls_modules(self, adapter: str) -> bool:
        """Whether A and B are called as modules: training, compilation, and weights that hooks or wrappers fetch."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return True
        return not (_is_plain(self.hoe_A[adapter]) and _is_plain(self.hoe_B[adapter]))


def _is_plain(part: nn.Module) -> bool:
    """Whether a factor's weight may be read without calling its module."""
    return (
        type(part) is nn.Linear
        and not part._forward_hooks
        and not part._forward_pre_hooks
        and not hasattr(part, "_hf_hook")
        and type(part.weight) in (nn.Parameter, torch.Tensor)
        and not hasattr(part.weight, "ds_id")
    )
