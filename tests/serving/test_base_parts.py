"""Experts of embeddings, heads and norms leave with a LoRA: in PEFT alone it computes what the adapter does."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
)

import peft_hoe
from peft_hoe import CheckpointError, HoEConfig, HoEError, HoELayer
from peft_hoe.serving import export_lora
from peft_hoe.serving.atlas import export_atlas
from peft_hoe.serving.dense import export_merged
from peft_hoe.serving.gguf_lora import export_gguf, export_gguf_experts
from peft_hoe.serving.llama_cpp import expert_scales
from peft_hoe.serving.lora_exporter import LoraExporter
from peft_hoe.serving.source import adapter_from_model
from peft_hoe.serving.vllm_names import Names, Settings

EXACT = {"atol": 1e-10, "rtol": 0}
GRID = [[1.0, 0.0], [0.6, 0.4], [0.3, 0.7]]
EVERYWHERE = {
    "target_embeddings": ["embed_tokens", "lm_head"],
    "target_norms": ["input_layernorm", "norm"],
    "interpolation": "norm",
}
# PEFT warns of tied embeddings whatever an adapter does with them.
pytestmark = pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")


@pytest.fixture
def everywhere(steerable):
    def make(**changes):
        return steerable(**{**EVERYWHERE, **changes})

    return make


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_the_same_from_a_model_and_from_files(everywhere, toys, as_lora, ids, tmp_path, tied):
    model = everywhere(tied=tied)
    toys.make_base(tied=tied).double().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "hoe")
    for preference in GRID:
        wanted = logits(model, ids, preference=preference)
        written = {}
        for name, source, base in (("model", model, None), ("files", tmp_path / "hoe", tmp_path / "base")):
            where = tmp_path / f"{name} {preference}"
            report = export_lora(source, preference, where, base=base)
            assert (report.modules, report.norms, report.lost) == (16, 3, 0)
            assert any("lm_head is tied to model.embed_tokens" in note for note in report.notes) == tied
            torch.testing.assert_close(as_lora(where, ids, tied=tied), wanted, **EXACT)
            written[name] = load_file(where / "adapter_model.safetensors")
        assert written["model"].keys() == written["files"].keys()
        assert all(torch.equal(written["model"][key], written["files"][key]) for key in written["files"])
    assert LoraConfig.from_pretrained(where).modules_to_save == [
        "model.layers.0.input_layernorm",
        "model.layers.1.input_layernorm",
        "model.norm",
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_routers_are_compared_with_the_whole_export(
    everywhere, as_lora, tokenizer, prompts, ids, tmp_path, tied
):
    model = everywhere(trained=("r0", "r1"), input_matters=False, tied=tied)
    report = model.export_lora([0.3, 0.7], tmp_path / "lora", prompts=prompts[:2], tokenizer=tokenizer)
    wanted = logits(model, ids, preference=[0.3, 0.7])
    torch.testing.assert_close(as_lora(tmp_path / "lora", ids, tied=tied), wanted, **EXACT)
    assert report.logits["largest"] < 1e-11
    assert report.logits["agreement"] == 1
    torch.testing.assert_close(logits(model, ids, preference=[0.3, 0.7]), wanted, rtol=0, atol=0)  # as it was


def test_voting_routers_have_no_say_there(everywhere, tokenizer, tmp_path):
    """Whatever a trained router votes elsewhere, these experts go by its static votes, 0.5 of each here."""
    model = everywhere(trained=("r0",), tied=True)
    model.export_lora([0.25, 0.75], tmp_path / "lora", prompts=["w1 w2 w3"], tokenizer=tokenizer)
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    with torch.no_grad():
        deltas = model.base_model.model.model.norm.hoe_norm["default"].weight
        wanted = model.base_model.model.model.norm.get_base_layer().weight + 0.5 * (deltas[1] + deltas[2])
    torch.testing.assert_close(written["base_model.model.model.norm.weight"], wanted, **EXACT)
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    head = "base_model.model.lm_head.lora_"
    assert torch.equal(written[f"{stem}A"].T, written[f"{head}B.weight"])
    assert torch.equal(written[f"{stem}B"].T, written[f"{head}A.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_merged_it_is_dense_and_a_tied_pair_stays_tied(everywhere, toys, ids, tmp_path, tied):
    model = everywhere(tied=tied)
    toys.make_base(tied=tied).double().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "hoe")
    for name, source in {"model": model, "files": tmp_path / "hoe"}.items():
        export_merged(source, [0.6, 0.4], tmp_path / "base", tmp_path / name)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        torch.testing.assert_close(logits(dense, ids), logits(model, ids, preference=[0.6, 0.4]), **EXACT)
        assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied


def test_a_head_that_is_adapted_alone_parts_from_its_embeddings(toys, ids, tmp_path):
    model = toys.make_policy(tied=True, target_embeddings=["lm_head"]).double()
    toys.make_base(tied=True).double().save_pretrained(tmp_path / "base")
    export_merged(model, [0.6, 0.4], tmp_path / "base", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64)
    torch.testing.assert_close(logits(dense, ids), logits(model, ids, preference=[0.6, 0.4]), **EXACT)
    assert not dense.config.tie_word_embeddings


def test_a_smaller_rank_holds_there_too(everywhere, tmp_path):
    model = everywhere(tied=True)
    model.export_lora([0.6, 0.4], tmp_path / "exact")
    report = model.export_lora([0.6, 0.4], tmp_path / "cut", rank=3, even=True)
    assert (report.rank, report.even) == (3, True)
    exact, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exact", "cut"))
    pair = [
        tensors["base_model.model.lm_head.lora_B.weight"].double()
        @ tensors["base_model.model.lm_head.lora_A.weight"].double()
        for tensors in (exact, cut)
    ]
    best = torch.linalg.svdvals(pair[0])[3:].norm()
    assert float((pair[0] - pair[1]).norm()) == pytest.approx(float(best), rel=1e-5)
    assert report.lost > 0
    norm = "base_model.model.model.norm.weight"
    assert torch.equal(exact[norm], cut[norm])


def test_an_atlas_tells_its_size(everywhere, tmp_path):
    model = everywhere(tied=True)
    reports = export_atlas(model, 0.5, tmp_path / "atlas")
    files = sum(
        tensor.nbytes
        for path in (tmp_path / "atlas").glob("*/adapter_model.safetensors")
        for tensor in load_file(path).values()
    )
    assert sum(report.bytes for report in reports) == files
    exporter = LoraExporter(adapter_from_model(model))
    for report in reports:
        assert exporter.bytes(report.preference) == report.bytes


# -- kinds of models ---


def exported(model, make_base, ids, directory, *, tied=False):
    """Outputs of a base under the LoRA, and of the adapter."""
    report = model.export_lora([0.3, 0.7], directory)
    assert any("is tied to" in note for note in report.notes) == tied
    lora = PeftModel.from_pretrained(make_base(), directory, autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        return lora(input_ids=ids)[0], model(input_ids=ids, preference=[0.3, 0.7])[0]


def randomise(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "hoe_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for layer in model.modules():
        if isinstance(layer, HoELayer) and layer.low_rank:
            layer.measure_lengths("default")
    return model.double().eval()


def test_layer_norms_with_a_bias_beside_conv1d(ids, tmp_path):
    def base():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        return GPT2LMHeadModel(config).double().eval()

    config = HoEConfig(
        objectives=["a", "b"], r=2, target_modules=["c_attn"], target_embeddings=["wte", "wpe"], target_norms=["ln_1", "ln_f"],
        task_type="CAUSAL_LM", interpolation="norm",
    )  # fmt: skip
    model = randomise(get_peft_model(base(), config))
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but the target module is"):
        torch.testing.assert_close(*exported(model, base, ids, tmp_path / "lora", tied=True), **EXACT)
    base().save_pretrained(tmp_path / "base")
    export_merged(model, [0.3, 0.7], tmp_path / "base", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64)
    torch.testing.assert_close(logits(dense, ids), logits(model, ids, preference=[0.3, 0.7]), **EXACT)


def test_a_norm_whose_name_ends_the_names_of_others(ids, tmp_path):
    """PEFT saves whole whatever ends with a name of `modules_to_save`: here "norm" would be every norm."""

    def base():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        return LlamaModel(config).double().eval()

    config = HoEConfig(
        objectives=["a", "b"], r=2, target_modules=["q_proj"], target_norms=["norm"], task_type="FEATURE_EXTRACTION"
    )
    model = randomise(get_peft_model(base(), config))
    torch.testing.assert_close(*exported(model, base, ids, tmp_path / "lora"), **EXACT)


def test_embeddings_that_their_model_scales(ids, tmp_path):
    def base():
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, pad_token_id=0,
        )  # fmt: skip
        return Gemma3ForCausalLM(config).double().eval()

    config = HoEConfig(
        objectives=["a", "b"], r=2, target_modules=["q_proj"], target_embeddings=["embed_tokens"],
        target_norms=["q_norm", "input_layernorm", "norm"], task_type="CAUSAL_LM",
    )  # fmt: skip
    model = randomise(get_peft_model(base(), config))
    got, wanted = exported(model, base, ids, tmp_path / "lora", tied=True)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)  # its norms compute in float32
    with torch.no_grad():
        assert float((base()(input_ids=ids).logits - wanted).abs().max()) > 0.01


# -- errors ---


def test_what_is_needed_of_the_base_is_said(everywhere, toys, tmp_path):
    model = everywhere()
    model.save_pretrained(tmp_path / "hoe")
    with pytest.raises(CheckpointError, match=r"experts of \['embed_tokens', .*names no base model.*--base"):
        export_lora(tmp_path / "hoe", [0.5, 0.5], tmp_path / "lora")
    toys.make_base().save_pretrained(tmp_path / "base")
    with pytest.raises(HoEError, match="the model that is exported has its base"):
        export_lora(model, [0.5, 0.5], tmp_path / "lora", base=tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for 'model.norm.weight'"):
        export_lora(tmp_path / "hoe", [0.5, 0.5], tmp_path / "lora", base=tmp_path / "base")
    assert not (tmp_path / "lora").exists()


def test_another_base_is_named(everywhere, tmp_path):
    model = everywhere()
    other = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"of shape \(32, 32\), but the base .*other' has one of shape \(40, 32\)"
    ):
        export_merged(model, [0.6, 0.4], tmp_path / "other", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_engines_refuse_what_they_cannot_take_by_name(everywhere, toys, tmp_path):
    toys.make_base().save_pretrained(tmp_path / "base")
    model = everywhere()
    model.save_pretrained(tmp_path / "hoe")
    named = r"experts of \['input_layernorm', 'norm'\] \(target_norms\), and a GGUF LoRA cannot.*--merged BASE"
    for refused in (
        lambda: export_gguf(model, [0.5, 0.5], tmp_path / "base", tmp_path / "out"),
        lambda: export_gguf_experts(model, tmp_path / "base", tmp_path / "out"),
        lambda: expert_scales(model, [0.5, 0.5]),
    ):
        with pytest.raises(HoEError, match=named):
            refused()
    assert not (tmp_path / "out").exists()
    serves = Settings({"mine": str(tmp_path / "hoe")}, folder=tmp_path / "cache")
    with pytest.raises(HoEError, match=r"experts of \['input_layernorm', 'norm'\] \(target_norms\), and vLLM's LoRAs"):
        Names(serves)
    model = everywhere(target_norms=None)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "hoe")
    written = load_file(Names(serves).path("mine@0.6,0.4") / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in written
    model.mark_trained("r0")
    model.save_pretrained(tmp_path / "hoe")
    routed = load_file(Names(serves).path("mine@0.3,0.7") / "adapter_model.safetensors")
    plain = export_lora(model, [0.3, 0.7], tmp_path / "plain", routers="static")
    fixed = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    for part in ("embed_tokens.lora_embedding_A", "embed_tokens.lora_embedding_B"):
        assert torch.equal(routed[f"base_model.model.model.{part}"], fixed[f"base_model.model.model.{part}"])
    assert plain.trained_routers == ["r0"]
    inner = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert routed[inner].shape[0] > fixed[inner].shape[0]  # it carries a router


def test_a_head_with_routers_is_refused_inside_vllm(toys, tmp_path):
    config = HoEConfig(
        objectives=["low", "high"], routers=[[0.5, 0.5]], r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"
    )  # fmt: skip
    routed = get_peft_model(toys.make_base(), config)
    routed.mark_trained()
    routed.save_pretrained(tmp_path / "hoe", save_embedding_layers=False)
    with pytest.raises(HoEError, match=r"adapts \['lm_head'\], where trained routers cannot vote .*target_embeddings"):
        Names(Settings({"mine": str(tmp_path / "hoe")}, folder=tmp_path / "cache"))


def test_a_merged_model_exports_what_it_did_before(everywhere, tmp_path):
    model = everywhere()
    model.set_preference([0.6, 0.4])
    peft_hoe.export_lora(model, [0.6, 0.4], tmp_path / "before")
    model.merge_adapter()
    peft_hoe.export_lora(model, [0.6, 0.4], tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(before[key], after[key]) for key in before)
