"""Checks of what a Decoding is made of: each gives the value in its plain form, or a HoEError that names it."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

from transformers import GenerationConfig

from ..errors import HoEError

# Options of transformers that mean something only where tokens are drawn.
SAMPLING_OPTIONS = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Options of transformers that Decoding says by another name, or that are not for whoever writes texts: why, and what to do.
_OTHERWISE = {
    "eos_token_id": "say stop_tokens=",
    "max_length": "it counts the prompt too; say max_new_tokens=",
    "min_length": "it counts the prompt too; say min_new_tokens",
    "max_time": "texts would depend on the machine; say max_new_tokens=",
    "num_return_sequences": "each row has one text; ask for several where you ask for texts (texts= of a sweep)",
    "pad_token_id": "it is the tokenizer's",
    "bos_token_id": "it is the tokenizer's",
    "return_dict_in_generate": "texts are all that is read",
    "output_scores": "texts are all that is read",
    "output_logits": "texts are all that is read",
    "output_attentions": "texts are all that is read",
    "output_hidden_states": "texts are all that is read",
}


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least:
        raise HoEError(
            f"{name} is {value!r}; it must be a whole number, at least {least}",
            argument=name, value=value, allowed=f"at least {least}",
        )  # fmt: skip
    return found


def number(name: str, value: Any, most: float) -> float:
    """A number above 0 and at most `most`."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= most and value < math.inf
    if not right:
        limits = "above 0" if most == math.inf else f"above 0 and at most {most:g}"
        raise HoEError(
            f"{name} is {value!r}; it must be a number {limits} (greedy is do_sample=False)",
            argument=name, value=value, allowed=limits,
        )  # fmt: skip
    return float(value)


def yes_or_no(value: Any) -> bool:
    """True or False: whether tokens are drawn."""
    if not isinstance(value, bool):
        raise HoEError(
            f"do_sample is {value!r}; give True (draw tokens) or False (greedy)",
            argument="do_sample", value=value, allowed=(True, False),
        )  # fmt: skip
    return value


def strings(value: Any) -> tuple[str, ...]:
    """Stop strings, each once; one text stands for itself."""
    given = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(given, Iterable) or not all(isinstance(item, str) and item for item in list(given)):
        raise HoEError(
            f'stop_strings is {value!r}; give texts that are not empty, such as ["Human:"]',
            argument="stop_strings", value=value,
        )  # fmt: skip
    return tuple(dict.fromkeys(given))


def tokens(value: Any) -> tuple[int, ...] | None:
    """Stop tokens, ascending; None stays None."""
    if value is None:
        return None
    try:
        given = value.tolist() if hasattr(value, "tolist") else value
        found = [operator.index(item) for item in (given if isinstance(given, Iterable) else [given])]
    except TypeError:
        found = [-1]
    if any(token < 0 for token in found):
        raise HoEError(
            f"stop_tokens is {value!r}; give token ids, () for none, or None for the model's and tokenizer's",
            argument="stop_tokens",
            value=value,
        )
    return tuple(sorted(set(found)))


def template_arguments(given: Any) -> dict[str, Any]:
    """Arguments of a chat template, from a mapping or its JSON."""
    try:
        arguments = json.loads(given) if isinstance(given, str) else {} if given is None else given
        if not isinstance(arguments, Mapping):
            raise TypeError(f"it is a {type(given).__name__}")
        found: dict[str, Any] = json.loads(json.dumps(dict(arguments), sort_keys=True))
    except (TypeError, ValueError) as error:
        raise HoEError(
            f"chat_template_kwargs is {given!r} ({error}); give a mapping of plain values, or its JSON, such as "
            '{"enable_thinking": false}',
            argument="chat_template_kwargs",
            value=given,
        ) from None
    return found


def options(given: Any, named: Set[str]) -> dict[str, Any]:
    """Fields of transformers' GenerationConfig beside those that a Decoding has a name for, `named`."""
    if not isinstance(given, Mapping):
        raise HoEError(
            f"options is {given!r}; give a mapping of fields of GenerationConfig", argument="options", value=given
        )
    known = vars(GenerationConfig())
    for name in given:
        if name in _OTHERWISE:
            raise HoEError(
                f"{name} is {given[name]!r}, which is no option of a decoding: {_OTHERWISE[name]}",
                argument=name, value=given[name],
            )  # fmt: skip
        if name in named or name not in known or name.startswith("_"):
            raise HoEError(
                f"{name} is no option of a decoding; it has {', '.join(sorted(named - {'options'}))}, and options are other "
                "fields of transformers' GenerationConfig",
                argument=name,
                value=given[name],
                allowed=sorted(named - {"options"}),
            )
    try:
        found: dict[str, Any] = json.loads(json.dumps({name: given[name] for name in sorted(given)}))
        GenerationConfig(do_sample=True, **found)  # without it, transformers says that sampling options are ignored
    except (TypeError, ValueError) as error:
        raise HoEError(
            f"the options {dict(given)!r} cannot be used: {error}; give plain values as GenerationConfig takes",
            argument="options",
            value=dict(given),
        ) from None
    return found
