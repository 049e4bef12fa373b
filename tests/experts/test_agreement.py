"""Agreement of task vectors, by hand and against the formulas written out."""

from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.agreement import Agreement, compare
from peft_hoe.experts.task_vectors import TaskVectors


def vectors(**deltas):
    found = {name: torch.tensor(delta) if isinstance(delta, list) else delta for name, delta in deltas.items()}
    return TaskVectors(found, {name: float(delta.double().norm()) for name, delta in found.items()})


def compared(**deltas):
    return compare(vectors(**deltas))


def test_agreement_by_hand():
    agreement = Agreement()
    agreement.add(compared(a=[[1.0, 2.0]], b=[[2.0, -1.0]]))
    agreement.add(compared(a=[[2.0, 0.0]], b=[[1.0, 5.0]]))
    # dot 2 - 2 + 2 = 2; norms 3 and sqrt(31); of 3 entries that both changed 2 agree.
    (row,) = agreement.pairs()
    assert row["policies"] == ["a", "b"]
    assert row["cosine"] == pytest.approx(2 / (3 * 31**0.5))
    assert row["sign_agreement"] == pytest.approx(2 / 3)
    assert agreement.equal() == []


def test_agreement_with_a_policy_that_changed_nothing():
    agreement = Agreement()
    agreement.add(compared(a=torch.ones(2, 2), b=torch.zeros(2, 2)))
    assert agreement.pairs() == [{"policies": ["a", "b"], "cosine": 0.0, "sign_agreement": 0.0}]


def test_pieces_make_no_difference(monkeypatch):
    monkeypatch.setattr("peft_hoe.experts.pieces.PIECE", 7)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(11, 13, generator=generator).round(decimals=0) for _ in range(2))
    agreement = Agreement()
    agreement.add(compared(a=first, b=second, c=first))
    row = agreement.pairs()[0]
    product = first.double() * second.double()
    assert row["cosine"] == pytest.approx(float(product.sum() / (first.double().norm() * second.double().norm())))
    assert row["sign_agreement"] == int((product > 0).sum()) / int((product != 0).sum())
    assert agreement.equal() == [("a", "c")]
