"""Rewards as one function for each objective: a batch is scored once, whoever asks first."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from peft_hoe.errors import RewardError
from peft_hoe.rewards import ClassifierReward, ModuleReward, Rewards

# What TRL passes beside the dataset's columns.
EXTRAS = {"completion_ids": [[1], [2]], "trainer_state": object(), "log_extra": print, "something_new": [1, 2, 3]}


def test_a_batch_is_scored_once_for_all_objectives() -> None:
    calls = []

    def both(prompts, completions, label):
        calls.append(list(completions))
        return [[len(text), one] for text, one in zip(completions, label, strict=True)]

    first, second = Rewards({("a", "b"): both}, ["a", "b"]).functions()
    assert (first.__name__, second.__name__) == ("a", "b")
    columns = {"label": [7, 8], **EXTRAS}
    assert first(["p", "q"], ["x", "yy"], **columns) == [1, 2]
    assert second(["p", "q"], ["x", "yy"], **columns) == [7, 8]
    assert (
        second(prompts=["p", "q"], completions=["x", "yy"], label=[1, None])[0] == 1
    )  # the next batch, of the same texts
    assert np.isnan(first(prompts=["p", "q"], completions=["", ""], label=[None, None])).sum() == 0
    assert first(["p", "q"], [[{"role": "assistant", "content": "xyz"}], "yy"], **columns) == [3, 2]
    assert calls == [["x", "yy"], ["x", "yy"], ["", ""], ["xyz", "yy"]]


def test_only_the_named_columns_are_passed_on() -> None:
    seen = []

    def one(prompts, completions, **columns):
        seen.append(sorted(columns))
        return [1.0] * len(prompts)

    rewards = Rewards([one], ["a"])
    rewards.functions()[0](["p"], ["x"], label=[1], other=[2], **{**EXTRAS, "completion_ids": [[1]]})
    rewards.functions(["label"])[0](["p"], ["x"], label=[1], other=[2])
    assert seen == [["label", "other"], ["label"]]


def test_models_move_and_bare_modules_are_refused(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        num_labels=2,
    )  # fmt: skip
    model, moved = LlamaForSequenceClassification(config), []
    monkeypatch.setattr(model, "to", moved.append)
    own = ClassifierReward(model, toys.make_tokenizer(), output=[0, 1])
    functions = Rewards({("a", "b"): own}, ["a", "b"]).functions()
    functions[1].to("cpu")
    assert moved == ["cpu"]
    expected = own(["w3"], ["w4"])
    assert [each(["w3"], ["w4"])[0] for each in functions] == expected[0].tolist()
    with pytest.raises(RewardError, match="reads the policy's tokens"):
        Rewards([ModuleReward(model)], ["a"]).functions()
