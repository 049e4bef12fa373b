"""How much of a change lies outside the weights in scope."""

from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.out_of_scope import ComparisonOutOfScope


def test_outside_scope_by_kind(opened):
    base, architecture, change = opened
    # The embedding is tied with the output embedding: it counts once.
    policy = change(lambda name, t: t + 1 if name.endswith(("embed_tokens.weight", "model.norm.weight")) else t)
    squared = ComparisonOutOfScope(base, policy, architecture).finish().squared
    assert squared == {"embeddings": pytest.approx(32 * 16), "norms": pytest.approx(16)}


def test_a_resized_vocabulary_is_noted(opened):
    base, architecture, change = opened

    def enlarge(name, tensor):
        return torch.cat([tensor + 1, torch.zeros(3, 16)]) if name.endswith("embed_tokens.weight") else tensor

    found = ComparisonOutOfScope(base, change(enlarge), architecture).finish()
    assert found.notes == [
        "model.embed_tokens.weight has 32 rows in the base but 35 in policy 'changed'; shared rows compared"
    ]
    assert found.squared["embeddings"] == pytest.approx(32 * 16)
