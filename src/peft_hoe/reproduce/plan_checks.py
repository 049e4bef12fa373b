"""Settings of an experiment that do not fit each other, found before anything is loaded.

Each check raises an error of ours that names the setting, its value, what is allowed and, where there is one, the option of the
command line that is the remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from .. import recipes
from ..errors import HoEError, RewardError
from ..evaluation.baselines import BASELINES

_NOT_ONE_CALL = {"morlhf"}  # needs a policy of its own for each preference


def check_updates(updates: int | str, max_updates: int | None, trainer: str) -> None:
    """Of each router: a number from 0, or "auto" with a bound of at least 1, which `distill` has no rewards for.

    Raises:
        HoEError: names the setting.
    """
    auto = updates == "auto"
    if not auto and (isinstance(updates, str) or updates < 0):
        raise HoEError(
            f"updates is {updates!r}; give a number, at least 0, or auto",
            argument="updates", value=updates, allowed="at least 0, or auto",
        )  # fmt: skip
    if auto and trainer == "distill":
        raise HoEError(
            "updates is auto, which follows the worst gap in rewards, but the trainer is distill, which has none; give a "
            "number",
            argument="updates", value=updates, allowed="at least 0",
        )  # fmt: skip
    if max_updates is not None and (max_updates < 1 or not auto):
        raise HoEError(
            f'max_updates is {max_updates} with updates={updates!r}; it bounds updates="auto", and is at least 1',
            argument="max_updates", value=max_updates, allowed='at least 1, with updates="auto"',
        )  # fmt: skip


def check_seeds(seeds: Sequence[int], *, trains: bool, places: bool) -> None:
    """Of training: each once, where routers train at places that are given.

    Args:
        seeds: empty where the experiment trains once.
        trains: whether routers train at places that are given.
        places: whether places are found by measurement.

    Raises:
        HoEError: names them, and what to leave out.
    """
    if not seeds:
        return
    if any(seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise HoEError(
            f"seeds are {list(seeds)}; give each once, numbers of at least 0 (--seeds 0,1,2)",
            argument="seeds", value=list(seeds), allowed="each once, at least 0",
        )  # fmt: skip
    if places:
        raise HoEError(
            f"seeds are {list(seeds)}, but experts and routers are placed by measurement (--auto), which finds other "
            "places with each; run one experiment for each seed (--seed), in a folder of its own",
            argument="seeds", value=list(seeds), allowed="none with auto",
        )  # fmt: skip
    if not trains:
        raise HoEError(
            f"seeds are {list(seeds)}, but no router is trained, so that all would be the same; leave seeds out, or train "
            "(--router, --updates)",
            argument="seeds", value=list(seeds), allowed="none where nothing trains",
        )  # fmt: skip


def check_texts(texts: int, *, sampled: bool) -> None:
    """Several texts for a prompt are sampled.

    Raises:
        HoEError: they are greedy, and so all the same.
    """
    if texts > 1 and not sampled:
        raise HoEError(
            f"texts is {texts}, but greedy texts are all the same; sample (--sample), or leave texts out",
            argument="texts", value=texts, allowed=1,
        )  # fmt: skip


def check_batches(*, batch_size: int, micro_batch_size: int | None, **others: int | None) -> None:
    """All sizes are at least 1, or None for all there is, and a batch is whole micro-batches.

    Args:
        batch_size: responses of an update.
        micro_batch_size: responses of a forward.
        others: more sizes, by the names of their settings.

    Raises:
        HoEError: names the setting.
    """
    for name, value in {"batch_size": batch_size, "micro_batch_size": micro_batch_size, **others}.items():
        if value is not None and value < 1:
            raise HoEError(
                f"{name} is {value}; it must be at least 1", argument=name, value=value, allowed="at least 1"
            )
    if batch_size % (micro_batch_size or batch_size):
        raise HoEError(
            f"batch_size is {batch_size} and micro_batch_size {micro_batch_size}; the batch must be a multiple of "
            "the micro-batch",
            argument="micro_batch_size", value=micro_batch_size, allowed=f"a divisor of {batch_size}",
        )  # fmt: skip


def check_rewards(given: Collection[str], objectives: Sequence[str], recipe: recipes.Recipe | None) -> None:
    """Each objective has a reward, the recipe's or one that is given, and no reward is given for another.

    Args:
        given: names that rewards are given for.
        objectives: the N names.
        recipe: None for one's own task.

    Raises:
        RewardError: names the objectives.
    """
    known = {*(recipe.objectives if recipe else ()), *given}
    missing = [name for name in objectives if name not in known]
    unknown = [name for name in given if name not in objectives]
    if missing or unknown:
        raise RewardError(
            f"rewards are missing for {missing} and given for {unknown}, which have no policy; the objectives are "
            f"{list(objectives)} (--reward NAME=SOURCE)",
            argument="rewards", value=list(given), allowed=list(objectives),
        )  # fmt: skip


def check_prompts(prompts: Any, data: str | None, recipe: recipes.Recipe | None) -> None:
    """One's own task has prompts, and no local copy of a recipe's dataset.

    Raises:
        HoEError: names the setting.
    """
    if recipe is None and prompts is None:
        raise HoEError("a task of one's own has no prompts; give them (--prompts FILE)", argument="prompts")
    if recipe is None and data is not None:
        raise HoEError(
            "data is a local copy of a recipe's dataset, and there is no recipe; give prompts (--prompts FILE)",
            argument="data", value=data,
        )  # fmt: skip


def check_baselines(names: Sequence[str]) -> None:
    """Each is one that needs no training for a preference, and is named once.

    Raises:
        HoEError: names them, and those there are.
    """
    known = sorted(BASELINES.keys() - _NOT_ONE_CALL)
    if not set(names) <= set(known) or len(set(names)) < len(names):
        raise HoEError(
            f"baselines are {list(names)}; each can be given once, of {known}",
            argument="baselines", value=list(names), allowed=known,
        )  # fmt: skip
