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

`HoEMethod` is the one for models with HoE layers; others (a soup of weights, logit fusion, a prompt that states the preference,
a server) are functions or small classes of the same shape.

Shapes: K rows, P prompt positions, N objectives.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationConfig

from ..errors import HoEError, PreferenceError
from ..preference import FloatArray
from ..training.policies import evaluating, generating
from ..training.prompts import PromptCollator
from ..tuner.functional import mark_trained, use_preference
from ..tuner.steering import Steering


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
        routers: "keep", or "drop" for the coarse interpolation of the LoRA experts, as if no router were trained.
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
        if routers not in ("keep", "drop"):
            raise HoEError(f'routers is {routers!r}; use "keep" or "drop"')
        if max_new_tokens < 1 or not temperature > 0:
            raise HoEError(
                f"max_new_tokens is {max_new_tokens} and temperature {temperature}; both must be above 0 (greedy is "
                "do_sample=False)"
            )
        self.collate = PromptCollator(tokenizer)
        self.tokenizer = self.collate.tokenizer
        self.routers = routers
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}
        self.settings = copy.deepcopy(generation_config) or GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=do_sample, **sampling
        )
        if self.settings.max_new_tokens is None:
            raise HoEError("generation_config has no max_new_tokens; say how long completions may get")
        self.settings.pad_token_id = self.tokenizer.pad_token_id
        if self.settings.eos_token_id is None:
            self.settings.eos_token_id = _stop_tokens(model, self.tokenizer)
        self.mixes_rows = True

    @property
    def decoding(self) -> dict[str, Any]:
        """Whatever of the settings is not transformers' default, as plain JSON."""
        given = self.settings.to_diff_dict()
        record = {name: given[name] for name in sorted(given.keys() - {"pad_token_id", "transformers_version"})}
        record |= {"do_sample": bool(self.settings.do_sample), "eos_token_id": self.settings.eos_token_id}
        return record | ({"routers": "drop"} if self.routers == "drop" else {})

    def fingerprint(self) -> str:
        """Changes with the adapter's tensors, preferences and `trained` marks, and with the base."""
        digest = hashlib.sha256()
        routing = Steering.of(self.model).adapters[self.adapter]
        config = routing.config
        specs = [[vars(spec) for spec in (config.experts or []) + (config.routers or [])], config.router_temperature]
        digest.update(json.dumps([self.objectives, specs, routing.trained.tolist()], default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if not isinstance(tensor, torch.Tensor):
                continue
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if tensor.device.type != "meta" and tensor.numel():
                # The adapter whole; of the base 256 numbers of each tensor, which no training leaves as they were.
                step = 1 if "hoe_" in name else max(1, tensor.numel() // 256)
                some = tensor.detach().flatten()[::step].contiguous().cpu()
                digest.update(some.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        """Complete K prompts, row k at `preferences[k]` of `(K, N)`.

        The model's modes, marks and generation settings are as before afterwards.
        """
        wanted = np.asarray(preferences, dtype=np.float64)
        with evaluating(self.model), self._routers_dropped(), generating(self.model, self.settings):
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
        batch = self.collate([{"prompt": prompt} for prompt in prompts])
        device = next(self.model.parameters()).device
        ids = batch["input_ids"].to(device)
        with use_preference(self.model, {self.adapter: preference.tolist()}):
            output = self.model.generate(
                input_ids=ids, attention_mask=batch["attention_mask"].to(device), generation_config=self.settings
            )
        decoder_only = not getattr(self.model.config, "is_encoder_decoder", False)
        new = output[:, ids.shape[1] :] if decoder_only else output
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))

    @contextlib.contextmanager
    def _routers_dropped(self) -> Iterator[None]:
        """An untrained router votes its coarse weights, which add up to the coarse interpolation."""
        routing = Steering.of(self.model).adapters[self.adapter]
        names = zip(routing.config.router_names, routing.trained.tolist(), strict=True)
        trained = [name for name, mark in names if mark and self.routers == "drop"]
        if trained:
            mark_trained(self.model, trained, trained=False, adapter_name=self.adapter)
        try:
            yield
        finally:
            if trained:
                mark_trained(self.model, trained, adapter_name=self.adapter)


def _stop_tokens(model: Any, tokenizer: Any) -> Any:
    """The tokenizer's end of text, and what else the model's own settings stop at, such as the end of a turn."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])} - {None}
    return min(stops) if len(stops) == 1 else sorted(stops) or None
