"""Implicit rewards are log-probability ratios, whatever stands beside a text."""

import numpy as np
import pytest
import torch

from peft_hoe import HoEError, PreferenceEstimate, demo
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


@pytest.mark.parametrize("wanted", [[0.95, 0.05], [0.05, 0.95]])
def test_a_preference_is_learnt_from_them(model, tokenizer, wanted):
    """Somebody who never errs, on texts that no reward function has read; the estimate learns their scale, nats, by itself."""
    words = [
        " a happy day",
        " a red house",
        " she smiled and laughed",
        " a tall green tree",
        " dark rain fell",
        " fun",
        " the blue sea",
    ]
    rewards = implicit_rewards(model, tokenizer, demo.load_prompts()[0], words)
    estimate = PreferenceEstimate(model.preference)
    for _ in range(8):
        pair = estimate.propose(rewards)
        worse, better = sorted(pair, key=lambda row: float(rewards[row] @ wanted))
        estimate.choose(rewards[better], rewards[worse])
    assert abs(estimate.mean - wanted).max() < 0.25  # 0.45 before the first choice
