"""How a published reward model is read: what it is given, which output counts, and with which sign."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import RewardError
from ..rewards.classifier import ClassifierReward, Text
from .templates import PromptTemplate

Layout = str | tuple[str, str]


@dataclass(frozen=True)
class RewardRecipe:
    """The reward of one objective: a model, or a function.

    Attributes:
        objective: its name in the paper.
        model: Hub id.
        layout: the text that the model reads, or the two that its tokenizer joins. Of `{prompt}`, the policy's prompt without
            white space at its end; `{content}`, the prompt without its template; `{completion}`, up to the first stop and
            stripped; `{bos}`, the tokenizer's token.
        output: index of the logit.
        outputs: how many there are, where the published configuration may not say so; a checkpoint with another number is
            refused. None: what the configuration says.
        sign: -1 where a high logit is bad.
        truncation_side: where a long text is cut off.
        score_model: whether it is a model of Safe-RLHF, see `ScoreModel`.
        function: instead of a model, `(prompts, completions, **columns)`.
        source: where these facts are from.

    >>> from peft_hoe import recipes
    >>> [(reward.objective, reward.sign) for reward in recipes.get("helpful-assistant").reward_recipes]
    [('helpful', 1), ('harmless', 1), ('humor', 1)]
    """

    objective: str
    model: str | None = None
    layout: Layout = ("{prompt}", "{completion}")
    output: int = 0
    outputs: int | None = 1
    sign: int = 1
    truncation_side: str = "left"
    score_model: bool = False
    function: Callable[..., Any] | None = None
    source: str = ""


class RecipeReward:
    """The rewards of one published model, which is loaded at the first call. A callable as `Rewards` takes it.

    Args:
        recipes: K recipes that read the same text with the same model.
        template: of the prompts.
        path: the model's Hub id or directory.
        device: where it goes.
        dtype: of its parameters; default that of its checkpoint.
        batch_size: texts at once.
        trust_remote_code: whether code that comes with the model may run.

    >>> from peft_hoe import recipes
    >>> rewards = recipes.get("helpful-assistant").rewards()  # a model is loaded when it is first asked
    >>> len(rewards)
    3
    """

    def __init__(
        self,
        recipes: Sequence[RewardRecipe],
        template: PromptTemplate,
        path: str,
        *,
        device: Any = "cpu",
        dtype: Any = "auto",
        batch_size: int = 16,
        trust_remote_code: bool = False,
    ) -> None:
        self.recipes = tuple(recipes)
        self.template = template
        self.path = path
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.trust_remote_code = trust_remote_code
        self.classifier: ClassifierReward | None = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> Tensor:
        """Rewards `(B, K)`, float32 on the CPU.

        Raises:
            RewardError: the model cannot be loaded, or a prompt is not of the recipe's template.
        """
        return self._loaded()(prompts, completions)

    def text(self, prompt: Any, completion: str) -> Text:
        """What the model reads."""
        layout = self.recipes[0].layout
        parts = {
            "content": self.template.content(prompt),
            "prompt": prompt.rstrip(),
            "completion": self.template.clean(completion),
            "bos": self._loaded().tokenizer.bos_token,
        }
        if isinstance(layout, str):
            return layout.format_map(parts)
        first, second = layout
        return first.format_map(parts), second.format_map(parts)

    def _loaded(self) -> ClassifierReward:
        if self.classifier is None:
            self.classifier = self._load()
        return self.classifier

    def _load(self) -> ClassifierReward:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from .score_model import ScoreModel

        recipe = self.recipes[0]
        kind: Any = ScoreModel if recipe.score_model else AutoModelForSequenceClassification
        settings = {} if recipe.outputs is None else {"num_labels": recipe.outputs}
        if not recipe.score_model:
            settings["trust_remote_code"] = self.trust_remote_code
        try:
            model, loading = kind.from_pretrained(self.path, output_loading_info=True, dtype=self.dtype, **settings)
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except RewardError:
            raise
        except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: another number of outputs
            raise RewardError(
                f"cannot load the reward model {self.path!r} ({error}); without network, give "
                "rewards(sources={objective: path})",
                argument="sources", value=self.path,
            ) from error  # fmt: skip
        missing = set(loading["missing_keys"])
        if recipe.score_model:
            missing -= {"score_head.bias"}  # some heads have none; transformers starts it at zero
        if missing:  # the others would be drawn at random
            raise RewardError(
                f"{self.path!r} is no reward model of this kind: it does not hold {sorted(missing)}",
                argument="sources", value=self.path,
            )  # fmt: skip
        if "{bos}" in str(recipe.layout) and tokenizer.bos_token is None:
            raise RewardError(
                f"the tokenizer of {self.path!r} has no bos_token, which the layout {recipe.layout!r} needs",
                argument="sources", value=self.path,
            )  # fmt: skip
        return ClassifierReward(
            model.to(self.device),
            tokenizer,
            output=[recipe.output for recipe in self.recipes],
            sign=[recipe.sign for recipe in self.recipes],
            template=self.text,
            batch_size=self.batch_size,
            truncation_side=recipe.truncation_side,
        )


def load_rewards(
    recipes: Sequence[RewardRecipe], template: PromptTemplate, sources: dict[str, str | Path], **settings: Any
) -> dict[str | tuple[str, ...], Callable[..., Any]]:
    """What `Rewards` takes: objectives that one model scores share a key, and the model runs once."""
    groups: dict[tuple[Any, ...], list[RewardRecipe]] = {}
    rewards: dict[str | tuple[str, ...], Callable[..., Any]] = {}
    for recipe in recipes:
        path = sources.get(recipe.objective, recipe.model)
        if recipe.function is not None:
            rewards[recipe.objective] = recipe.function
        else:
            key = (str(path), recipe.layout, recipe.truncation_side, recipe.score_model)
            groups.setdefault(key, []).append(recipe)
    for (path, *_), group in groups.items():
        names = tuple(recipe.objective for recipe in group)
        rewards[names if len(names) > 1 else names[0]] = RecipeReward(group, template, path, **settings)
    return rewards
