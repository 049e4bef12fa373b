"""What TRL's own tests of PPOTrainer do, offline and with HoERouterTrainer in its place.

Not taken over: their tests of AutoModel...WithValueHead, of `batch_generation` and of the masked statistics, which concern
other code of TRL, and those that look at the calls inside PPOTrainer's loop.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from peft_hoe import HoEConfig

pytest.importorskip("trl.experimental.ppo")
datasets = pytest.importorskip("datasets")

Make = Callable[..., Any]


@pytest.fixture
def script(toys: ModuleType) -> dict[str, Any]:
    """Arguments as TRL's example script passes them: classifiers as reward and value models, a tokenised data set."""
    tokenizer, config = toys.make_tokenizer(), toys.make_base().config
    config.num_labels = 1
    torch.manual_seed(2)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        ids = [*tokenizer(row["prompt"])["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    rows = datasets.Dataset.from_list(toys.PROMPTS).map(tokenize, remove_columns="prompt")
    return {
        "processing_class": tokenizer,
        "ref_model": None,
        "reward_model": [LlamaForSequenceClassification(config).eval() for _ in range(2)],
        "value_model": LlamaForSequenceClassification(config),
        "train_dataset": rows,
        "eval_dataset": rows.select(range(8)),
        "normalizer": None,
    }


SETTINGS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "num_ppo_epochs": 2,
    "num_sample_generations": 1,
}


def check_updates(trainer: Any, critic: dict[str, torch.Tensor], policy: dict[str, torch.Tensor]) -> None:
    assert any(not torch.equal(critic[name], p) for name, p in trainer.model.value_model.named_parameters() if name in critic
               and p.shape == critic[name].shape)  # fmt: skip
    moved = {name for name, p in trainer.model.policy.named_parameters() if not torch.equal(policy[name], p)}
    assert moved
    assert all("hoe_router" in name for name in moved)


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_basic_training(make_trainer: Make, toys: ModuleType, script: dict[str, Any]) -> None:
    model, critic = toys.make_policy(), copies(script["value_model"])
    policy = copies(model)
    trainer = make_trainer(model=model, constructor={**script, "ref_model": toys.make_base(1)}, **SETTINGS)
    trainer.train()
    check_updates(trainer, critic, policy)


def test_peft_training(make_trainer: Make, toys: ModuleType, script: dict[str, Any]) -> None:
    config = HoEConfig(
        objectives=["low", "high"], routers=[[0.25, 0.75]], r=4, target_modules="all-linear", task_type="CAUSAL_LM",
        init_weights=False,
    )  # fmt: skip
    critic = copies(script["value_model"])
    trainer = make_trainer(model=toys.make_base(), constructor={**script, "peft_config": config}, **SETTINGS)
    policy = copies(trainer.model.policy)
    trainer.train()
    check_updates(trainer, critic, policy)


def test_uneven_micro_batches(make_trainer: Make, script: dict[str, Any]) -> None:
    """A mini-batch of 6 in micro-batches of 4 and 2."""
    trainer = make_trainer(
        constructor=script, per_device_train_batch_size=4, gradient_accumulation_steps=3, num_mini_batches=2, num_ppo_epochs=1,
        total_episodes=12, max_steps=-1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[-1]["val/ratio"] == pytest.approx(1.0, abs=0.5)


def test_zero_learning_rate_keeps_the_ratio_at_one(make_trainer: Make, script: dict[str, Any]) -> None:
    trainer = make_trainer(
        constructor=script, learning_rate=0.0, value_learning_rate=0.0, max_steps=1, num_ppo_epochs=3
    )
    trainer.train()
    assert trainer.state.log_history[-1]["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert trainer.state.log_history[-1]["policy/clipfrac_avg"] == 0
