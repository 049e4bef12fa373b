from __future__ import annotations

import pytest
import torch

from peft_hoe import CheckpointError
from peft_hoe.experts.architecture import read_architecture
from peft_hoe.experts.model_weights import ModelWeights
from peft_hoe.experts.task_vectors import TaskVectorReader


def test_task_vectors_are_differences_in_float32(opened):
    base, architecture, change = opened
    policies = {"up": change(lambda _, t: t + 0.25, "up"), "half": change(lambda _, t: t.bfloat16(), "half")}
    reader = TaskVectorReader(base, policies)
    for target in architecture.targets:
        found = reader.read(target)
        assert {delta.dtype for delta in found.deltas.values()} == {torch.float32}
        torch.testing.assert_close(found.deltas["up"], torch.full((target.d_out, target.d_in), 0.25))
        weight = base.stored(target.weight)
        assert torch.equal(found.deltas["half"], weight.bfloat16().float() - weight)
        assert found.norms["up"] == pytest.approx(0.25 * (target.d_out * target.d_in) ** 0.5, rel=1e-6)
    assert set(reader.read(architecture.targets[0], ["half"]).deltas) == {"half"}


def test_a_policy_in_double_precision_is_subtracted_before_it_is_rounded(opened):
    base, architecture, change = opened
    tiny_step = 1e-9  # of a weight near 1, which float32 cannot tell from 0
    double = change(lambda _, tensor: tensor.double() + tiny_step)
    target = architecture.targets[0]
    delta = TaskVectorReader(base, {"x": double}).read(target).deltas["x"]
    torch.testing.assert_close(delta, torch.full_like(delta, tiny_step), rtol=1e-5, atol=0)


def test_large_weights_are_read_in_pieces(opened, monkeypatch):
    base, architecture, change = opened
    policy = change(lambda _, tensor: tensor + 0.25)
    target = next(target for target in architecture.targets if target.name.endswith("up_proj"))
    whole = TaskVectorReader(base, {"x": policy}).read(target).deltas["x"].clone()
    monkeypatch.setattr("peft_hoe.experts.pieces.PIECE", 10)  # five rows of 16
    assert torch.equal(TaskVectorReader(base, {"x": policy}).read(target).deltas["x"], whole)


def test_conv1d_task_vectors_are_turned(gpt2, tmp_path, tiny):
    architecture = read_architecture(gpt2)
    base = ModelWeights(gpt2, "the base", architecture)
    step = torch.arange(16.0)[:, None]  # differs along d_in
    changed = tiny.rewrite(gpt2, tmp_path / "x", lambda n, t: t + step if n.endswith("c_attn.weight") else t)
    target = next(target for target in architecture.targets if target.name.endswith("c_attn"))
    delta = TaskVectorReader(base, {"x": ModelWeights(changed, "x", architecture)}).read(target).deltas["x"]
    torch.testing.assert_close(delta, step.T.expand(48, 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_name_the_tensor(opened, value):
    base, architecture, change = opened

    def spoil(name, tensor):
        if name.endswith("k_proj.weight"):
            tensor = tensor.clone()
            tensor[0, 0] = value
        return tensor

    policy = change(spoil)
    target = next(target for target in architecture.targets if target.name.endswith("k_proj"))
    with pytest.raises(
        CheckpointError, match=r"policy 'changed': .* 'model.layers.0.self_attn.k_proj.weight' holds NaN"
    ):
        TaskVectorReader(base, {"x": policy}).read(target)
