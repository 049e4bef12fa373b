from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from peft_hoe import HoEError
from peft_hoe.training.distillation.texts import TextCollator, check_texts, has_completions

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"


def collate(toys: ModuleType, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return {name: value.tolist() for name, value in TextCollator(toys.make_tokenizer(), **settings)(rows).items()}


def test_prompts_on_the_left_completions_on_the_right(toys: ModuleType) -> None:
    """Word w_i is token 4 + i; a completion ends with </s>, token 2."""
    rows = [{"prompt": "w0 w1", "completion": "w2 w3"}, {"prompt": "w4", "completion": "w5"}]
    assert collate(toys, rows) == {
        "prompt_ids": [[4, 5], [0, 8]],
        "prompt_mask": [[1, 1], [0, 1]],
        "completion_ids": [[6, 7, 2], [9, 2, 0]],
        "completion_mask": [[1, 1, 1], [1, 1, 0]],
    }


def test_a_text_is_completion_from_its_second_token_on(toys: ModuleType) -> None:
    rows = [{"text": "w0 w1 w2"}, {"input_ids": [7, 8]}]
    found = collate(toys, rows)
    assert found["prompt_ids"] == [[4], [7]]
    assert found["completion_ids"] == [[5, 6], [8, 0]]
    assert collate(toys, [{"text": "w0 w1 w2"}], max_length=2)["completion_ids"] == [[5]]


def test_prompts_alone_have_empty_completions(toys: ModuleType) -> None:
    found = TextCollator(toys.make_tokenizer())([{"prompt": "w0"}, {"prompt": "w1"}])
    assert found["completion_ids"].shape == found["completion_mask"].shape == (2, 0)
    assert found["completion_ids"].dtype == torch.long


def test_chat_completions_follow_the_template(toys: ModuleType) -> None:
    tokenizer = toys.make_tokenizer()
    tokenizer.chat_template = CHAT.replace(
        "{{ m['content'] }} ", "{% if m['role'] == 'assistant' %}w9 {% endif %}{{ m['content'] }} "
    )
    row = {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w2"}]}
    found = TextCollator(tokenizer)([row])
    assert found["prompt_ids"].tolist() == [[5, 13]]
    assert found["completion_ids"].tolist() == [[6]]
    tokenizer.chat_template = CHAT
    with pytest.raises(HoEError, match="chat template does not put"):
        TextCollator(tokenizer)([row])


def test_rows_without_text_are_refused(toys: ModuleType) -> None:
    with pytest.raises(HoEError, match=r"columns are \['answer'\]"):
        check_texts([{"answer": "w1"}])
    with pytest.raises(HoEError, match="dataset is empty"):
        check_texts([])
    with pytest.raises(HoEError, match="a row of the dataset is empty"):
        TextCollator(toys.make_tokenizer())([{"text": ""}])
    assert [has_completions(row) for row in ({"prompt": "a"}, {"prompt": "a", "completion": "b"}, {"text": "c"})] == [
        False,
        True,
        True,
    ]


def test_a_tokenizer_without_an_end_token(toys: ModuleType) -> None:
    tokenizer = toys.make_tokenizer()
    tokenizer.eos_token = None
    batch = TextCollator(tokenizer)([{"prompt": "w1", "completion": "w2 w3"}])
    assert tokenizer.batch_decode(batch["completion_ids"]) == ["w2 w3"]
