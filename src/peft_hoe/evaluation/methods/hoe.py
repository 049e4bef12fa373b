"""What a sweep measures: methods that turn prompts and preferences into completions.

A method is any callable `(prompts, preferences) -> completions`: K prompts (texts or chat messages), preferences `(K, N)`, K
texts. Rows may have different preferences, and a greedy method's text for a row must not depend on the other rows. What else a
sweep reads of a method, each optional:

| attribute | meaning | without it |
|---|---|---|
| `name` | what tables and plots call it | the function's name |
| `objectives` | the N names, in the preferences' order | the names of the rewards |
| `decoding` | how it generates, plain JSON; `do_sample: True` says that a second text would differ | `{}` |
| `fingerprint()` | tells this model from another, so that an interrupted sweep is not continued with the wrong one | `None` |
| `mixes_rows` | False where all rows of a call must share one preference | True |

`HoEMethod` is the one for models with HoE layers; others (a server, say) are functions or small classes of the same shape, and
`evaluation.baselines` has those that HoE is compared with.

Shapes: K rows, P prompt positions, N objectives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationConfig

from ...errors import PreferenceError, check_choice
from ...generation.decoder import Decoder, weights_digest
from ...generation.settings import evaluating
from ...preference import FloatArray
from ...tuner.functional import use_preference
from ...tuner.plan import ROUTERS
from ...tuner.steering import Steering


class Generate(Protocol):
    """The smallest method."""

    def __call__(self, prompts: Sequence[Any], preferences: FloatArray, /) -> Sequence[str]:
        """Complete K prompts, row k at `preferences[k]` of `(K, N)`."""


class HoEMethod:
    """A model that carries HoE layers, steered row by row.

    Args:
        model: its first active HoE adapter is steered.
        tokenizer: the policy's, or a processor that holds it.
        max_new_tokens: length of a completion.
        do_sample: sample from the whole vocabulary; off, greedy.
        temperature: of sampling.
        routers: as in `HoEModel.use_preference`: "keep", "static", or "drop" for the interpolation of the LoRA experts alone.
        generation_config: any other decoding in place of the three above; it needs `max_new_tokens`. Nothing is filled in from
            the model's own settings but stop tokens, where this one has none.

    Raises:
        PreferenceError: there is no active HoE adapter.
        HoEError: an option is out of range, or the tokenizer has no padding token.
    """

    name = "HoE"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        routers: str = "keep",
        generation_config: GenerationConfig | None = None,
    ) -> None:
        steering = Steering.of(model)
        self.model, self.adapter = model, steering.active_adapter()
        self.objectives = tuple(steering.adapters[self.adapter].objectives)
        check_choice("routers", routers, ROUTERS)
        self.decoder = Decoder(
            model, tokenizer, max_new_tokens=max_new_tokens, do_sample=do_sample, temperature=temperature,
            generation_config=generation_config,
        )  # fmt: skip
        self.tokenizer = self.decoder.tokenizer
        self.routers = routers
        self.mixes_rows = True

    @property
    def decoding(self) -> dict[str, Any]:
        """Whatever of the settings is not transformers' default, as plain JSON."""
        return self.decoder.record | ({} if self.routers == "keep" else {"routers": self.routers})

    def fingerprint(self) -> str:
        """Changes with the adapter's tensors, preferences and `trained` marks, and with the base."""
        digest = hashlib.sha256()
        routing = Steering.of(self.model).adapters[self.adapter]
        config = routing.config
        specs = [[vars(spec) for spec in (config.experts or []) + (config.routers or [])], config.router_temperature]
        digest.update(json.dumps([self.objectives, specs, routing.trained.tolist()], default=str).encode())
        digest.update(weights_digest(self.model).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        """Complete K prompts, row k at `preferences[k]` of `(K, N)`.

        The model's modes, marks and generation settings are as before afterwards.
        """
        wanted = np.asarray(preferences, dtype=np.float64)
        with evaluating(self.model):
            if self.mixes_rows:
                try:
                    return self._complete(prompts, wanted)
                except PreferenceError:  # a layer that cannot tell rows apart, such as a mixture of experts
                    self.mixes_rows = False
            texts: dict[int, str] = {}
            for point in np.unique(wanted, axis=0):
                rows = np.flatnonzero((wanted == point).all(axis=1)).tolist()
                texts |= dict(zip(rows, self._complete([prompts[row] for row in rows], point), strict=True))
        return [texts[row] for row in range(len(prompts))]

    def _complete(self, prompts: Sequence[Any], preference: FloatArray) -> list[str]:
        """At one preference `(N,)`, or at one for each row `(K, N)`."""
        with use_preference(self.model, {self.adapter: preference.tolist()}, routers=self.routers):
            return self.decoder.complete(self.model, prompts)
