"""Bases whose weights bitsandbytes or torchao keep in 4 or 8 bits, on the CPU. Each skips where its package is missing, but
in `make engines`."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_hoe import HoEConfig, HoELayer, StaticMergeError, export_lora

pytestmark = pytest.mark.filterwarnings("ignore")


def make_base():
    """Widths of 64 and more: bitsandbytes quantises 64 numbers together."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def put_experts_on(base):
    """Random experts and routers, the same on every base."""
    torch.manual_seed(1)
    config = HoEConfig(
        objectives=["low", "high"], routers=[[0.25, 0.75]], r=4, target_modules=["q_proj", "down_proj"], init_weights=False,
        interpolation="norm",
    )  # fmt: skip
    model = get_peft_model(base, config)
    for layer in model.modules():
        if isinstance(layer, HoELayer):
            layer.measure_lengths("default")
    return model.eval()


def needed(package):
    """A package that quantises; `make engines` installs both, and says that these tests must run there."""
    if os.environ.get("PEFT_HOE_REQUIRE_QUANTISED"):
        return importlib.import_module(package)
    return pytest.importorskip(package)


def by_bitsandbytes(bits):
    bnb = needed("bitsandbytes")

    def quantise(base):
        for name, module in list(base.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                if bits == 4:
                    narrow = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                    narrow.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                else:
                    narrow = bnb.nn.Linear8bitLt(
                        module.in_features, module.out_features, bias=False, has_fp16_weights=False
                    )
                    narrow.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
                base.set_submodule(name, narrow.to("cpu"))
        return base

    return quantise


def by_torchao(bits):
    quantisation = needed("torchao.quantization")

    def quantise(base):
        quantisation.quantize_(
            base,
            quantisation.Int8WeightOnlyConfig(),
            filter_fn=lambda module, name: name != "lm_head" and type(module) is torch.nn.Linear,
        )
        return base

    return quantise


@pytest.fixture(
    params=[(by_bitsandbytes, 4), (by_bitsandbytes, 8), (by_torchao, 8)], ids=["bnb-4", "bnb-8", "torchao-8"]
)
def quantised(request):
    """A function that gives the base, quantised."""
    make, bits = request.param
    quantise = make(bits)
    return lambda: quantise(make_base())


@pytest.fixture
def model(quantised):
    return put_experts_on(quantised())


@pytest.fixture
def ids():
    return torch.randint(4, 32, (2, 6), generator=torch.Generator().manual_seed(3))


def test_experts_add_to_a_quantised_base_what_they_add_to_a_plain_one(model):
    plain = {layer.module_name: layer for layer in put_experts_on(make_base()).modules() if isinstance(layer, HoELayer)}
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, HoELayer):
                x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
                other = plain[layer.module_name]
                found, expected = layer(x) - layer.base_layer(x), other(x) - other.base_layer(x)
                torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4)


def test_it_is_saved_loaded_and_exported(model, quantised, ids, tmp_path):
    with torch.no_grad():
        expected = model(input_ids=ids, preference=[0.3, 0.7]).logits
        model.save_pretrained(tmp_path / "hoe")
        loaded = PeftModel.from_pretrained(quantised(), tmp_path / "hoe").eval()
        torch.testing.assert_close(loaded(input_ids=ids, preference=[0.3, 0.7]).logits, expected)
        export_lora(model, [0.3, 0.7], tmp_path / "lora")
        lora = PeftModel.from_pretrained(quantised(), tmp_path / "lora").eval()
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, rtol=0, atol=1e-3)


def test_routers_get_gradients_and_merging_is_refused(model, ids):
    with pytest.raises(StaticMergeError, match="quantised"):
        model.merge_and_unload()
    model.mark_trained("r0")
    routers = {name: parameter for name, parameter in model.named_parameters() if "hoe_router" in name}
    for parameter in routers.values():
        parameter.requires_grad_(True)
    model(input_ids=ids, preference=[0.25, 0.75]).logits.float().pow(2).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in routers.values())
