"""The paper's tasks by name: prompts, objectives, rewards and models.

    recipe = recipes.get("helpful-assistant")
    prompts = recipe.load_prompts("test", limit=100, seed=0)
    rewards = Rewards(recipe.rewards(device="cuda"), recipe.objectives)

docs/recipes.md has the table, what the paper leaves open and what is chosen.
"""

from ..errors import HoEError
from .answers import final_answer, pass_at_1
from .prompt_data import DatasetRecipe
from .recipe import Recipe
from .refusals import REFUSAL_PHRASES, is_refusal, refusal_ratios
from .reward_recipes import RecipeReward, RewardRecipe
from .table import RECIPES
from .templates import PromptTemplate

__all__ = [
    "REFUSAL_PHRASES",
    "DatasetRecipe",
    "PromptTemplate",
    "Recipe",
    "RecipeReward",
    "RewardRecipe",
    "final_answer",
    "get",
    "is_refusal",
    "names",
    "pass_at_1",
    "refusal_ratios",
]


def names() -> list[str]:
    """The recipes' names.

    >>> from peft_hoe import recipes
    >>> "helpful-assistant" in recipes.names()
    True
    """
    return list(RECIPES)


def get(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        HoEError: there is none of that name.

    >>> from peft_hoe import recipes
    >>> recipes.get("helpful-assistant").objectives
    ('helpful', 'harmless', 'humor')
    """
    if name not in RECIPES:
        known = names()
        raise HoEError(f"there is no recipe {name!r}; there are {known}", argument="name", value=name, allowed=known)
    return RECIPES[name]
