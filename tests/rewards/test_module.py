from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2ForSequenceClassification,
    GPT2Model,
)

from peft_hoe.errors import RewardError
from peft_hoe.rewards import ModuleReward, Rewards

PROMPTS = ["w3 w4", "w5"]
TEXTS = [" w6", " w7 w8 w9"]
ROUNDING = 1e-4  # of two layers in float32; those of other texts lie further apart


class TrlReward(nn.Module):
    """The least that TRL's PPO asks for."""

    base_model_prefix = "backbone"

    def __init__(self, model: GPT2ForSequenceClassification):
        super().__init__()
        self.backbone: GPT2Model = model.transformer
        self.score = model.score


IDS = torch.tensor([[0, 0, 3, 4, 5, 0, 0], [0, 6, 7, 8, 9, 2, 0]])


def test_the_first_example_of_the_documentation_runs(gpt2):
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    names = {
        "vader": lambda prompts, completions: [0.5, None],
        "reward_module": TrlReward(gpt2(1)),
        "prompts": PROMPTS,
        "completions": TEXTS,
        "labels": [0, 1],
        "input_ids": IDS,
        "attention_mask": (IDS != 0).long(),
    }
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), names)
    np.testing.assert_array_equal(names["table"][:, 0], [0.5, np.nan])
    assert np.isfinite(names["table"][:, 1]).all()


@pytest.mark.parametrize("batch_size", [16, 1])
def test_a_module_reads_the_policys_tokens(batch_size, gpt2):
    module = TrlReward(gpt2(2))
    rewards = Rewards(
        {("a", "b"): ModuleReward(module, output=[1, 0], sign=[1, -1], batch_size=batch_size)}, ["a", "b"]
    )
    assert rewards.needs_tokens
    table = rewards(PROMPTS, TEXTS, input_ids=IDS, attention_mask=(IDS != 0).long())
    for row, ids in enumerate(([3, 4, 5], [6, 7, 8, 9, 2])):
        with torch.no_grad():
            scores = module.score(module.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
        np.testing.assert_allclose(table[row], [scores[1], -scores[0]], atol=ROUNDING)


def test_a_module_equals_trls_definition(gpt2):
    trl = pytest.importorskip("trl.experimental.utils")
    module = TrlReward(gpt2(1)).eval()
    if not hasattr(trl, "get_reward"):
        pytest.skip("TRL has no get_reward any more")
    with torch.no_grad():
        _, expected, _ = trl.get_reward(module, IDS, 0, 4)
    table = Rewards([module], ["a"])(PROMPTS, TEXTS, input_ids=IDS, attention_mask=IDS != 0)
    np.testing.assert_allclose(table[:, 0], expected, atol=ROUNDING)


def test_padding_ids_may_lie_beyond_a_modules_vocabulary(gpt2):
    """As after tokenizer.add_special_tokens({"pad_token": ...}) without a resized reward model, as TRL's scripts have it."""
    model = gpt2()
    size = model.config.vocab_size
    ids = torch.tensor([[size, size, 1, 5], [1, 5, 6, 7]])
    inside = ids.masked_fill(ids == size, 0)
    expected = ModuleReward(model)(inside, ids != size)
    torch.testing.assert_close(ModuleReward(model)(ids, ids != size), expected, rtol=0, atol=ROUNDING)
    with pytest.raises(RewardError, match="another tokenizer"):
        ModuleReward(model)(ids, torch.ones_like(ids))


def test_modules_that_do_not_fit(gpt2):
    with pytest.raises(RewardError, match=r"score has 2 outputs, but 1 are needed"):
        Rewards([TrlReward(gpt2(2))], ["a"])
    with pytest.raises(RewardError, match=r"score has 2 outputs; outputs \[2\]"):
        ModuleReward(TrlReward(gpt2(2)), output=2)
    with pytest.raises(RewardError, match="sign is 2"):
        ModuleReward(TrlReward(gpt2(2)), sign=2)
    rewards = Rewards([gpt2(1)], ["a"])
    with pytest.raises(RewardError, match="reward 'a' is a module that reads tokens; pass input_ids"):
        rewards(PROMPTS, TEXTS)
    with pytest.raises(RewardError, match=r"reward 'a': .* knows 40 tokens, .* up to 99: .*ClassifierReward"):
        rewards(PROMPTS, TEXTS, input_ids=torch.tensor([[99], [1]]), attention_mask=torch.ones(2, 1))
