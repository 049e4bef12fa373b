"""Experts of embeddings, heads and norms, and experts that have a policy of their own."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from peft_hoe import CheckpointError, ExpertError, ExpertSpec, HoEConfig, HoEError, PreferenceError
from peft_hoe.commands.arguments import read_expert
from peft_hoe.experts import build_adapter, plan_build
from peft_hoe.experts.capture import MUCH
from peft_hoe.tuner.embedding import HoEHead, TiedHead

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
EXACT = {"r": "full", "pruning": None, "rescale": None, "progress": False}
BOTH = ("embeddings", "norms")
CLOSE = {"atol": 2e-4, "rtol": 0}
TOKENS = torch.arange(3, 23).reshape(2, 10)


def load(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def logits(model, **kwargs):
    with torch.no_grad():
        return model(TOKENS, **kwargs).logits


def test_with_everything_captured_at_full_rank_each_corner_is_its_policy(llama, policies, tmp_path):
    report = build_adapter(llama, policies, tmp_path / "out", capture=BOTH, **EXACT)
    model = load(llama, tmp_path / "out")
    for index, policy in enumerate(policies.values()):
        wanted = logits(AutoModelForCausalLM.from_pretrained(policy).eval())
        torch.testing.assert_close(logits(model, preference=[1 - index, index]), wanted, **CLOSE)
    assert isinstance(model.base_model.model.lm_head, TiedHead)
    config = HoEConfig.from_pretrained(tmp_path / "out")
    assert config.target_embeddings == ["model.embed_tokens"]
    assert set(config.target_norms) == {
        "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm",
    }  # fmt: skip
    kind = report.policies["kind"]
    assert set(kind.captured) == {"embeddings", "norms"}
    assert kind.not_captured == {}
    assert "captured of kind besides linear layers" in report.table()


def test_a_head_of_its_own(tiny, tmp_path):
    torch.manual_seed(0)
    tiny.llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    policies = {name: tiny.rewrite(tmp_path / "base", tmp_path / name, tiny.noisy(i)) for i, name in enumerate("ab")}
    build_adapter(tmp_path / "base", policies, tmp_path / "out", capture=["embeddings"], **EXACT)
    model = load(tmp_path / "base", tmp_path / "out")
    assert isinstance(model.base_model.model.lm_head, HoEHead)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", policies["a"]))
    for name in ("lm_head", "model.embed_tokens"):
        delta = tiny.delta(tmp_path / "out", name, 0)
        wanted = after[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(delta, wanted.T if "embed" in name else wanted, atol=1e-5, rtol=1e-4)


def test_a_merged_expert_of_norms_is_the_weighted_mean(llama, policies, tmp_path, tiny):
    build_adapter(
        llama, policies, tmp_path / "out", experts=[[0.25, 0.75]], capture="norms", routers=[[0.5, 0.5]], **EXACT
    )
    deltas = tiny.tensors(tmp_path / "out")["base_model.model.model.norm.hoe_norm.weight"]
    files = [load_file(folder / "model.safetensors")["model.norm.weight"] for folder in (llama, *policies.values())]
    kind, brief = files[1] - files[0], files[2] - files[0]
    torch.testing.assert_close(deltas, torch.stack([kind, brief, 0.25 * kind + 0.75 * brief]))
    assert not any("norm" in name or "embed" in name for name in tiny.tensors(tmp_path / "out") if "hoe_router" in name)


def test_pruning_of_linear_layers_does_not_depend_on_what_is_captured(llama, policies, tmp_path, tiny):
    reports = [
        build_adapter(llama, policies, tmp_path / str(i), capture=capture, progress=False, r=4)
        for i, capture in enumerate([(), BOTH])
    ]
    assert reports[0].policies["kind"].prune_threshold == reports[1].policies["kind"].prune_threshold
    assert reports[0].pairs == reports[1].pairs
    plain, all_of_it = (tiny.tensors(tmp_path / name) for name in "01")
    assert plain.keys() < all_of_it.keys()
    assert all(torch.equal(tensor, all_of_it[name]) for name, tensor in plain.items())
    assert reports[1].modules["model.embed_tokens"]["kind"].kept == 1


def test_lora_policies_have_nothing_to_capture(llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "lora")
    build_adapter(llama, {"a": tmp_path / "lora"}, tmp_path / "out", capture=BOTH, progress=False)
    config = HoEConfig.from_pretrained(tmp_path / "out")
    assert (config.target_embeddings, config.target_norms) == (None, None)


def test_what_cannot_be_captured_is_refused(llama, policies, tmp_path):
    with pytest.raises(ExpertError, match=r"capture is 'biases'; use one of 'embeddings', 'norms'"):
        build_adapter(llama, policies, tmp_path / "out", capture=["biases"], progress=False)
    settings = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(settings).save_pretrained(tmp_path / "t5")
    with pytest.raises(CheckpointError, match=r"shared shares its weight with .*embed_tokens"):
        build_adapter(tmp_path / "t5", {"a": tmp_path / "t5"}, tmp_path / "out", capture=["embeddings"], progress=False)
    assert not (tmp_path / "out").exists()


# -- "auto" ---


@pytest.mark.parametrize(("scale", "chosen"), [(1.0, []), (2.0, ["embeddings"])])
def test_embeddings_get_experts_where_a_policy_changed_them_much(llama, tmp_path, tiny, scale, chosen):
    """Changes are constant, so that shares follow from the numbers of entries."""

    def change(name, tensor):
        return tensor + (0.1 * scale if "embed" in name or name == "lm_head.weight" else 0.1 * (tensor.ndim == 2))

    policy = tiny.rewrite(llama, tmp_path / "a", change)
    weights = tiny.tensors_of(llama)
    embeddings = weights["model.embed_tokens.weight"].numel() * scale**2
    linear = sum(tensor.numel() for name, tensor in weights.items() if "proj" in name)
    assert (embeddings / (embeddings + linear) >= MUCH) == bool(chosen)
    report = build_adapter(llama, {"a": policy}, tmp_path / "out", **EXACT)
    assert report.options["capture"] == tuple(chosen)
    assert HoEConfig.from_pretrained(tmp_path / "out").target_embeddings == (["model.embed_tokens"] if chosen else None)
    share = f"{embeddings / (embeddings + linear):.0%}"
    assert any(f"they hold {share} of what 'a' changed" in note for note in report.notes) == bool(chosen)


def test_embeddings_that_cannot_have_experts_are_left_out(llama, tmp_path, tiny):
    """A policy with a longer vocabulary is an error only where they are asked for."""
    longer = {"model.embed_tokens.weight": lambda tensor: torch.cat([tensor + 1, tensor[:2]])}
    policy = tiny.rewrite(llama, tmp_path / "a", lambda name, tensor: longer.get(name, lambda t: t + 0.1)(tensor))
    assert build_adapter(llama, {"a": policy}, tmp_path / "out", **EXACT).options["capture"] == ()
    with pytest.raises(CheckpointError, match="embed_tokens"):
        build_adapter(llama, {"a": policy}, tmp_path / "asked", capture="embeddings", **EXACT)


def test_auto_stands_alone(llama, policies, tmp_path):
    with pytest.raises(ExpertError, match="'auto' stands alone"):
        build_adapter(llama, policies, tmp_path / "out", capture=["auto", "norms"], progress=False)
    plans = [plan_build(llama, policies, r=4, capture=capture) for capture in ((), "auto")]
    assert plans[0].adapter_bytes == plans[1].adapter_bytes  # no weight is read


# -- policies of single experts ---


@pytest.fixture
def mixture(llama, tmp_path, tiny):
    return tiny.rewrite(llama, tmp_path / "mixture", tiny.noisy(9))


def test_an_expert_of_a_policy_of_its_own(llama, policies, mixture, tmp_path, tiny):
    middle = ExpertSpec([0.5, 0.5], policy=mixture)
    report = build_adapter(llama, policies, tmp_path / "out", experts=[middle, [0.25, 0.75]], capture=BOTH, **EXACT)
    model = load(llama, tmp_path / "out")
    wanted = logits(AutoModelForCausalLM.from_pretrained(mixture).eval())
    torch.testing.assert_close(logits(model, preference=[0.5, 0.5]), wanted, **CLOSE)
    assert model.peft_config["default"].objectives == ["kind", "brief"]
    assert list(report.policies) == ["kind", "brief", "centroid"]
    assert report.policies["centroid"].source == str(mixture)
    assert [expert.get("policy") for expert in report.experts] == [None, None, str(mixture), None]
    assert len(report.pairs) == 3
    assert "policy" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())["experts"][2]
    assert tiny.config(tmp_path / "out")["experts"][3]["name"] == "e3"


def test_it_is_pruned_and_rescaled_as_a_corner_is(llama, policies, mixture, tmp_path, tiny):
    settings = {"r": 4, "progress": False}
    build_adapter(llama, policies, tmp_path / "out", experts=[ExpertSpec([0.5, 0.5], policy=mixture)], **settings)
    build_adapter(llama, {"alone": mixture}, tmp_path / "alone", **settings)
    up = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(tiny.delta(tmp_path / "out", up, 2), tiny.delta(tmp_path / "alone", up, 0))


def test_a_killed_build_is_not_gone_on_with_for_other_policies(llama, policies, mixture, tmp_path):
    # The files are the same and so is the configuration: only which policy is whose tells them apart.
    from peft_hoe.experts.adapter_config import adapter_config, expert_specs
    from peft_hoe.experts.build_inputs import open_inputs
    from peft_hoe.experts.option_groups import Loading
    from peft_hoe.experts.options import BuildOptions
    from peft_hoe.experts.stages import work_key

    options = BuildOptions.checked(
        r=4, pruning=None, merging="ties", svd="exact", rescale=None, interpolation="norm", capture=(), seed=0, dtype=None,
        num_processes=1,
    )  # fmt: skip

    def key(given):
        own = {"centroid": mixture}
        inputs = open_inputs(
            llama, given, target_modules="all-linear", exclude_modules=None, loading=Loading(), own=own
        )
        specs = expert_specs([ExpertSpec([0.5, 0.5], policy=mixture)], list(given))
        return work_key(inputs, options, adapter_config(inputs, options, specs, None))

    swapped = dict(zip(policies, reversed(policies.values()), strict=True))
    assert key(policies) == key(policies) != key(swapped)


def test_a_policy_of_its_own_where_it_makes_no_sense(llama, policies, mixture, tmp_path):
    for spec, message in (
        (ExpertSpec([1, 0], policy=mixture), "'kind' alone has a policy of its own.*as the policy of the objective"),
        (ExpertSpec([0.5, 0.5], name="nobody", policy=tmp_path / "nowhere"), "nowhere"),
        (ExpertSpec([0.5, 0.5], policy=""), "the place of a model is ''; give a checkpoint's directory or a Hub id"),
        (ExpertSpec([0.5, 0.5], policy=7), "the place of a model is 7; give"),
        (ExpertSpec([0.5, 0.6], policy=mixture), "sums to 1.1"),
        (ExpertSpec({"kind": 0.5, "funny": 0.5}, policy=mixture), r"names \['funny'\]; the objectives are"),
        (ExpertSpec([0.5, 0.5], name="kind", policy=mixture), r"\['kind'\] are used twice"),
        (ExpertSpec([0.25, 0.75], r=0, policy=mixture), "the rank of expert 'e2' is 0"),
    ):
        with pytest.raises((ExpertError, CheckpointError, PreferenceError), match=message):
            build_adapter(llama, policies, tmp_path / "out", experts=[spec], progress=False)
        assert not [path for path in tmp_path.iterdir() if "out" in path.name or path.name.startswith(".")]
    twice = [ExpertSpec([0.5, 0.5], policy=mixture), [0.5, 0.5]]
    with pytest.raises(ExpertError, match=r"'centroid' have preferences \[0.5, 0.5\] and \[0.5, 0.5\], only 0 apart"):
        build_adapter(llama, policies, tmp_path / "out", experts=twice, progress=False)
    with pytest.raises(ExpertError, match="names the policy 'x', which only build_adapter"):
        HoEConfig(objectives=["a", "b"], experts=[[1, 0], [0, 1], ExpertSpec([0.5, 0.5], policy="x")])


def test_the_plan_counts_what_is_captured(llama, policies, mixture):
    plans = [plan_build(llama, policies, r=4, capture=capture) for capture in ((), BOTH)]
    numbers = (
        3 * 4 * (32 + 16) + 3 * 3 * 16
    )  # embeddings (32, 16) at rank 4, three norms of width 16, for three experts
    assert plans[1].adapter_bytes - plans[0].adapter_bytes == 4 * numbers
    own = plan_build(llama, policies, experts=[ExpertSpec([0.5, 0.5], policy=mixture)], merging="ties")
    assert "merging" not in own.parts
    assert own.read_bytes == plans[0].read_bytes * 4 / 3


@pytest.mark.parametrize(
    ("text", "preference", "policy"),
    [
        ("0.5,0.5", [0.5, 0.5], None),
        ("0.5,0.5=models/a=b", [0.5, 0.5], "models/a=b"),
        ("kind=0.5,brief=0.5", {"kind": 0.5, "brief": 0.5}, None),
        ("kind=0.5,brief=0.5=org/name@main", {"kind": 0.5, "brief": 0.5}, "org/name@main"),
        ("[0.25, 0.75]", [0.25, 0.75], None),
    ],
)
def test_experts_on_the_command_line(text, preference, policy):
    spec = read_expert(text)
    assert (spec.preference, spec.policy) == (preference, policy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5,0.5=", "--expert is '0.5,0.5=', with no policy after the last '='; write PREFERENCE=PATH"),
        ("nan,1=models/a", "cannot read the preference 'nan,1=models/a'"),
        ("=models/a", "cannot read the preference '=models/a'"),
        ("kind=0.5,brief=0.5,kind=0.2=models/a", r"the preference names \['kind'\] twice"),
        ('{"kind": 0.5, "brief": 0.25, "kind": 0.5}', r"the preference names \['kind'\] twice"),
    ],
)
def test_what_is_no_expert_on_the_command_line(text, message):
    with pytest.raises(HoEError, match=message):
        read_expert(text)
