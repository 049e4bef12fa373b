"""The settings of a build, checked before anything is read.

The defaults are chosen by `benchmarks/build_defaults.py` on validation prompts; docs/build.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import INTERPOLATIONS
from ..errors import ExpertError
from .merging import check_merge
from .rescale import check_rescale
from .svd import SOLVERS

DEFAULT_RANK = 16
DEFAULT_PRUNE = 0.4
DEFAULT_RESCALE = "norm"
DEFAULT_INTERPOLATION = "norm"
PRUNE_SCOPES = ("global", "module")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BuildOptions:
    """Settings with every name and number checked.

    Attributes:
        r: rank of an expert that states none; "auto" is `DEFAULT_RANK`, and a LoRA policy's own rank for its expert;
            "full" keeps every direction.
        prune: share of the smallest entries of a task vector to drop, or 0.
        prune_scope: "global" (one threshold per policy) or "module".
        merge: method that makes multi-objective experts.
        merge_options: its options, defaults filled in.
        rescale: "norm", "policy_norm", a number or None.
        interpolation: "norm" or "linear".
        svd: "randomized" or "exact".
        seed: of the randomised solver.
        dtype: what is written, or None for the base's.
    """

    r: int | str
    prune: float
    prune_scope: str
    merge: str
    merge_options: dict[str, float]
    rescale: str | float | None
    interpolation: str
    svd: str
    seed: int
    dtype: torch.dtype | None

    @classmethod
    def checked(
        cls,
        *,
        r: Any,
        prune: Any,
        prune_scope: str,
        merge: str,
        merge_options: Mapping[str, Any] | None,
        rescale: Any,
        interpolation: str,
        svd: str,
        seed: int,
        dtype: Any,
    ) -> BuildOptions:
        """Settings from what a user wrote.

        Raises:
            ExpertError: names the value and what is allowed.
        """
        _check_choice("prune_scope", prune_scope, PRUNE_SCOPES)
        _check_choice("interpolation", interpolation, INTERPOLATIONS)
        _check_choice("svd", svd, SOLVERS)
        return cls(
            r=_check_rank(r),
            prune=_check_prune(prune),
            prune_scope=prune_scope,
            merge=merge,
            merge_options=check_merge(merge, merge_options),
            rescale=check_rescale(rescale),
            interpolation=interpolation,
            svd=svd,
            seed=seed,
            dtype=_check_dtype(dtype),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch.")}


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ExpertError(f"{name} is {value!r}; allowed are {list(allowed)}")


def _check_rank(r: Any) -> int | str:
    if r is None or r == "full":
        return "full"
    if r == "auto":
        return "auto"
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ExpertError(f"r is {r!r}; allowed are a whole number of at least 1, 'full' (or None) and 'auto'")
    return r


def _check_prune(prune: Any) -> float:
    if prune is None or prune == "none":
        return 0.0
    if isinstance(prune, bool) or not isinstance(prune, (int, float)) or not 0 <= prune < 1:
        raise ExpertError(f"prune is {prune!r}; allowed are a share from 0 up to but without 1, or None for none")
    return float(prune)


def _check_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[no-any-return]
    if dtype not in DTYPES:
        raise ExpertError(f"dtype is {dtype!r}; allowed are {sorted(DTYPES)}, or None for the base's")
    return DTYPES[dtype]
