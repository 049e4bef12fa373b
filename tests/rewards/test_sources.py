from __future__ import annotations

import asyncio
import sys
import threading

import numpy as np
import pytest
import torch

from peft_hoe.errors import RewardError
from peft_hoe.rewards import Rewards
from peft_hoe.rewards.command_line import parse_reward, parse_rewards

PROMPTS = ["w3 w4", "w5"]
TEXTS = [" w6", " w7 w8 w9"]


def count(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def bonus(prompts, completions, bonus):
    return [None if extra is None else len(prompt) + extra for prompt, extra in zip(prompts, bonus, strict=True)]


def test_by_name_and_in_order():
    expected = [[3.0, 15.0], [9.0, np.nan]]
    columns = {"bonus": [10, None], "other": [1, 2]}
    for sources in ({"b": bonus, "a": count}, [count, bonus], (count, bonus)):
        rewards = Rewards(sources, ["a", "b"])
        table = rewards(PROMPTS, TEXTS, columns)
        assert table.dtype == np.float64
        np.testing.assert_array_equal(table, expected)
        assert not rewards.needs_tokens
    assert Rewards.of(rewards, ["a", "b"]) is rewards
    with pytest.raises(RewardError, match=r"are for \['a', 'b'\]"):
        Rewards.of(rewards, ["b", "a"])


def test_one_source_for_several_objectives():
    def both(prompts, completions):
        return torch.tensor([[1.0, 2.0], [3.0, float("nan")]], dtype=torch.bfloat16)

    np.testing.assert_array_equal(Rewards(both, ["a", "b"])(PROMPTS, TEXTS), [[1, 2], [3, np.nan]])
    mixed = Rewards({("c", "a"): both, "b": count}, ["a", "b", "c"])
    np.testing.assert_array_equal(mixed(PROMPTS, TEXTS), [[2, 3, 1], [np.nan, 9, 3]])


def test_functions_of_other_forms():
    def only_completions(completions, **columns):
        assert set(columns) == {"prompts", "label"}
        assert completions == TEXTS
        return (1, 2)

    def other_names(questions, answers):
        return [questions == PROMPTS, answers == TEXTS]

    np.testing.assert_array_equal(Rewards([only_completions], ["a"])(PROMPTS, TEXTS, {"label": [0, 0]}), [[1], [2]])
    np.testing.assert_array_equal(Rewards([other_names], ["a"])(PROMPTS, TEXTS, {"label": [0, 0]}), [[1], [1]])
    assert Rewards([count], ["a"])([], []).shape == (0, 1)


def test_coroutine_functions_are_waited_for():
    """Also where an event loop runs already, as in a notebook, and no longer than the timeout."""

    async def late(prompts, completions):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def never(prompts, completions):
        await asyncio.sleep(5)

    async def in_a_notebook():
        return Rewards([late, count], ["a", "b"], timeout=60)(PROMPTS, TEXTS)

    expected = [[3, 3], [9, 9]]
    np.testing.assert_array_equal(Rewards([late, count], ["a", "b"])(PROMPTS, TEXTS), expected)
    np.testing.assert_array_equal(asyncio.run(in_a_notebook()), expected)
    with pytest.raises(RewardError, match=r"reward 'a' did not return within 0\.05 s"):
        Rewards([never], ["a"], timeout=0.05)(PROMPTS, TEXTS)


def _raise(prompts, completions):
    raise KeyError("oops")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (lambda prompts, completions: [1.0], r"reward 'b' returned 1 values for 2 completions; expected 2 numbers"),
        (lambda prompts, completions: 1.0, r"reward 'b' returned 1.0, a float"),
        (lambda prompts, completions: None, r"reward 'b' returned None"),
        (lambda prompts, completions: [1.0, "2"], r"reward 'b' returned '2' for completion 1"),
        (lambda prompts, completions: [1.0, float("inf")], r"reward 'b' returned inf for completion 1"),
        (lambda prompts, completions: [[1.0, 2.0]] * 2, r"returned \[1.0, 2.0\] for completion 0"),
        (lambda prompts, completions: [None, float("nan")], r"reward 'b' returned no number for any of 2 completions"),
        (_raise, r"reward 'b' raised KeyError: 'oops'"),
        (
            lambda prompts, completions, answer: [1.0],
            r"reward 'b' cannot be called: missing .*'answer'.*columns \['x'\]",
        ),
    ],
)
def test_what_a_reward_must_not_do(source, match):
    with pytest.raises(RewardError, match=match):
        Rewards([count, source], ["a", "b"])(PROMPTS, TEXTS, {"x": [1, 2]})


def test_rows_must_agree():
    rewards = Rewards([count], ["a"])
    with pytest.raises(RewardError, match="prompts has 1 rows, but there are 2 completions"):
        rewards(PROMPTS[:1], TEXTS)
    with pytest.raises(RewardError, match="x has 3 rows"):
        rewards(PROMPTS, TEXTS, {"x": [1, 2, 3]})


def test_a_reward_that_hangs():
    released = threading.Event()

    def hang(prompts, completions):
        released.wait()
        return [0.0, 0.0]

    with pytest.raises(RewardError, match=r"reward 'a' did not return within 0\.1 s; raise timeout=") as told:
        Rewards([hang, count], ["a", "b"], timeout=0.1)(PROMPTS, TEXTS)
    assert (told.value.argument, told.value.allowed) == ("reward 'a'", "a result within 0.1 s")
    released.set()
    np.testing.assert_array_equal(Rewards([count], ["a"], timeout=600)(PROMPTS, TEXTS), [[3], [9]])
    with pytest.raises(RewardError, match="timeout is 0"):
        Rewards([count], ["a"], timeout=0)


# -- the command line ---


def test_functions_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "class Kinds:\n    length = staticmethod(lambda prompts, completions: [3, 4])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    rewards = Rewards(parse_rewards(["b=my_rewards:Kinds.length", "a=url:http://127.0.0.1:1/x"]), ["a", "b"])
    assert rewards.objectives == ("a", "b")
    name, function = parse_reward("b = my_rewards:Kinds.length")
    assert (name, function([], [])) == ("b", [3, 4])
    assert parse_reward("a=url:http://host:80/x?y=z")[1].url == "http://host:80/x?y=z"
    with pytest.raises(RewardError, match="'my_rewards' has no function 'width'"):
        parse_reward("a=my_rewards:width")


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (["vader"], "cannot read the reward 'vader'; write NAME=module:function"),
        (["a="], "cannot read"),
        (["a=module"], "cannot read"),
        (["=module:function"], "cannot read"),
        (["a=hub:#1"], "cannot read the reward"),
        (["a=hub:org/model#:-"], "cannot read the reward"),
        (["a=no_such_module:f"], "cannot import the reward's module 'no_such_module'"),
        (["a=url:ftp://host"], "must begin with http"),
        (["a=math:sin", "a=math:cos"], "'a' is given twice"),
        (["a=hub:/no/such/directory"], "cannot load the classifier '/no/such/directory'"),
    ],
)
def test_texts_that_cannot_be_read(texts, match, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(RewardError, match=match):
        parse_rewards(texts)
