"""Responses end where the run's decoding says, in training and in its payoff table, as in a sweep of the same decoding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import peft_hoe
from peft_hoe import Decoding, HoEError, HoEWarning
from peft_hoe.training.run.steered_policy import steered

Make = Callable[..., Any]


def rollout(trainer: Any) -> Any:
    torch.manual_seed(0)
    with steered(trainer.policy_model, trainer.router):
        return trainer.ppo.rollout(trainer.next_prompts())


def test_a_stop_string_ends_a_response(make_trainer: Make, toys: ModuleType) -> None:
    """It is trained on up to the token that completes it, and scored without it."""
    free = rollout(make_trainer(response_length=12)).responses
    word = free.texts[0].split()[3]
    trainer = make_trainer(response_length=12, stop_strings=[f" {word}"], missing_eos_penalty=1.0)
    found = rollout(trainer)
    for row, text in enumerate(free.texts):
        tokens = [toys.make_tokenizer().decode([token]) for token in free.ids[row].tolist()]
        if f" {word}" in text:
            assert found.responses.texts[row] == text[: text.index(f" {word}")]
            count = next(
                n
                for n in range(1, 13)
                if f" {word}" in toys.make_tokenizer().decode(free.ids[row, :n], skip_special_tokens=True)
            )
            assert found.responses.mask[row].sum() == count
            assert word in tokens[count - 1]
            assert found.responses.ended[row]
    assert found.responses.ended[0]
    assert 0 < found.responses.ended.sum() < len(free.texts)
    assert not found.logprobs[0][~found.responses.mask[0]].isnan().any()
    trainer.train()


def test_the_table_of_a_run_is_that_of_a_sweep_of_its_decoding(make_trainer: Make, toys: ModuleType) -> None:
    """An instruct model has a further stop token in its generation_config; both end there, and no warning is due."""
    model = toys.make_policy()
    model.get_base_model().generation_config.eos_token_id = [2, 9]
    trainer = make_trainer(
        model=model, response_length=12, stop_token="eos", payoff_prompts=24, constructor={"normalizer": None}
    )
    table = trainer.measure_payoff()
    assert table.decoding["stop_tokens"] == [2, 9]
    assert Decoding.of(table.decoding) == trainer.ppo.settings.decoding
    prompts = [row["prompt"] for row in toys.PROMPTS]
    swept = peft_hoe.sweep(
        toys.make_policy(), toys.make_tokenizer(), prompts, toys.REWARDS, [[1, 0], [0, 1]], decoding=table.decoding,
        payoff=table, progress=False,
    )  # fmt: skip
    assert swept.runs[0]["decoding"] == table.decoding
    with pytest.warns(HoEWarning, match="another decoding.*stop_tokens"):
        peft_hoe.sweep(
            toys.make_policy(), toys.make_tokenizer(), prompts[:1], toys.REWARDS, [[1, 0], [0, 1]], payoff=table,
            decoding={**table.decoding, "stop_tokens": [2]}, progress=False,
        )  # fmt: skip


def test_chats_become_prompts_as_the_run_says(make_trainer: Make, toys: ModuleType) -> None:
    tokenizer = toys.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if brief %}w5{% else %}w6 w7{% endif %}"
    )
    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(8)]
    given = {"processing_class": tokenizer, "train_dataset": rows}
    trainer = make_trainer(constructor=given, chat_template_kwargs='{"brief": true}')
    texts = tokenizer.batch_decode(trainer.next_prompts().ids, skip_special_tokens=True)
    assert all(text.endswith(" w5") for text in texts)
    with pytest.raises(HoEError, match="makes tokens of chats itself"):
        make_trainer(constructor={**given, "data_collator": lambda rows: rows}, chat_template_kwargs={"brief": True})


def test_two_tasks_in_one_dataset_train(make_trainer: Make, toys: ModuleType) -> None:
    """Each has a reward of its own, and some batches hold one task only: the other objective waits."""

    def of(task: str, reward: Any) -> Any:
        def scored(prompts: Any, completions: Any, task_name: Any) -> list[float | None]:
            found = reward(prompts, completions)
            return [value if name == task else None for value, name in zip(found, task_name, strict=True)]

        return scored

    rows = [{**row, "task_name": "a" if i % 12 else "b"} for i, row in enumerate(toys.PROMPTS)]
    rewards = {"low": of("a", toys.low), "high": of("b", toys.high)}
    trainer = make_trainer(constructor={"reward_model": rewards, "train_dataset": rows}, max_steps=6)
    with pytest.warns(HoEWarning, match="objective 'high' has no reward in a batch"):
        trainer.train()
    seen = [{name for name in entry if name.startswith("reward/")} for entry in trainer.state.log_history]
    assert {"reward/low"} in seen
    assert {"reward/low", "reward/high"} in seen
    assert all(np.isfinite(entry["objective/scores"]) for entry in trainer.state.log_history)
    by_task = {task: [row for row in rows if row["task_name"] == task] for task in "ab"}
    measured = make_trainer(constructor={"reward_model": rewards, "train_dataset": rows, "eval_dataset": by_task})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HoEWarning)  # of few prompts
        assert np.isfinite(measured.measure_payoff().payoff).all()  # the first evaluation set has no number for "high"
