"""λ from a person's choices: which of two texts somebody likes better tells how much each objective matters to them."""

from .estimate import CredibleRegion, PreferenceEstimate
from .implicit_rewards import implicit_rewards

__all__ = ["CredibleRegion", "PreferenceEstimate", "implicit_rewards"]
