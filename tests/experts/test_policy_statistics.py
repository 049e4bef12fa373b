"""What a build says about policies that are probably not what they were meant to be."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from peft_hoe import HoEWarning, build_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
QUIET = {"progress": False, "pruning": None}


def build(*arguments, **options):
    """The report, and the text of each warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HoEWarning)
        report = build_adapter(*arguments, **options, **QUIET)
    return report, [str(warning.message) for warning in caught if warning.category is HoEWarning]


def test_policies_that_differ_from_base_and_from_each_other_are_not_remarked_on(llama, policies, tmp_path):
    report, told = build(llama, policies, tmp_path / "out")
    assert told == []
    assert [note for note in report.notes if "policy" in note or "policies" in note] == []


@pytest.mark.parametrize("copied", [False, True])
def test_a_policy_that_is_the_base_is_told(llama, policies, tmp_path, tiny, copied):
    same = tiny.rewrite(llama, tmp_path / "same", lambda _, tensor: tensor) if copied else llama
    report, told = build(llama, {"kind": policies["kind"], "same": same}, tmp_path / "out")
    assert told == [
        "policy 'same' equals the base in every weight in scope, so its expert is empty; is it the base itself?"
    ]
    assert told[0] in report.notes
    assert f"note: {told[0]}" in report.table()


def test_of_a_policy_that_is_the_base_nothing_more_is_said(llama, policies, tmp_path):
    """Its entries are all equal, so that pruning dropped none of them: that is no matter of 16-bit checkpoints."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HoEWarning)
        build_adapter(llama, {"kind": policies["kind"], "same": llama}, tmp_path / "out", progress=False)
    assert [str(each.message)[:29] for each in caught if each.category is HoEWarning] == [
        "policy 'same' equals the base"
    ]


def test_one_policy_under_two_names_is_told_for_each_pair(llama, policies, tmp_path, tiny):
    copy = tiny.rewrite(policies["kind"], tmp_path / "copy", lambda _, tensor: tensor)
    names = {"kind": policies["kind"], "brief": policies["brief"], "again": policies["kind"], "copy": copy}
    report, told = build(llama, names, tmp_path / "out", experts=[])
    pairs = [("kind", "again"), ("kind", "copy"), ("again", "copy")]
    assert told == [
        f"policies {a!r} and {b!r} changed the base in exactly the same way, so their experts are the same; is one model "
        "given under two names?"
        for a, b in pairs
    ]
    assert set(told) <= set(report.notes)


def test_policies_that_differ_in_one_entry_are_two(llama, policies, tmp_path, tiny):
    def change(name, tensor):
        if name.endswith("down_proj.weight"):  # the last that is read
            tensor = tensor.clone()
            tensor[-1, -1] += 1
        return tensor

    other = tiny.rewrite(policies["kind"], tmp_path / "other", change)
    told = build(llama, {"kind": policies["kind"], "other": other}, tmp_path / "out")[1]
    assert [note for note in told if "exactly" in note] == []


def test_fused_experts_that_get_no_expert_are_told_with_their_share(tmp_path):
    # Nothing said that most of the change was left out.
    config = MixtralConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=32,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        MixtralForCausalLM(config).save_pretrained(tmp_path / name)
    if any("w1" in name for name, _ in MixtralForCausalLM(config).named_modules()):
        pytest.skip("transformers 4 keeps one linear layer for each expert")
    report, told = build(tmp_path / "base", {name: tmp_path / name for name in "ab"}, tmp_path / "out")
    shares = [report.policies[name].not_captured["fused experts"] for name in "ab"]
    assert min(shares) > 0.3
    assert [note for note in told if "fused" in note] == [
        "4 fused expert tensors, such as 'model.layers.0.mlp.experts.gate_up_proj', get no expert, because experts live in "
        f"linear layers; they hold {shares[0]:.1%} of 'a', {shares[1]:.1%} of 'b' (share of the squared change)"
    ]
    assert told[0] in report.notes
