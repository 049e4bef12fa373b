"""From a row of a dataset to the policy's prompt, and back to what a reward model reads.

The paper prints no prompt. Where its baselines' public code has one (RiC, github.com/YangRui2015/RiC, from which the paper
reproduces RiC, rewarded soups and MORLHF), that is taken; docs/recipes.md says what is chosen where.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import RewardError


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a question, a post or a dialogue.

    Attributes:
        text: with `{content}` once.
        stops: strings at which a completion ends: where a model goes on with another turn of its own.

    >>> from peft_hoe.recipes import PromptTemplate
    >>> PromptTemplate("Question: {content} Answer:").fill("How many?")
    'Question: How many? Answer:'
    """

    text: str
    stops: tuple[str, ...] = ()

    def fill(self, content: str) -> str:
        """The prompt."""
        return self.text.replace("{content}", content)

    def content(self, prompt: object) -> str:
        """What `fill` was given.

        Raises:
            RewardError: `prompt` is not of this template.
        """
        start, _, end = self.text.partition("{content}")
        if not isinstance(prompt, str) or not (prompt.startswith(start) and prompt.endswith(end)):
            shown = repr(prompt)
            raise RewardError(
                f"the prompt {shown[:100]}{'...' * (len(shown) > 100)} is not of the recipe's template {self.text!r}; take "
                "prompts from Recipe.load_prompts, or make them with Recipe.fill",
                argument="prompt", value=prompt, allowed=self.text,
            )  # fmt: skip
        return prompt[len(start) : len(prompt) - len(end)]

    def clean(self, completion: str) -> str:
        """The completion up to the first stop, without white space around it."""
        ends = [index for index in map(completion.find, self.stops) if index >= 0]
        return completion[: min(ends, default=None)].strip()


# The layout of hh-rlhf, with RiC's space before the last turn, which the reward models' cards have too.
DIALOGUE = PromptTemplate(
    "\n\nHuman: {content} \n\nAssistant:", ("\n\nHuman:", "\nHuman:", "\n\nAssistant:", "\nAssistant:")
)
# RiC's, for openai/summarize_from_feedback.
SUMMARY = PromptTemplate(
    "### Instruction: Generate a one-sentence summary of this post. ### Input: {content} ### Response: ",
    ("### Instruction:", "### Input:", "### Response:"),
)
# That of the model card of meta-math/MetaMath-7B-V1.0, the paper's policy for mathematics.
MATHEMATICS = PromptTemplate(
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{content}\n\n### Response: Let's think step by step.",
    ("### Instruction:", "### Response:"),
)


def dialogue_content(text: str) -> str:
    """The turns of a dialogue of hh-rlhf before its last answer, without the first `Human:`.

    Raises:
        ValueError: `text` is no such dialogue.
    """
    turns, answer, _ = text.rpartition("\n\nAssistant:")
    if not answer or not turns.startswith("\n\nHuman:"):
        raise ValueError('it does not begin with "\\n\\nHuman:", or has no "\\n\\nAssistant:"')
    return turns.removeprefix("\n\nHuman:").strip()


_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")


def helpsteer2_content(text: str) -> str:
    """A prompt of HelpSteer2, whose later turns begin with `<extra_id_1>User` and `<extra_id_1>Assistant`, as a dialogue."""
    speakers = {"User": "Human", "Assistant": "Assistant"}
    return _TURN.sub(lambda turn: f"\n\n{speakers[turn.group(1)]}: ", text).strip()
