"""A task of the paper: prompts, objectives, rewards and the models that it starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HoEError, RewardError
from .prompt_data import DatasetRecipe
from .reward_recipes import RewardRecipe, load_rewards
from .templates import PromptTemplate


@dataclass(frozen=True)
class Recipe:
    """A task by name.

    Attributes:
        name: as in `recipes.names()`.
        summary: what it measures.
        datasets: one or more, with splits of different names and the same template.
        reward_recipes: one for each objective, in the paper's order.
        base: Hub ids of the pretrained models.
        sft: Hub id of the published fine-tune that the paper starts from; None: the paper trains one and publishes none.
        policies: `{objective: Hub id}` of published single-objective policies; for other objectives the paper trains them.
        max_new_tokens: of a completion.
        left_open: what the paper does not say, and what is chosen.

    >>> from peft_hoe import recipes
    >>> print(recipes.get("helpful-assistant").fill("How do I boil an egg?").strip())
    Human: How do I boil an egg?
    <BLANKLINE>
    Assistant:
    """

    name: str
    summary: str
    datasets: tuple[DatasetRecipe, ...]
    reward_recipes: tuple[RewardRecipe, ...]
    base: tuple[str, ...]
    sft: str | None = None
    policies: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int = 128
    left_open: tuple[str, ...] = ()

    @property
    def objectives(self) -> tuple[str, ...]:
        """The N objectives."""
        return tuple(reward.objective for reward in self.reward_recipes)

    @property
    def template(self) -> PromptTemplate:
        """Of the policy's prompt."""
        return self.datasets[0].template

    @property
    def splits(self) -> tuple[str, ...]:
        """What `load_prompts` knows."""
        return tuple(split for dataset in self.datasets for split in dataset.splits)

    def load_prompts(
        self, split: str, source: str | Path | None = None, *, limit: int | None = None, seed: int | None = None
    ) -> Any:
        """The prompts of a split, each once.

        Args:
            split: one of `splits`.
            source: a local file, or a folder with files, in the published schema (.jsonl, .json, .csv, .parquet, .gz of
                them); of a folder, the files whose names hold the split's. None: the Hub.
            limit: prompts at most.
            seed: shuffles them, before the limit; None: the published order.

        Returns:
            A `datasets.Dataset` with `prompt`, text for the policy, and the columns that the rewards read.

        Raises:
            HoEError: no such split, or nothing in the published schema.
        """
        for dataset in self.datasets:
            if split in dataset.splits:
                return dataset.load(split, source, limit, seed)
        raise HoEError(
            f"the recipe {self.name!r} has no split {split!r}; it has {list(self.splits)}",
            argument="split", value=split, allowed=list(self.splits),
        )  # fmt: skip

    def fill(self, content: str) -> str:
        """The policy's prompt for a text of one's own: a question, a post, or the turns of a dialogue."""
        return self.template.fill(content)

    def rewards(
        self,
        objectives: Sequence[str] | None = None,
        *,
        sources: Mapping[str, str | Path] | None = None,
        device: Any = "cpu",
        dtype: Any = "auto",
        batch_size: int = 16,
        trust_remote_code: bool = False,
    ) -> dict[str | tuple[str, ...], Callable[..., Any]]:
        """The rewards, as `Rewards(recipe.rewards(), recipe.objectives)` takes them; models are loaded at their first call.

        Args:
            objectives: those wanted; default all.
            sources: `{objective: directory or Hub id}` instead of the published model, of the same layout.
            device: of the models.
            dtype: of their parameters; default that of their checkpoints.
            batch_size: texts at once.
            trust_remote_code: whether code that comes with a model may run.

        Returns:
            `{objective: callable}`; objectives that one model scores share a key, `{(objective, ...): callable}`.

        Raises:
            RewardError: an objective that the recipe does not have.
        """
        wanted = self.objectives if objectives is None else tuple(objectives)
        sources = dict(sources or {})
        unknown = [name for name in (*wanted, *sources) if name not in self.objectives]
        if unknown:
            raise RewardError(
                f"the recipe {self.name!r} has no objective {', '.join(map(repr, unknown))}; it has {list(self.objectives)}",
                argument="objectives" if unknown[0] in wanted else "sources",
                value=unknown, allowed=list(self.objectives),
            )  # fmt: skip
        functions = [
            reward.objective for reward in self.reward_recipes if reward.function and reward.objective in sources
        ]
        if functions:
            raise RewardError(
                f"the rewards {functions} of {self.name!r} are functions; give sources for models only",
                argument="sources", value=functions,
                allowed=[reward.objective for reward in self.reward_recipes if not reward.function],
            )  # fmt: skip
        chosen = [reward for reward in self.reward_recipes if reward.objective in wanted]
        return load_rewards(
            chosen, self.template, sources,
            device=device, dtype=dtype, batch_size=batch_size, trust_remote_code=trust_remote_code,
        )  # fmt: skip
