"""Which source of rewards covers which objectives, in every form in which a user may give them; `Rewards` says which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import RewardError
from .classifier import ClassifierReward
from .module import ModuleReward


def match_sources(sources: Any, objectives: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    """Pairs of objectives and source; each objective exactly once.

    Raises:
        RewardError: sources and objectives do not match.
    """
    if isinstance(sources, nn.ModuleDict):
        sources = dict(sources.items())
    if isinstance(sources, Mapping):
        named = [((key,) if isinstance(key, str) else tuple(key), source) for key, source in sources.items()]
        given = [name for names, _ in named for name in names]
        unknown = [name for name in given if name not in objectives]
        missing = [name for name in objectives if name not in given]
        twice = sorted({name for name in given if given.count(name) > 1})
        if unknown or missing or twice:
            raise RewardError(
                f"rewards are given for {given}, but the objectives are {list(objectives)}: unknown {unknown}, missing "
                f"{missing}, twice {twice}; give exactly one reward for each objective",
                argument="rewards",
                value=given,
                allowed=list(objectives),
            )
        return named
    if isinstance(sources, (list, tuple, nn.ModuleList)):
        if len(sources) != len(objectives):
            raise RewardError(
                f"{len(sources)} rewards are given for the {len(objectives)} objectives {list(objectives)}; give one for "
                "each, in that order, or {objective: reward}",
                argument="rewards",
                value=len(sources),
                allowed=len(objectives),
            )
        return [((name,), source) for name, source in zip(objectives, sources, strict=True)]
    return [(objectives, sources)]


def as_source(source: Any, names: tuple[str, ...]) -> Callable[..., Any]:
    """A source as a callable with an output for each of these objectives; a module is wrapped as a ModuleReward.

    Raises:
        RewardError: it is of no known kind, or has another number of outputs.
    """
    label = f"the reward of {list(names)}"
    if isinstance(source, nn.Module):
        width = getattr(getattr(source, "score", None), "out_features", len(names))
        if width != len(names):
            raise RewardError(
                f"{label} is a {type(source).__name__} whose score has {width} outputs, but {len(names)} are needed; name all "
                "objectives that it covers, as {('a', 'b'): model}, or choose outputs with ModuleReward(model, output=...)",
                argument=label,
                value=width,
                allowed=len(names),
            )
        source = ModuleReward(source, output=range(len(names)))
    if not callable(source):
        raise RewardError(
            f"{label} is {source!r}; give a callable (prompts, completions, **columns), an nn.Module with TRL's interface, "
            "ClassifierReward(model, tokenizer) or URLReward(url)",
            argument=label,
            value=source,
        )
    outputs = (
        getattr(source, "outputs", len(names)) if isinstance(source, (ClassifierReward, ModuleReward)) else len(names)
    )
    if outputs != len(names):
        raise RewardError(
            f"{label} has {outputs} outputs; state one for each objective, as output=[0, 1]",
            argument=label,
            value=outputs,
        )
    return source  # type: ignore[no-any-return]
