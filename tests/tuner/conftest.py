from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_hoe import HoEConfig


def _randomise(model: nn.Module, seed: int = 0) -> None:
    """Give experts and routers weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "hoe_" in name:
            scale = 0.5 if "hoe_router" in name else 0.2
            parameter.data = (
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * scale
            )


@pytest.fixture
def randomise() -> Callable[..., None]:
    return _randomise


@pytest.fixture
def llama() -> Callable[[], LlamaForCausalLM]:
    def make() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def config() -> Callable[..., HoEConfig]:
    """Two objectives, the default experts, one router at [.25, .75]."""

    def make(**changes: object) -> HoEConfig:
        settings: dict[str, object] = {
            "objectives": ["a", "b"],
            "routers": [[0.25, 0.75]],
            "r": 4,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        }
        return HoEConfig(**{**settings, **changes})

    return make


@pytest.fixture
def hoe_llama(llama, config) -> Callable[..., PeftModel]:
    """A tiny Llama whose experts and routers do something; `trained=True` makes the router choose."""

    def make(*, trained: bool = False, **changes: object) -> PeftModel:
        model = get_peft_model(llama(), config(**changes))
        _randomise(model)
        if trained:
            model.mark_trained()
        return model.eval()

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """(3, 7) token ids without padding."""
    return torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
