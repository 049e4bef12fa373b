"""A file is loaded as its configuration describes it, or not at all."""

from __future__ import annotations

import json

import pytest
import safetensors
import torch
from packaging import version
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_hoe import CheckpointError, ExpertError, ExpertSpec, HoEConfig, HoEWarning, RouterSpec

EXPERTS = [ExpertSpec([1, 0], r=1), ExpertSpec([0, 1], r=2), ExpertSpec([0.5, 0.5], r=3)]
ROUTERS = [
    RouterSpec([0.25, 0.75], votes_for=["b", "centroid"], trained=True),
    RouterSpec([0.75, 0.25], votes_for=["a", "b"], trained=True),
]


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.fixture
def saved(hoe_llama, llama, tmp_path):
    """(base directory, adapter directory), experts of different ranks, two routers."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    llama().save_pretrained(base)
    hoe_llama(experts=EXPERTS, routers=ROUTERS).save_pretrained(adapter)
    return base, adapter


def edit(adapter, change):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewrite(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def by_peft(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def by_low_memory(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True)


def by_transformers(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    model(torch.ones(1, 2, dtype=torch.long))
    return model


def with_a_configuration(base, adapter):
    config = HoEConfig.from_pretrained(adapter)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, config=config)


EVERY_WAY = pytest.mark.parametrize("load", [by_peft, by_low_memory, by_transformers, with_a_configuration])


# -- a configuration that contradicts its file ---


def other_order(config):
    config["experts"] = [config["experts"][i] for i in (2, 1, 0)]


def other_ranks(config):
    for expert, rank in zip(config["experts"], (3, 2, 1), strict=True):
        expert["r"] = rank


def other_preferences(config):
    first, second = config["experts"][:2]
    first["preference"], second["preference"] = second["preference"], first["preference"]
    config["routers"][0]["votes_for"] = ["a", "centroid"]


def other_routers(config):
    config["routers"].reverse()


def other_votes(config):
    config["routers"][1]["votes_for"] = ["a", "centroid"]


@EVERY_WAY
@pytest.mark.parametrize("change", [other_order, other_ranks, other_preferences, other_routers, other_votes])
def test_experts_and_routers_in_another_order(saved, load, change):
    # The shapes are the same. Ranks in another order moved logits by 0.44, in silence.
    base, adapter = saved
    edit(adapter, change)
    with pytest.raises(CheckpointError, match=r"fingerprint .* were changed or put in another order"):
        load(base, adapter)


@EVERY_WAY
def test_other_names_temperatures_and_defaults_are_no_contradiction(saved, load, tokens, agree):
    base, adapter = saved
    alone = logits(by_peft(base, adapter), tokens, preference=[1, 0])

    def rename(config):
        config["experts"][0]["name"] = "first"
        config["routers"][1]["votes_for"] = ["first", "b"]
        config["router_temperature"] = 2.0
        config["default_preference"] = [1, 0]

    edit(adapter, rename)
    model = load(base, adapter)
    config = model.peft_config["default"]
    assert [expert.name for expert in config.experts] == ["first", "b", "centroid"]
    assert config.router_temperature == 2
    agree(logits(model, tokens), alone)  # the default is the first expert alone now, where no router votes


def test_target_modules_that_leave_tensors_unused(saved):
    # 0.27 in the logits, and PEFT does not say that tensors of a file went nowhere.
    base, adapter = saved
    edit(adapter, lambda config: config.update(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(CheckpointError, match=r"holds the tensor .*(k|o|up|gate|down)_proj.*no place for it"):
        by_peft(base, adapter)


def test_routers_that_the_configuration_does_not_have(saved):
    base, adapter = saved
    edit(adapter, lambda config: config.update(routers=[], fingerprint=None))
    with pytest.raises(CheckpointError, match="is a router's, but the configuration has no routers"):
        by_peft(base, adapter)


def test_a_mark_that_is_a_text(saved):
    base, adapter = saved
    edit(adapter, lambda config: config["routers"][0].update(trained="false"))
    with pytest.raises(ExpertError, match="trained of router 'r0' is 'false'; use True or False"):
        by_peft(base, adapter)


# -- a file that is not what it should be ---

COMPLEX = pytest.mark.skipif(
    version.parse(safetensors.__version__) < version.parse("0.6"), reason="safetensors cannot write it"
)
A = "base_model.model.model.layers.1.mlp.up_proj.hoe_A.weight"
B = A.replace("hoe_A", "hoe_B")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, pytest.param(torch.complex64, marks=COMPLEX)])
def test_numbers_of_another_kind(saved, dtype):
    base, adapter = saved
    model = by_peft(base, adapter)
    state = get_peft_model_state_dict(model)
    rewrite(adapter, lambda tensors: tensors.update({A: tensors[A].to(dtype)}))
    with pytest.raises(CheckpointError, match=r"up_proj.hoe_A.weight' holds .*, not one of \['BF16'") as refused:
        by_peft(base, adapter)
    assert refused.value.tensor == A
    with pytest.raises(CheckpointError, match="not floating-point numbers"):
        set_peft_model_state_dict(model, {key: t.to(dtype) if key == A else t for key, t in state.items()})


@pytest.mark.parametrize(
    ("key", "value", "dtype"), [(A, 3e38, torch.float32), (B, -2e30, torch.float32), (A, 60000.0, torch.float16)]
)
def test_finite_numbers_that_overflow_later(saved, key, value, dtype):
    base, adapter = saved

    def enlarge(tensors):
        tensors[key] = tensors[key].to(dtype)
        tensors[key][0, 0] = value

    rewrite(adapter, enlarge)
    for load in (by_peft, by_transformers)[: 1 if dtype == torch.float16 else 2]:  # transformers reads float32
        with pytest.raises(CheckpointError, match=r"up_proj.hoe_[AB].* holds numbers as large as"):
            load(base, adapter)


def test_inner_products_that_are_none(hoe_llama, llama, tmp_path):
    hoe_llama(interpolation="norm").save_pretrained(tmp_path)
    key = A.replace("hoe_A.weight", "hoe_length.gram")
    rewrite(tmp_path, lambda tensors: tensors[key].mul_(1e20))
    with pytest.raises(CheckpointError, match="gram' holds numbers as large as"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("keep", [lambda key: False, lambda key: "hoe_router" in key, lambda key: "hoe_B" in key])
def test_a_file_without_an_expert(saved, keep):
    # It was loaded as the base model.
    base, adapter = saved

    def strip(tensors):
        for key in list(tensors):
            if not keep(key):
                del tensors[key]
        tensors["something"] = torch.ones(1)

    rewrite(adapter, strip)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors holds no expert.*another file"):
        by_peft(base, adapter)


def test_a_configuration_that_says_no_fingerprint_is_taken_at_its_word(saved, tokens):
    base, adapter = saved
    expected = logits(by_peft(base, adapter), tokens, preference=[0.3, 0.7])
    edit(adapter, lambda config: config.pop("fingerprint"))
    for load in (by_peft, by_low_memory):
        torch.testing.assert_close(logits(load(base, adapter), tokens, preference=[0.3, 0.7]), expected)


# -- weights of the base in an adapter's file ---


@pytest.mark.parametrize("name", ["self_attn.q_proj.base_layer.weight", "input_layernorm.weight"])
def test_a_file_that_would_overwrite_the_base(saved, name):
    base, adapter = saved
    key = f"base_model.model.model.layers.0.{name}"
    shape = {"weight": (32, 32)} if "proj" in name else {"weight": (32,)}
    rewrite(adapter, lambda tensors: tensors.update({key: torch.zeros(shape["weight"])}))
    with pytest.raises(CheckpointError, match=r"a weight of the base model, which it would overwrite") as refused:
        by_peft(base, adapter)
    assert name in refused.value.tensor


def test_embeddings_may_come_with_an_adapter(saved, tokens):
    base, adapter = saved
    loaded = by_peft(base, adapter)
    expected = logits(loaded, tokens)
    key = "base_model.model.model.embed_tokens.weight"
    embeddings = loaded.get_input_embeddings().weight.detach().clone()
    rewrite(adapter, lambda tensors: tensors.update({key: embeddings}))
    torch.testing.assert_close(logits(by_peft(base, adapter), tokens), expected)
    rewrite(adapter, lambda tensors: tensors.update({key: embeddings * 2}))
    with pytest.warns(HoEWarning, match=r"replaces the base model's embeddings .*embed_tokens"):
        changed = by_peft(base, adapter)
    torch.testing.assert_close(changed.get_input_embeddings().weight, embeddings * 2)


def test_whole_models_and_parts_without_an_adapter_are_loaded_as_ever(hoe_llama, llama, tokens):
    model, other = hoe_llama(trained=True), hoe_llama(trained=True, init_weights=False)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(other, tokens), logits(model, tokens))
    part = {"base_model.model.model.norm.weight": torch.full((32,), 2.0)}
    other.load_state_dict(part, strict=False)
    assert not torch.allclose(logits(other, tokens), logits(model, tokens))
    routers = {key: tensor for key, tensor in model.state_dict().items() if "hoe_router" in key}
    other.load_state_dict(routers, strict=False)


def test_modules_to_save_are_no_base(hoe_llama, llama, tokens, tmp_path):
    model = hoe_llama(modules_to_save=["lm_head"], target_modules=["q_proj"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens))
