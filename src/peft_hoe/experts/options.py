"""The settings of a build, checked before anything is read.

What belongs together is one small group. The defaults are chosen by `benchmarks/build_defaults.py` on validation prompts;
docs/build.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..config import INTERPOLATIONS
from ..errors import ExpertError, check_choice
from .merging import check_merge
from .rescale import check_rescale
from .svd import SOLVERS, TOLERANCE

DEFAULT_RANK = 16
DEFAULT_RESCALE = "norm"
DEFAULT_INTERPOLATION = "norm"
DEFAULT_CAPTURE: tuple[str, ...] = ()
CAPTURES = ("embeddings", "norms")
PRUNE_SCOPES = ("global", "module")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Pruning:
    """Which entries of a full fine-tune's task vector are dropped before it is truncated.

    >>> Pruning(0.6, scope="module")
    Pruning(share=0.6, scope='module')

    Args:
        share: of the smallest entries, from 0 (nothing is dropped) up to but without 1.
        scope: what the share is counted over: "global" has one threshold for all weights in scope, "module" one for each.

    Raises:
        ExpertError: names the value and what is allowed.
    """

    share: float = 0.4
    scope: str = "global"

    def __post_init__(self) -> None:
        share = self.share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            allowed = "a number from 0 up to but without 1, or None for none"
            raise ExpertError(
                f"the share to prune is {share!r}; allowed are {allowed}",
                argument="pruning",
                value=share,
                allowed=allowed,
            )
        check_choice("the scope of pruning", self.scope, PRUNE_SCOPES, ExpertError)

    @classmethod
    def of(cls, given: Any) -> Pruning:
        """From its short forms: a number is the share, None or "none" drops nothing."""
        if isinstance(given, cls):
            return given
        return cls(0.0 if given is None or given == "none" else given)


@dataclass(frozen=True)
class Merging:
    """How the policies' task vectors become that of a multi-objective expert.

    >>> Merging("ties").options
    {'density': 0.6}

    Args:
        method: "linear", "ties" or "pcb"; see `merging`.
        options: of the method, by name; what is left out has the method's default.

    Raises:
        ExpertError: an unknown method or option, or a value that is not allowed.
    """

    method: str = "ties"
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", check_merge(self.method, self.options))

    @classmethod
    def of(cls, given: Any) -> Merging:
        """From its short form, the name of the method."""
        return given if isinstance(given, cls) else cls(given)


@dataclass(frozen=True)
class TaskSVD:
    """How a task vector is truncated.

    >>> TaskSVD("exact")
    TaskSVD(solver='exact', tolerance=0.0001)

    Args:
        solver: "randomized" (a block Krylov space) or "exact".
        tolerance: the share of the energy of the best approximation of its rank that the randomised solver may leave.

    Raises:
        ExpertError: names the value and what is allowed.
    """

    solver: str = "randomized"
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        check_choice("svd", self.solver, SOLVERS, ExpertError)
        if (
            isinstance(self.tolerance, bool)
            or not isinstance(self.tolerance, (int, float))
            or not 0 < self.tolerance < 1
        ):
            raise ExpertError(
                f"the tolerance of svd is {self.tolerance!r}; it must be a number above 0 and below 1, such as {TOLERANCE}",
                argument="svd", value=self.tolerance, allowed="above 0 and below 1",
            )  # fmt: skip

    @classmethod
    def of(cls, given: Any) -> TaskSVD:
        """From its short form, the name of the solver."""
        return given if isinstance(given, cls) else cls(given)


@dataclass(frozen=True)
class Loading:
    """How the base and the policies are read.

    >>> Loading(revision="v1.0")
    Loading(task_type=None, revision='v1.0', token=None, allow_pickle=False)

    Args:
        task_type: PEFT's name of what the model does, such as "CAUSAL_LM"; default from the base's class.
        revision: of the base on the Hub; a policy's is written `id@revision`.
        token: for the Hub; default the one that is logged in.
        allow_pickle: whether `.bin` checkpoints may be read (with `weights_only`).
    """

    task_type: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    allow_pickle: bool = False


@dataclass(frozen=True)
class BuildOptions:
    """What decides the numbers of an adapter, every name and number checked.

    Attributes:
        r: rank of an expert that states none; "auto" is `DEFAULT_RANK`, and a LoRA policy's own rank for its expert;
            "full" keeps every direction.
        pruning: what is dropped of a full fine-tune.
        merging: how multi-objective experts are made.
        svd: how task vectors are truncated.
        rescale: "norm", "policy_norm", a number or None.
        interpolation: "norm" or "linear".
        capture: what gets experts besides linear layers, of `CAPTURES`.
        seed: of everything random.
        dtype: what is written, or None for the base's.
        num_processes: how many share the work, which decides no number.
    """

    r: int | str
    pruning: Pruning
    merging: Merging
    svd: TaskSVD
    rescale: str | float | None
    interpolation: str
    capture: tuple[str, ...]
    seed: int
    dtype: torch.dtype | None
    num_processes: int = 1

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
    ) -> BuildOptions:
        """Settings from what a user wrote, short forms included.

        Raises:
            ExpertError: names the value and what is allowed.
        """
        check_choice("interpolation", interpolation, INTERPOLATIONS, ExpertError)
        return cls(
            r=_check_rank(r),
            pruning=Pruning.of(pruning),
            merging=Merging.of(merging),
            svd=TaskSVD.of(svd),
            rescale=check_rescale(rescale),
            interpolation=interpolation,
            capture=_check_capture(capture),
            seed=seed,
            dtype=_check_dtype(dtype),
            num_processes=_check_processes(num_processes),
        )

    def to_dict(self) -> dict[str, Any]:
        """What decides the numbers, in plain JSON types."""
        content = asdict(self)
        del content["num_processes"]
        return {**content, "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch.")}


def _check_rank(r: Any) -> int | str:
    if r is None or r == "full":
        return "full"
    if r == "auto":
        return "auto"
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        allowed = "a whole number of at least 1, 'full' (or None) and 'auto'"
        raise ExpertError(f"r is {r!r}; allowed are {allowed}", argument="r", value=r, allowed=allowed)
    return r


def _check_processes(count: Any) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ExpertError(
            f"num_processes is {count!r}; it must be a whole number of at least 1",
            argument="num_processes", value=count, allowed="at least 1",
        )  # fmt: skip
    return count


def _check_capture(capture: Any) -> tuple[str, ...]:
    names = (capture,) if isinstance(capture, str) else tuple(capture or ())
    for name in names:
        check_choice("capture", name, CAPTURES, ExpertError)
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
