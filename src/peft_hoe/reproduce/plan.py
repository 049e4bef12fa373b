"""The settings of an experiment, with the paper's or the recipe's where the user says nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from .. import recipes
from ..errors import HoEError, check_choice
from ..generation.decoding import Decoding
from ..placing import Budget
from ..preference import parse_preference, preference_grid
from ..router_recipe import MOST_UPDATES, RESPONSES, UPDATES, default_experts, default_routers
from ..training.run.reports import check_reports
from . import plan_checks as checks

OWN = "own"
TRAINERS = ("ppo", "grpo", "distill")
# What may be others when a run goes on: more baselines, and how it is computed; who runs out of memory takes smaller batches.
_EXECUTION = ("output_dir", "baselines", "cpu", "micro_batch_size", "sweep_batch_size", "save_steps", "report_to")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `reproduce` does; made by `Plan.of`, which fills in and checks.

    Attributes:
        task: a recipe's name, or "own".
        base: directory or Hub id of the model that the policies were trained from.
        policies: `{objective: directory or Hub id}`, in the order of the objectives.
        output_dir: where everything goes.
        rewards: `{objective: source}` instead of the recipe's: text as `parse_rewards` reads it, or a callable.
        prompts: `{split: file}` or one file for `read_splits`, instead of the recipe's dataset; or `{split: rows}`.
        data: local copy of the recipe's dataset, in the published schema.
        experts: preferences of merged experts.
        routers: preferences of routers.
        auto: what may be spent on experts and routers that are placed where the front of the validation prompts is weak, see
            `place`; True for as many parameters as the adapter is built with. None places none.
        trainer: "ppo", "grpo" or "distill".
        updates: of each router; 0 trains none, and "auto" ends when the worst gap has stopped falling beyond its error.
        max_updates: bound of "auto"; None for 240.
        batch_size: responses of an update.
        micro_batch_size: responses of a forward in training; None for all.
        learning_rate: of routers; None for the trainer's default.
        save_steps: a checkpoint every so many updates.
        preferences: `(K, N)` rows that fronts are measured at.
        baselines: names of `evaluation.baselines`.
        decoding: of all sweeps, and of their payoff table. Routers train on samples of the same length that end at the same
            places, at its temperature, top_k and top_p if it samples, else at 1 from the whole vocabulary.
        texts: for each prompt and preference of all sweeps, and of their payoff table; several if the decoding samples.
        limit: test prompts at most; None for all.
        rank: as `build_adapter`'s `r`.
        seed: of prompts, build and training.
        seeds: of training, several: routers, and baselines that are trained, are trained with each and swept; the sweeps of a
            method are then stacked, so that intervals hold what another training would change. Empty trains once, with `seed`.
        sweep_batch_size: completions at once.
        report_to: where metrics of the routers' training go, as in transformers.
        cpu: use no accelerator.

    >>> from peft_hoe import demo
    >>> from peft_hoe.reproduce import Plan
    >>> plan = Plan.of(
    ...     "own", base=demo.BASE, policies=demo.POLICIES, prompts=str(demo.embedded.ASSETS / "prompts.json"), output_dir="out",
    ...     rewards={name: f"peft_hoe.demo.rewards:{name}" for name in demo.REWARDS},
    ... )
    >>> plan.policies.keys() == demo.POLICIES.keys()
    True
    """

    task: str
    base: str
    policies: Mapping[str, str]
    output_dir: str
    rewards: Mapping[str, Any] = field(default_factory=dict)
    prompts: Any = None
    data: str | None = None
    experts: Sequence[Sequence[float]] = ()
    routers: Sequence[Sequence[float]] = ()
    auto: Budget | bool | None = None
    trainer: str = "ppo"
    updates: int | str = UPDATES
    max_updates: int | None = None
    batch_size: int = RESPONSES
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    save_steps: int = 10
    preferences: Sequence[Sequence[float]] = ()
    baselines: Sequence[str] = ()
    decoding: Decoding = Decoding()  # noqa: RUF009
    texts: int = 1
    limit: int | None = None
    rank: int | str = "auto"
    seed: int = 0
    seeds: Sequence[int] = ()
    sweep_batch_size: int = 128
    report_to: Sequence[str] = ()
    cpu: bool = False

    @classmethod
    def of(
        cls,
        task: str,
        *,
        output_dir: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        policies: Mapping[str, Any] | None = None,
        rewards: Mapping[str, Any] | None = None,
        experts: Sequence[Any] | None = None,
        routers: Sequence[Any] | None = None,
        auto: Budget | bool | None = None,
        preferences: Any = "grid",
        decoding: Any = None,
        **others: Any,
    ) -> Plan:
        """A checked plan.

        Objectives are those that have a policy, the recipe's or given here: the recipe's first, in its order.

        Args:
            task: a recipe's name, or "own" for a task of one's own, for which policies, rewards and prompts are given.
            output_dir: where everything goes.
            base: default the recipe's fine-tune, or its base where it has one only.
            policies: beside the recipe's published ones, or instead of them.
            rewards: instead of the recipe's.
            experts: default `router_recipe.default_experts`, with `auto` none; rows may be `{objective: weight}`.
            routers: default `router_recipe.default_routers`, with `auto` none.
            auto: see the attribute.
            preferences: rows or "grid".
            decoding: what `Decoding.of` takes; default greedy, and what a mapping does not say of the length is the recipe's,
                else 64 new tokens.
            others: more attributes.

        Raises:
            HoEError: no such recipe, something that has no default is missing, or a setting out of range.
            PreferenceError: a preference does not fit the objectives.
        """
        recipe = None if task == OWN else recipes.get(task)
        chosen = {**(recipe.policies if recipe else {}), **(policies or {})}
        order = [*(recipe.objectives if recipe else ()), *chosen]
        objectives = [name for name in dict.fromkeys(order) if name in chosen]
        if len(objectives) < 2:
            known = (
                f"the objectives of {task!r} are {list(recipe.objectives)}" if recipe else "name your own objectives"
            )
            raise HoEError(
                f"there are policies for {objectives}, and a front needs two at least; {known} (--policy)",
                argument="policies", value=objectives, allowed="two at least",
            )  # fmt: skip
        if base is None:
            base = _default_base(recipe)
        n = len(objectives)
        rows = preference_grid(n) if isinstance(preferences, str) and preferences == "grid" else preferences
        plan = cls(
            task=task,
            base=os.fspath(base),
            policies={name: os.fspath(chosen[name]) for name in objectives},
            output_dir=os.fspath(output_dir),
            rewards=dict(rewards or {}),
            experts=_points((default_experts(n) if experts is None and not auto else experts) or [], objectives),
            routers=_points((default_routers(n) if routers is None and not auto else routers) or [], objectives),
            auto=auto or None,
            preferences=_points(rows, objectives),
            decoding=_decoding(decoding, recipe),
            **others,
        )
        _check(plan, recipe)
        return plan

    @property
    def objectives(self) -> tuple[str, ...]:
        """The N names."""
        return tuple(self.policies)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.output_dir)

    @property
    def recipe(self) -> recipes.Recipe | None:
        """The paper's task; None for one's own."""
        return None if self.task == OWN else recipes.get(self.task)

    @property
    def trains(self) -> bool:
        """Whether there are routers to train at places that are given."""
        return bool(self.routers) and self.updates != 0

    @property
    def learns(self) -> bool:
        """Whether routers train, at these places or at such that are found."""
        return self.trains or (self.auto is not None and self.updates != 0)

    @property
    def most_updates(self) -> int:
        """Of each router, at most."""
        return (self.max_updates or MOST_UPDATES) if isinstance(self.updates, str) else self.updates

    def settings(self) -> dict[str, Any]:
        """What results depend on, as plain JSON."""
        found = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _EXECUTION}
        found["policies"] = dict(self.policies)
        found["auto"] = asdict(self.auto) if isinstance(self.auto, Budget) else self.auto
        found["decoding"] = self.decoding.record
        found["rewards"] = {name: _written(source) for name, source in self.rewards.items()}
        if isinstance(self.prompts, Mapping):
            found["prompts"] = {
                split: source if isinstance(source, str) else _digest(source) for split, source in self.prompts.items()
            }
        return found


def _decoding(given: Any, recipe: recipes.Recipe | None) -> Decoding:
    if recipe is not None and (given is None or (isinstance(given, Mapping) and "max_new_tokens" not in given)):
        given = {"max_new_tokens": recipe.max_new_tokens, **(given or {})}
    return Decoding.of(given)


def _default_base(recipe: recipes.Recipe | None) -> str:
    if recipe is None:
        raise HoEError(
            "the base model is missing; give the one that the policies were trained from (--base)", argument="base"
        )
    if recipe.sft is None and len(recipe.base) > 1:
        raise HoEError(
            f"the recipe {recipe.name!r} has several bases, {list(recipe.base)}; give the one that the policies were trained "
            "from (--base)",
            argument="base", allowed=list(recipe.base),
        )  # fmt: skip
    return recipe.sft or recipe.base[0]


def _points(rows: Any, objectives: Sequence[str]) -> list[list[float]]:
    return [np.asarray(parse_preference(row, objectives)).tolist() for row in rows]


def _check(plan: Plan, recipe: recipes.Recipe | None) -> None:
    """What can be known before anything is loaded."""
    check_choice("trainer", plan.trainer, TRAINERS)
    check_reports(plan.report_to)
    checks.check_updates(plan.updates, plan.max_updates, plan.trainer)
    checks.check_batches(
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        save_steps=plan.save_steps,
        limit=plan.limit,
        texts=plan.texts,
        sweep_batch_size=plan.sweep_batch_size,
    )
    checks.check_seeds(plan.seeds, trains=plan.trains, places=plan.auto is not None)
    checks.check_texts(plan.texts, sampled=plan.decoding.do_sample)
    checks.check_rewards(plan.rewards, plan.objectives, recipe)
    checks.check_prompts(plan.prompts, plan.data, recipe)
    checks.check_baselines(plan.baselines)


def _written(source: Any) -> str:
    """A reward as JSON can hold it."""
    if isinstance(source, str):
        return source
    named = source if hasattr(source, "__qualname__") else type(source)
    return f"{named.__module__}:{named.__qualname__}"


def _digest(rows: Any) -> str:
    """Rows of prompts as JSON can hold them."""
    text = json.dumps(list(rows), default=str, sort_keys=True)
    return f"{len(list(rows))} rows, sha256 {hashlib.sha256(text.encode()).hexdigest()}"
