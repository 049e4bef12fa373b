"""What is sharded and what cannot be; sharded runs are in test_two_processes.py."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from peft import get_peft_model

from peft_hoe import HoEConfig
from peft_hoe.errors import HoEError
from peft_hoe.training.ppo.sharding import shard, written_with_adapter

CPU = torch.device("cpu")


def test_one_process_cannot_shard(toys: ModuleType) -> None:
    policy = toys.make_policy()
    before = [parameter.clone() for parameter in policy.parameters()]
    with pytest.raises(HoEError, match=r"torch 2\.7|number of processes is 1"):
        shard(policy, CPU)
    assert all(torch.equal(x, y) for x, y in zip(before, policy.parameters(), strict=True))


def test_a_model_that_does_not_name_its_layers_is_refused(toys: ModuleType) -> None:
    policy = toys.make_policy()
    policy.get_base_model()._no_split_modules = None
    with pytest.raises(HoEError, match="LlamaForCausalLM does not say what its layers are"):
        shard(policy, CPU)


def test_quantised_weights_are_refused(toys: ModuleType) -> None:
    policy = toys.make_policy()
    norm = policy.get_base_model().model.norm
    norm.weight = torch.nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(HoEError, match=r"model\.norm\.weight is a quantised torch\.int8"):
        shard(policy, CPU)


def test_a_policy_on_several_devices_is_refused(toys: ModuleType) -> None:
    policy = toys.make_policy()
    policy.get_base_model().hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(HoEError, match=r"device_map over .*0.*cpu"):
        shard(policy, CPU)


def test_what_is_saved_with_the_adapter_stays_whole(toys: ModuleType) -> None:
    """Experts, modules_to_save, and the base weight of an output head, which PEFT saves where it is a target."""
    config = HoEConfig(
        objectives=["low", "high"],
        target_modules=["q_proj", "lm_head"],
        modules_to_save=["embed_tokens"],
        task_type="CAUSAL_LM",
    )
    policy = get_peft_model(toys.make_base(), config)
    model = policy.get_base_model()
    whole = written_with_adapter(model)
    kept = {name for name, parameter in model.named_parameters() if parameter in whole}
    base = {name for name, _ in model.named_parameters() if "hoe_" not in name}
    head_and_embedding = {
        "lm_head.base_layer.weight",
        "model.embed_tokens.original_module.weight",
        "model.embed_tokens.modules_to_save.default.weight",
    }
    assert kept & base == head_and_embedding
    assert kept - base == {name for name, _ in model.named_parameters() if "hoe_" in name}
