"""The loss against formulas that are computed from separate forwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("trl")

from trl import DPOTrainer

from peft_hoe import use_preference
from peft_hoe.training.dpo.margins import answer_logprobs

Make = Callable[..., Any]
PREFERENCE = [0.25, 0.75]


@pytest.fixture
def policy(toys: ModuleType) -> Any:
    """A policy whose router votes, as after some training, in float64.

    Log-probabilities are float32 all the same: sums of up to 20, off by 1e-6, in losses of about 1.
    """
    model = toys.make_policy().double()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "hoe_router" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.mark_trained("r0")
    return model


def batch_of(trainer: Any, rows: Any = (0, 3, 20, 40)) -> dict[str, Any]:
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def logprob(model: Any, prompt: list[int], answer: list[int], **how: Any) -> torch.Tensor:
    """Of one answer, without padding."""
    ids = torch.tensor([prompt + answer])
    logprobs = model(input_ids=ids, **how).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def differences(model: Any, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """log π(chosen) − log π(rejected) of the policy, of each expert and of the base."""
    ways = {"policy": PREFERENCE, "low": [1.0, 0.0], "high": [0.0, 1.0]}
    answers = (row["chosen_ids"], row["rejected_ids"])
    found = {}
    for name, preference in ways.items():
        chosen, rejected = (logprob(model, row["prompt_ids"], answer, preference=preference) for answer in answers)
        found[name] = chosen - rejected
    with model.disable_adapter():
        chosen, rejected = (logprob(model, row["prompt_ids"], answer) for answer in answers)
    return found | {"base": chosen - rejected}


@pytest.mark.parametrize("margin_beta", [None, 0.2])
def test_margin_of_the_experts(make_dpo_trainer: Make, policy: Any, margin_beta: float | None) -> None:
    trainer = make_dpo_trainer(model=policy, beta=0.4, margin_beta=margin_beta)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(policy, batch).detach()
    arguments = []
    with torch.no_grad():
        for i in (0, 3, 20, 40):
            row = trainer.train_dataset[i]
            delta = differences(policy, row)
            own, other = row["objective"], 1 - row["objective"]
            reward = (margin_beta or 0.4) * (delta[["low", "high"][other]] - delta["base"])
            arguments.append((0.4 * (delta["policy"] - delta["base"]) - PREFERENCE[other] * reward) / PREFERENCE[own])
    assert set(batch["objective"].tolist()) == {0, 1}
    assert float(loss) == pytest.approx(-float(F.logsigmoid(torch.stack(arguments)).mean()), rel=1e-5)
    # What is logged is of the same pairs.
    count, losses, accurate, margins = trainer._pairs["eval"]
    assert count.tolist() == [2, 2]
    assert losses.sum() / 4 == pytest.approx(float(loss), rel=1e-5)
    assert margins.sum() == pytest.approx(float(sum(arguments)), rel=1e-5)
    assert accurate.sum() == sum(float(argument) > 0 for argument in arguments)


def test_margin_of_a_column(make_dpo_trainer: Make, toys: ModuleType, policy: Any) -> None:
    """The experts' margin, written into the dataset, gives the experts' loss."""
    pairs = {name: toys.make_pairs(name, rows=2) for name in toys.REWARDS}
    expected = make_dpo_trainer(model=policy, constructor={"train_dataset": pairs})
    with torch.no_grad():
        for row in expected.train_dataset:
            delta, other = differences(policy, row), 1 - row["objective"]
            pair = next(p for p in pairs[["low", "high"][row["objective"]]] if p["prompt"] == row["prompt"])
            pair["margin"] = PREFERENCE[other] * 0.5 * float(delta[["low", "high"][other]] - delta["base"])
    given = make_dpo_trainer(model=policy, constructor={"train_dataset": pairs}, margin="column")
    rows = range(len(given.train_dataset))
    x, y = (trainer.compute_loss(policy, batch_of(trainer, rows)).item() for trainer in (expected, given))
    assert x == pytest.approx(y, rel=1e-5)
    assert given.train_dataset.unique("margin") != [0.0]


def test_without_a_margin_it_is_trl_s_dpo(make_dpo_trainer: Make, policy: Any) -> None:
    """Loss and gradients are those of TRL's own code on the same batch, the adapters-off policy its reference."""
    trainer = make_dpo_trainer(model=policy, margin="none")
    batch = batch_of(trainer)
    routers = [parameter for name, parameter in policy.named_parameters() if "hoe_router" in name]
    loss = trainer.compute_loss(policy, batch)
    gradients = torch.autograd.grad(loss, routers)
    plain = {name: value for name, value in batch.items() if name != "objective"}
    with trainer.model_settings.applied(), use_preference(policy, PREFERENCE):
        theirs = DPOTrainer._compute_loss(trainer, policy, plain, False)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-4)
    for x, y in zip(gradients, torch.autograd.grad(theirs, routers), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert any(bool(x.any()) for x in gradients)


ELEMENTWISE = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
    "sigmoid_norm",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_other_losses_take_each_pair_s_beta_and_margin(
    make_dpo_trainer: Make, policy: Any, ld_alpha: float | None
) -> None:
    """TRL's loss of a batch is the mean of its losses of single pairs: no pair sees another one's β/λ or margin."""
    trainer = make_dpo_trainer(model=policy, label_smoothing=0.1, ld_alpha=ld_alpha)
    batches = [batch_of(trainer), *(batch_of(trainer, [i]) for i in (0, 3, 20, 40))]
    for loss_type in ELEMENTWISE:
        trainer.loss_types = [loss_type]
        with torch.no_grad():
            whole, *single = (float(trainer.compute_loss(policy, batch)) for batch in batches)
        assert whole == pytest.approx(np.mean(single), rel=1e-5), loss_type
        assert len({round(loss, 4) for loss in single}) > 1, loss_type


def test_the_reference_is_the_base_model(make_dpo_trainer: Make, toys: ModuleType, policy: Any) -> None:
    names = [name for name, _ in policy.named_parameters()]
    trainer = make_dpo_trainer(model=policy)
    assert list(policy.peft_config) == ["default"]
    assert [name for name, _ in policy.named_parameters()] == names
    base = toys.make_base().double()
    rows = [trainer.train_dataset[i] for i in (0, 3)]
    with torch.no_grad():
        found = trainer._reference_logprobs(batch_of(trainer, (0, 3)))
        expected = [logprob(base, r["prompt_ids"], r[key]) for key in ("chosen_ids", "rejected_ids") for r in rows]
    # Newer TRLs take log-probabilities in float32, whose sums of some ten numbers of up to 5 are off by 10 * 5 * 6e-8.
    bound = 1e-12 if found.dtype == torch.float64 else 3e-6
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=0, atol=bound)


def test_a_user_s_reference_is_used_and_left_alone(make_dpo_trainer: Make, toys: ModuleType, policy: Any) -> None:
    """The experts' rewards stay relative to the base."""
    other = toys.make_base(seed=9)
    trainer = make_dpo_trainer(model=policy, constructor={"ref_model": other})
    assert trainer.ref_model is other
    assert "forward" not in vars(other)
    row = trainer.train_dataset[0]
    loss = trainer.compute_loss(policy, batch_of(trainer, [0])).item()
    with torch.no_grad():
        delta, prompt = differences(policy, row), row["prompt_ids"]
        reference = logprob(other, prompt, row["chosen_ids"]) - logprob(other, prompt, row["rejected_ids"])
    one = 1 - row["objective"]
    margin = PREFERENCE[one] * 0.5 * (delta[["low", "high"][one]] - delta["base"])
    argument = (0.5 * (delta["policy"] - reference) - margin) / PREFERENCE[row["objective"]]
    assert loss == pytest.approx(math.log1p(math.exp(-float(argument))), rel=1e-5)


def test_precomputed_references_give_the_same_loss(make_dpo_trainer: Make, policy: Any) -> None:
    plain, ready = make_dpo_trainer(model=policy), make_dpo_trainer(model=policy, precompute_ref_log_probs=True)
    assert "ref_chosen_logps" in ready.train_dataset.column_names
    x, y = (trainer.compute_loss(policy, batch_of(trainer)).item() for trainer in (plain, ready))
    assert x == pytest.approx(y, rel=1e-5)


def test_log_probabilities_of_answers() -> None:
    """Of answers of 3 and 1 tokens, LD-DPO weighs the first token 1, the other two 1/2."""
    tokens = torch.tensor([[9.0, -1.0, -2.0, -4.0], [9.0, -8.0, float("nan"), 9.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]])
    assert answer_logprobs(tokens, mask).tolist() == [-7.0, -8.0]
    assert answer_logprobs(tokens, mask, ld_alpha=0.5).tolist() == [-4.0, -8.0]


def test_reference_and_margin_do_not_drop_out(make_dpo_trainer: Make, policy: Any) -> None:
    """Llama's attention drops out by the mode."""
    for layer in policy.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = make_dpo_trainer(model=policy)
    batch = batch_of(trainer)
    found = []
    for training in (True, False):
        policy.train(training)
        with trainer.model_settings.applied():
            reference = trainer._reference_logprobs(batch)
            found.append(torch.stack([reference, trainer._others(batch, reference)]))
    assert torch.equal(*found)
