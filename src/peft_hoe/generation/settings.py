"""How a model generates: decoding settings, what is recorded of them, and modes that are put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import GenerationConfig


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has its own mode again: users put parts of a model into evaluation mode."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the block lasts."""
    with modes_kept(model):
        model.eval()
        yield


def sampling(
    tokenizer: Any, stop: int | None, max_new_tokens: int, temperature: float, *, do_sample: bool = True
) -> GenerationConfig:
    """How a run generates: from the whole vocabulary at its temperature, or greedily."""
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id, **how
    )


@contextlib.contextmanager
def generating(policy: Any, settings: GenerationConfig) -> Iterator[GenerationConfig]:
    """The model's own settings out of the way: transformers fills what is None in ours, such as no stop token, from them."""
    # A PeftModel on which a user has set them gives them to its base with every call.
    before = [(module, module.generation_config) for module in policy.modules() if "generation_config" in vars(module)]
    for module, _ in before:
        module.generation_config = settings
    try:
        yield settings
    finally:
        for module, own in before:
            module.generation_config = own


def decoding_record(settings: GenerationConfig) -> dict[str, Any]:
    """Whatever of the settings is not transformers' default, as plain JSON."""
    given = settings.to_diff_dict()
    record = {name: given[name] for name in sorted(given.keys() - {"pad_token_id", "transformers_version"})}
    return record | {"do_sample": bool(settings.do_sample), "eos_token_id": settings.eos_token_id}
