"""Merging bakes the current preference in, exactly, or refuses before anything is changed."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_hoe import HoEConfig, PreferenceError, RouterSpec, StaticMergeError

PREFERENCES = [[1, 0], [0.25, 0.75], [0.1, 0.9], [0.7, 0.3]]


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.fixture
def hoe_llama(hoe_llama):
    """In float64, where equal means equal."""
    return lambda **settings: hoe_llama(**settings).double()


@pytest.mark.parametrize("preference", PREFERENCES)
def test_merged_equals_unmerged(hoe_llama, tokens, preference):
    model = hoe_llama()
    model.set_preference(preference)
    expected = logits(model, tokens)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-10)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any("hoe" in name for name, _ in merged.named_modules())
    assert not merged._forward_pre_hooks
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=1e-10)


def test_conv1d(randomise, tokens):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval().double()
    model = get_peft_model(
        base, HoEConfig(objectives=["a", "b"], r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    randomise(model)
    rows = [[1, 0], [0.2, 0.8], [0.5, 0.5]]
    together = logits(model.eval(), tokens, preference=rows)
    alone = torch.cat([logits(model, tokens[i : i + 1], preference=p) for i, p in enumerate(rows)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    model.set_preference(rows[1])
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, rtol=0, atol=1e-10)


def test_a_block_counts(hoe_llama, tokens):
    model = hoe_llama()
    expected = logits(model, tokens, preference=[0, 1])
    with model.use_preference([0, 1]):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=1e-10)


def test_trained_routers_refuse_before_anything_is_changed(hoe_llama, tokens):
    model = hoe_llama(trained=True)
    model.set_preference([0.1, 0.9])
    expected = logits(model, tokens)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(StaticMergeError, match=r"trained routers \['r0'\]"):
            merge()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-10)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert not layer.supports_lora_conversion()
    model.set_preference([0.7, 0.3])  # between [1, 0] and [.5, .5] no router votes
    assert layer.supports_lora_conversion()
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, rtol=0, atol=1e-10)


def test_dropping_routers_bakes_the_coarse_interpolation(hoe_llama, tokens):
    static = hoe_llama(trained=False)
    expected = logits(static, tokens, preference=[0.1, 0.9])
    model = hoe_llama(trained=True)
    model.set_preference([0.1, 0.9])
    model.merge_adapter(routers="drop")
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    merged = model.merge_and_unload(routers="drop")
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="routers is 'maybe'"):
        hoe_llama().merge_and_unload(routers="maybe")


def test_dropping_routers_ignores_voting_sets_of_their_own(hoe_llama):
    model = hoe_llama(routers=[RouterSpec([0.5, 0.5], votes_for=["a", "b"])])
    model.set_preference([0.5, 0.5])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    weight_a, weight_b = layer.factors("default")
    expected = layer.weight + weight_b[:, 8:] @ weight_a[8:]  # the centroid alone; its rank is 4, like the corners'
    model.merge_adapter(routers="drop")
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_bases_are_merged_in_float32(hoe_llama, dtype):
    model = hoe_llama()
    model.base_model.model.to(dtype)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    expected = (layer.weight.float() + layer.get_delta_weight("default")).to(dtype)
    model.merge_adapter()
    assert torch.equal(layer.weight, expected)


def test_what_was_saved_is_what_was_merged(hoe_llama, tokens):
    model = hoe_llama()
    for preference in ([1 / 3, 2 / 3], [0.62872634, 0.37127366], [0.1 + 0.2, 0.7]):
        model.set_preference(preference)
        expected = logits(model, tokens)
        model.merge_adapter()
        merged = logits(model, tokens, preference=model.preference)
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-10)
        model.unmerge_adapter()


def test_rows_cannot_be_merged(hoe_llama):
    model = hoe_llama()
    with model.use_preference([[1, 0], [0, 1]]), pytest.raises(PreferenceError, match="one preference per row"):
        model.merge_adapter()


def test_a_merged_model_does_not_pretend_to_be_steered(hoe_llama, tokens):
    model = hoe_llama()
    model.set_preference([1, 0])
    model.merge_adapter()
    with pytest.raises(PreferenceError, match=r"merged at \[1.0, 0.0\]"):
        model(tokens, preference=[0, 1])
    logits(model, tokens)


def test_unloading_gives_the_base_back(hoe_llama, llama, tokens):
    model = hoe_llama().unload()
    torch.testing.assert_close(logits(model, tokens), logits(llama().double(), tokens), rtol=0, atol=1e-10)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    with pytest.raises(TypeError, match="preference"):
        model.model.embed_tokens(tokens, preference=[1, 0])


def test_conversion_to_lora(hoe_llama, tokens):
    pytest.importorskip("peft", minversion="0.19")
    from peft import convert_to_lora

    model = hoe_llama()
    model.set_preference([0.7, 0.3])
    config, state = convert_to_lora(model, rank=12)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    scale = config.lora_alpha / config.r
    delta = scale * state[key.format("B")] @ state[key.format("A")]
    torch.testing.assert_close(delta.float(), layer.get_delta_weight("default").float(), rtol=1e-3, atol=1e-4)


@pytest.fixture
def tied(randomise):
    """A tiny Llama whose head is its embeddings, the head adapted too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).double().eval()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT, of any adapted head that is tied
        model = get_peft_model(
            base, HoEConfig(objectives=["a", "b"], r=3, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
        )
    randomise(model)
    return model.double().eval()


def test_merging_a_tied_head_leaves_the_embeddings_alone(tied, tokens):
    embeddings = tied.get_input_embeddings().weight
    before = embeddings.detach().clone()
    tied.set_preference([0.3, 0.7])
    expected = logits(tied, tokens)
    tied.merge_adapter()
    torch.testing.assert_close(logits(tied, tokens), expected)
    assert torch.equal(embeddings, before)
    tied.unmerge_adapter()
    head = tied.base_model.model.lm_head
    assert head.get_base_layer().weight is tied.get_input_embeddings().weight
    assert torch.equal(head.weight, before)
    torch.testing.assert_close(logits(tied, tokens), expected)


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")  # PEFT, of newer versions
def test_an_unloaded_head_stays_untied(tied, tokens, tmp_path):
    tied.set_preference([0.3, 0.7])
    expected = logits(tied, tokens)
    merged = tied.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), expected)
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again, tokens), expected)


def test_a_tied_head_that_is_not_adapted_stays_tied(tokens, randomise):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    hoe = HoEConfig(objectives=["a", "b"], r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    merged = get_peft_model(LlamaForCausalLM(config), hoe).merge_and_unload()
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
