"""The gate's kernel against the gate in torch: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from peft_hoe.serving import vllm_gate
from peft_hoe.serving.routed_exporter import room
from peft_hoe.serving.routed_lora import routed_factors, routed_votes
from peft_hoe.serving.source import adapter_from_model

pytest.importorskip("triton")
POINTS = ([0.25, 0.75], [0.4, 0.6], [0.6, 0.4], [0.75, 0.25])
TOKENS = 24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="this process has Triton for itself")
def test_in_the_interpreter():
    """Triton reads this variable when it is imported, so that the tests below run in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "8 passed" in ran.stdout


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="neither a GPU nor the interpreter")
@pytest.mark.parametrize("interpolation", ["linear", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [64, 40])  # one is no power of 2
def test_the_kernel_does_what_the_gate_in_torch_does(toys, interpolation, dtype, rank):
    from peft_hoe.serving import vllm_gate_triton

    model = toys.make_policy(interpolation=interpolation, rank_pattern={"q_proj": [3, 5, 2]})
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "hoe_router" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.mark_trained(["r0", "r1"])
    source = adapter_from_model(model)
    votes = [routed_votes(source.config, torch.tensor(point).double().numpy()) for point in POINTS]
    layout = room([(source.config, torch.tensor(POINTS).double().numpy())])
    for module in source.modules[:3]:
        memory = torch.arange(TOKENS) % 7 - 1  # no adapter, four of ours, an ordinary one, an empty place
        lora_b = torch.zeros(6, 1, source.factors(module)[1].shape[0], rank, dtype=dtype)
        lora_b[4] = torch.randn(lora_b[4].shape, generator=generator)
        for slot, each in enumerate(votes):
            factors = routed_factors(source, module, each, layout)
            lora_b[slot, 0, :, : factors.rank] = factors.b
        inner = torch.randn(TOKENS, rank, generator=generator)
        expected, found = inner.clone(), inner.clone().to(DEVICE)
        vllm_gate.gate(expected, lora_b, memory, layout)
        vllm_gate_triton.gate(found, lora_b.to(DEVICE), memory.to(DEVICE), layout)
        assert torch.equal(found.cpu()[memory >= 4], inner[memory >= 4])
        assert torch.equal(found.cpu()[memory == -1], inner[memory == -1])  # what expands it leaves such tokens out
        torch.testing.assert_close(found.cpu()[memory >= 0], expected[memory >= 0], rtol=1e-5, atol=1e-5)
        assert not torch.equal(expected[memory == 0], inner[memory == 0])
