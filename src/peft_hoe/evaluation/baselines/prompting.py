"""The preference as a part of the prompt, for the base model as it is: nothing is trained or stored.

A base model that was never taught to follow such a line will not follow it; RiC and DPA are this idea with training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import HoEError
from ...generation.completer import Completer
from ...generation.settings import evaluating
from ...preference import FloatArray
from ..methods.fingerprints import Source, weights_digest
from .adapters import load_base

TEMPLATE = "Write a text that is {preference}.\n\n"


def prompting(
    base: Source,
    policies: Mapping[str, Source],
    *,
    tokenizer: Any,
    folder: Source | None = None,
    template: str = TEMPLATE,
    decoding: Any = None,
    model_options: Mapping[str, Any] | None = None,
) -> Prompting:
    """The base model with the preference in its prompt.

    Args:
        base: directory or Hub id.
        policies: only the objectives' names are read.
        tokenizer: the base's.
        folder: not used.
        template: stands before text as it is, and in the system message of a chat; `{preference}` becomes such as
            "30% helpful and 70% harmless".
        decoding: what `Decoding.of` takes; default greedy, 64 new tokens.
        model_options: of `from_pretrained`.

    Raises:
        HoEError: the template has no `{preference}`.
    """
    model = load_base(base, model_options)
    return Prompting(model, list(policies), Completer(model, tokenizer, decoding), template)


class Prompting:
    """Any model that is told the preference."""

    name = "prompting"

    def __init__(self, model: Any, objectives: Sequence[str], completer: Completer, template: str) -> None:
        if "{preference}" not in template:
            raise HoEError(
                f'template is {template!r}; it needs {{preference}}, such as "Be {{preference}}.\\n"',
                argument="template", value=template, allowed="a text with {preference}",
            )  # fmt: skip
        self.model, self.completer, self.template = model, completer, template
        self.objectives = tuple(objectives)

    @property
    def decoding(self) -> dict[str, Any]:
        """How it generates, as plain JSON."""
        return self.completer.decoding.record

    @property
    def settings(self) -> dict[str, Any]:
        """What else its texts depend on."""
        return {"template": self.template}

    def fingerprint(self) -> str:
        """Changes with the model and the template."""
        return hashlib.sha256(json.dumps([weights_digest(self.model), self.template]).encode()).hexdigest()

    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        """Complete K prompts, row k at `preferences[k]` of `(K, N)`."""
        rows = [self.prompt(prompt, row) for prompt, row in zip(prompts, np.asarray(preferences), strict=True)]
        with evaluating(self.model):
            return self.completer.complete(self.model, rows)

    def prompt(self, prompt: Any, preference: FloatArray) -> Any:
        """A prompt that states a preference `(N,)`; of the kind that it was, text or chat messages."""
        line = self.template.replace("{preference}", self.words(preference))
        if isinstance(prompt, str):
            return line + prompt
        if prompt[0]["role"] == "system":
            return [{**prompt[0], "content": f"{prompt[0]['content']}\n\n{line.strip()}"}, *prompt[1:]]
        return [{"role": "system", "content": line.strip()}, *prompt]

    def words(self, preference: FloatArray) -> str:
        """Objectives of positive weight with their shares, rounded to per cent."""
        shares = zip(self.objectives, preference.tolist(), strict=True)
        parts = [f"{round(100 * weight)}% {name}" for name, weight in shares if weight > 0]
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
