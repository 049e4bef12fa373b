from __future__ import annotations

import pytest

pytest.importorskip("pydantic")

from peft_hoe.serving.server.requests import RequestError, RequestReader

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def reader(toys):
    tokenizer = toys.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return RequestReader("mine", tokenizer, ["low", "high"], {"low": 0.5, "high": 0.5}, 64, 32)


def body(**more):
    return {"model": "mine", "prompt": "w1 w2", **more}


def test_what_is_left_out_has_the_defaults_of_openai(reader):
    wanted = reader.completion(body())
    assert wanted.prompts == [[5, 6]]
    assert wanted.preferences[0].tolist() == [0.5, 0.5]
    assert (wanted.choices, wanted.max_new_tokens, wanted.stop_strings, wanted.stream) == (1, [16], [], False)
    assert (wanted.sampling.temperature, wanted.sampling.top_p, wanted.sampling.seed) == (1, 1, None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"preference": [0.7, 0.3]}, [0.7, 0.3]),
        ({"preference": {"high": 1}}, [0, 1]),
        ({"preference": "low=0.7,high=0.3"}, [0.7, 0.3]),
        ({"model": "mine@0.7,0.3"}, [0.7, 0.3]),
        ({"model": "mine@low=0.7,high=0.3"}, [0.7, 0.3]),
        ({"preference": [0.34, 0.67]}, [0.34 / 1.01, 0.67 / 1.01]),
    ],
)
def test_a_preference_may_be_written_in_several_ways(reader, given, expected):
    assert reader.completion(body(**given)).preferences[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("w1", [[5]]), (["w1", "w2 w3"], [[5], [6, 7]]), ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]]), ("", [[1]])],
)
def test_prompts_are_texts_or_tokens_one_or_several(reader, prompt, ids):
    assert reader.completion(body(prompt=prompt)).prompts == ids


def test_each_prompt_may_have_its_own_preference(reader):
    wanted = reader.completion(body(prompt=["w1", "w2"], preference=[[1, 0], [0, 1]], n=2))
    assert [point.tolist() for point in wanted.preferences] == [[1, 0], [0, 1]]
    assert wanted.choices == 2


def test_chats_go_through_the_template(reader):
    wanted = reader.chat({"model": "mine", "messages": [{"role": "w1", "content": "w2"}], "max_completion_tokens": 7})
    assert wanted.prompts == [[5, 6]]
    assert wanted.max_new_tokens == [7]
    assert reader.chat({"model": "mine", "messages": [{"role": "w1", "content": "w2"}]}).max_new_tokens == [62]


@pytest.mark.parametrize(
    ("more", "argument", "message"),
    [
        ({"preference": [0.5, 0.6]}, "preference", "sums to 1.1"),
        ({"preference": [1, 0, 0]}, "preference", "3 numbers"),
        ({"preference": {"tall": 1}}, "preference", "tall"),
        ({"preference": "a lot"}, "preference", "cannot read"),
        ({"preference": [[1, 0], [0, 1]]}, "preference", "2 rows for 1 prompts"),
        ({"preference": [float("nan"), 1]}, "preference", "NaN"),
        ({"model": "mine@0.7,0.3", "preference": [1, 0]}, "preference", "both give"),
        ({"temperature": -1}, "temperature", "from 0 to 100"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 63}, "max_tokens", "may be 64"),
        ({"prompt": "w1 " * 64}, "max_tokens", "64 tokens"),
        ({"prompt": []}, "n", "0 texts"),
        ({"prompt": [99]}, "prompt", "vocabulary of 32"),
        ({"prompt": [[]]}, "prompt", "no token"),
        ({"n": 65}, "n", "1 to 64"),
        ({"stop": [""]}, "stop", "not empty"),
        ({"seed": 2**70}, "seed", "less than or equal"),
        ({"logprobs": 3}, "logprobs", "has no logprobs"),
        ({"echo": True}, "echo", "has no echo"),
        ({"presence_penalty": 0.5}, "presence_penalty", "has no presence_penalty"),
        ({"preferense": [1, 0]}, "preferense", "not permitted"),
    ],
)
def test_what_cannot_be_used_is_named(reader, more, argument, message):
    with pytest.raises(RequestError, match=message) as caught:
        reader.completion(body(**more))
    assert (caught.value.status, caught.value.argument.partition(".")[0]) == (422, argument)


def test_other_bodies_and_models_are_refused(reader):
    with pytest.raises(RequestError, match="no model 'other'") as caught:
        reader.completion(body(model="other"))
    assert caught.value.status == 404
    for wrong in (None, [], "text", {"model": "mine"}):
        with pytest.raises(RequestError):
            reader.completion(wrong)
    with pytest.raises(RequestError, match="tools"):
        reader.chat({"model": "mine", "messages": [{"role": "w1", "content": "w2"}], "tools": [{"type": "function"}]})
    reader.tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # and the model has no embedding for it
    for ask, given in (
        (reader.chat, {"messages": [{"role": "w1", "content": "[PAD]"}]}),
        (reader.completion, {"prompt": "[PAD]"}),
    ):
        with pytest.raises(RequestError, match=r"(prompt|messages): there are tokens outside the vocabulary of 32"):
            ask({"model": "mine", **given})
    reader.tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        reader.chat({"model": "mine", "messages": [{"role": "w1", "content": "w2"}]})
