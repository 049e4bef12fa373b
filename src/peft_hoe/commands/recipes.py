"""`peft-hoe recipes`: the paper's tasks by name."""

from __future__ import annotations

import argparse
import textwrap

from .. import recipes
from ..recipes import Recipe, RewardRecipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="one recipe in full; default a list of all")


def run(arguments: argparse.Namespace) -> int:
    """Print.

    Raises:
        HoEError: there is no such recipe.
    """
    if arguments.name is None:
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"{name:{width}}  {recipes.get(name).summary}: {', '.join(recipes.get(name).objectives)}")
    else:
        print(describe(recipes.get(arguments.name)))
    return 0


def describe(recipe: Recipe) -> str:
    """A recipe as text."""
    lines = [f"{recipe.name}: {recipe.summary}", ""]
    for dataset in recipe.datasets:
        splits = ", ".join(dataset.splits)
        lines.append(
            _line("dataset", f"{dataset.id}, splits {splits}" + f"; {dataset.choices}" * bool(dataset.choices))
        )
    lines += [
        _line("prompt", repr(recipe.template.text)),
        _line("tokens", f"{recipe.max_new_tokens} at most in a completion"),
        _line("base", ", ".join(recipe.base)),
        _line("SFT", recipe.sft or "none published"),
        _line(
            "policies", ", ".join(f"{name}: {policy}" for name, policy in recipe.policies.items()) or "none published"
        ),
    ]
    for reward in recipe.reward_recipes:
        lines += ["", *_describe_reward(reward)]
    lines += ["", "What the paper leaves open, and what is chosen:"]
    lines += [textwrap.fill(text, 110, initial_indent="- ", subsequent_indent="  ") for text in recipe.left_open]
    return "\n".join(lines)


def _describe_reward(reward: RewardRecipe) -> list[str]:
    lines = [_line("objective", reward.objective)]
    if reward.function is not None:
        lines.append(_line("function", f"{reward.function.__module__}.{reward.function.__name__}"))
    else:
        layout = (reward.layout,) if isinstance(reward.layout, str) else reward.layout
        lines += [
            _line("model", str(reward.model)),
            _line("reads", " and ".join(map(repr, layout)) + " as a pair" * (len(layout) == 2)),
            _line("output", f"{reward.output}, {'negated' if reward.sign < 0 else 'as it is'}"),
        ]
    return [*lines, _line("from", reward.source)]


def _line(name: str, text: str) -> str:
    return textwrap.fill(
        text,
        110,
        initial_indent=f"{name:10}",
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )
