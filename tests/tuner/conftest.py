from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from packaging import version
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_hoe import HoEConfig
from peft_hoe.tuner.layer import HoELayer


def _randomise(model: nn.Module, seed: int = 0) -> None:
    """Give experts and routers weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "hoe_" in name:
            scale = 0.5 if "hoe_router" in name else 0.2
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(drawn.to(parameter) * scale)  # as loading does: what lies how in memory stays
    for module in model.modules():
        if isinstance(module, HoELayer):
            for adapter in module.hoe_length:
                module.measure_lengths(adapter)


@pytest.fixture
def whole_graph() -> None:
    """Dynamo of older versions cannot trace PeftModel's forward whole."""
    if version.parse(torch.__version__) < version.parse("2.8"):
        pytest.skip("torch.compile cannot trace PEFT without a break")


@pytest.fixture
def randomise() -> Callable[..., None]:
    return _randomise


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    def make(width: int = 32) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=width,
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

    def make(
        *, trained: bool = False, dtype: torch.dtype = torch.float32, width: int = 32, **changes: object
    ) -> PeftModel:
        model = get_peft_model(llama(width).to(dtype), config(**changes))
        _randomise(model)
        if trained:
            model.mark_trained()
        return model.eval()

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """(3, 7) token ids without padding."""
    return torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))


def opt():
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            init_std=0.2,
        )
    )  # fmt: skip


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1, initializer_factor=3.0,
        )
    )  # fmt: skip


def bart():
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    )  # fmt: skip


@pytest.fixture
def steerable(hoe_llama, randomise):
    """Models of several architectures, with a trained router: steerable("opt")."""

    def make(kind):
        if kind == "llama":
            return hoe_llama(trained=True)
        task = "CAUSAL_LM" if kind == "opt" else "SEQ_2_SEQ_LM"
        base = {"opt": opt, "t5": t5, "bart": bart}[kind]()
        model = get_peft_model(
            base,
            HoEConfig(objectives=["a", "b"], routers=[[0.25, 0.75]], r=4, target_modules="all-linear", task_type=task),
        )
        randomise(model)
        model.mark_trained()
        return model.eval()

    return make
