"""Rewards on a command line, the same in every command.

NAME=module:function            a function (prompts, completions, **columns) of an importable module
NAME=hub:ID[#output][:-]        a sequence classifier from the Hub or a directory; which output (index or label); negated
NAME=url:http://host/path       a server, see URLReward
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..errors import RewardError
from .classifier import ClassifierReward
from .url import URLReward

_FORMS = "NAME=module:function, NAME=hub:ID[#output][:-] or NAME=url:http://..."


@dataclass(frozen=True)
class HubReward:
    """What `hub:ID[#output][:-]` says.

    Attributes:
        name: Hub id or directory.
        output: index or label.
        sign: 1 or -1.
    """

    name: str
    output: int | str
    sign: int


def parse_rewards(texts: Sequence[str]) -> dict[str | tuple[str, ...], Any]:
    """What `Rewards` takes, from N texts of the forms above.

    A classifier that several objectives name is loaded and run once.

    Raises:
        RewardError: a text of another form, an objective named twice, or something that cannot be imported or loaded.
    """
    named: dict[str, Any] = {}
    for text in texts:
        name, source = parse_reward(text)
        if name in named:
            raise RewardError(
                f"the reward of {name!r} is given twice, the second time as {text!r}; give one",
                argument="--reward",
                value=text,
            )
        named[name] = source
    hubs: dict[str, list[str]] = {}  # model: objectives
    for name, source in named.items():
        if isinstance(source, HubReward):
            hubs.setdefault(source.name, []).append(name)
    sources: dict[str | tuple[str, ...], Any] = {
        name: source for name, source in named.items() if not isinstance(source, HubReward)
    }
    for model, names in hubs.items():
        sources[tuple(names)] = load_classifier(model, [named[name] for name in names])
    return sources


def parse_reward(text: str) -> tuple[str, Callable[..., Any] | HubReward]:
    """Objective and source of one text; a classifier is not loaded yet.

    Raises:
        RewardError: as `parse_rewards`.
    """
    name, equals, source = text.partition("=")
    name, source = name.strip(), source.strip()
    kind, colon, rest = source.partition(":")
    if not (name and equals and kind and colon and rest):
        raise RewardError(f"cannot read the reward {text!r}; write {_FORMS}", argument="--reward", value=text)
    if kind == "hub":
        return name, _parse_hub(rest, text)
    if kind == "url":
        return name, URLReward(rest)
    return name, load_function(kind, rest)


def _parse_hub(text: str, shown: str) -> HubReward:
    positive = text.removesuffix(":-")
    model, hash_sign, output = positive.partition("#")
    if not model or (hash_sign and not output):
        raise RewardError(
            f"cannot read the reward {shown!r}; write NAME=hub:ID[#output][:-], such as good=hub:org/model#1",
            argument="--reward",
            value=shown,
        )
    index = int(output) if output.isdigit() else output or 0
    return HubReward(model, index, 1 if positive == text else -1)


def load_function(module: str, path: str) -> Callable[..., Any]:
    """A function by module and dotted path; modules of the working directory are found, as `python -m` finds them.

    Raises:
        RewardError: there is no such module, or nothing callable of that name in it.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise RewardError(
            f"cannot import the reward's module {module!r} ({error}); run the command where it lies, or install it",
            argument="--reward",
            value=module,
        ) from error
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise RewardError(f"module {module!r} has no function {path!r}", argument="--reward", value=path)
    return found  # type: ignore[no-any-return]


def load_classifier(name: str, outputs: Sequence[HubReward]) -> ClassifierReward:
    """A classifier and its tokenizer, with K of its outputs.

    Raises:
        RewardError: it cannot be loaded, or has not these outputs.
    """
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RewardError(f"cannot load the classifier {name!r}: {error}", argument="--reward", value=name) from error
    if loading["missing_keys"]:  # transformers would draw them at random
        raise RewardError(
            f"{name!r} is no sequence classifier: it does not hold {sorted(loading['missing_keys'])}",
            argument="--reward",
            value=name,
        )
    return ClassifierReward(
        model, tokenizer, output=[reward.output for reward in outputs], sign=[reward.sign for reward in outputs]
    )
