"""A stranger's configuration: what it may ask for is bounded, and its patterns are matched with a limit."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_hoe import CheckpointError, ExpertError, HoEConfig


@pytest.mark.parametrize("r", [10**6, 10**12])
def test_a_million_ranks_are_refused_before_any_is_made(llama, config, r):
    with pytest.raises(ExpertError, match=r"layers.0.self_attn.q_proj maps 32 to 32 .*at most 16777216") as refused:
        get_peft_model(llama(), config(r=r))
    assert refused.value.value == [r, r, r]


def test_a_million_ranks_that_the_file_does_not_hold_are_refused_by_its_header(hoe_llama, llama, tmp_path):
    hoe_llama().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    for expert in written["experts"]:
        expert["r"] = 10**6
    del written["fingerprint"]
    path.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=r"hoe_[AB].weight' has shape .*asks for 3000000 along axis") as refused:
        PeftModel.from_pretrained(llama(), tmp_path)
    assert refused.value.path.endswith("adapter_model.safetensors")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_patterns_of_modules_are_matched_with_a_limit(field):
    names = {"a" * 60: torch.nn.Linear(2, 2), "lin": torch.nn.Linear(2, 2)}
    settings = {"target_modules": ["lin"], field: r"(a|aa)+b"}
    with pytest.raises(ExpertError, match=f"{field}: the pattern.*backtracks"):
        get_peft_model(torch.nn.ModuleDict(names), HoEConfig(objectives=["a", "b"], **settings))


def test_patterns_select_what_they_select_in_peft(llama, config):
    def adapted(**changes):
        return set(get_peft_model(llama(), config(**changes)).targeted_module_names)

    assert adapted(target_modules=r".*layers\.1.*(down|up)_proj") == {
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert adapted(target_modules=["q_proj"], exclude_modules=r".*layers\.0.*") == {"model.layers.1.self_attn.q_proj"}
    assert adapted(modules_to_save=["mlp"]) == {
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"
    }
