"""What cannot be adapted is refused by name: when the adapter is put in, or at latest when the model passes it by."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from packaging import version
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_hoe import HoEConfig, HoEWarning
from peft_hoe.errors import ModuleError

TRANSFORMERS = version.parse(transformers.__version__)


def adapted(base, randomise, *targets, **changes):
    config = HoEConfig(objectives=["a", "b"], r=2, target_modules=list(targets), **changes)
    model = get_peft_model(base.double().eval(), config).double()
    randomise(model)
    return model


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))


@pytest.mark.skipif(version.parse("5") > TRANSFORMERS, reason="transformers 4 calls the module")
def test_mambas_weights_that_are_read_past_their_module(randomise, tokens):
    # Mamba computes dt_proj.weight @ x: an adapter there did nothing, until it was merged.
    model = adapted(mamba(), randomise, "dt_proj", task_type="CAUSAL_LM")
    with (
        pytest.raises(ModuleError, match=r"weight of backbone.layers.0.mixer.dt_proj past") as refused,
        torch.no_grad(),
    ):
        model(tokens, preference=[1, 0])
    assert refused.value.module == "backbone.layers.0.mixer.dt_proj"
    with model.disable_adapter(), torch.no_grad():
        base = model(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(base, mamba().double().eval()(tokens).logits)
        merged = model.merge_and_unload()  # there is nothing to be passed by any more
        assert not torch.allclose(merged(tokens).logits, base)


def mamba2():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=64, **sizes))


@pytest.mark.parametrize("target", ["out_proj", "conv1d"])
@pytest.mark.parametrize("make", [mamba, mamba2])
def test_pefts_refusals_by_type_of_model_hold(make, target):
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(make(), LoraConfig(target_modules=[target]))
    with pytest.raises(ModuleError, match="incompatible with Mamba") as refused:
        get_peft_model(make(), HoEConfig(objectives=["a", "b"], target_modules=[target], task_type="CAUSAL_LM"))
    assert refused.value.module == target


def test_other_mamba_modules_are_right(randomise, tokens):
    model = adapted(mamba(), randomise, "in_proj", "x_proj", task_type="CAUSAL_LM")
    with torch.no_grad():
        unmerged = model(tokens, preference=[0.3, 0.7]).logits
        model.set_preference([0.3, 0.7])
        torch.testing.assert_close(model.merge_and_unload()(tokens).logits, unmerged)


def test_a_transformer_encoder_does_not_take_its_fast_path_around_the_adapter(randomise):
    # In eval mode it reads linear1.weight past linear1; a weight that is guarded makes it go through its modules.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = adapted(base, randomise, "linear1", "linear2")
    x = torch.randn(2, 5, 16).double()
    with torch.no_grad():
        fast = model(x, preference=[0.3, 0.7])
        model.train()
        torch.testing.assert_close(fast, model(x, preference=[0.3, 0.7]))
        assert not torch.allclose(fast, model(x, preference=[0, 1]))


def test_a_weight_may_be_looked_at(randomise, tokens):
    # T5 asks wo.weight for its type in every forward.
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = adapted(T5ForConditionalGeneration(config), randomise, "wo", task_type="SEQ_2_SEQ_LM")
    model(input_ids=tokens, labels=tokens, preference=[1, 0])
    seen = []

    def look(module, args):
        weight = model.base_model.model.encoder.block[0].layer[1].DenseReluDense.wo.weight
        seen.append((weight.dtype, weight.device.type, tuple(weight.shape), weight.ndim, weight.requires_grad))
        with pytest.raises(ModuleError, match="wo past"):
            weight.sum()

    model.base_model.model.decoder.register_forward_pre_hook(look)
    model(input_ids=tokens, labels=tokens, preference=[1, 0])
    assert seen == [(torch.float64, "cpu", (32, 48), 2, False)]
    layer = model.base_model.model.encoder.block[0].layer[1].DenseReluDense.wo
    assert type(layer.weight) is nn.Parameter  # between calls it is the weight itself


def test_a_tensor_parallel_base_is_refused(llama):
    base = llama()
    base._tp_size = 2
    with pytest.raises(ModuleError, match="split over 2 processes"):
        get_peft_model(base, HoEConfig(objectives=["a", "b"], target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_a_shared_weight_is_refused(llama):
    base = llama()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        part = base.model.layers[0].self_attn.q_proj
        part.weight = nn.Parameter(distribute_tensor(part.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ModuleError, match=r"q_proj has a weight that several processes share \(DTensor\)"):
            get_peft_model(base, HoEConfig(objectives=["a", "b"], target_modules=["q_proj"], task_type="CAUSAL_LM"))
    finally:
        torch.distributed.destroy_process_group()


def test_the_overridden_check_of_peft_has_its_signature():
    parameters = list(inspect.signature(BaseTuner._check_target_module_compatiblity).parameters)
    assert parameters == ["self", "peft_config", "model", "target_name"]


@pytest.mark.parametrize(("targets", "left"), [("all-linear", 2), (["q_proj", "down_proj"], 1)])
def test_fused_experts_that_are_left_out_are_told(targets, left):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=4, num_key_value_heads=2, **sizes))
    if not any(parameter.ndim == 3 for parameter in base.parameters()):
        pytest.skip("before transformers 5 each expert has linear modules")
    config = HoEConfig(objectives=["a", "b"], r=2, target_modules=targets, task_type="CAUSAL_LM")
    with pytest.warns(HoEWarning, match=f"{left} tensors that hold all experts .* are left out"):
        get_peft_model(base, config)


class Clamps(nn.Module):
    """Keeps its weight small while it trains, as Gemma3n does."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        if self.training:
            self.proj.weight.data.clamp_(-0.1, 0.1)
        return self.proj(x)


def test_a_weight_that_is_clamped_in_place_is_not_read(randomise):
    # It was refused, as if the adapter did nothing there; the base changes, and the adapter acts as before.
    torch.manual_seed(0)
    model = adapted(Clamps(), randomise, "proj")
    x = torch.randn(3, 8).double()
    weight = model.base_model.model.proj.weight.detach().clone()
    assert float(weight.abs().max()) > 0.1
    with torch.no_grad():
        experts = model(x, preference=[0.3, 0.7]) - x @ weight.T
        trained = model.train()(x, preference=[0.3, 0.7])
        torch.testing.assert_close(trained, x @ weight.clamp(-0.1, 0.1).T + experts)
    torch.testing.assert_close(model.base_model.model.proj.weight.detach(), weight.clamp(-0.1, 0.1), rtol=0, atol=0)


def test_what_data_gives_is_guarded_too(randomise):
    model = adapted(nn.Sequential(Clamps()), randomise, "proj").train()
    layer = model.base_model.model[0].proj
    layer.base_layer.register_forward_pre_hook(lambda *unused: layer.weight.data.sum())
    with pytest.raises(ModuleError, match=r"the weight of 0\.proj past"):
        model(torch.randn(3, 8).double(), preference=[0.3, 0.7])
