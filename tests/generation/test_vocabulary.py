"""Tokens that were added to a tokenizer and not to its model, as scripts do: any but padding is refused."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_hoe import HoEConfig, HoEError
from peft_hoe.generation import completer
from peft_hoe.generation.decoding import padding_token
from peft_hoe.generation.vocabulary import vocabulary_size


@pytest.fixture
def tokenizer(toys: ModuleType) -> Any:
    """Its padding token is 32, beyond the embedding."""
    return toys.make_padded_tokenizer()


def adapted(toys: ModuleType, **fields: Any) -> Any:
    config = HoEConfig(objectives=["low", "high"], r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **fields)
    return get_peft_model(toys.make_base(), config).eval()


def test_an_embedding_with_experts_is_counted_too(toys: ModuleType, tokenizer: Any) -> None:
    """Rows that have ended went on with the padding token, which such a model looked up and did not have."""
    for model in (toys.make_base(), adapted(toys), adapted(toys, target_embeddings=["embed_tokens"])):
        assert vocabulary_size(model) == 32
        assert padding_token(model, tokenizer) == 0
    assert vocabulary_size(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("fields", [{}, {"target_embeddings": ["embed_tokens"]}])
def test_rows_that_end_early_go_on_with_a_known_token(toys: ModuleType, tokenizer: Any, fields: dict[str, Any]) -> None:
    model = adapted(toys, **fields)
    prompts = ["w1", "w3 w4 w5"]
    free = completer.Completer(model, tokenizer, {"max_new_tokens": 6, "stop_tokens": ()})
    first, second = (free.complete(model, [prompt])[0].split() for prompt in prompts)
    stop = next(word for word in first if word not in second)  # ends the first text before the second
    ends = completer.Completer(model, tokenizer, {"max_new_tokens": 6, "stop_tokens": tokenizer(stop)["input_ids"]})
    assert ends.complete(model, prompts)[1].split() == second


@pytest.mark.parametrize("given", ["org/name", None])
def test_a_name_in_place_of_a_tokenizer_is_told(toys: ModuleType, given: Any) -> None:
    with pytest.raises(HoEError, match=r"the tokenizer is .*; load the policy's, with transformers\.AutoTokenizer"):
        completer.Completer(toys.make_base(), given)


def test_a_prompt_with_an_unknown_token_is_refused(toys: ModuleType, tokenizer: Any) -> None:
    """It was an IndexError deep in the model; on a GPU the process has to be started anew."""
    model = adapted(toys)
    with pytest.raises(HoEError, match=r"token 32 \('\[PAD\]'\) in the prompts is none of the 32") as caught:
        completer.Completer(model, tokenizer, {"max_new_tokens": 1}).complete(model, ["w1", "w2 [PAD]"])
    assert (caught.value.argument, caught.value.value) == ("prompts", 32)
