"""Distillation on the toy; no TRL and no rewards are involved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from peft_hoe import CheckpointError, ExpertError, HoEError
from peft_hoe.generation.fusion import divergence, fusion_logprobs
from peft_hoe.training.distillation.trainer import HoEDistillationTrainer

Make = Callable[..., HoEDistillationTrainer]


@pytest.fixture
def make(make_distillation: Make) -> Make:
    return make_distillation


def test_the_loss_is_the_mean_divergence_per_token(make: Make, toys: ModuleType) -> None:
    trainer = make()
    batch = trainer.data_collator([{"text": "w1 w2 w3 w4"}, {"text": "w5 w6"}])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        teacher = fusion_logprobs(trainer.policy, "default", trainer.router.preference, ids, mask, 3)
        logits = trainer.policy(ids, attention_mask=mask, preference=[0.25, 0.75]).logits[:, :-1]
        each = divergence(logits.log_softmax(-1), teacher, 0.0)
        assert float(trainer.compute_loss(trainer.model, batch)) == pytest.approx(
            float((each[0].sum() + each[1, 0]) / 4), abs=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_divergence_falls(make: Make, toys: ModuleType, beta: float) -> None:
    """Measured by evaluate, before and after, on text that is not sampled."""
    trainer = make(beta=beta, max_steps=40, constructor={"eval_dataset": toys.TEXTS[:8]})
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.7 * before
    logged = trainer.state.log_history[0]
    assert sum(logged[f"router/usage/{name}"] for name in trainer.router.voting_experts) == pytest.approx(1, abs=1e-5)
    assert 0 < logged["router/entropy"] < 0.6932


@pytest.mark.slow
def test_the_students_own_completions(make: Make, toys: ModuleType) -> None:
    trainer = make(constructor={"train_dataset": toys.PROMPTS}, max_steps=30)
    assert trainer.lmbda == 1
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert make().lmbda == 0


def test_only_the_router_moves(make: Make, toys: ModuleType) -> None:
    """Weight decay, a second router, and a warm optimizer: nothing else moves by a bit, and all is put back."""
    model = toys.make_policy()
    routers = [parameter for name, parameter in model.named_parameters() if "hoe_router" in name]
    for parameter in routers:
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(routers, lr=0.05, weight_decay=0.1)
    sum((parameter**2).sum() for parameter in routers).backward()
    optimizer.step()
    model.set_preference([0.6, 0.4])
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own, other = toys.rows_of(model, "r0"), toys.rows_of(model, "r1")
    make(model=model, weight_decay=0.1, constructor={"optimizers": (optimizer, None)}).train()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "hoe_router" not in name)
    assert all(torch.equal(x, y) for x, y in zip(other, toys.rows_of(model, "r1"), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(own, toys.rows_of(model, "r0"), strict=True))
    assert dict(model.preference) == {"low": 0.6, "high": 0.4}
    assert trains == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not model.training
    assert model.peft_config["default"].routers[0].trained
    assert not model.peft_config["default"].routers[1].trained


@pytest.mark.slow
@pytest.mark.parametrize("average", [False, True])
def test_resumed_run_equals_uninterrupted(make: Make, toys: ModuleType, tmp_path: Path, average: bool) -> None:
    """On-policy completions included."""
    run: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 2, "average_routers": average,
        "constructor": {"train_dataset": toys.PROMPTS},
    }  # fmt: skip
    whole = make(model=toys.make_policy().double(), **run)
    whole.train()
    torch.manual_seed(99)
    resumed = make(model=toys.make_policy().double(), **run)
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert resumed.state.global_step == 4
    for x, y in zip(whole.router.parameters(), resumed.router.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    for x, y in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    other = make(**{**run, "beta": 1.0})
    with pytest.raises(CheckpointError, match="was written by a run with"):
        other.train(resume_from_checkpoint=True)


def test_interrupted_and_run_twice(make: Make, toys: ModuleType, tmp_path: Path) -> None:
    trainer = make(constructor={"callbacks": [toys.Press()]})
    trainer.train()
    assert trainer.interrupted
    assert trainer.state.global_step == 2
    assert [path.name for path in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-2"]
    with pytest.raises(HoEError, match="this trainer has run"):
        trainer.train()


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_parameters(make: Make, toys: ModuleType) -> None:
    plain, saving = (
        make(model=toys.make_policy().double()),
        make(model=toys.make_policy().double(), **toys.checkpointing()),
    )
    plain.train()
    saving.train()
    for x, y in zip(plain.router.parameters(), saving.router.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    assert not any(layer.gradient_checkpointing for layer in saving.policy.get_base_model().model.layers)


def test_bad_input_raises_before_the_first_step(make: Make, toys: ModuleType) -> None:
    for changes, said in (
        ({"lmbda": 1.5}, "lmbda is 1.5"),
        ({"beta": -1}, "beta is -1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"router": "r9"}, "no router 'r9'"),
        ({"constructor": {"train_dataset": toys.PROMPTS}, "lmbda": 0.5}, "holds prompts only"),
        ({"constructor": {"train_dataset": [{"answer": "w1"}]}}, "columns are"),
        ({"constructor": {"args": object()}}, "use HoEDistillationConfig"),
        ({"constructor": {"processing_class": None}}, "processing_class is None"),
    ):
        with pytest.raises((HoEError, ExpertError), match=said):
            make(**changes)


def test_accumulated_gradients_are_the_large_batch_s(toys: ModuleType, tmp_path: Path) -> None:
    """Texts of 2 to 9 words in micro-batches of 2: each token counts the same."""
    large = toys.distillation_updates(str(tmp_path / "large"), 8)
    small = toys.distillation_updates(str(tmp_path / "small"), 2, gradient_accumulation_steps=4)
    for x, y in zip(large["trained"], small["trained"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    torch.testing.assert_close(large["losses"], small["losses"], rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("saving", [False, True])
def test_nothing_drops_out(make: Make, toys: ModuleType, saving: bool) -> None:
    """Llama's attention drops out by the mode: neither the teacher's nor the student's does."""
    model = toys.make_policy().double()
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.5
    changed, plain = (
        make(model=model, **(toys.checkpointing() if saving else {})),
        make(model=toys.make_policy().double()),
    )
    changed.train()
    plain.train()
    for x, y in zip(changed.router.parameters(), plain.router.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)


def test_rows_without_a_completion_count_for_nothing(make: Make, toys: ModuleType) -> None:
    """Texts of one word: a batch of nothing else leaves the router as it is, and does not make it NaN."""
    trainer = make(
        constructor={"train_dataset": [{"text": "w1"}] * 4}, per_device_train_batch_size=2, max_steps=1, optim="sgd"
    )
    before = [parameter.detach().clone() for parameter in trainer.router.parameters()]
    trainer.train()
    assert all(torch.equal(x, y) for x, y in zip(before, trainer.router.parameters(), strict=True))
    assert trainer.state.log_history[0]["loss"] == 0
    assert "router/entropy" not in trainer.state.log_history[0]


def test_prompts_alone_cannot_be_evaluated_on(make: Make, toys: ModuleType) -> None:
    with pytest.raises(HoEError, match="evaluation dataset holds prompts only"):
        make(constructor={"eval_dataset": toys.PROMPTS})
    with pytest.raises(HoEError, match="evaluation dataset holds prompts only"):
        make().evaluate(toys.PROMPTS)
