"""What a build says when the policies do not look like children of the base."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_hoe import HoEWarning, build_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def notes(*arguments, **options):
    """What is warned of; all of it stands in the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HoEWarning)
        report = build_adapter(*arguments, progress=False, pruning=None, **options)
    told = [str(warning.message) for warning in caught if warning.category is HoEWarning]
    assert set(told) <= set(report.notes)
    return told


def test_a_policy_of_another_base_is_farther_from_it_than_zero_is(llama, tmp_path, tiny):
    torch.manual_seed(7)
    tiny.llama().save_pretrained(tmp_path / "other")
    (told,) = notes(llama, {"kind": tmp_path / "other"}, tmp_path / "out")
    assert "policy 'kind' is farther from the base than the base is from zero" in told


def test_a_common_direction_of_all_policies_is_a_wrong_base(llama, tmp_path, tiny):
    common = tiny.rewrite(llama, tmp_path / "common", tiny.noisy(1))
    paths = {name: tiny.rewrite(common, tmp_path / name, tiny.noisy(seed, 0.01)) for seed, name in enumerate("ab", 2)}
    (told,) = notes(llama, paths, tmp_path / "out")
    assert "all policies changed the base in nearly the same direction (cosines of at least 0.99" in told
    assert notes(common, paths, tmp_path / "right") == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 0.1),
        ("num_attention_heads", 4),
        ("head_dim", 4),
        ("hidden_act", "gelu"),
        ("rope_theta", 500000.0),
        ("tie_word_embeddings", False),
        ("attention_bias", True),
    ],
)
def test_a_configuration_that_changes_what_weights_mean_is_told(llama, policies, tmp_path, key, value):
    path = policies["kind"] / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, key: value, "use_cache": False, "transformers_version": "1"}))
    (told,) = notes(llama, policies, tmp_path / "out")
    before = settings.get(key)
    assert (
        told == f"policy 'kind' has another configuration than the base: {key} is {value!r} (the base's is {before!r})"
    )


def test_the_share_of_rounding_is_that_of_a_policy_that_was_rounded(llama, tmp_path, tiny):
    noise = tiny.noisy(1, 4e-4)
    exact = {name: tensor for name, tensor in tiny.tensors_of(llama).items() if "_proj" in name}
    wanted = {name: noise(name, tensor) for name, tensor in exact.items()}
    policy = tiny.rewrite(llama, tmp_path / "kind", lambda name, tensor: wanted.get(name, tensor).bfloat16())
    changed = sum(float((wanted[name].bfloat16().float() - tensor).square().sum()) for name, tensor in exact.items())
    rounded = sum(float((wanted[name].bfloat16().float() - wanted[name]).square().sum()) for name in exact)
    (told,) = notes(llama, {"kind": policy}, tmp_path / "out")
    share = float(told.partition("about ")[2].partition("%")[0]) / 100
    assert share == pytest.approx(rounded / changed, rel=0.1)
    assert "rounding to bfloat16 is about" in told


def test_a_lora_policy_that_declares_another_base_is_told(llama, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "lora")
    assert notes(llama, {"kind": tmp_path / "lora"}, tmp_path / "out") == []
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "us/other-7b"}))
    (told,) = notes(llama, {"kind": tmp_path / "lora"}, tmp_path / "again")
    assert told == (
        f"policy 'kind' says that it was trained on 'us/other-7b', but the base is {str(llama)!r}; is that the same model?"
    )


def test_a_head_of_its_own_that_was_trained_is_told(tmp_path, tiny):
    torch.manual_seed(0)
    tiny.llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    noise = tiny.noisy(1)
    policy = tiny.rewrite(
        tmp_path / "base", tmp_path / "kind", lambda n, t: noise(n, t) if n != "lm_head.weight" else t + 1
    )
    report = build_adapter(tmp_path / "base", {"kind": policy}, tmp_path / "out", capture=(), progress=False)
    assert any(
        "policy 'kind' changed the output embedding (lm_head), which its expert does not hold: " in n
        for n in report.notes
    )
