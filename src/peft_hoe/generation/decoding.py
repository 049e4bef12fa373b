"""Decoding: how texts are written token by token, and where they end; one for all that trains, measures and compares.

A text ends after `max_new_tokens`, at a stop token, or at a stop string. Stop tokens and the tokens of a stop string belong to
what was generated: training counts them, up to and including the token that completes the stop string. The text ends before the
stop string.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import GenerationConfig

from ..errors import HoEError
from . import checks
from .checks import SAMPLING_OPTIONS
from .vocabulary import tokenizer_of, vocabulary_size

# Of a GenerationConfig, what does not change a text.
_NO_MATTER = {"pad_token_id", "bos_token_id", "transformers_version", "_from_model_config"}


@dataclass(frozen=True)
class Decoding:
    """How texts are written; every part that generates takes one, compares it as a whole, and records it.

    Args:
        max_new_tokens: length of a text, at most.
        do_sample: draw each token; off, take the most likely one (greedy).
        temperature: of sampling.
        top_k: draw from so many most likely tokens; 0 for the whole vocabulary.
        top_p: draw from the most likely tokens of so much probability; 1 for the whole vocabulary.
        stop_strings: a text ends before the first of them.
        stop_tokens: a text ends at any of them. None for those of the tokenizer and of the model's `generation_config`
            together, such as the end of text and the end of a turn; `()` for none.
        chat_template_kwargs: arguments of the tokenizer's chat template, for prompts that are chats, such as
            `{"enable_thinking": False}`.
        options: more fields of transformers' GenerationConfig, such as `{"repetition_penalty": 1.2}`.

    Nothing else comes from the model's own generation settings.

    Raises:
        HoEError: a value is out of range, there is no such option, or sampling is set up where nothing is drawn.

    Example:
        >>> from peft_hoe import Decoding
        >>> Decoding(max_new_tokens=32, do_sample=True, temperature=0.7, stop_strings=["Human:"]).record["stop_strings"]
        ['Human:']
        >>> Decoding.of({"max_new_tokens": 8, "repetition_penalty": 1.2}) == Decoding(8, options={"repetition_penalty": 1.2})
        True
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked = {
            "max_new_tokens": checks.whole("max_new_tokens", self.max_new_tokens, 1),
            "do_sample": checks.yes_or_no(self.do_sample),
            "temperature": checks.number("temperature", self.temperature, math.inf),
            "top_k": checks.whole("top_k", self.top_k, 0),
            "top_p": checks.number("top_p", self.top_p, 1.0),
            "stop_strings": checks.strings(self.stop_strings),
            "stop_tokens": checks.tokens(self.stop_tokens),
            "chat_template_kwargs": checks.template_arguments(self.chat_template_kwargs),
            "options": checks.options(self.options, {item.name for item in fields(self)}),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not self.do_sample:
            self._check_greedy()

    def __hash__(self) -> int:
        return hash(json.dumps(self.record, sort_keys=True))

    def _check_greedy(self) -> None:
        drawn = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        given = {name: getattr(self, name) for name, default in drawn.items() if getattr(self, name) != default}
        given |= {name: self.options[name] for name in SAMPLING_OPTIONS if name in self.options}
        if given:
            said = ", ".join(f"{name} is {value}" for name, value in given.items())
            raise HoEError(
                f"{said}, but do_sample is False: greedy texts are the same with any; give do_sample=True, or leave it out",
                argument=next(iter(given)),
                value=next(iter(given.values())),
            )

    @classmethod
    def of(cls, given: Decoding | GenerationConfig | Mapping[str, Any] | None) -> Decoding:
        """A Decoding from one, from a mapping, or from a GenerationConfig.

        Args:
            given: a Decoding, as it is; a mapping of the fields above, as `record` writes it, in which any other name is one of
                `options`; a GenerationConfig that has `max_new_tokens`; or None for the defaults. A GenerationConfig means what
                it means to `generate` on a model without settings of its own: sampling without a `top_k` draws from the 50 most
                likely tokens. Without an `eos_token_id` it has the default stop tokens.

        Raises:
            HoEError: it is none of these, or cannot be one.
        """
        if given is None:
            return cls()
        if isinstance(given, Decoding):
            return given
        if isinstance(given, GenerationConfig):
            return _of_generation_config(given)
        if not isinstance(given, Mapping):
            raise HoEError(
                f"the decoding is {given!r}, a {type(given).__name__}; give a Decoding, a GenerationConfig or a mapping such "
                'as {"max_new_tokens": 64}',
                argument="decoding",
                value=given,
            )
        names = {item.name for item in fields(cls)} - {"options"}
        options = {name: value for name, value in given.items() if name not in names and name != "options"}
        return cls(
            **{name: value for name, value in given.items() if name in names},
            options={**(given.get("options") or {}), **options},
        )

    @property
    def record(self) -> dict[str, Any]:
        """Plain JSON, from which `Decoding.of` makes it again; what means nothing in this decoding is left out."""
        drawn = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            **(drawn if self.do_sample else {}),
            **({"stop_strings": list(self.stop_strings)} if self.stop_strings else {}),
            "stop_tokens": None if self.stop_tokens is None else list(self.stop_tokens),
            **({"chat_template_kwargs": dict(self.chat_template_kwargs)} if self.chat_template_kwargs else {}),
            **self.options,
        }

    def resolved(self, model: Any, tokenizer: Any) -> Decoding:
        """The same, with its stop tokens as numbers: what is recorded and compared."""
        if self.stop_tokens is not None:
            return self
        return replace(self, stop_tokens=stop_tokens(model, tokenizer))

    def resolve(self, model: Any, tokenizer: Any) -> GenerationConfig:
        """What transformers generates with, stop strings apart: `generate_responses` looks out for them (`StopAtStrings`).

        Args:
            model: whose stop tokens count where this has none of its own; of an encoder-decoder also where decoding begins.
            tokenizer: the policy's, with a padding token, or a processor that holds it.
        """
        tokenizer = tokenizer_of(tokenizer)
        settings: dict[str, Any] = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if not self.do_sample:
            settings = {}
        stops = self.resolved(model, tokenizer).stop_tokens
        if getattr(model.config, "is_encoder_decoder", False):
            places = (getattr(model, "generation_config", None), model.config)
            starts = [getattr(place, "decoder_start_token_id", None) for place in places]
            settings["decoder_start_token_id"] = next((start for start in starts if start is not None), None)
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            eos_token_id=list(stops) if stops else None,
            pad_token_id=padding_token(model, tokenizer),
            **{**settings, **self.options},
        )


def padding_token(model: Any, tokenizer: Any) -> int:
    """What rows that have ended go on with: the tokenizer's padding token, or 0 where the model has no embedding for it."""
    token: int = tokenizer_of(tokenizer).pad_token_id
    size = vocabulary_size(model)
    return token if size is None or token < size else 0


def stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's end of text, and what else the model's own settings stop at, such as the end of a turn."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokenizer = tokenizer_of(tokenizer)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])} - {None}
    return tuple(sorted(int(token) for token in found))


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two recorded decodings, each as "name: one there, another here".

    A record of `Decoding` says everything; what a method of another origin does not say of itself is not compared.

    Args:
        first: plain JSON, as `record`.
        second: likewise.
    """
    whole = all("stop_tokens" in record and "max_new_tokens" in record for record in (first, second))
    names = [name for name in {**first, **second} if whole or (name in first and name in second)]
    if first.get("do_sample") != second.get("do_sample"):  # the other one has none
        names = [name for name in names if name not in ("temperature", "top_k", "top_p")]
    return [
        f"{name}: {first.get(name)!r} there, {second.get(name)!r} here"
        for name in names
        if first.get(name) != second.get(name)
    ]


def _of_generation_config(config: GenerationConfig) -> Decoding:
    given = config.to_diff_dict()
    if config.max_new_tokens is None:
        raise HoEError(
            "generation_config has no max_new_tokens; say how long completions may get", argument="max_new_tokens"
        )
    kept = {name: value for name, value in given.items() if name not in _NO_MATTER}
    stops = kept.pop("eos_token_id", None)
    drawn = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    for name, default in drawn.items():
        kept.pop(name, None)
        if config.do_sample:
            value = getattr(config, name)
            kept[name] = default if value is None else value
    return Decoding.of({**kept, "do_sample": bool(config.do_sample), "stop_tokens": stops})
