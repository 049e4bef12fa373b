from __future__ import annotations

import pytest
import torch

from peft_hoe import CheckpointError
from peft_hoe.experts.architecture import read_architecture
from peft_hoe.experts.model_weights import ModelWeights
from peft_hoe.experts.task_vectors import Agreement, task_vectors


def test_task_vectors_are_differences_in_float32(opened):
    base, architecture, change = opened
    policies = {"up": change(lambda _, t: t + 0.25, "up"), "half": change(lambda _, t: t.bfloat16(), "half")}
    for target in architecture.targets:
        deltas = task_vectors(base, policies, target)
        assert {delta.dtype for delta in deltas.values()} == {torch.float32}
        torch.testing.assert_close(deltas["up"], torch.full((target.d_out, target.d_in), 0.25))
        weight = base.read(target.weight)
        assert torch.equal(deltas["half"], weight.bfloat16().float() - weight)


def test_conv1d_task_vectors_are_turned(gpt2, tmp_path, tiny):
    architecture = read_architecture(gpt2)
    base = ModelWeights(gpt2, "the base", architecture)
    step = torch.arange(16.0)[:, None]  # differs along d_in
    changed = tiny.rewrite(gpt2, tmp_path / "x", lambda n, t: t + step if n.endswith("c_attn.weight") else t)
    target = next(target for target in architecture.targets if target.name.endswith("c_attn"))
    delta = task_vectors(base, {"x": ModelWeights(changed, "x", architecture)}, target)["x"]
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
        task_vectors(base, {"x": policy}, target)


def test_agreement_by_hand():
    agreement = Agreement()
    agreement.add({"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[2.0, -1.0]])})
    agreement.add({"a": torch.tensor([[2.0, 0.0]]), "b": torch.tensor([[1.0, 5.0]])})
    # dot 2 - 2 + 2 = 2; norms 3 and sqrt(31); of 3 entries that both changed 2 agree.
    (row,) = agreement.pairs()
    assert row["policies"] == ["a", "b"]
    assert row["cosine"] == pytest.approx(2 / (3 * 31**0.5))
    assert row["sign_agreement"] == pytest.approx(2 / 3)


def test_agreement_with_a_policy_that_changed_nothing():
    agreement = Agreement()
    agreement.add({"a": torch.ones(2, 2), "b": torch.zeros(2, 2)})
    assert agreement.pairs() == [{"policies": ["a", "b"], "cosine": 0.0, "sign_agreement": 0.0}]
