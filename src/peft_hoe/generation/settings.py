"""A model while it generates: its modes, its own settings and the random numbers are as before afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
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


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """`generate` draws from the global generators only, so they are seeded here and put back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        yield


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
