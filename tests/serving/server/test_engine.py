from __future__ import annotations

import random
import threading

import pytest
import torch

from peft_hoe import HoEError, PreferenceError, RowsError
from peft_hoe.serving.server import batch as batch_module
from peft_hoe.serving.server.engine import EngineStoppedError, QueueFullError

PREFERENCES = [[1.0, 0.0], [0.25, 0.75], [0.6, 0.4], [0.0, 1.0], [0.3, 0.7]]


def alone(model, tokenizer, text):
    """The same text by transformers, one row."""
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([text.prompt]),
            max_new_tokens=text.max_new_tokens,
            do_sample=False,
            eos_token_id=list(text.stop_tokens) or None,
            pad_token_id=0,
            preference=text.preference.tolist(),
        )
    return tokenizer.decode(output[0, len(text.prompt) :], skip_special_tokens=True)


def test_texts_that_join_and_leave_at_any_time_are_those_written_alone(engine, ask, tokenizer):
    running = engine(max_batch=4)
    assert (running.mixed, running.batches) == (True, True)
    rng = random.Random(0)
    asked = []
    for number in range(14):
        words = " ".join(f"w{rng.randrange(28)}" for _ in range(rng.randint(1, 9)))
        asked.append(ask(words, PREFERENCES[number % 5], rng.randint(1, 12)))
    for text, _ in asked:
        running.submit([text])
    # float64: rounding does not change a token.
    for text, listener in asked:
        assert listener.wait() == alone(running.model, tokenizer, text)
        assert listener.reason in ("stop", "length")
        assert text.stream.text == "".join(listener.parts)


def test_preferences_matter(engine, ask):
    running = engine()
    asked = [ask("w1 w2", preference, 10, stop_tokens=()) for preference in PREFERENCES]
    running.submit([text for text, _ in asked])
    assert len({listener.wait() for _, listener in asked}) == 5


def test_a_seed_draws_the_same_whatever_the_neighbours(engine, ask):
    running = engine()
    wanted = {"temperature": 1.0, "top_p": 0.9, "seed": 11, "stop_tokens": ()}
    first, heard = ask("w1 w2 w3", [0.3, 0.7], 12, **wanted)
    running.submit([first])
    heard.wait()
    others = [ask("w5 " * n, [0.6, 0.4], 12, temperature=1.0) for n in (1, 4, 7)]
    again, heard_again = ask("w1 w2 w3", [0.3, 0.7], 12, **wanted)
    running.submit([*(text for text, _ in others), again])
    heard_again.wait()
    assert again.stream.ids == first.stream.ids


def test_texts_that_nobody_wants_leave_their_place(engine, ask):
    running = engine(max_batch=1)
    endless, _ = ask("w1", [1, 0], 50, stop_tokens=())
    waiting, heard = ask("w2", [0, 1], 2, stop_tokens=())
    never, silent = ask("w3", [0, 1], 2, stop_tokens=())
    never.cancelled = True
    running.submit([endless, never, waiting])
    endless.cancelled = True
    heard.wait()
    assert len(endless.stream.ids) < 50
    assert silent.parts == []


def test_limits_and_the_end(engine, ask):
    running = engine(start=False, max_waiting=2)
    with pytest.raises(EngineStoppedError):  # it has not begun
        running.submit([ask("w1", [1, 0])[0]])
    running = engine(max_waiting=2)
    with pytest.raises(QueueFullError, match="0 texts wait, and 2 may") as refused:
        running.submit([ask("w1", [1, 0])[0] for _ in range(3)])
    assert (refused.value.value, refused.value.allowed) == (3, "at most 2")
    asked = [ask("w1", [1, 0], 12, stop_tokens=()) for _ in range(2)]
    running.submit([text for text, _ in asked])
    running.stop()  # what was taken is written to its end
    assert [len(text.stream.ids) for text, _ in asked] == [12, 12]
    assert not running.state.alive
    with pytest.raises(EngineStoppedError):
        running.submit([ask("w1", [1, 0])[0]])


def test_a_failure_is_told_and_the_next_text_is_served(engine, ask, monkeypatch, caplog):
    running = engine()

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(batch_module.RunningBatch, "_forward", broken)
        text, heard = ask("w1", [1, 0])
        running.submit([text])
        heard.wait()
    assert isinstance(heard.error, RuntimeError)
    assert "a batch failed" in caplog.text
    text, heard = ask("w1", [1, 0])
    running.submit([text])
    heard.wait()
    assert heard.reason is not None


def test_where_rows_cannot_be_told_apart_preferences_take_turns(engine, steerable, ask, tokenizer, monkeypatch):
    model = steerable()
    forward = batch_module.RunningBatch._forward
    seen = []

    def only_one(self, rows, *args):
        if len({tuple(row.preference) for row in rows}) > 1:
            raise RowsError("experts are dispatched", module="experts")
        seen.append(len(rows))
        return forward(self, rows, *args)

    monkeypatch.setattr(batch_module.RunningBatch, "_forward", only_one)
    running = engine(model, max_batch=4)
    assert (running.mixed, running.batches) == (False, True)
    asked = [ask(f"w{n}", PREFERENCES[n % 2], 6) for n in range(6)]
    running.submit([text for text, _ in asked])
    for text, heard in asked:
        assert heard.wait() == alone(model, tokenizer, text)
    assert max(seen) > 1


def test_a_model_whose_cache_cannot_be_joined_writes_one_text_at_a_time(engine, steerable, ask, tokenizer, monkeypatch):
    def no_joining(cache, rows):
        raise AttributeError("a recurrent state has no keys")

    monkeypatch.setattr(batch_module, "_selected", no_joining)
    model = steerable()
    running = engine(model, max_batch=4)
    assert not running.batches
    asked = [ask(f"w{n} w3", PREFERENCES[n], 6) for n in range(3)]
    running.submit([text for text, _ in asked])
    for text, heard in asked:
        assert heard.wait() == alone(model, tokenizer, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_batch": 0}, "max_batch is 0"), ({"max_length": 1}, "at least 2"), ({"max_length": 65}, "64 positions")],
)
def test_limits_out_of_range_are_named(engine, options, message):
    with pytest.raises(HoEError, match=message):
        engine(start=False, **options)


def test_the_thread_ends(engine):
    running = engine()
    running.stop()
    assert "peft-hoe engine" not in {thread.name for thread in threading.enumerate()}


def test_a_disabled_or_merged_adapter_is_not_served(engine, toys):
    model = toys.make_policy()
    model.base_model.disable_adapter_layers()
    with pytest.raises(PreferenceError, match="adapter 'default' is disabled"):
        engine(model)
    model.base_model.enable_adapter_layers()
    model.set_preference([1, 0])
    model.merge_adapter()
    with pytest.raises(PreferenceError, match="adapter 'default' is merged into the base"):
        engine(model)
