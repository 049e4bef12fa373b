"""Sources by name, in order and as modules, and what does not match the objectives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from peft_hoe.errors import RewardError
from peft_hoe.rewards import Rewards

PROMPTS = ["w3 w4", "w5"]
TEXTS = [" w6", " w7 w8 w9"]


def count(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def test_modules_in_a_list_or_by_name():
    """As TRL's scripts hold several reward models."""
    models = [reward_module(seed) for seed in (0, 1)]
    ids = torch.tensor([[1, 5, 6], [1, 7, 8]])
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = Rewards(models, ["a", "b"])(PROMPTS, TEXTS, **tokens)
    assert (expected[:, 0] != expected[:, 1]).all()
    for sources in (nn.ModuleList(models), nn.ModuleDict({"b": models[1], "a": models[0]})):
        np.testing.assert_array_equal(Rewards(sources, ["a", "b"])(PROMPTS, TEXTS, **tokens), expected)
    with pytest.raises(RewardError, match="2 rewards are given for the 3 objectives"):
        Rewards(nn.ModuleList(models), ["a", "b", "c"])


def reward_module(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize(
    ("sources", "match"),
    [
        ({"a": count}, r"missing \['b'\]"),
        ({"a": count, "b": count, "c": count}, r"unknown \['c'\]"),
        ({"a": count, ("a", "b"): count}, r"twice \['a'\]"),
        ([count], r"1 rewards are given for the 2 objectives \['a', 'b'\]"),
        ([count, "vader"], r"reward of \['b'\] is 'vader'; give a callable"),
        ([count, nn.Linear(2, 1)], "has not the interface of TRL's reward models"),
    ],
)
def test_sources_that_do_not_match(sources, match):
    with pytest.raises(RewardError, match=match):
        Rewards(sources, ["a", "b"])
