from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from peft_hoe import HoEError
from peft_hoe.errors import RewardError
from peft_hoe.rewards import ClassifierReward, ModuleReward, Rewards, URLReward
from peft_hoe.training.grpo.rewards import fill_missing, known_means, processing_classes, reward_functions

NAMES = ["low", "high"]
UNUSED = SimpleNamespace(pad_token_id=0)  # a tokenizer where no text is read
# What TRL passes beside prompts and completions.
EXTRAS: dict[str, Any] = {
    "completion_ids": [[5], [6, 7]], "trainer_state": object(), "log_extra": print, "log_metric": print, "tag": [1, 2],
}  # fmt: skip


def length(completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


def classifier(outputs: int) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        num_labels=outputs,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def test_functions_stand_in_the_objectives_order() -> None:
    named = reward_functions({"high": length, "low": lambda prompts, completions: [0.0, 1.0]}, NAMES)
    assert [function.__name__ for function in named] == NAMES
    assert [function(["p", "q"], ["a", "bc"], **EXTRAS) for function in named] == [[0.0, 1.0], [1.0, 2.0]]
    listed = reward_functions([length, length], NAMES)
    assert [function(["p"], ["abc"]) for function in listed] == [[3.0], [3.0]]
    (alone,) = reward_functions(length, ["low"])
    assert alone(["p"], ["abc"]) == [3.0]


def test_a_function_is_given_what_it_takes() -> None:
    seen: list[Any] = []

    def by_position(texts: Any, answers: Any, tag: Any) -> list[float | None]:
        seen.append((texts, answers, tag))
        return [None, 2.0]

    def by_name(completions: Any, trainer_state: Any, **columns: Any) -> torch.Tensor:
        seen.append(sorted(columns))
        return torch.tensor([1.0, 2.0])

    first, second = reward_functions([by_position, by_name], NAMES)
    assert np.isnan(first(["p", "q"], ["a", "b"], **EXTRAS)[0])
    assert second(["p", "q"], ["a", "b"], **EXTRAS) == [1.0, 2.0]
    assert seen[0] == (["p", "q"], ["a", "b"], [1, 2])
    assert seen[1] == ["completion_ids", "log_extra", "log_metric", "prompts", "tag"]


def test_a_reward_on_text_is_given_text(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of chat completions, what the assistant said; of TRL's extras, nothing."""
    sent: list[bytes] = []

    def answer(self: Any, body: bytes) -> bytes:
        sent.append(body)
        return b'{"rewards": [1, null]}'

    monkeypatch.setattr(URLReward, "_post", answer)
    chats = [[{"role": "assistant", "content": "w5"}], [{"role": "assistant", "content": "w6"}]]
    own = ClassifierReward(classifier(2), toys.make_tokenizer(), output=1, template="{completion}")
    remote, local = reward_functions([URLReward("http://localhost:1"), own], NAMES)
    assert remote([[], []], chats, **EXTRAS)[0] == 1.0
    assert sent == [b'{"prompts": [[], []], "completions": ["w5", "w6"], "columns": {"tag": [1, 2]}}']
    assert local(["", ""], chats, **EXTRAS) == own(["", ""], ["w5", "w6"])[:, 0].tolist()


def test_a_classifier_moves_to_the_device_of_the_trainer(
    toys: ModuleType, make_grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, moved = ClassifierReward(classifier(1), toys.make_tokenizer()), []
    monkeypatch.setattr(own.model, "to", moved.append)
    trainer = make_grpo(constructor={"reward_funcs": [length, own]})
    assert moved == [trainer.accelerator.device]


def test_one_reward_for_several_objectives_is_called_once_a_batch() -> None:
    """A function gets completions as TRL makes them, a Rewards gives its sources text."""
    calls: list[Any] = []

    def both(completions: Any, tag: Any, **columns: Any) -> list[list[int]]:
        calls.append(completions)
        return [[len(text), one] for text, one in zip(completions, tag, strict=True)]

    chats = [[{"role": "assistant", "content": "w55"}], [{"role": "assistant", "content": "w6"}]]
    for sources, lengths in ((both, [1, 1]), ({("low", "high"): both}, [1, 1]), (Rewards(both, NAMES), [3, 2])):
        functions = reward_functions(sources, NAMES)
        assert [function.__name__ for function in functions] == NAMES
        assert [function(["p", "q"], chats, **EXTRAS) for function in functions] == [lengths, [1, 2]]
    assert calls == [chats, chats, ["w55", "w6"]]


def test_errors_name_the_objective() -> None:
    def broken(completions: Any, **columns: Any) -> list[float]:
        raise RuntimeError("no")

    with pytest.raises(RewardError, match="reward 'low' raised RuntimeError: no"):
        reward_functions({"low": broken, "high": length}, NAMES)[0](["p"], ["a"])
    with pytest.raises(RewardError, match="reward 'high' returned 1 values for 2 completions"):
        reward_functions([length, lambda prompts, completions: [1.0]], NAMES)[1](["p", "q"], ["a", "b"])


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([length], "1 rewards are given for the 2 objectives"),
        ({"low": length, "hi": length}, r"unknown \['hi'\], missing \['high'\]"),
        ({("low", "high"): "org/model"}, "'org/model', which TRL runs for one objective only"),
        ({("low", "high"): classifier(2)}, "'LlamaForSequenceClassification', which TRL runs for one objective only"),
        ({("low", "high"): ClassifierReward(classifier(2), UNUSED)}, "with 1 outputs, but 2 are needed"),
        (Rewards([length], ["low"]), r"the rewards are for \['low'\]"),
        ([length, 3], "'high' is 3"),
        ([length, classifier(2)], "LlamaForSequenceClassification with 2 outputs"),
        ([length, ClassifierReward(classifier(2), UNUSED, output=[0, 1])], "ClassifierReward with 2 outputs"),
        ([length, ModuleReward(classifier(1))], "reads the policy's tokens"),
    ],
)
def test_what_does_not_fit_is_refused(sources: Any, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        reward_functions(sources, NAMES)


def test_tokenizers_by_objective() -> None:
    rewards = [len, "classifier"]
    assert processing_classes({"high": "tokenizer"}, NAMES, rewards) == [None, "tokenizer"]
    assert processing_classes([None, "tokenizer"], NAMES, rewards) == [None, "tokenizer"]
    assert processing_classes(None, NAMES, rewards) is None
    with pytest.raises(RewardError, match=r"for \['hi'\]"):
        processing_classes({"hi": "tokenizer"}, NAMES, rewards)
    with pytest.raises(RewardError, match="a tokenizer for 'low', whose reward is called with text; leave it out"):
        processing_classes({"low": "tokenizer"}, NAMES, rewards)


def test_missing_rewards_become_their_groups_mean() -> None:
    nan = np.nan
    rewards = np.array([[1.0, nan], [nan, nan], [3.0, 4.0], [nan, 6.0], [1.0, nan], [2.0, nan], [nan, nan], [6.0, nan]])
    filled = fill_missing(rewards, 4)
    expected = [[1, 5], [nan, nan], [3, 4], [2, 6], [1, nan], [2, nan], [nan, nan], [6, nan]]
    np.testing.assert_array_equal(filled, np.array(expected))
    np.testing.assert_array_equal(known_means(rewards), [2.6, 5.0])
    np.testing.assert_array_equal(known_means(rewards[4:]), [3.0, nan])


def test_classifiers_and_asynchronous_functions(make_grpo: Callable[..., Any], toys: ModuleType) -> None:
    """TRL calls them itself: a classifier on prompt and completion with its own tokenizer, a coroutine in its event loop."""
    pytest.importorskip("trl")

    async def high(completions: Any, **columns: Any) -> list[float]:
        return toys.high([], completions)

    tokenizer = toys.make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = classifier(1)
    constructor = {"reward_funcs": {"high": high, "low": model}, "reward_processing_classes": {"low": tokenizer}}
    trainer = make_grpo(constructor=constructor)
    prompts, completions = ["w5 ", "w6 "], ["w20 w1", "w7"]
    found = trainer._raw_rewards(prompts, completions)
    with torch.no_grad():
        texts = [tokenizer(prompts[i] + completions[i], return_tensors="pt") for i in (0, 1)]
        logits = [float(model(**text).logits) for text in texts]
    assert [row[0] for row in found] == pytest.approx(logits, abs=1e-5)
    assert [row[1] for row in found] == [0.5, 0.0]
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_objective_that_is_missing_everywhere_stops_the_payoff_table(make_grpo: Callable[..., Any]) -> None:
    pytest.importorskip("trl")
    rewards = {"low": length, "high": lambda prompts, completions: [None] * len(completions)}
    with pytest.raises(HoEError, match=r"objectives \['high'\]"):
        make_grpo(constructor={"normalizer": None, "reward_funcs": rewards}).train()


@pytest.mark.slow
def test_a_reward_that_hangs_is_left_behind(make_grpo: Callable[..., Any], toys: ModuleType) -> None:
    """A function, and a coroutine in TRL's event loop."""
    pytest.importorskip("trl")

    async def sleeps(completions: Any, **columns: Any) -> list[float]:
        await asyncio.sleep(600)
        return toys.low([], completions)

    for low in (toys.hangs, sleeps):
        trainer = make_grpo(constructor={"reward_funcs": {"low": low, "high": toys.high}}, reward_timeout=0.05)
        with pytest.raises(RewardError, match=r"'low' did not return within 0\.05 s"):
            trainer.train()
        assert trainer.state.global_step == 0
    with pytest.raises(HoEError, match="reward_timeout is 0"):
        make_grpo(reward_timeout=0.0)
