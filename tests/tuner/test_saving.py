"""Save and load by every path, and files that must be refused."""

from __future__ import annotations

import copy
import inspect
import json
import re

import peft
import pytest
import torch
from packaging import version
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForCausalLM,
)

from peft_hoe import CheckpointError, HoEConfig, HoEWarning, versions

PREFERENCE = [0.1, 0.9]


@pytest.mark.skipif(not hasattr(BaseTuner, "_get_adapter_state_dict"), reason="PEFT asks the tuner since 0.21")
def test_the_overridden_choice_of_peft_has_its_signature():
    parameters = list(inspect.signature(BaseTuner._get_adapter_state_dict).parameters)
    assert parameters == ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"]


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.fixture
def saved(hoe_llama, llama, tmp_path, tokens):
    """(base directory, adapter directory, logits at the saved default), with a trained router."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    llama().save_pretrained(base)
    model = hoe_llama(trained=True)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.set_preference(PREFERENCE)
    model.save_pretrained(adapter)
    return base, adapter, logits(model, tokens)


def by_peft(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def by_auto(base, adapter):
    return AutoPeftModelForCausalLM.from_pretrained(adapter)


def by_transformers(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    return model


def by_low_memory(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True)


def by_another_name(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, adapter_name="renamed")


def by_injection(base, adapter):
    model = inject_adapter_in_model(HoEConfig.from_pretrained(adapter), AutoModelForCausalLM.from_pretrained(base))
    tensors = load_file(adapter / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()})
    return model.eval()


def as_a_second_adapter(base, adapter):
    model = by_peft(base, adapter)
    model.load_adapter(adapter, adapter_name="again")
    model.set_adapter("again")
    return model


def trainable(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True).eval()


def by_deepcopy(base, adapter):
    return copy.deepcopy(by_peft(base, adapter))


def offloaded(base, adapter):
    if version.parse(peft.__version__) < version.parse("0.21"):
        pytest.skip("PEFT before 0.21 cannot offload a base whose parts are placed one by one")
    folder = adapter.parent / "offload"
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, device_map=device_map, offload_folder=folder)
    device_map = {f"base_model.model.{name}": device for name, device in device_map.items()}
    model = PeftModel.from_pretrained(model, adapter, device_map=device_map, offload_dir=folder)
    assert model.base_model.model.model.layers[1].mlp.up_proj.hoe_A["default"].weight.device.type == "meta"
    return model


def saved_again(base, adapter):
    again = adapter.parent / "again"
    by_peft(base, adapter).save_pretrained(again)
    return by_peft(base, again)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter.*")  # PEFT, for what is offloaded
@pytest.mark.parametrize(
    "load",
    [
        by_peft, by_auto, by_transformers, by_low_memory, by_another_name, by_injection, as_a_second_adapter, trainable,
        by_deepcopy, offloaded, saved_again,
    ],
)  # fmt: skip
def test_the_weights_are_bitwise_the_same_and_the_logits_agree(saved, tokens, load, agree):
    # Not the bits of the logits: torch may take another kernel for a weight that is frozen or lies elsewhere in memory.
    base, adapter, expected = saved
    model = load(base, adapter)
    agree(logits(model, tokens), expected)
    written = load_file(adapter / "adapter_model.safetensors")
    held = {re.sub(r".*(layers\..*)\.\w+\.", r"\1.", name): p for name, p in model.named_parameters() if "hoe_" in name}
    assert len(held) == 14 * 4  # hoe_A, hoe_B, and the router's weight and bias
    for name, found in held.items():
        assert found.device.type == "meta" or torch.equal(found, written[f"base_model.model.model.{name}"])


def test_transformers_saves_what_it_loaded(saved, tokens, tmp_path, agree):
    base, adapter, expected = saved
    model = by_transformers(base, adapter)
    if versions.refused_without_peft_model():
        with pytest.raises(ValueError, match="PEFT"):
            model.save_pretrained(tmp_path / "by transformers")
        pytest.skip(versions.refused_without_peft_model())
    model.save_pretrained(tmp_path / "by transformers")
    again = by_peft(base, tmp_path / "by transformers")
    agree(logits(again, tokens), expected)


def test_versions_that_cannot_save_it_are_named_when_transformers_loads(saved, monkeypatch):
    base, adapter, _ = saved
    monkeypatch.setattr(versions, "refused_without_peft_model", lambda: "these two")
    for load in (by_transformers, by_injection):
        with pytest.warns(HoEWarning, match="these two"):
            load(base, adapter)
    for load in (by_peft, by_low_memory):  # a PeftModel saves by itself
        load(base, adapter)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")  # peft 0.18, of modules_to_save
def test_modules_to_save_come_back(hoe_llama, saved, tokens, tmp_path, agree):
    base, _, _ = saved
    model = hoe_llama(modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(tmp_path / "head")
    agree(logits(by_peft(base, tmp_path / "head"), tokens), logits(model, tokens))


def test_fan_in_fan_out_of_a_linear_is_ignored_and_said(hoe_llama, tokens, agree):
    with pytest.warns(UserWarning, match="fan_in_fan_out is ignored"):
        model = hoe_llama(fan_in_fan_out=True)
    agree(logits(model, tokens), logits(hoe_llama(), tokens))


def test_a_loaded_router_is_still_trained(saved):
    base, adapter, _ = saved
    model = by_peft(base, adapter)
    assert model.peft_config["default"].routers[0].trained
    with pytest.raises(ValueError, match="trained routers"):
        model.merge_adapter()


def test_the_current_default_is_saved(hoe_llama, tmp_path):
    model = hoe_llama()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["default_preference"] is None
    model.set_preference({"a": 1})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["default_preference"] == [1.0, 0.0]


def test_a_process_wide_preference_is_the_default(saved, monkeypatch):
    base, adapter, _ = saved
    monkeypatch.setenv("PEFT_HOE_PREFERENCE", "1,0")
    assert dict(by_peft(base, adapter).preference) == {"a": 1, "b": 0}
    monkeypatch.setenv("PEFT_HOE_PREFERENCE", "x=1")
    with pytest.raises(ValueError, match=r"PEFT_HOE_PREFERENCE=x=1.*the objectives are"):
        by_peft(base, adapter)


def test_base_modules_with_our_prefix_in_their_names_stay_the_bases():
    pytest.importorskip("peft", minversion="0.21")  # older versions look for the prefix anywhere in a name

    class Shop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shoe_rack = torch.nn.Linear(2, 2)
            self.lin = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.lin(self.shoe_rack(x))

    model = get_peft_model(Shop(), HoEConfig(objectives=["a", "b"], r=1, target_modules=["lin"]))
    assert not any("shoe_rack" in key for key in get_peft_model_state_dict(model))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "shoe_rack" in name)


def test_state_dict_keys_are_pefts(hoe_llama):
    keys = get_peft_model_state_dict(hoe_llama()).keys()
    parts = {key.split("q_proj.")[1] for key in keys if "q_proj" in key}
    assert parts == {"hoe_A.weight", "hoe_B.weight", "hoe_router.weight", "hoe_router.bias"}
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)


@pytest.mark.parametrize(
    ("task", "auto"),
    [
        ("SEQ_CLS", AutoModelForSequenceClassification),
        ("TOKEN_CLS", AutoModelForTokenClassification),
        ("FEATURE_EXTRACTION", AutoModel),
    ],
)
def test_other_task_types(saved, config, randomise, tokens, tmp_path, task, auto, agree):
    base, _, _ = saved

    def make():
        torch.manual_seed(0)
        return auto.from_pretrained(base)

    model = get_peft_model(make(), config(task_type=task, target_modules=["q_proj", "v_proj"]))
    randomise(model)
    model.eval()
    rows = [[1, 0], [0, 1], [0.4, 0.6]]
    with torch.no_grad():
        together = model(tokens, preference=rows)[0]
        alone = torch.cat([model(tokens[i : i + 1], preference=p)[0] for i, p in enumerate(rows)])
        agree(together, alone)
        model.save_pretrained(tmp_path / "task")
        again = PeftModel.from_pretrained(make(), tmp_path / "task")
        agree(again(tokens, preference=rows)[0], together)


def dtypes(model):
    found = {"experts": set(), "routers": set(), "lengths": set()}
    for name, parameter in model.named_parameters():
        kind = "routers" if "hoe_router" in name else "lengths" if "hoe_length" in name else "experts"
        if "hoe_" in name:
            found[kind].add(parameter.dtype)
    return {kind: next(iter(each)) if len(each) == 1 else each for kind, each in found.items() if each}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_sixteen_bit_bases(saved, config, randomise, tokens, tmp_path, dtype, autocast):
    """Experts have the base's dtype, routers and lengths float32; saved and loaded so."""
    base, _, _ = saved

    def make():
        return LlamaForCausalLM.from_pretrained(base, dtype=dtype)

    settings = {"interpolation": "norm"}
    model = get_peft_model(make(), config(**settings), autocast_adapter_dtype=autocast)
    wanted = {"experts": dtype, "routers": torch.float32, "lengths": torch.float32}
    assert dtypes(model) == wanted
    randomise(model)
    model.mark_trained()
    model.eval()
    first = logits(model, tokens, preference=PREFERENCE)
    assert first.dtype == dtype
    assert torch.isfinite(first).all()
    model.save_pretrained(tmp_path / "half")
    again = PeftModel.from_pretrained(make(), tmp_path / "half", autocast_adapter_dtype=autocast)
    assert dtypes(again) == wanted
    assert logits(again, tokens, preference=PREFERENCE).dtype == dtype
    tensors = dict(again.named_parameters())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.named_parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_float32_file_on_a_sixteen_bit_base(saved, low_cpu_mem_usage):
    """The experts are rounded once; routers are the file's to the bit."""
    base, adapter, _ = saved
    wide = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
    half = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(half, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    assert dtypes(model) == {"experts": torch.bfloat16, "routers": torch.float32}
    tensors = dict(wide.named_parameters())
    for name, tensor in model.named_parameters():
        if "hoe_" in name:
            assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


def test_transformers_loads_the_same_dtypes(saved):
    base, adapter, _ = saved
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.load_adapter(str(adapter))
    assert dtypes(model)["routers"] == torch.float32


def test_experts_that_train_are_float32(saved, config):
    base, _, _ = saved
    half = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(half, config(train_experts=True))
    assert dtypes(model) == {"experts": torch.float32, "routers": torch.float32}


def test_casting_the_model_does_not_round_the_preference(hoe_llama, tokens):
    model = hoe_llama()
    model.set_preference([0.3, 0.7])
    model.to(torch.bfloat16)
    assert dict(model.preference) == {"a": 0.3, "b": 0.7}
    assert model.base_model.steering.default.adapters["default"].static.dtype == torch.float64
    assert logits(model, tokens).dtype == torch.bfloat16


def test_selecting_modules(llama, config):
    def adapted(**changes):
        model = get_peft_model(llama(), config(**changes))
        return set(model.targeted_module_names)

    assert len(adapted()) == 14
    assert adapted(layers_to_transform=0, target_modules=["q_proj"]) == {"model.layers.0.self_attn.q_proj"}
    assert adapted(layers_to_transform=[1], target_modules=["q_proj"]) == {"model.layers.1.self_attn.q_proj"}
    assert adapted(target_modules=r".*layers\.1.*down_proj") == {"model.layers.1.mlp.down_proj"}
    assert len(adapted(exclude_modules=["q_proj", "layers.0.mlp.up_proj"])) == 11


def test_rank_patterns_are_saved_and_loaded(saved, config, randomise, tokens, tmp_path, agree):
    base, _, _ = saved
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        config(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": [1, 0, 5]}),
    )
    randomise(model)
    layer = model.base_model.model.model.layers[1]
    assert layer.self_attn.q_proj.hoe_A["default"].weight.shape == (6, 32)
    assert layer.mlp.up_proj.hoe_A["default"].weight.shape == (6, 32)
    assert layer.mlp.down_proj.hoe_A["default"].weight.shape == (12, 48)
    model.save_pretrained(tmp_path / "ranks")
    again = by_peft(base, tmp_path / "ranks")
    agree(logits(again, tokens), logits(model.eval(), tokens))


# -- files that must be refused ---


def damaged(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.1.mlp.up_proj.hoe_B.weight"


def drop(tensors):
    del tensors[KEY]


def reshape(tensors):
    tensors[KEY] = tensors[KEY][:, :-1].contiguous()


def poison(tensors):
    tensors[KEY][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"), [(drop, "lacks the tensor.*up_proj.hoe_B"), (reshape, r"shape \(48, 11\)"), (poison, "NaN")]
)
def test_damaged_tensors_are_named(saved, change, message):
    base, adapter, _ = saved
    damaged(adapter, change)
    for load in (by_peft, by_auto, by_low_memory):
        with pytest.raises(CheckpointError, match=message):
            load(base, adapter)


def test_what_transformers_loads_is_checked_before_it_is_used(saved, tokens):
    base, adapter, _ = saved
    damaged(adapter, poison)
    with pytest.raises(CheckpointError, match=r"up_proj.hoe_B.default.weight.*NaN"):  # noqa: PT012
        model = by_transformers(base, adapter)
        model(tokens)


@pytest.mark.parametrize("load", [by_auto, by_transformers])
def test_other_loaders_refuse_what_is_not_safetensors_in_their_own_words(saved, load):
    base, adapter, _ = saved
    (adapter / "adapter_model.safetensors").write_bytes(b"not this")
    with pytest.raises(Exception, match=r"header|safetensors"):
        load(base, adapter)


def test_files_that_are_not_safetensors_are_named(saved):
    base, adapter, _ = saved
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"PK\x03\x04 not this", b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors.*(truncated|safetensors)"):
            by_peft(base, adapter)


def test_a_failed_load_leaves_the_loaded_adapter_working(saved, tokens, agree):
    base, adapter, expected = saved
    model = by_peft(base, adapter)
    damaged(adapter, poison)
    with pytest.raises(CheckpointError):
        model.load_adapter(adapter, adapter_name="broken")
    model.set_adapter("default")
    agree(logits(model, tokens), expected)


def test_what_is_saved_lies_as_safetensors_wants_it(saved, tmp_path):
    """B's columns lie together in memory, and PEFT before 0.21 writes tensors as they lie."""
    base, adapter, _ = saved
    model = by_peft(base, adapter)
    written = get_peft_model_state_dict(model)
    save_file(written, tmp_path / "adapter.safetensors")
    own = dict(model.named_parameters())
    parts = [name for name in written if "hoe_B" in name]
    assert parts
    for name in parts:
        parameter = own[name.replace(".weight", ".default.weight")]
        assert torch.equal(written[name], parameter)
        assert model.state_dict(keep_vars=True)[name.replace(".weight", ".default.weight")] is parameter
