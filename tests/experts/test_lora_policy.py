"""LoRA adapters as policies: what PEFT computes with them is what the experts hold."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_hoe import CheckpointError
from peft_hoe.experts import build_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
QUIET = {"progress": False}


@pytest.fixture
def lora(llama, tmp_path):
    """A function that saves a random LoRA adapter of a base."""

    def make(name, base=llama, seed=0, **settings):
        torch.manual_seed(seed)
        defaults = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**defaults, **settings}))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def merged_change(base, adapter):
    """`{module: (d_out, d_in)}`: what PEFT's own merge adds to the base's linear weights."""
    before = AutoModelForCausalLM.from_pretrained(base)
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    old, new = before.state_dict(), after.state_dict()
    transposed = before.config.model_type == "gpt2"
    changes = {name.removesuffix(".weight"): new[name] - old[name] for name in old if (new[name] != old[name]).any()}
    return {name: change.T if transposed else change for name, change in changes.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 12},
        {"lora_alpha": 12, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 40}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_scales_are_folded_exactly(llama, lora, tmp_path, tiny, settings):
    adapter = lora("kind", **settings)
    report = build_adapter(llama, {"kind": adapter}, tmp_path / "out", **QUIET)
    changes = merged_change(llama, adapter)
    assert set(report.modules) == set(changes)
    for module, change in changes.items():
        torch.testing.assert_close(tiny.delta(tmp_path / "out", module, 0), change, atol=1e-5, rtol=1e-4)


def test_conv1d_with_fan_in_fan_out(gpt2, lora, tmp_path, tiny):
    adapter = lora("kind", base=gpt2, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"])
    build_adapter(gpt2, {"kind": adapter}, tmp_path / "out", **QUIET)
    changes = merged_change(gpt2, adapter)
    assert len(changes) == 2
    for module, change in changes.items():
        torch.testing.assert_close(tiny.delta(tmp_path / "out", module, 0), change, atol=1e-5, rtol=1e-4)


def test_base_weights_are_not_read_when_all_policies_are_lora(llama, lora, tmp_path):
    adapters = {"kind": lora("kind"), "brief": lora("brief", seed=1)}
    (llama / "model.safetensors").unlink()
    report = build_adapter(llama, adapters, tmp_path / "out", **QUIET)
    assert [policy.kind for policy in report.policies.values()] == ["lora", "lora"]


def test_factors_are_taken_as_they_are_without_pruning_or_rescaling(llama, lora, tmp_path, tiny):
    adapter = lora("kind", lora_alpha=4)  # scale 1
    build_adapter(llama, {"kind": adapter}, tmp_path / "out", pruning=0.9, rescale="norm", **QUIET)
    own, built = load_file(adapter / "adapter_model.safetensors"), tiny.tensors(tmp_path / "out")
    for name, tensor in own.items():
        assert torch.equal(built[name.replace("lora_", "hoe_")], tensor)


def test_a_policy_is_never_overwritten(llama, lora):
    adapter = lora("kind")
    with pytest.raises(
        CheckpointError, match="holds an adapter of type 'LORA', not 'HOE', so it will not be overwritten"
    ):
        build_adapter(llama, {"kind": adapter}, adapter, overwrite=True, **QUIET)
    assert (adapter / "adapter_model.safetensors").is_file()


def test_a_smaller_rank_is_the_best_approximation(llama, lora, tmp_path, tiny):
    adapter = lora("kind")
    build_adapter(llama, {"kind": adapter}, tmp_path / "out", r=2, **QUIET)
    for module, change in merged_change(llama, adapter).items():
        lost = (change - tiny.delta(tmp_path / "out", module, 0)).norm().item()
        assert lost == pytest.approx(torch.linalg.svdvals(change)[2:].norm().item(), rel=1e-3, abs=1e-5)


def test_modules_without_weights_have_rank_zero(llama, lora, policies, tmp_path, tiny):
    adapter = lora("short", target_modules=["q_proj"])
    report = build_adapter(llama, {"kind": policies["kind"], "short": adapter}, tmp_path / "out", r=3, **QUIET)
    pattern = tiny.config(tmp_path / "out")["rank_pattern"]
    assert pattern["model.layers.0.mlp.up_proj"] == [3, 0, 3]
    assert "model.layers.0.self_attn.q_proj" not in pattern
    assert report.modules["model.layers.0.mlp.up_proj"]["short"].rank == 0
    assert tiny.tensors(tmp_path / "out")["base_model.model.model.layers.0.mlp.up_proj.hoe_A.weight"].shape == (6, 16)


def test_a_linear_merge_of_lora_policies_is_their_weighted_sum(llama, lora, tmp_path, tiny):
    adapters = {"kind": lora("kind"), "brief": lora("brief", seed=1)}
    build_adapter(
        llama, adapters, tmp_path / "out", experts=[[0.3, 0.7]], merging="linear", rescale=None, r="full", **QUIET
    )
    first, second = (merged_change(llama, adapter) for adapter in adapters.values())
    for module, change in first.items():
        expected = 0.3 * change + 0.7 * second[module]
        torch.testing.assert_close(tiny.delta(tmp_path / "out", module, 2), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rescale", [None, "norm", "policy_norm"])
def test_a_linear_merge_of_lora_policies_is_made_from_their_factors(llama, lora, tmp_path, tiny, monkeypatch, rescale):
    """Exactly, at the sum of their ranks or reduced, with the lengths of a merge that was multiplied out."""
    adapters = {"kind": lora("kind", target_modules=["q_proj", "up_proj"]), "brief": lora("brief", seed=1, r=3)}
    options = {"experts": [[0.3, 0.7]], "merging": "linear", "rescale": rescale, **QUIET}
    with monkeypatch.context() as patch:
        patch.setattr("peft_hoe.experts.module_builder.merge", None)  # nothing of full size is merged
        found = build_adapter(llama, adapters, tmp_path / "out", r=5, **options)
        build_adapter(llama, adapters, tmp_path / "whole", r=7, **{**options, "rescale": None})
    first, second = (merged_change(llama, adapter) for adapter in adapters.values())
    for module, change in second.items():
        whole = 0.3 * first.get(module, torch.zeros_like(change)) + 0.7 * change
        torch.testing.assert_close(tiny.delta(tmp_path / "whole", module, 2), whole, atol=1e-5, rtol=1e-4)
        row = found.modules[module]["e2"]
        u, s, vh = torch.linalg.svd(whole)
        truncated = (u[:, :5] * s[:5]) @ vh[:5]
        assert row.tau_norm == pytest.approx(whole.norm().item(), rel=1e-4)
        assert row.residual == pytest.approx(s[5:].norm().item(), abs=1e-4)
        factor = {None: 1.0, "norm": row.tau_norm / s[:5].norm().item()}.get(rescale, row.rescale)
        torch.testing.assert_close(tiny.delta(tmp_path / "out", module, 2), factor * truncated, atol=1e-4, rtol=1e-3)
        lengths = 0.3 * first[module].norm().item() if module in first else 0.0
        if rescale == "policy_norm":
            assert row.norm == pytest.approx(
                min(lengths + 0.7 * change.norm().item(), 3 * s[:5].norm().item()), rel=1e-3
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True: DoRA normalises"),
        ({"bias": "all"}, "bias='all': experts have no bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* holds whole modules"),
        ({"lora_bias": True}, "lora_bias=True: experts have no bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.* holds embedding rows"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which also changes the base's weights"),
        ({"peft_type": "IA3"}, "a PEFT adapter of type 'IA3'; only LORA"),
    ],
)
def test_what_is_not_a_low_rank_delta_is_refused(llama, lora, tmp_path, settings, message):
    adapter = lora("kind")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    with pytest.raises(CheckpointError, match=message):
        build_adapter(llama, {"kind": adapter}, tmp_path / "out", **QUIET)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.lora_A.weight"), "tensor '.*q_proj.lora_A.weight' is missing"),
        (lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(4, 9)}), r"shape \(4, 9\), but .* \(16, 16\)"),
        (lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.full((4, 16), torch.nan)}), "lora_A.weight' holds NaN"),
        (lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.ones(3, 16)}), "lora_A of rank 3 but lora_B of rank 4"),
        (lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(4, 16)}), "no linear module in scope"),
        (
            lambda t: t.update({"base_model.model.x.lora_embedding_A": torch.ones(4, 16)}),
            "is not a factor of a linear layer",
        ),
    ],
)
def test_damaged_adapters_are_named(llama, lora, tmp_path, change, message):
    adapter = lora("kind")
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        build_adapter(llama, {"kind": adapter}, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()
