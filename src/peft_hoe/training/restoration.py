"""What TRL's and transformers' trainers leave behind in a user's model, and how it is undone.

They write the tokenizer's special tokens and `use_cache` into its configurations, set its dropout to 0, tag it, hook its
embeddings for gradient checkpointing and, since TRL 1.16, give it a forward with a fused language-model head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FORWARDS = ("forward", "_original_forward")  # the second is accelerate's, under autocast
_MISSING = object()


@contextlib.contextmanager
def restored(policy: Any) -> Iterator[None]:
    """Afterwards tokens, `use_cache`, dropout, modes, tags, the embeddings' hooks and the forwards are what they were before.

    A model that the block moved to another device stays there.
    """
    model = policy.get_base_model()
    config = model.config
    owners = [config, config.get_text_config(), getattr(model, "generation_config", None)]
    before: list[tuple[Any, dict[str, Any]]] = [
        (owner, _held(owner, (*_TOKENS, "use_cache"))) for owner in owners if owner is not None
    ]
    tags = None if getattr(model, "model_tags", None) is None else list(model.model_tags)
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    embeddings = model.get_input_embeddings()
    hooks = set(embeddings._forward_hooks)
    modes = [(module, module.training) for module in policy.modules()]
    before += [(owner, _held(owner, _FORWARDS)) for owner in (policy, model)]
    try:
        yield
    finally:
        for owner, values in before:
            _put_back(owner, values)
        if hasattr(model, "model_tags"):
            model.model_tags = tags
        for module, p in dropouts:
            module.p = p
        for module, training in modes:
            module.training = training
        for key in set(embeddings._forward_hooks) - hooks:
            del embeddings._forward_hooks[key]


@contextlib.contextmanager
def forwards_taken(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Forwards that the block gives to modules are taken from them again; afterwards they are in what is yielded."""
    taken: dict[nn.Module, Any] = {}
    before = [(module, _held(module, _FORWARDS)) for module in modules]
    try:
        yield taken
    finally:
        for module, values in before:
            forward = vars(module).get("forward", _MISSING)
            if forward is not values["forward"]:
                taken[module] = forward
            _put_back(module, values)


@contextlib.contextmanager
def with_forwards(forwards: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Modules have these forwards while the block lasts."""
    before = [(module, _held(module, ("forward",))) for module in forwards]
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, values in before:
            _put_back(module, values)


def _held(owner: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: vars(owner).get(name, _MISSING) for name in names}


def _put_back(owner: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is not _MISSING:
            owner.__dict__[name] = value
        else:
            owner.__dict__.pop(name, None)
