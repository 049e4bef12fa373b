"""GSM8K's pass@1: the last number of one answer against the gold answer's.

The paper says "PASS@1 accuracy" (E.5) and not how an answer is found; the rules here are those of `final_answer`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from ..errors import RewardError

_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+")
_MARKERS = ("####", "The answer is")


def final_answer(text: str) -> Decimal | None:
    """The number that a solution ends with.

    1. After the last `####`, as in the gold answers: the first number ("#### 1,234" is 1234).
    2. Else after the last "The answer is", as MetaMath writes: the first number.
    3. Else, or where no number follows, the last number of the text.

    Commas between thousands and a dollar sign are dropped. A minus counts where no digit, letter or bracket stands before
    it: "16-3" ends with 3. Fractions and numbers in words are not understood: "3/4" ends with 4.

    >>> from peft_hoe.recipes import final_answer
    >>> final_answer("She has 3 + 4 = 7 apples. #### 7")
    Decimal('7')
    """
    for marker in _MARKERS:
        _, found, rest = text.rpartition(marker)
        match = _NUMBER.search(rest) if found else None
        if match:
            return _decimal(match.group())
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def pass_at_1(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where a completion's final answer equals that of the column `answer`, else 0; "18.00" equals "18".

    Raises:
        RewardError: a gold answer holds no number.

    >>> from peft_hoe.recipes import pass_at_1
    >>> pass_at_1(["How many?"] * 2, ["#### 7", "#### 8"], answer=["#### 7"] * 2)
    [1.0, 0.0]
    """
    gold = [final_answer(text) for text in answer]
    if None in gold:
        value = answer[gold.index(None)]
        raise RewardError(f"the gold answer {value!r} holds no number", argument="answer", value=value)
    return [float(final_answer(text) == number) for text, number in zip(completions, gold, strict=True)]


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))
