"""All that one plan needs in one module, resolved once.

A step of decoding costs as many operations, whatever the numbers, so it should look nothing up and make nothing but the
products themselves. Rows of A and columns of B are views; what is copied or computed is small, and bounded (`Steps`). None
of it outlives a change of the weights that it was made from.

Shapes: of L experts S are in play, with ranks that sum to r; B rows; T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .kernels.choice import is_fused
from .kernels.gate import MAX_FACTOR, length_factor, over_ranks
from .layout import ExpertLayout
from .lengths import gram_root, lengthened
from .parameter_sources import Source, are_unchanged
from .plan import AdapterPlan
from .selection import Selection
from .votes import module_votes

_MOST_SPANS = 8  # more stretches of neighbouring experts than this are read as all experts at once
_MOST_STEPS = 16
_LEAST_BYTES = 128  # so that a toy's layers prepare something too


class Stretch(NamedTuple):
    """Neighbouring experts of a step, with ranks that sum to r_i.

    Attributes:
        rows: of A, `(r_i, d_in)`, a view.
        columns: of B, transposed, `(r_i, d_out)`, a view.
        scale: c(w) w over the ranks, `(B, r_i)`, where votes do not depend on the input; else None.
        owners: of each rank its expert's place in the step, `(r_i,)`; None where one stretch holds all, of equal rank.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    scale: Any
    owners: torch.Tensor | None

    def weighed(self, inner: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
        """A x `(T, r_i)` times its experts' votes; `votes` `(T, S)`."""
        if self.owners is not None:
            return inner * votes.index_select(1, self.owners)
        experts = votes.shape[1]
        return (inner.unflatten(1, (experts, inner.shape[1] // experts)) * votes.unsqueeze(-1)).flatten(1)


class Step:
    """One plan in one module.

    Args:
        plan: of an adapter.
        layout: of the adapter in this module.
        sources: "A", "B", and where they play a part "gram" (of all experts, `(L, L)`, where c is not 1), "router" and "bias".
        fixed: whether votes of routers that vote by module are taken from "bias" now; else they are computed at each call,
            because they train.
        limit: bytes of all steps of the module; what only saves time is made where it leaves room for others.

    Attributes:
        dtype: of A and B.
        experts: in play, ascending.
        ranks: theirs.
        stretches: of these.
        placed: its votes.
        fused: whether a kernel works out the gate; only where votes depend on the token, and none on a bias that trains.
        gram: for the kernel, of the experts in play `(S, S)`; None where c is 1.
        mixed: what the routers' softmax is multiplied with for the votes over the ranks, `(r, V)`, where c is not 1 followed by
            what c follows from, `(S + 1, V)`; None where rows differ, or votes are worked out otherwise.
        scale_is_known: whether they are the same for all tokens and stay as they are; then stretches have their scales.
        router: the live routers' rows of the router linear, float32 or wider, `(slots, d_in)` and `(slots,)`; None where none
            is read from there.
        nbytes: of what is copied or computed.
    """

    __slots__ = (
        "_genuine",
        "_parts",
        "_root",
        "_sources",
        "_widths",
        "dtype",
        "experts",
        "fused",
        "gram",
        "mixed",
        "nbytes",
        "placed",
        "ranks",
        "router",
        "scale_is_known",
        "stretches",
    )

    def __init__(
        self,
        plan: AdapterPlan,
        layout: ExpertLayout,
        sources: Mapping[str, Source],
        *,
        fixed: bool = True,
        limit: int = 0,
    ) -> None:
        ranks = layout.ranks
        weight_a, weight_b = sources["A"].parameter, sources["B"].parameter
        selection = plan.selection(ranks, whole=False)
        if len(selection.spans) > _MOST_SPANS:
            selection = plan.selection(ranks, whole=True)
        self.placed = plan.votes(weight_a, selection.experts)
        modules = self.placed.modules
        copies: list[torch.Tensor] = []
        if modules is not None and fixed:
            bias = sources["bias"].parameter.detach()
            self.placed = self.placed.with_rows(module_votes(modules, bias, layout.temperature))
            copies.append(self.placed.votes.mix)
        mix = self.placed.votes.mix
        self._sources, self._parts = tuple(sources.values()), sources["A"].parts
        self.dtype, self.experts, self.ranks = weight_a.dtype, selection.experts, selection.ranks
        slots = self.placed.rows
        by_module = self.placed.modules is not None
        self.fused = slots is not None and is_fused(weight_a.device, self.dtype, len(self.experts), by_module=by_module)
        self.scale_is_known = slots is None and not by_module
        products = self._in_play(sources["gram"].parameter).to(mix.dtype) if "gram" in sources else None
        self.gram = products if self.fused else None
        self._root: tuple[torch.Tensor, ...] = ()
        if products is not None and not self.fused and not self.scale_is_known:
            self._root = self._make_root(products)
        self.router, self.mixed, scale = None, None, None
        self._widths = (sum(selection.ranks), len(self.experts), 1)
        if self.scale_is_known:
            votes = mix if products is None else mix * length_factor(mix, products)
            scale = over_ranks(votes, selection.ranks).to(self.dtype)
            copies.append(scale)
        elif slots is not None and "router" in sources:
            stored = [sources[name].parameter.detach() for name in ("router", "bias")]
            rows = [part[slots].to(torch.promote_types(part.dtype, torch.float32)) for part in stored]
            self.router = rows[0], rows[1]
            copies += [] if isinstance(slots, slice) and rows[0].dtype == stored[0].dtype else rows
        mixed = sum(self._widths) * mix.shape[-1] * mix.itemsize
        if slots is not None and not by_module and not self.fused and mix.ndim == 2 and 2 * mixed <= limit:
            self.mixed = torch.cat([mix[selection.owners(mix.device)], *(part @ mix for part in self._root)])
            copies.append(self.mixed)
        copies += self._root if self.gram is None else [self.gram]
        self.nbytes = sum(copy.nbytes for copy in copies)
        self._genuine = all(type(copy) is torch.Tensor for copy in (mix, *copies))  # not a tracer's
        self.stretches = tuple(_stretches(selection, weight_a, weight_b, scale))

    def _in_play(self, gram: torch.Tensor) -> torch.Tensor:
        """Inner products `(S, S)` of the experts in play, of those of all `(L, L)`."""
        experts = torch.tensor(self.experts, device=gram.device)
        return gram.detach()[experts][:, experts]

    def _make_root(self, products: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.to(products.dtype).to(products.device) for part in gram_root(products))

    def scale(self, shares: torch.Tensor) -> torch.Tensor:
        """c(w) w over the ranks, `(T, r)`, of the routers' softmax `(T, V)`; only where there is `mixed`."""
        found = F.linear(shares, self.mixed)  # type: ignore[arg-type]
        if not self._root:
            return found
        scale, seen, lengths = found.split_with_sizes(self._widths, 1)
        length = torch.linalg.vector_norm(seen, dim=-1, keepdim=True)
        return scale / (length / lengths).clamp_min(1 / MAX_FACTOR)

    def is_current(self, parts: Mapping[str, Any]) -> bool:
        """Whether nothing that it was made from has changed, and nothing of it should be in a graph.

        Args:
            parts: the layer's A by adapter. DataParallel's replicas share all but their modules.
        """
        if self._parts is not parts or not self._genuine:
            return False
        if torch.is_grad_enabled() and any(source.parameter.requires_grad for source in self._sources[:2]):
            return False
        return are_unchanged(self._sources)

    def lengthened(self, votes: torch.Tensor) -> torch.Tensor:
        """c(w) w `(T, S)` of votes w `(T, S)`."""
        return lengthened(votes, *self._root) if self._root else votes


def _stretches(
    selection: Selection, weight_a: torch.Tensor, weight_b: torch.Tensor, scale: torch.Tensor | None
) -> Iterator[Stretch]:
    """The stretches of a selection; `scale` `(B, r)`."""
    start, owners = 0, selection.owners(weight_a.device)
    alone = len(selection.spans) == 1 and len(set(selection.ranks)) == 1
    for span in selection.spans:
        here = slice(start, start + span.stop - span.start)
        start = here.stop
        yield Stretch(
            rows=weight_a if selection.whole else weight_a[span],
            columns=(weight_b if selection.whole else weight_b[:, span]).t(),
            scale=None if scale is None else scale[:, here],
            owners=None if alone else owners[here],
        )


class Steps:
    """The latest steps of one module, as many as fit a number of bytes."""

    def __init__(self) -> None:
        self._kept: dict[Any, Step] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy's weights go their own way."""
        return {"_kept": {}}

    @property
    def nbytes(self) -> int:
        """Of what they copied or computed."""
        return sum(step.nbytes for step in tuple(self._kept.values()))

    def get(self, key: Any) -> Step | None:
        """The step of that key."""
        return self._kept.get(key)

    def add(self, key: Any, step: Step, limit: int) -> None:
        """Keep a step, and of the older ones as many as leave all within `limit` bytes; none that exceeds it by itself."""
        self._kept.pop(key, None)
        limit = max(limit, _LEAST_BYTES)
        if step.nbytes > limit:
            return
        self._kept[key] = step
        for oldest in tuple(self._kept):
            if self.nbytes <= limit and len(self._kept) <= _MOST_STEPS:
                return
            self._kept.pop(oldest, None)

    def clear(self) -> None:
        """Drop all."""
        self._kept = {}
