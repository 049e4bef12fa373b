"""The table of merge methods, and the way in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import ExpertError, check_choice
from .breadcrumbs import breadcrumbs
from .fr import fr
from .pcb import pcb
from .random_drops import dare, dare_ties, della
from .sce import sce
from .sums import linear, model_stock
from .ties import ties
from .tsv import tsv


@dataclass(frozen=True)
class MergeMethod:
    """A merge method.

    >>> METHODS["breadcrumbs"].options
    {'density': 0.9, 'gamma': 0.01}

    Attributes:
        function: what it computes.
        options: defaults of its options, all of them shares in [0, 1].
        source: who published it.
        sums: whether the result is the policies' weighted sum, so that low-rank policies can be merged by their factors.
        seeded: whether it draws at random, from a seed for each policy.
    """

    function: Callable[..., Tensor]
    options: Mapping[str, float]
    source: str
    sums: bool = False
    seeded: bool = False


METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod(linear, {}, "task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089)", sums=True),
    "ties": MergeMethod(ties, {"density": 0.6}, "Yadav et al. 2023 (arXiv 2306.01708)"),
    "dare": MergeMethod(dare, {"density": 0.5}, "Yu et al. 2024 (arXiv 2311.03099)", seeded=True),
    "dare_ties": MergeMethod(dare_ties, {"density": 0.5}, "Yu et al. 2024 (arXiv 2311.03099)", seeded=True),
    "della": MergeMethod(della, {"density": 0.5, "epsilon": 0.15}, "Deep et al. 2024 (arXiv 2406.11617)", seeded=True),
    "breadcrumbs": MergeMethod(
        breadcrumbs, {"density": 0.9, "gamma": 0.01}, "Davari and Belilovsky 2024 (arXiv 2312.06795)"
    ),
    "sce": MergeMethod(sce, {"density": 0.1}, "Wan et al. 2024 (arXiv 2408.07990)"),
    "pcb": MergeMethod(pcb, {"density": 0.2}, "Du et al. 2024 (arXiv 2410.02396)"),
    "tsv": MergeMethod(tsv, {"density": 1.0}, "Gargiulo et al. 2025 (arXiv 2412.00081)"),
    "fr": MergeMethod(
        fr, {"density": 0.9}, "FREE-Merging, Zheng and Wang 2024 (arXiv 2411.16815); depends on the order of neurons"
    ),
    "model_stock": MergeMethod(model_stock, {}, "Jang et al. 2024 (arXiv 2403.19522)"),
}


def check_merge(method: str, options: Mapping[str, Any] | None) -> dict[str, float]:
    """All options of a method, defaults filled in.

    >>> check_merge("breadcrumbs", {"density": 0.5})
    {'density': 0.5, 'gamma': 0.01}

    Raises:
        ExpertError: unknown method or option, or a share outside [0, 1].
    """
    check_choice("merge method", method, sorted(METHODS), ExpertError)
    known = METHODS[method].options
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise ExpertError(
            f"merge {method!r} has no option {unknown}; it has {sorted(known) or 'none'}",
            argument="merging", value=unknown, allowed=sorted(known),
        )  # fmt: skip
    chosen = {**known, **(options or {})}
    for name, value in chosen.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ExpertError(
                f"merge option {name} is {value!r}; it must be a number from 0 to 1",
                argument=name, value=value, allowed="from 0 to 1",
            )  # fmt: skip
    return chosen


def merge(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    method: str,
    options: Mapping[str, float],
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """One task vector for a preference.

    >>> import torch
    >>> merge([torch.tensor([4.0, -1.0]), torch.tensor([2.0, 3.0])], [0.5, 0.5], "ties", {"density": 1.0})
    tensor([3., 3.])

    Args:
        deltas: K raw task vectors of one shape, float32.
        weights: the preference, `(K,)`, non-negative; policies of weight 0 are dropped, the rest renormalised.
        method: a key of `METHODS`.
        options: as returned by `check_merge`.
        seeds: K seeds, for methods that draw at random; default 0, 1, ...

    Returns:
        a tensor of the task vectors' shape.
    """
    kept = [i for i, weight in enumerate(weights) if weight > 0]
    total = sum(weights[i] for i in kept)
    chosen = METHODS[method]
    drawn = {"seeds": [i if seeds is None else seeds[i] for i in kept]} if chosen.seeded else {}
    return chosen.function([deltas[i] for i in kept], [weights[i] / total for i in kept], **options, **drawn)
