from __future__ import annotations

import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from peft_hoe.serving.server.app import create_app  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture
def server(engine, serving, tokenizer):
    """An engine that is served, and a client of it."""
    template, tokenizer.chat_template = tokenizer.chat_template, TEMPLATE
    running = engine(start=False, max_batch=8, max_waiting=64)
    with serving(create_app(running, "mine", max_body=4000)) as url:
        yield running, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    tokenizer.chat_template = template


def alone(running, prompt, preference, length):
    ids = running.tokenizer(prompt)["input_ids"]
    with torch.inference_mode():
        output = running.model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=length, do_sample=False, eos_token_id=2, pad_token_id=0,
            preference=list(preference),
        )  # fmt: skip
    return running.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_the_openai_client_completes_and_chats_at_a_preference(server):
    running, client = server
    model = client.models.list().data[0]
    assert (model.id, model.objectives) == ("mine", ["low", "high"])
    for preference in ([1, 0], [0.25, 0.75]):
        wanted = alone(running, "w1 w2", preference, 9)
        plain = client.completions.create(
            model="mine", prompt="w1 w2", max_tokens=9, temperature=0, extra_body={"preference": preference}
        )
        named = client.completions.create(
            model=f"mine@{preference[0]},{preference[1]}", prompt="w1 w2", max_tokens=9, temperature=0
        )
        chat = client.chat.completions.create(
            model="mine", messages=[{"role": "user", "content": "w1 w2"}], max_tokens=9, temperature=0,
            extra_body={"preference": preference},
        )  # fmt: skip
        assert plain.choices[0].text == named.choices[0].text == chat.choices[0].message.content == wanted
        for answer in (plain, named, chat):
            assert answer.choices[0].preference == dict(zip(["low", "high"], preference, strict=True))
            assert answer.choices[0].finish_reason in ("stop", "length")
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert plain.usage.prompt_tokens == 2


def test_streams_add_up_to_the_same_text(server):
    running, client = server
    wanted = alone(running, "w3", [0.3, 0.7], 12)
    how = {
        "model": "mine",
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chunks = list(client.completions.create(prompt="w3", extra_body={"preference": [0.3, 0.7]}, **how))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == wanted
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.completion_tokens >= len(wanted.split())
    assert len({chunk.id for chunk in chunks}) == 1
    messages = [{"role": "user", "content": "w3"}]
    chunks = list(client.chat.completions.create(messages=messages, extra_body={"preference": [0.3, 0.7]}, **how))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted


def test_several_prompts_and_choices_keep_their_order_and_preference(server):
    running, client = server
    answer = client.completions.create(
        model="mine",
        prompt=["w1", "w2 w3"],
        n=2,
        max_tokens=5,
        temperature=0,
        extra_body={"preference": [[1, 0], [0, 1]]},
    )
    texts = [choice.text for choice in answer.choices]
    assert texts == [alone(running, "w1", [1, 0], 5)] * 2 + [alone(running, "w2 w3", [0, 1], 5)] * 2
    assert [choice.preference["low"] for choice in answer.choices] == [1, 1, 0, 0]


def test_stop_strings_seeds_and_sampling(server):
    _, client = server
    how = {"model": "mine", "prompt": "w1 w2", "max_tokens": 12, "seed": 4}
    first = client.completions.create(**how).choices[0].text
    assert client.completions.create(**how).choices[0].text == first
    assert client.completions.create(**{**how, "seed": 5}).choices[0].text != first
    words = first.split()
    cut = client.completions.create(**how, stop=words[2]).choices[0]
    assert cut.text == first[: first.index(words[2])]
    assert cut.finish_reason == "stop"
    two = client.completions.create(**how, n=2)
    assert two.choices[0].text == first != two.choices[1].text


def test_errors_have_a_status_and_our_words(server):
    running, client = server
    with pytest.raises(openai.UnprocessableEntityError, match=r"sums to 1\.1") as caught:
        client.completions.create(model="mine", prompt="w1", extra_body={"preference": [0.5, 0.6]})
    assert caught.value.param == "preference"
    with pytest.raises(openai.NotFoundError, match="no model 'yours'"):
        client.completions.create(model="yours", prompt="w1")
    with pytest.raises(openai.APIStatusError, match="4000 bytes") as caught:
        client.completions.create(model="mine", prompt="w1 " * 2000)
    assert caught.value.status_code == 413
    running.max_waiting = 1
    with pytest.raises(openai.RateLimitError, match="and 1 may"):
        client.completions.create(model="mine", prompt="w1", n=2)
    url = urlsplit(str(client.base_url))
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
    connection.request("POST", "/v1/completions", body="{not json")
    answer = connection.getresponse()
    assert answer.status == 400
    assert "not JSON" in json.loads(answer.read())["error"]["message"]
    connection.close()
    assert running.state.alive


def test_health_and_clients_that_hang_up(server, monkeypatch):
    running, client = server
    url = urlsplit(str(client.base_url))
    submitted, submit = [], running.submit
    monkeypatch.setattr(running, "submit", lambda texts: (submitted.extend(texts), submit(texts)))
    stream = client.completions.create(model="mine", prompt="w1", max_tokens=60, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    plain = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
    plain.request("POST", "/v1/completions", body=json.dumps({"model": "mine", "prompt": "w1", "max_tokens": 60}))
    plain.close()
    deadline = time.monotonic() + 30
    while not (len(submitted) == 2 and all(text.cancelled for text in submitted)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while running.state.running or running.state.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok", "running": 0, "waiting": 0}
    connection.close()


def test_a_failing_model_is_a_server_error_that_tells_nothing_of_the_inside(server, monkeypatch):
    running, client = server

    def broken(*args, **kwargs):
        raise RuntimeError("secret path")

    with monkeypatch.context() as patch:
        patch.setattr(type(running._batch), "_forward", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="mine", prompt="w1")
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.APIError, match="model failed"):
            list(client.completions.create(model="mine", prompt="w1", stream=True))
    assert client.completions.create(model="mine", prompt="w1", max_tokens=2).choices


@pytest.mark.slow
def test_many_clients_at_once_get_what_they_would_get_alone(server):
    """Valid and invalid requests, some cut off, at random preferences: every answer is the one computed alone."""
    running, client = server
    rng = random.Random(1)
    points = np.random.default_rng(1).dirichlet([1, 1], 12).tolist()

    def one(number):
        point, prompt = points[number % 12], f"w{number % 28} w{rng.randrange(28)}"
        how = {"model": "mine", "prompt": prompt, "max_tokens": 6, "temperature": 0}
        if number % 10 == 3:
            with pytest.raises(openai.UnprocessableEntityError):
                client.completions.create(**how, extra_body={"preference": [0.9, 0.9]})
            return None
        if number % 10 == 7:
            stream = client.completions.create(**how, stream=True, extra_body={"preference": point})
            next(iter(stream))
            stream.close()
            return None
        answer = client.completions.create(**how, extra_body={"preference": point})
        return prompt, point, answer.choices[0]

    with ThreadPoolExecutor(8) as pool:
        answers = [answer for answer in pool.map(one, range(60)) if answer is not None]
    assert len(answers) == 48
    for prompt, point, choice in answers:
        assert list(choice.preference.values()) == pytest.approx(point, abs=1e-12)
        assert choice.text == alone(running, prompt, point, 6)
    assert running.state.alive


def test_stopping_lets_texts_under_way_finish(engine, serving):
    running = engine(start=False)
    heard = {}

    def ask(client):
        heard["answer"] = client.completions.create(
            model="mine", prompt="w1", max_tokens=60, temperature=0, stop="never"
        )

    with serving(create_app(running, "mine")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        thread = threading.Thread(target=ask, args=(client,))
        thread.start()
        while not running.state.running:
            time.sleep(0.001)
    thread.join(30)
    assert heard["answer"].choices[0].finish_reason in ("stop", "length")
    assert not running.state.alive
