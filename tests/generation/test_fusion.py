from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch

from peft_hoe.errors import RowsError
from peft_hoe.generation import fusion
from peft_hoe.generation.fusion import divergence, fusion_logprobs


@pytest.mark.parametrize("preference", [[0.25, 0.75], [1.0, 0.0]])
@pytest.mark.parametrize("mixed", [True, False])
def test_fusion_equals_separate_forwards(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch, preference: list[float], mixed: bool
) -> None:
    """Σ λ_i log π_i, normalised; also where a layer cannot tell the rows of a batch apart."""
    model = toys.make_policy()
    ids = torch.tensor([[0, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    naive = torch.zeros(2, 3, len(toys.WORDS))
    with torch.no_grad():
        for i, weight in enumerate(preference):
            logits = model(ids, attention_mask=mask, position_ids=positions, preference=np.eye(2)[i].tolist()).logits
            naive += weight * logits[:, -4:-1].log_softmax(-1)
    if not mixed:
        steer = fusion.use_preference

        def refuse(policy, preferences):  # type: ignore[no-untyped-def]
            if np.ndim(preferences["default"]) == 2:
                raise RowsError("rows are not samples")
            return steer(policy, preferences)

        monkeypatch.setattr(fusion, "use_preference", refuse)
    fused = fusion_logprobs(model, "default", np.asarray(preference), ids, mask, 3)
    torch.testing.assert_close(fused, naive.log_softmax(-1), rtol=0, atol=2e-4)
    torch.testing.assert_close(fused.exp().sum(-1), torch.ones(2, 3))


def test_divergences_by_hand() -> None:
    """teacher (1/2, 1/2), student (1/4, 3/4): KL is ln 2 − ln 3 / 2 one way and 3/4 ln 3 − ln 2 the other."""
    teacher = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    student = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    assert float(divergence(student, teacher, 0.0)) == pytest.approx(math.log(2) - math.log(3) / 2)
    assert float(divergence(student, teacher, 1.0)) == pytest.approx(0.75 * math.log(3) - math.log(2))
    middle = [0.375, 0.625]
    halves = 0.5 * sum(0.5 * math.log(0.5 / m) for m in middle)
    halves += 0.5 * (0.25 * math.log(0.25 / middle[0]) + 0.75 * math.log(0.75 / middle[1]))
    assert float(divergence(student, teacher, 0.5)) == pytest.approx(halves)
    for beta in (0.0, 0.3, 1.0):
        assert float(divergence(teacher, teacher, beta)) == pytest.approx(0, abs=1e-12)
