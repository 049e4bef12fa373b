"""Experts of embeddings, heads and norms: the naive sum in float64, tied pairs, rows, merging, files."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peft_hoe import ExpertError, HoEConfig, HoELayer, RouterSpec, StaticMergeError
from peft_hoe.errors import ModuleError
from peft_hoe.tuner.embedding import HoEEmbedding, HoEHead, TiedHead
from peft_hoe.tuner.functional import adapter_of, record_votes
from peft_hoe.tuner.norm import HoENorm

EXACT = {"rtol": 1e-10, "atol": 1e-10}
EVERYWHERE = {"target_embeddings": ["embed_tokens", "lm_head"], "target_norms": ["input_layernorm", "norm"]}


@pytest.fixture
def tied(llama):
    def make() -> LlamaForCausalLM:
        base = llama()
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
        return base

    return make


@pytest.fixture
def adapted(llama, tied, config, randomise):
    def make(base=None, *, tie=False, trained=False, **changes):
        model = get_peft_model((base or (tied if tie else llama))(), config(**{**EVERYWHERE, **changes}))
        randomise(model)
        if trained:
            model.mark_trained()
        return model.double().eval()

    return make


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def by_hand(model, base, preference):
    """The base with every expert summed into its weights, from the formula."""
    adapter = adapter_of(model)
    weights = torch.from_numpy(adapter.plan(torch.tensor(preference, dtype=torch.float64).numpy()).fixed[0].numpy())
    base = base.double()
    done = set()
    for layer in (module for module in model.modules() if isinstance(module, HoELayer)):
        target = base.get_submodule(layer.module_name)
        if isinstance(layer, HoENorm):
            for name, deltas in layer.hoe_norm["default"].named_parameters():
                getattr(target, name).data += sum(w * delta for w, delta in zip(weights, deltas, strict=True))
            continue
        if isinstance(layer, TiedHead):
            continue
        a, b = layer.factors("default")
        ranks = layer.hoe_layouts["default"].ranks
        experts = [b_j @ a_j for a_j, b_j in zip(a.split(ranks), b.split(ranks, dim=1), strict=True)]
        delta = sum(w * expert for w, expert in zip(weights, experts, strict=True))
        if "default" in layer.hoe_length:
            mean = sum(w * expert.norm() for w, expert in zip(weights, experts, strict=True))
            delta = delta * min(3.0, float(mean / delta.norm()))
        assert id(target.weight) not in done
        done.add(id(target.weight))
        target.weight.data += delta.T if isinstance(layer, HoEEmbedding) else delta
    return base


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("interpolation", ["linear", "norm"])
def test_the_naive_sum(adapted, llama, tied, tokens, tie, interpolation):
    model = adapted(tie=tie, interpolation=interpolation)
    for layer in (module for module in model.modules() if isinstance(module, HoELayer)):
        for adapter in layer.hoe_length:
            layer.measure_lengths(adapter)
    for preference in ([1.0, 0.0], [0.25, 0.75], [0.7, 0.3]):
        wanted = logits(by_hand(model, (tied if tie else llama)(), preference), tokens)
        torch.testing.assert_close(logits(model, tokens, preference=preference), wanted, **EXACT)


def test_what_kind_of_layer_each_is(adapted):
    untied, tied = adapted(), adapted(tie=True)
    heads = [model.base_model.model.lm_head for model in (untied, tied)]
    assert [type(head) for head in heads] == [HoEHead, TiedHead]
    assert not any("lm_head" in name for name, _ in tied.named_parameters() if "hoe_" in name)
    assert not any("embed" in name or "norm" in name for name in untied.state_dict() if "hoe_router" in name)
    assert not any(p.requires_grad for name, p in untied.named_parameters() if "hoe_" in name and "router" not in name)


@pytest.mark.parametrize("tie", [False, True])
def test_rows_have_their_own_preference(adapted, tokens, tie):
    model = adapted(tie=tie, trained=True, interpolation="norm")
    rows = [[1, 0], [0.25, 0.75], [0.6, 0.4]]
    together = logits(model, tokens, preference=rows)
    for row, preference in enumerate(rows):
        alone = logits(model, tokens[row : row + 1], preference=preference)
        torch.testing.assert_close(together[row : row + 1], alone, **EXACT)
    beams = model.generate(tokens, preference=rows, max_new_tokens=4, num_beams=2, do_sample=False)
    for row, preference in enumerate(rows):
        alone = model.generate(
            tokens[row : row + 1], preference=preference, max_new_tokens=4, num_beams=2, do_sample=False
        )
        assert torch.equal(beams[row : row + 1], alone)


def test_layer_norms_with_a_bias_and_embeddings_of_another_model(adapted, steerable, tokens, randomise):
    base = steerable("opt").unload()
    config = HoEConfig(
        objectives=["a", "b"], r=4, target_modules=["fc1"], task_type="CAUSAL_LM",
        target_embeddings=["embed_tokens"], target_norms=["self_attn_layer_norm", "final_layer_norm"],
    )  # fmt: skip
    clean = copy.deepcopy(base)
    model = get_peft_model(base, config)
    randomise(model)
    model.double().eval()
    assert isinstance(base, OPTForCausalLM)
    rows = [[1, 0], [0.25, 0.75], [0.6, 0.4]]
    together = logits(model, tokens, preference=rows)
    for row, preference in enumerate(rows):
        wanted = logits(by_hand(model, copy.deepcopy(clean), [float(x) for x in preference]), tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], wanted, **EXACT)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gemma3", "qwen3"])
def test_scaled_embeddings_and_norms_of_heads(kind, tokens, randomise):
    # Gemma multiplies embeddings by a constant, and normalises with 1 + weight in float32; both norm queries and keys.
    torch.manual_seed(0)
    base = {
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    }[kind]()
    config = HoEConfig(
        objectives=["a", "b"], r=4, target_modules="all-linear", task_type="CAUSAL_LM",
        target_embeddings=["embed_tokens"], target_norms=["q_norm", "k_norm", "input_layernorm", "norm"],
    )  # fmt: skip
    model = get_peft_model(base, config)
    randomise(model)
    model.double().eval()
    close = {"rtol": 0, "atol": 1e-5 if kind == "gemma3" else 1e-10}
    rows = [[1, 0], [0.25, 0.75], [0.6, 0.4]]
    together = logits(model, tokens, preference=rows)
    for row, preference in enumerate(rows):
        alone = copy.deepcopy(model)
        alone.set_preference(preference)
        torch.testing.assert_close(logits(alone, tokens[row : row + 1]), together[row : row + 1], **close)
        merged = alone.merge_and_unload()
        torch.testing.assert_close(logits(merged, tokens[row : row + 1]), together[row : row + 1], **close)


def test_trained_routers_vote_there_as_before_their_training(adapted, tokens):
    model = adapted(trained=True)
    with record_votes(model) as votes:
        logits(model, tokens, preference=[0.25, 0.75])
    assert votes["model.layers.0.self_attn.q_proj"].shape == (3, 7, 3)
    for module in ("model.embed_tokens", "lm_head"):
        torch.testing.assert_close(votes[module], torch.tensor([0, 0.5, 0.5], dtype=torch.float64))
    with record_votes(model) as votes:
        logits(model, tokens, preference=[[1, 0], [0, 1], [0.5, 0.5]])
    assert votes["model.embed_tokens"][:, 0].tolist() == votes["lm_head"][:, 0].tolist() == torch.eye(3).tolist()
    static = adapted()
    plan = adapter_of(model).plan(torch.tensor([0.25, 0.75], dtype=torch.float64).numpy())
    torch.testing.assert_close(plan.fixed[0], torch.tensor([0, 0.5, 0.5], dtype=torch.float64))
    hidden = [each.base_model.model.model.embed_tokens(tokens) for each in (model, static)]
    torch.testing.assert_close(*hidden)


@pytest.mark.parametrize("tie", [False, True])
def test_merging_is_exact_and_a_tied_pair_stays_tied(adapted, tokens, tie, tmp_path):
    model = adapted(tie=tie, interpolation="norm")
    model.set_preference([0.7, 0.3])
    wanted, other = logits(model, tokens), logits(model, tokens, preference=[1, 0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), wanted, **EXACT)
    with pytest.raises(ValueError, match="is merged at") as caught:
        logits(model, tokens, preference=[1, 0])
    assert (caught.value.value, caught.value.allowed) == ([[1.0, 0.0]], [0.7, 0.3])
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], **EXACT)
    torch.testing.assert_close(logits(model, tokens, preference=[1, 0]), other, **EXACT)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), wanted, **EXACT)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tie
    assert merged.config.tie_word_embeddings == tie
    assert not any(isinstance(module, HoELayer) for module in merged.modules())
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(logits(again, tokens), wanted, **EXACT)


def test_merging_is_exact_with_routers_by_module(adapted, tokens):
    router = RouterSpec([0.25, 0.75], kind="module", votes_for="all")
    model = adapted(tie=True, interpolation="norm", routers=[router], trained=True)
    for name, parameter in model.named_parameters():
        if "hoe_router" in name and name.endswith("weight"):
            parameter.data.zero_()  # it votes by its bias alone
    model.set_preference([0.3, 0.7])
    wanted = logits(model, tokens)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), wanted, **EXACT)


def test_merging_is_refused_where_a_trained_router_votes(adapted, tokens):
    model = adapted(trained=True)
    before = logits(model, tokens, preference=[0.25, 0.75])
    model.set_preference([0.25, 0.75])
    with pytest.raises(StaticMergeError):
        model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=0)


@pytest.mark.parametrize("tie", [False, True])
def test_disabled_and_unloaded_it_is_the_base(adapted, llama, tied, tokens, tie):
    model = adapted(tie=tie)
    wanted = logits((tied if tie else llama)().double(), tokens)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens), wanted, rtol=0, atol=0)
    assert not torch.allclose(logits(model, tokens), wanted)
    base = model.unload()
    torch.testing.assert_close(logits(base, tokens), wanted, rtol=0, atol=0)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tie


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_saved_and_loaded(adapted, llama, tied, tokens, tmp_path, tie, low_memory):
    model = adapted(tie=tie, trained=True, interpolation="norm")
    model.save_pretrained(tmp_path)
    base = (tied if tie else llama)().double()
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory).eval()
    for preference in ([1, 0], [0.25, 0.75], [0.6, 0.4]):
        torch.testing.assert_close(
            logits(loaded, tokens, preference=preference), logits(model, tokens, preference=preference), **EXACT
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_bases(llama, config, tokens, tmp_path, dtype):
    """Experts of embeddings and heads have the base's dtype; those of norms, a shift of few numbers, are float32."""
    settings = {"interpolation": "norm", "init_weights": False, **EVERYWHERE}
    model = get_peft_model(llama().to(dtype), config(**settings)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().to(dtype), tmp_path)
    tensors = dict(model.named_parameters())
    for name, tensor in loaded.named_parameters():
        wide = any(part in name for part in ("hoe_norm", "hoe_length", "hoe_router"))
        assert tensor.dtype == (torch.float32 if wide else dtype), name
        assert torch.equal(tensor, tensors[name]), name
    assert logits(loaded, tokens, preference=[0.3, 0.7]).dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("preference", [[0.3, 0.7], [[0.3, 0.7], [1.0, 0.0]]], ids=["shared", "rows"])
def test_autocast_does_not_round_the_weight_of_a_norm(llama, config, randomise, preference):
    model = get_peft_model(llama(), config(**EVERYWHERE)).eval()
    randomise(model)
    norm = model.base_model.model.model.norm
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with model.use_preference(preference):
        expected = norm(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(norm(x), expected, rtol=0, atol=0)


def test_the_base_is_not_saved_with_it(adapted, tmp_path):
    # PEFT saves whole embeddings where target_modules names them.
    from safetensors import safe_open

    adapted(target_embeddings=["embed_tokens"]).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert all(".hoe_" in key for key in file.keys())  # noqa: SIM118


def test_they_grow_and_shrink_with_the_adapter(adapted, tokens, tied, tmp_path):
    model = adapted(tie=True, interpolation="norm", trained=True)
    grid = [[0.9, 0.1], [0.25, 0.75]]
    before = [logits(model, tokens, preference=point) for point in grid]
    generator = torch.Generator().manual_seed(5)
    drawn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2  # noqa: E731
    layers = {m.module_name: m for m in model.modules() if isinstance(m, HoELayer) and m.hoe_layouts}
    weights = {
        name: (drawn(2, layer.in_features), drawn(layer.out_features, 2)) if layer.low_rank else (drawn(32),)
        for name, layer in layers.items()
    }
    with pytest.raises(ExpertError, match=r"weights of model.norm are \[\(3,\)\]; give a tuple of 1 deltas \(32,\)"):
        model.add_objective("c", weights={**weights, "model.norm": (drawn(3),)})
    model.add_objective("c", weights=weights)
    model.add_router([0.5, 0.2, 0.3])
    for point, output in zip(grid, before, strict=True):
        torch.testing.assert_close(logits(model, tokens, preference=[*point, 0]), output, **EXACT)
    embedding = layers["model.embed_tokens"]
    torch.testing.assert_close(
        embedding.get_delta_weight("default", torch.eye(4)[3]),
        (weights["model.embed_tokens"][1] @ weights["model.embed_tokens"][0]).T,
    )
    wanted = logits(by_hand(model, tied(), [0.0, 0.0, 1.0]), tokens)
    torch.testing.assert_close(logits(model, tokens, preference=[0, 0, 1]), wanted, **EXACT)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tied().double(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens, preference=[0, 0, 1]), wanted, **EXACT)
    model.remove_router("r1")
    with pytest.warns(UserWarning, match="no expert serves"):
        model.remove_expert("c")
    for point, output in zip(grid, before, strict=True):
        torch.testing.assert_close(logits(model, tokens, preference=[*point, 0]), output, **EXACT)


def test_experts_that_train_train_there_too(adapted, tokens):
    model = adapted(tie=True, train_experts=True)
    model(tokens, labels=tokens, preference=[0.7, 0.3]).loss.backward()
    embedding = model.base_model.model.model.embed_tokens
    for parameter in (*embedding.factors("default"), model.base_model.model.model.norm.hoe_norm["default"].weight):
        assert bool(parameter.grad.any())


@pytest.mark.slow
@pytest.mark.usefixtures("whole_graph")
def test_compiled_it_is_one_graph(adapted, tokens):
    model = adapted(tie=True, interpolation="norm")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for preference in ([1, 0], [0.3, 0.7]):
        model.set_preference(preference)
        torch.testing.assert_close(logits(compiled, tokens), logits(model, tokens), **EXACT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_embeddings": ["nowhere"]}, "target_embeddings names 'nowhere', but LlamaForCausalLM has no module"),
        ({"target_norms": ["embed_token"]}, "target_norms names 'embed_token', but"),
        ({"target_norms": ["layers"]}, "layers is a ModuleList|a ModuleList"),
    ],
)
def test_names_of_nothing(llama, config, changes, message):
    with pytest.raises(ModuleError, match=message):
        get_peft_model(llama(), config(**changes))


def test_a_tied_head_that_target_modules_names_too(tied, config):
    with (
        pytest.raises(ModuleError, match=r"lm_head .* shares its weight without following"),
        pytest.warns(UserWarning, match="tie_word_embeddings"),
    ):
        get_peft_model(tied(), config(target_modules=["lm_head", "q_proj"], target_embeddings=["embed_tokens"]))
