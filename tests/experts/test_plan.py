"""What a build is said to take, against what it takes."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from peft_hoe import CheckpointError, ExpertError, ExpertSpec, Pruning, build_adapter
from peft_hoe.experts import checkpoints, plan_build

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SETTINGS = {"r": 3, "experts": [ExpertSpec([0.5, 0.5], r=12)], "routers": [[0.25, 0.75]], "interpolation": "linear"}


def test_the_adapter_has_the_planned_experts_and_size(llama, policies, tmp_path, tiny):
    plan = plan_build(llama, policies, **SETTINGS)
    report = build_adapter(llama, policies, tmp_path / "out", progress=False, **SETTINGS)
    assert plan.experts == report.experts
    assert plan.modules == len(report.modules) == 7
    tensors = tiny.tensors(tmp_path / "out")
    assert plan.adapter_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("pruning", "passes"), [(0.4, 2), (None, 1), (Pruning(0.4, "module"), 1)])
def test_what_is_read(llama, policies, tiny, pruning, passes):
    plan = plan_build(llama, policies, pruning=pruning)
    tensors = tiny.tensors_of(llama)
    scope = sum(tensor.nbytes for name, tensor in tensors.items() if "_proj" in name)
    assert plan.passes == passes
    assert plan.weights * 4 == scope
    assert plan.read_bytes == 3 * (sum(tensor.nbytes for tensor in tensors.values()) + (passes - 1) * scope)
    assert plan.fetch_bytes == 0
    assert plan.seconds == pytest.approx(sum(plan.parts.values()))


def test_nothing_is_read_but_configurations(tmp_path, monkeypatch):
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    for name in ("base", "policy", "lora"):
        config.save_pretrained(tmp_path / name)
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 7}))
    monkeypatch.setattr(checkpoints, "open_file", None)
    plan = plan_build(tmp_path / "base", {"kind": tmp_path / "policy", "brief": tmp_path / "lora"}, num_processes=4)
    assert plan.weights == 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert [expert["r"] for expert in plan.experts] == [16, 7, 16]
    assert "560 linear layers, 68.45 billion weights" in plan.table()


def test_lora_policies_need_no_base(llama, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 7}))
    plan = plan_build(llama, {"kind": tmp_path / "lora"})
    assert (plan.passes, plan.read_bytes, plan.seconds) == (0, 0, 0)


def test_what_cannot_be_built_is_refused(llama, policies, tmp_path):
    with pytest.raises(ExpertError, match="policies is empty"):
        plan_build(llama, {})
    with pytest.raises(ExpertError, match="num_processes is 0; it must be a whole number"):
        plan_build(llama, policies, num_processes=0)
    with pytest.raises(CheckpointError, match="is not a directory"):
        plan_build(llama, {"kind": tmp_path / "nowhere"})
