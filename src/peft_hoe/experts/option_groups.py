"""The groups of a build's settings: what belongs together is one small frozen value, checked when it is made.

The defaults are chosen by `benchmarks/build_defaults.py` on validation prompts; docs/build.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ExpertError, check_choice
from ..patterns import matches
from .merging import check_merge
from .svd import SOLVERS, TOLERANCE

PRUNE_SCOPES = ("global", "module")


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
        method: a key of `merging.METHODS`, such as "linear" or "ties"; `peft-hoe merges` lists them.
        options: of the method, by name; what is left out has the method's default.
        experts: `{expert: Merging, or its method alone}` of those that are merged in another way.

    Raises:
        ExpertError: an unknown method or option, or a value that is not allowed.
    """

    method: str = "ties"
    options: Mapping[str, float] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", check_merge(self.method, self.options))
        own = {name: Merging.of(given) for name, given in self.experts.items()}
        for name, merging in own.items():
            if merging.experts:
                raise ExpertError(
                    f"the merge of expert {name!r} names experts itself, {sorted(merging.experts)}; name each once, beside it",
                    argument="merging", value=sorted(merging.experts),
                )  # fmt: skip
        object.__setattr__(self, "experts", own)

    @classmethod
    def of(cls, given: Any) -> Merging:
        """From its short form, the name of the method; or from its fields, as a report has them."""
        if isinstance(given, Mapping):
            return cls(**given)
        return given if isinstance(given, cls) else cls(given)

    def of_expert(self, name: str) -> Merging:
        """How one expert is merged."""
        own: Merging = self.experts.get(name, self)
        return own

    def check_experts(self, merged: Sequence[str]) -> None:
        """See that what `experts` names are merges.

        Args:
            merged: names of the experts that are.

        Raises:
            ExpertError: names the experts that could be named.
        """
        unknown = sorted(set(self.experts) - set(merged))
        if unknown:
            raise ExpertError(
                f"merging names the experts {unknown}, but merges are {list(merged)}; give an expert a name with "
                "ExpertSpec(preference, name=...)",
                argument="merging", value=unknown, allowed=list(merged),
            )  # fmt: skip


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
class Ranks:
    """How many directions experts keep.

    >>> Ranks(energy=0.95, maximum=64, modules={"down_proj": 128})
    Ranks(rank=64, energy=0.95, maximum=64, modules={'down_proj': 128})

    Args:
        rank: of an expert that states none: a number; "full" (or None) for all directions; "auto" for the default, and LoRA
            policies at their own. With `energy` it is `maximum`.
        energy: keep, in each module, the fewest directions that hold this share of the squared norm of the (pruned or merged)
            task vector; above 0 and below 1. It holds for what is decomposed: LoRA policies are taken as they are.
        maximum: but at most so many. Used with `energy` only.
        modules: `{module: rank}`, names or regular expressions as in `HoEConfig.rank_pattern`; beats all other ranks there.

    Raises:
        ExpertError: names the value and what is allowed.
    """

    rank: Any = "auto"
    energy: float | None = None
    maximum: int = 128
    modules: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole("maximum", self.maximum)
        for name, chosen in self.modules.items():
            check_whole(f"the rank of modules {name!r}", chosen)
        rank: Any = "full" if self.rank is None else self.rank
        if rank not in ("full", "auto") and not _is_whole(rank):
            allowed = "a whole number of at least 1, a share of the energy below 1, 'full' (or None) and 'auto'"
            raise ExpertError(f"r is {rank!r}; allowed are {allowed}", argument="r", value=rank, allowed=allowed)
        if self.energy is not None and not 0 < self.energy < 1:
            raise ExpertError(
                f"the share of the energy to keep is {self.energy!r}; it must be above 0 and below 1, such as 0.95",
                argument="energy", value=self.energy, allowed="above 0 and below 1",
            )  # fmt: skip
        object.__setattr__(self, "rank", rank if self.energy is None else self.maximum)
        object.__setattr__(self, "modules", dict(self.modules))

    @classmethod
    def of(cls, given: Any) -> Ranks:
        """From its short forms: a whole number, "full", None or "auto" is the rank, a share below 1 the energy."""
        if isinstance(given, cls):
            return given
        share = isinstance(given, float) and not given.is_integer()
        return cls(energy=given) if share else cls(given)

    def in_module(self, name: str, rank: int) -> int:
        """The rank, at most, of an expert of some rank in a module."""
        for pattern, chosen in self.modules.items():
            if matches(rf"(.*\.)?({pattern})", name, f"modules[{pattern!r}]"):
                return chosen
        return rank


@dataclass(frozen=True)
class Loading:
    """How the base and the policies are read.

    >>> Loading(revision="v1.0")
    Loading(task_type=None, revision='v1.0', token=None, allow_pickle=False, keep_shards=False)

    Args:
        task_type: PEFT's name of what the model does, such as "CAUSAL_LM"; default from the base's class.
        revision: of the base on the Hub; a policy's is written `id@revision`.
        token: for the Hub; default the one that is logged in.
        allow_pickle: whether `.bin` checkpoints may be read (with `weights_only`).
        keep_shards: whether weights on the Hub that are split into several files are all fetched into the Hub's cache and stay
            there. By default one file at a time is fetched, used and deleted, in each pass over the weights.
    """

    task_type: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    allow_pickle: bool = False
    keep_shards: bool = False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_whole(name: str, value: Any) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        ExpertError: names the setting and its value.
    """
    if not _is_whole(value):
        raise ExpertError(
            f"{name} is {value!r}; it must be a whole number of at least 1",
            argument=name, value=value, allowed="at least 1",
        )  # fmt: skip
