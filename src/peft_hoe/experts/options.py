"""All settings of a build, checked before anything is read; what belongs together is a group (`option_groups`).

The defaults are chosen by `benchmarks/build_defaults.py` on validation prompts; docs/build.md has the table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import INTERPOLATIONS
from ..errors import ExpertError, check_choice
from .devices import CPU, check_device
from .option_groups import Merging, Pruning, Ranks, TaskSVD, check_whole
from .rescale import check_rescale

DEFAULT_RANK = 16
DEFAULT_RESCALE = "norm"
DEFAULT_INTERPOLATION = "norm"
DEFAULT_CAPTURE = "auto"
AUTO_CAPTURE = ("auto",)  # as it is kept
CAPTURES = ("embeddings", "norms")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BuildOptions:
    """What decides the numbers of an adapter, every name and number checked.

    Attributes:
        r: how many directions experts keep.
        pruning: what is dropped of a full fine-tune.
        merging: how multi-objective experts are made.
        svd: how task vectors are truncated.
        rescale: "norm", "policy_norm", a number or None.
        interpolation: "norm" or "linear".
        capture: what gets experts besides linear layers, of `CAPTURES`; `AUTO_CAPTURE` leaves it to the policies.
        seed: of everything random.
        dtype: what is written, or None for the base's.
        num_processes: how many share the work, which decides no number.
        device: where modules are computed.
    """

    r: Ranks
    pruning: Pruning
    merging: Merging
    svd: TaskSVD
    rescale: str | float | None
    interpolation: str
    capture: tuple[str, ...]
    seed: int
    dtype: torch.dtype | None
    num_processes: int = 1
    device: torch.device = CPU

    @classmethod
    def checked(
        cls,
        *,
        r: Any,
        pruning: Any,
        merging: Any,
        svd: Any,
        rescale: Any,
        interpolation: str,
        capture: Any,
        seed: int,
        dtype: Any,
        num_processes: Any = 1,
        device: Any = CPU,
    ) -> BuildOptions:
        """Settings from what a user wrote, short forms included.

        Raises:
            ExpertError: names the value and what is allowed.
        """
        check_whole("num_processes", num_processes)
        check_choice("interpolation", interpolation, INTERPOLATIONS, ExpertError)
        return cls(
            r=Ranks.of(r),
            pruning=Pruning.of(pruning),
            merging=Merging.of(merging),
            svd=TaskSVD.of(svd),
            rescale=check_rescale(rescale),
            interpolation=interpolation,
            capture=_check_capture(capture),
            seed=seed,
            dtype=_check_dtype(dtype),
            num_processes=num_processes,
            device=check_device(device),
        )

    def to_dict(self) -> dict[str, Any]:
        """What decides the numbers, in plain JSON types."""
        content = asdict(self)
        del content["num_processes"]
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {**content, "dtype": dtype, "device": str(self.device)}


def _check_capture(capture: Any) -> tuple[str, ...]:
    names = (capture,) if isinstance(capture, str) else tuple(capture or ())
    if names == AUTO_CAPTURE:
        return names
    for name in names:
        check_choice("capture", name, (*CAPTURES, *AUTO_CAPTURE), ExpertError)
        if name in AUTO_CAPTURE:
            raise ExpertError(
                f"capture is {capture!r}; 'auto' stands alone, or name what gets experts: {list(CAPTURES)}",
                argument="capture", value=capture, allowed=CAPTURES,
            )  # fmt: skip
    return tuple(name for name in CAPTURES if name in names)


def _check_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[no-any-return]
    if dtype not in DTYPES:
        raise ExpertError(
            f"dtype is {dtype!r}; allowed are {sorted(DTYPES)}, or None for the base's",
            argument="dtype", value=dtype, allowed=sorted(DTYPES),
        )  # fmt: skip
    return DTYPES[dtype]
