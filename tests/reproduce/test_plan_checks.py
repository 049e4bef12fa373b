"""Settings of an experiment that do not fit each other: each check alone names its setting, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peft_hoe import recipes
from peft_hoe.errors import HoEError, RewardError
from peft_hoe.reproduce import plan_checks as checks


@pytest.mark.parametrize(
    ("check", "argument", "value", "allowed"),
    [
        (lambda: checks.check_updates(-1, None, "ppo"), "updates", -1, "at least 0, or auto"),
        (lambda: checks.check_updates("many", None, "ppo"), "updates", "many", "at least 0, or auto"),
        (lambda: checks.check_updates("auto", None, "distill"), "updates", "auto", "at least 0"),
        (lambda: checks.check_updates(60, 80, "ppo"), "max_updates", 80, 'at least 1, with updates="auto"'),
        (lambda: checks.check_updates("auto", 0, "ppo"), "max_updates", 0, 'at least 1, with updates="auto"'),
        (lambda: checks.check_batches(batch_size=0, micro_batch_size=None), "batch_size", 0, "at least 1"),
        (lambda: checks.check_batches(batch_size=4, micro_batch_size=None, limit=0), "limit", 0, "at least 1"),
        (lambda: checks.check_batches(batch_size=6, micro_batch_size=4), "micro_batch_size", 4, "a divisor of 6"),
        (lambda: checks.check_seeds([0, 0], trains=True, places=False), "seeds", [0, 0], "each once, at least 0"),
        (lambda: checks.check_seeds([0, -1], trains=True, places=False), "seeds", [0, -1], "each once, at least 0"),
        (lambda: checks.check_seeds([0], trains=True, places=True), "seeds", [0], "none with auto"),
        (lambda: checks.check_seeds([0], trains=False, places=False), "seeds", [0], "none where nothing trains"),
        (lambda: checks.check_texts(4, sampled=False), "texts", 4, 1),
        (lambda: checks.check_prompts(None, None, None), "prompts", None, None),
        (lambda: checks.check_prompts("prompts.json", "copy", None), "data", "copy", None),
    ],
)
def test_what_does_not_fit_is_named(
    check: Callable[[], None], argument: str, value: object, allowed: str | int | None
) -> None:
    with pytest.raises(HoEError, match=argument) as refused:
        check()
    assert (refused.value.argument, refused.value.value, refused.value.allowed) == (argument, value, allowed)


def test_every_objective_has_one_reward() -> None:
    with pytest.raises(RewardError, match=r"missing for \['b'\] and given for \['c'\]") as refused:
        checks.check_rewards(["a", "c"], ["a", "b"], None)
    assert (refused.value.value, refused.value.allowed) == (["a", "c"], ["a", "b"])
    recipe = recipes.get("helpful-assistant")
    with pytest.raises(RewardError, match=r"missing for \['brief'\] and given for \[\]"):
        checks.check_rewards([], ["helpful", "brief"], recipe)


def test_baselines_are_named_once_and_need_no_training_for_a_preference() -> None:
    for names in (["rs", "rs"], ["morlhf"], ["unheard of"]):
        with pytest.raises(HoEError, match="each can be given once") as refused:
            checks.check_baselines(names)
        assert refused.value.value == names
        assert "rs" in refused.value.allowed
        assert "morlhf" not in refused.value.allowed


def refused(check: Callable[..., None], *given: Any, **named: Any) -> str | None:
    """The argument that is refused, if one is."""
    try:
        check(*given, **named)
    except HoEError as error:
        return str(error.argument)
    return None


def test_where_refusals_begin() -> None:
    assert [refused(checks.check_updates, n, None, "distill") for n in (-1, 0, 1)] == ["updates", None, None]
    assert [refused(checks.check_updates, "auto", n, "ppo") for n in (0, 1)] == ["max_updates", None]
    sizes = {"batch_size": 6, "save_steps": 1, "limit": None}
    micro = [refused(checks.check_batches, micro_batch_size=n, **sizes) for n in (None, 0, 1, 2, 3, 4, 6)]
    assert micro == [None, "micro_batch_size", None, None, None, "micro_batch_size", None]
    recipe = recipes.get("helpful-assistant")
    names = ["helpful", "brief"]
    assert [refused(checks.check_rewards, names[:n], names, None) for n in (1, 2)] == ["rewards", None]
    assert [refused(checks.check_rewards, names[n:], names, recipe) for n in (0, 1, 2)] == [None, None, "rewards"]
    assert refused(checks.check_prompts, "prompts.json", None, None) is None
    assert refused(checks.check_prompts, None, "copy", recipe) is None
    assert refused(checks.check_baselines, ["rs", "ties"]) is None
