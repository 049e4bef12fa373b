"""One description of how texts are written: read from anything, refused by name, recorded and compared whole."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from peft_hoe import Decoding, HoEError
from peft_hoe.generation.completer import Completer
from peft_hoe.generation.decoding import differences, stop_tokens


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(),
        Decoding(8, do_sample=True, temperature=0.7, top_k=5, top_p=0.9, stop_tokens=(7, 2)),
        Decoding(8, stop_strings=["\n\n", "Human:"], stop_tokens=(), options={"repetition_penalty": 1.2}),
        Decoding(8, do_sample=True, options={"suppress_tokens": (1, 2), "min_p": 0.1}),
        Decoding(8, chat_template_kwargs={"enable_thinking": False, "languages": ["en"]}),
    ],
)
def test_the_record_is_json_and_is_read_back(decoding: Decoding) -> None:
    again = Decoding.of(json.loads(json.dumps(decoding.record)))
    assert again == decoding
    assert hash(again) == hash(decoding)
    assert Decoding.of(decoding) is decoding


def test_any_difference_counts() -> None:
    plain = Decoding(8, do_sample=True)
    others = [
        Decoding(9, do_sample=True),
        Decoding(8),
        Decoding(8, do_sample=True, temperature=0.5),
        Decoding(8, do_sample=True, top_k=3),
        Decoding(8, do_sample=True, top_p=0.5),
        Decoding(8, do_sample=True, stop_strings="x"),
        Decoding(8, do_sample=True, stop_tokens=()),
        Decoding(8, do_sample=True, options={"min_new_tokens": 2}),
        Decoding(8, do_sample=True, chat_template_kwargs={"enable_thinking": False}),
    ]
    assert all(plain != other and differences(plain.record, other.record) for other in others)
    assert len({plain, *others, Decoding.of({"max_new_tokens": 8, "do_sample": True})}) == 10
    assert differences(plain.record, plain.record) == []
    assert differences(plain.record, Decoding(8, do_sample=True, top_k=3).record) == ["top_k: 0 there, 3 here"]


def test_a_generation_config_means_what_it_means_to_generate() -> None:
    """Sampling with what transformers fills in; token ids that do not change a text are left out."""
    config = GenerationConfig(
        max_new_tokens=5, do_sample=True, temperature=0.5, eos_token_id=[7, 2], pad_token_id=0, bos_token_id=1,
        repetition_penalty=1.5, stop_strings=["x"],
    )  # fmt: skip
    assert Decoding.of(config) == Decoding(
        5, do_sample=True, temperature=0.5, top_k=50, stop_tokens=(2, 7), stop_strings=("x",),
        options={"repetition_penalty": 1.5},
    )  # fmt: skip
    assert Decoding.of(GenerationConfig(max_new_tokens=5)) == Decoding(5)
    whole = GenerationConfig(max_new_tokens=5, do_sample=True, top_k=0)
    assert Decoding.of(whole) == Decoding(5, do_sample=True)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number, at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"do_sample": 1}, "do_sample is 1; give True"),
        ({"do_sample": True, "temperature": 0}, r"temperature is 0; .* above 0 \(greedy is do_sample=False\)"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5; it must be a number above 0 and at most 1"),
        ({"temperature": 0.7}, "temperature is 0.7, but do_sample is False"),
        ({"top_k": 5, "top_p": 0.5}, "top_k is 5, top_p is 0.5, but do_sample is False"),
        ({"min_p": 0.1}, "min_p is 0.1, but do_sample is False"),
        ({"stop_strings": [""]}, r"stop_strings is \[''\]; give texts that are not empty"),
        ({"stop_strings": [3]}, "stop_strings is"),
        ({"stop_tokens": [-1]}, r"stop_tokens is \[-1\]; give token ids"),
        ({"stop_tokens": "</s>"}, "stop_tokens is '</s>'"),
        ({"eos_token_id": 2}, "eos_token_id is 2, which is no option of a decoding: say stop_tokens="),
        ({"max_length": 9}, "max_length is 9.*say max_new_tokens="),
        ({"num_return_sequences": 2}, "num_return_sequences is 2.*each row has one text"),
        ({"temprature": 1.0}, "temprature is no option of a decoding; it has chat_template_kwargs, do_sample"),
        ({"chat_template_kwargs": ["a"]}, r"chat_template_kwargs is \['a'\] \(it is a list\); give a mapping"),
        ({"chat_template_kwargs": "{"}, "chat_template_kwargs is '{'"),
        ({"sequence_bias": {(1, 2): 0.5}}, "cannot be used"),
        (64, "the decoding is 64, a int; give a Decoding, a GenerationConfig or a mapping"),
        (GenerationConfig(do_sample=True), "generation_config has no max_new_tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: Any, told: str) -> None:
    with pytest.raises(HoEError, match=told):
        Decoding.of(given)


def test_stop_tokens_are_those_of_tokenizer_and_model_together(toys: ModuleType) -> None:
    model, tokenizer = toys.make_base(), toys.make_tokenizer()
    assert stop_tokens(model, tokenizer) == (2,)
    model.generation_config.eos_token_id = [9, 2]  # as instruct models have an end of turn
    assert Decoding().resolved(model, tokenizer).stop_tokens == (2, 9)
    assert Decoding(stop_tokens=5).resolved(model, tokenizer).stop_tokens == (5,)
    model.generation_config.eos_token_id = 9
    assert Decoding().resolve(model, tokenizer).eos_token_id == [2, 9]
    assert Decoding(stop_tokens=()).resolve(model, tokenizer).eos_token_id is None
    tokenizer.eos_token = None
    assert stop_tokens(model, tokenizer) == (9,)


def test_nothing_else_is_filled_in_from_the_models_own_settings(toys: ModuleType) -> None:
    model, tokenizer = toys.make_base(), toys.make_tokenizer()
    model.generation_config = GenerationConfig(repetition_penalty=5.0, temperature=0.1, top_k=1, max_length=9)
    found = Decoding(8, do_sample=True, stop_strings=["x"], options={"min_new_tokens": 2}).resolve(model, tokenizer)
    wanted = GenerationConfig(
        max_new_tokens=8, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=[2], pad_token_id=0,
        min_new_tokens=2,
    )  # fmt: skip
    assert found.to_dict() == wanted.to_dict()


def test_numbers_of_numpy_are_numbers() -> None:
    assert Decoding(np.int64(8), stop_tokens=np.array([3, 2])) == Decoding(8, stop_tokens=(2, 3))


def test_the_chat_template_gets_its_arguments(toys: ModuleType) -> None:
    """In a sweep as in a payoff table: without them a model that can think aloud would be measured thinking."""
    model, tokenizer = toys.make_base(), toys.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if brief %}w5{% else %}w6 w7{% endif %}"
    )
    chat = [[{"role": "user", "content": "w3"}]]
    for given, expected in ((None, "w3 w6 w7"), ('{"brief": true}', "w3 w5")):
        batch = Completer(model, tokenizer, {"chat_template_kwargs": given}).batch(model, chat)
        assert tokenizer.decode(batch.ids[0]) == expected
