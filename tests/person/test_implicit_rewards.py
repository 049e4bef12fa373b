"""Implicit rewards are log-probability ratios, whatever stands beside a text."""

import numpy as np
import pytest
import torch

from peft_hoe import HoEError, demo
from peft_hoe.person import implicit_rewards


@pytest.fixture(scope="module")
def model():
    return demo.load_demo_adapter().double()


@pytest.fixture(scope="module")
def tokenizer():
    return demo.load_tokenizer()


def naive(model, tokenizer, prompt, text):
    """One text at a time, position by position."""
    start, rest = (tokenizer(prompt)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([[*start, *rest]])

    def logprob(**options):
        logits = model(ids, **options).logits[0].log_softmax(-1)
        return sum(float(logits[len(start) + i - 1, token]) for i, token in enumerate(rest))

    with torch.no_grad():
        with model.disable_adapter():
            base = logprob()
        return [logprob(preference=corner) - base for corner in ([1, 0], [0, 1])]


def test_a_text_with_a_token_that_the_model_does_not_know_is_refused(model):
    padded = demo.load_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(HoEError, match=r"token 123 .* in the texts is none of the 123"):
        implicit_rewards(model, padded, demo.load_prompts()[0], [" a [PAD]"])


def test_they_are_the_log_probability_ratios(model, tokenizer):
    prompt, texts = demo.load_prompts()[0], [" the happy cat sat", " red", " a bright blue sky over"]
    found = implicit_rewards(model, tokenizer, prompt, texts)
    wanted = [naive(model, tokenizer, prompt, text) for text in texts]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-8)
    assert np.abs(found).max() > 0.01


def test_the_model_is_as_it_was(model, tokenizer):
    before = dict(model.preference)
    model.train()
    try:
        implicit_rewards(model, tokenizer, demo.load_prompts()[0], [" red"])
        assert model.training
    finally:
        model.eval()
    assert dict(model.preference) == before


@pytest.mark.parametrize("texts", [[], [" red", ""]])
def test_there_must_be_texts(model, tokenizer, texts):
    with pytest.raises(HoEError, match="give at least one answer, none of them empty"):
        implicit_rewards(model, tokenizer, demo.load_prompts()[0], texts)
