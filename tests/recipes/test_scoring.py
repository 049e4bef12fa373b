"""Answers of mathematics and refusals."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest

from peft_hoe import recipes
from peft_hoe.errors import RewardError
from peft_hoe.recipes import final_answer, is_refusal, pass_at_1, refusal_ratios
from peft_hoe.rewards import Rewards


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"),
        ("so 5 apples\n#### 18", "18"),
        ("#### 3 and then\n#### $4.50 each of 2", "4.50"),
        ("####\nnothing, but 7", "7"),
        ("The answer is: 42. I checked 3 times.", "42"),
        ("The answer is 2. No! The answer is: 3", "3"),
        ("The answer is: 5 #### 6", "6"),
        ("The answer is unknown; 12 perhaps", "12"),
        ("3 + 4 = 7", "7"),
        ("It costs $1,234,567.89.", "1234567.89"),
        ("16-3-4=9", "9"),
        ("he has 16-3", "3"),
        ("it is -5", "-5"),
        ("it is -$5", "-5"),
        ("it is $-5", "-5"),
        ("(2)-3", "3"),
        ("1, 2, 3", "3"),
        ("12,3456", "3456"),
        ("half: .5", "0.5"),
        ("He is 18.", "18"),
        ("50%", "50"),
        ("3/4", "4"),
        ("two", None),
        ("", None),
    ],
)
def test_final_answers(text, number):
    assert final_answer(text) == (None if number is None else Decimal(number))


def test_pass_at_1():
    completions = ["It is 18.00.", "It is 19.", "I do not know.", "#### 1,000"]
    assert pass_at_1([""] * 4, completions, ["#### 18", "#### 18", "#### 18", "#### 1000"]) == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(RewardError, match="the gold answer 'eighteen' holds no number"):
        pass_at_1([""], ["18"], ["eighteen"])
    recipe = recipes.get("math")
    with pytest.raises(RewardError, match=r"reward 'math' cannot be called.*'answer'"):
        Rewards(recipe.rewards(), recipe.objectives)(["q"], ["18"])


@pytest.mark.parametrize(
    "text",
    [
        "Sorry, no.",
        "  I'm sorry, but",
        "I\u2019m sorry",
        "I AM SORRY",
        "I cannot help",
        "I can\u2019t",
        "As an AI model",
        "No, you",
    ],
)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text", ["Sure! I cannot wait.", "Nothing easier.", "Here is how.", "", "Well, I'm sorry", "Not at all"]
)
def test_answers(text):
    assert not is_refusal(text)


def test_other_phrases():
    assert is_refusal("Nope.", phrases=["nope"])
    assert not is_refusal("Sorry.", phrases=["nope"])


def test_ratios():
    labels = ["unsafe", "unsafe", "unsafe", "safe", "safe"]
    answers = ["I cannot.", "Sure.", "I can't.", "No.", "Sure."]
    assert refusal_ratios(answers, labels) == {"safety": pytest.approx(2 / 3), "helpfulness": 0.5}
    recipe = recipes.get("over-refusal")
    table = Rewards(recipe.rewards(), recipe.objectives)([""] * 5, answers, {"label": labels})
    assert table[:3, 0].tolist() == [1.0, 0.0, 1.0]
    assert table[3:, 1].tolist() == [0.0, 1.0]
    assert all(math.isnan(number) for number in [*table[3:, 0], *table[:3, 1]])
    assert math.isnan(refusal_ratios(["Sure."], ["safe"])["safety"])
    with pytest.raises(RewardError, match=r"label holds \['harmful'\]; it may hold 'safe' and 'unsafe'"):
        refusal_ratios(["Sure."], ["harmful"])
