"""What an experiment is given: its prompts, to train on, to scale rewards on and to measure on, and its rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HoEError
from ..generation.prompt_rows import drawn_rows
from ..inputs import read_prompts
from ..recipes import Recipe
from ..rewards.command_line import parse_rewards
from ..rewards.sources import Rewards
from .plan import Plan

SPLITS = ("train", "validation", "test")
HELD_OUT = 128  # training prompts that are kept for the payoff table

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompts:
    """Rows with `prompt` and the columns that rewards read.

    Attributes:
        train: of the routers, without the test prompts; empty where no router trains.
        validation: of payoff tables; empty where there is nothing to hold out.
        test: of the sweeps.
    """

    train: Rows
    validation: Rows
    test: Rows


def load_prompts(plan: Plan) -> Prompts:
    """The user's splits, and the recipe's for those that are not given.

    Without validation prompts, up to 128 of the training prompts, a fifth at most, are held out for it. These, and what `limit`
    leaves of the others, are drawn by the plan's seed: files are often sorted.

    Raises:
        HoEError: a file or dataset cannot be read, or a split that is needed is missing.
    """
    found = _given(plan.prompts)
    recipe = plan.recipe
    if recipe is not None:
        found = _published(plan, recipe, found) | found
    missing = [split for split, needed in (("train", plan.learns), ("test", True)) if needed and not found.get(split)]
    if missing:
        raise HoEError(
            f"there are no prompts for {missing}; give them, as --prompts {missing[0]}=FILE"
            + (", or train no routers (--updates 0)" if missing == ["train"] else ""),
            argument="prompts", value=list(found), allowed=f"also {' and '.join(missing)}",
        )  # fmt: skip
    test = _drawn(found["test"], plan)
    measured = {json.dumps(row["prompt"]) for row in test}
    train = [row for row in found.get("train", []) if json.dumps(row["prompt"]) not in measured]
    validation = _drawn(found.get("validation", []), plan)
    if not validation:
        held_out = set(drawn_rows(len(train), min(HELD_OUT, plan.limit or HELD_OUT, len(train) // 5), plan.seed))
        validation = [row for number, row in enumerate(train) if number in held_out]
        train = [row for number, row in enumerate(train) if number not in held_out]
    return Prompts(train if plan.learns else [], validation, test)


def _drawn(rows: Rows, plan: Plan) -> Rows:
    """As many as the plan's limit allows."""
    return [rows[number] for number in drawn_rows(len(rows), plan.limit or len(rows), plan.seed)]


def _given(prompts: Any) -> dict[str, Rows]:
    if prompts is None:
        return {}
    if isinstance(prompts, str):
        prompts = _read_splits(prompts)
    unknown = [split for split in prompts if split not in SPLITS]
    if unknown:
        raise HoEError(
            f"prompts are given for {unknown}; the splits are {list(SPLITS)}",
            argument="prompts", value=unknown, allowed=list(SPLITS),
        )  # fmt: skip
    return {split: _rows(source) for split, source in prompts.items()}


def _read_splits(path: str) -> Mapping[str, Any]:
    """A JSON file of all splits; a file of another kind holds test prompts."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8")) if path.endswith(".json") else None
    except (OSError, ValueError) as error:
        raise HoEError(f"cannot read the prompts {path!r}: {error}", argument="prompts", value=path) from None
    return content if isinstance(content, dict) else {"test": path}


def _rows(source: Any) -> Rows:
    if isinstance(source, str):
        return read_prompts(source)
    return [row if isinstance(row, dict) else {"prompt": row} for row in source]


def _published(plan: Plan, recipe: Recipe, given: Mapping[str, Sequence[Any]]) -> dict[str, Rows]:
    """Of a recipe, what is not given: the split to measure on, and as many training prompts as are used."""
    found = {}
    if "test" not in given:
        split = next((name for name in ("test", "validation") if name in recipe.splits), recipe.splits[0])
        seed = None if plan.limit is None else plan.seed
        found["test"] = recipe.load_prompts(split, plan.data, limit=plan.limit, seed=seed).to_list()
    needed = plan.learns or plan.auto is not None or "validation" not in given
    if "train" not in given and needed and "train" in recipe.splits:
        used = plan.most_updates * plan.batch_size * plan.learns + 5 * HELD_OUT
        found["train"] = recipe.load_prompts("train", plan.data, limit=used, seed=plan.seed).to_list()
    return found


def load_rewards(plan: Plan, device: str) -> Rewards:
    """The recipe's rewards, but for those that the user gives.

    Raises:
        RewardError: one cannot be imported or loaded.
    """
    texts = [f"{name}={source}" for name, source in plan.rewards.items() if isinstance(source, str)]
    sources: dict[Any, Any] = parse_rewards(texts)
    sources |= {name: source for name, source in plan.rewards.items() if not isinstance(source, str)}
    others = [name for name in plan.objectives if name not in plan.rewards]
    if plan.recipe is not None and others:
        sources |= plan.recipe.rewards(others, device=device)
    return Rewards(sources, plan.objectives).to(device)
