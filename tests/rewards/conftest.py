from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification


@pytest.fixture(scope="session")
def gpt2() -> Callable[..., GPT2ForSequenceClassification]:
    """Makes a classifier with random outputs."""

    def make(num_labels: int = 1, **settings) -> GPT2ForSequenceClassification:
        torch.manual_seed(0)
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32, "pad_token_id": 0}
        model = GPT2ForSequenceClassification(GPT2Config(num_labels=num_labels, **{**shape, **settings}))
        model.score.weight.data.normal_()
        return model

    return make
