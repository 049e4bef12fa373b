"""Stop strings in GRPO: what TRL generates ends at them, is trained on with them and scored without them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from peft_hoe import HoEError

pytest.importorskip("trl")

Make = Callable[..., Any]


def completions(trainer: Any, count: int = 8) -> list[list[int]]:
    """Token ids, as TRL's loop gets them."""
    trainer.policy.train()
    prompts = [
        trainer.processing_class(row["prompt"])["input_ids"] for row in trainer.train_dataset.select(range(count))
    ]
    more = {"num_generations": 4} if "num_generations" in _signature(trainer) else {}
    with trainer.model_settings.applied():
        torch.manual_seed(0)
        ids, _ = trainer._generate_single_turn(prompts, None, {}, **more)
    return list(ids)


def _signature(trainer: Any) -> list[str]:
    import inspect

    import trl

    return list(inspect.signature(trl.GRPOTrainer._generate_single_turn).parameters)


def test_a_stop_string_ends_a_completion(make_grpo: Make, toys: ModuleType) -> None:
    """At the token that completes it; other rows are what they are without it, and all end once the last one has."""
    decode = toys.make_tokenizer().decode
    free = completions(make_grpo(max_completion_length=12))
    longest = max(range(len(free)), key=lambda row: len(free[row]))
    word = decode(free[longest], skip_special_tokens=True).split()[3]
    trainer = make_grpo(max_completion_length=12, stop_strings=[f" {word}"])
    found = completions(trainer)
    ended = [f" {word}" in decode(ids, skip_special_tokens=True) for ids in free]
    assert ended[longest]
    assert not all(ended)
    for with_stop, without, has in zip(found, free, ended, strict=True):
        assert with_stop == without[: len(with_stop)]
        if has:
            assert f" {word}" in decode(with_stop, skip_special_tokens=True)
            assert f" {word}" not in decode(with_stop[:-1], skip_special_tokens=True)
        else:
            assert with_stop == without
    assert "generate" not in vars(trainer.policy)


def test_generation_ends_with_the_last_row(make_grpo: Make, toys: ModuleType) -> None:
    """And is not merely cut: one row that says its stop string in its first tokens costs as many steps."""
    free = completions(make_grpo(max_completion_length=40), count=1)
    decode = toys.make_tokenizer().decode
    stop = decode(free[0][:2])  # which the first token alone may say
    trainer = make_grpo(max_completion_length=40, stop_strings=[stop])
    steps: list[int] = []
    trainer.policy.get_base_model().register_forward_hook(lambda *unused: steps.append(1))
    completions(trainer, count=1)
    assert len(steps) == next(count for count in (1, 2) if stop in decode(free[0][:count]))


def test_rewards_and_the_payoff_table_see_what_comes_before(make_grpo: Make, toys: ModuleType) -> None:
    seen: list[str] = []

    def low(prompts: Any, completions: Any) -> list[float]:
        seen.extend(completions)
        return list(toys.low(prompts, completions))

    rewards = {"low": low, "high": toys.high}
    trainer = make_grpo(
        max_completion_length=12, stop_strings=[" w2"], constructor={"reward_funcs": rewards, "normalizer": None}
    )
    table = trainer.measure_payoff()
    assert table.decoding["stop_strings"] == [" w2"]
    trainer.train()
    assert len(seen) > 16
    assert not any(" w2" in text for text in seen)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"generation_kwargs": {"stop_strings": ["w2"]}}, "generation_kwargs"),
        ({"stop_strings": ["w2"], "mask_truncated_completions": True}, "mask_truncated_completions"),
        ({"stop_strings": [""]}, "stop_strings"),
    ],
)
def test_what_cannot_work_is_refused(make_grpo: Make, changes: dict[str, Any], argument: str) -> None:
    with pytest.raises(HoEError) as caught:
        make_grpo(**changes)
    assert caught.value.argument == argument
