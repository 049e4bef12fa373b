"""B lies column by column in memory however it came there, unless it trains, and is saved row by row."""

from __future__ import annotations

import torch
from peft import PeftModel
from safetensors import safe_open

from peft_hoe.tuner.layer import HoELayer

LIVE = [0.25, 0.75]


def layers(model):
    return [module for module in model.modules() if isinstance(module, HoELayer)]


def is_laid_out(model):
    return all(layer.factors("default")[1].t().is_contiguous() for layer in layers(model))


def test_columns_of_b_are_blocks_of_memory_however_they_came(hoe_llama, llama, tokens, tmp_path):
    model = hoe_llama(trained=True)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens, preference=LIVE).logits, model(tokens, preference=LIVE).logits)
        assert is_laid_out(loaded)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        for layer in layers(model):
            saved = file.get_tensor(f"base_model.model.{layer.module_name}.hoe_B.weight")
            torch.testing.assert_close(saved, layer.factors("default")[1], rtol=0, atol=0)


def test_experts_that_train_stay_as_torch_made_them(hoe_llama):
    """What trains may be flattened by an optimiser or by processes that share it."""
    assert all(layer.factors("default")[1].is_contiguous() for layer in layers(hoe_llama(train_experts=True)))
