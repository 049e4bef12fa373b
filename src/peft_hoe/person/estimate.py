"""A belief about somebody's preference that learns from their choices between texts.

The sharpness κ of the choice model (`choice_model.py`), how reliably a person chooses, is learnt along with λ.

Shapes: N objectives, G grid points of the simplex, K sharpnesses, T texts, M pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from ..errors import HoEError
from ..preference import FloatArray, parse_preference
from . import checks
from .choice_model import SHARPNESS, grid, information, log_choice

_DRAWS = 64  # points of the posterior that a proposal is judged by
_PAIRS = 200  # pairs that are looked at for a proposal


@dataclass(frozen=True, eq=False)
class CredibleRegion:
    """The most credible preferences that hold a share of the probability together.

    Attributes:
        level: that share.
        intervals: the smallest and greatest weight of each objective inside.
        points: the preferences of the grid inside, `(G', N)`.

    >>> from peft_hoe import PreferenceEstimate
    >>> region = PreferenceEstimate(["kind", "brief"]).region(0.8)
    >>> [round(bound, 1) for bound in region.intervals["kind"]]
    [0.0, 1.0]
    """

    level: float
    intervals: dict[str, tuple[float, float]]
    points: FloatArray
    _estimate: PreferenceEstimate
    _choices: int
    _least: float

    def contains(self, preference: Any) -> bool:
        """Whether a preference (N numbers or `{objective: weight}`) lies inside.

        Raises:
            PreferenceError: it is no point of the simplex.
        """
        point = parse_preference(preference, self._estimate.objectives)
        return bool(self._estimate._log_density(point[None], self._choices)[0] >= self._least)


class PreferenceEstimate:
    """What is known about a person's λ, from "this text rather than that".

    Args:
        objectives: the N names.
        sharpness: κ of the choice model, where it is known; default learnt. A person who errs in 10 % of the choices between
            texts that differ by 0.3 has ln(9) / 0.3 = 7.3.
        seed: of the pairs that proposals look at.

    Rewards are those of the two texts, `(N,)`, normalised so that 0 to 1 is what the experts reach
    (`RewardNormalizer.normalize`), or `implicit_rewards` where there are none. Before the first choice all preferences are
    equally likely.

    Raises:
        HoEError: no objectives, or a sharpness that is no positive number.

    >>> from peft_hoe import PreferenceEstimate
    >>> estimate = PreferenceEstimate(["kind", "brief"])
    >>> estimate.choose(better=[0.9, 0.1], worse=[0.2, 0.9])
    >>> estimate.choose(better=[0.7, 0.3], worse=[0.6, 0.9])
    >>> {name: round(weight, 1) for name, weight in estimate.preference.items()}
    {'kind': 0.8, 'brief': 0.2}
    >>> texts = [[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]]
    >>> first, second = estimate.propose(texts)  # the two that tell most
    """

    def __init__(self, objectives: Sequence[str], *, sharpness: float | None = None, seed: int = 0) -> None:
        self.objectives = checks.names(objectives)
        self._kappa = np.asarray(SHARPNESS if sharpness is None else [checks.sharpness(sharpness)])
        self._rng = np.random.default_rng(seed)
        self._points = grid(len(self.objectives))
        self._likelihood = np.zeros((len(self._points), len(self._kappa)))
        self._differences: list[FloatArray] = []

    def __len__(self) -> int:
        """Number of choices so far."""
        return len(self._differences)

    # -- choices ---

    def choose(self, better: Any, worse: Any, *, again: bool = False) -> None:
        """Learn from a choice.

        Args:
            better: rewards of the text that was chosen, N numbers or `{objective: reward}`.
            worse: of the other one.
            again: whether a choice may contradict an earlier one between texts of the same rewards. A person may waver, and the
                model knows that; without it such a choice is taken for a slip.

        Raises:
            HoEError: rewards that are not N finite numbers, are the same for both texts, or contradict an earlier choice.
                Nothing is learnt then.
        """
        chosen, other = (
            checks.rewards(given, self.objectives, name) for given, name in ((better, "better"), (worse, "worse"))
        )
        difference = chosen - other
        if not difference.any():
            raise HoEError(
                "both texts have the same rewards, so that the choice says nothing about preferences; offer two that differ",
                argument="better",
                value=better,
            )
        if not again and any(np.allclose(difference, -other) for other in self._differences):
            raise HoEError(
                "the choice contradicts an earlier one between texts of the same rewards; take that back with forget(), or say "
                "again=True if the person really wavers",
                argument="better",
                value=better,
            )
        self._differences.append(difference)
        self._likelihood += log_choice(self._points @ difference, self._kappa)

    def forget(self, choices: int = 1) -> None:
        """Take the last choices back.

        Raises:
            HoEError: there are not so many.
        """
        count = checks.choices(choices, len(self))
        self._differences = self._differences[: len(self) - count]
        self._likelihood = sum(
            (log_choice(self._points @ difference, self._kappa) for difference in self._differences),
            np.zeros_like(self._likelihood),
        )

    def propose(self, texts: Any) -> tuple[int, int]:
        """Which two texts to show next: those whose choice is expected to tell most about λ.

        Args:
            texts: their rewards `(T, N)`; rows may be `{objective: reward}`.

        Returns:
            two row numbers. Pairs of the same rewards as an earlier one are not proposed.

        Raises:
            HoEError: fewer than two texts, rewards that are not finite, or no pair that differs and was not shown.
        """
        rewards = checks.texts(texts, self.objectives)
        pairs = self._pairs(len(rewards))
        differences = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
        shown = np.asarray(self._differences).reshape(-1, rewards.shape[1])
        new = np.asarray(differences.any(axis=1))
        for difference in shown:
            new &= ~(np.isclose(differences, difference).all(1) | np.isclose(differences, -difference).all(1))
        if not new.any():
            raise HoEError(
                "no two texts differ in their rewards and were not shown before; offer more texts", argument="texts"
            )
        first, second = pairs[new][int(np.argmax(self._information(differences[new])))].tolist()
        return first, second

    def _pairs(self, texts: int) -> NDArray[np.int64]:
        """Pairs to look at `(M, 2)`: all, or some at random where there are many."""
        if texts * (texts - 1) // 2 <= _PAIRS:
            return np.stack(np.triu_indices(texts, 1), axis=1)
        first = self._rng.integers(texts, size=_PAIRS)
        return np.stack([first, (first + self._rng.integers(1, texts, size=_PAIRS)) % texts], axis=1)

    def _information(self, differences: FloatArray) -> FloatArray:
        """What the choices between pairs with these differences `(M, N)` would tell of λ, in nats `(M,)`."""
        weights = np.exp(self._likelihood - logsumexp(self._likelihood))
        share = weights.sum(axis=1)
        drawn = self._rng.choice(len(share), size=_DRAWS, p=share / share.sum())
        return information(differences, self._points[drawn], self._kappa, weights[drawn] / share[drawn, None])

    # -- what is known ---

    @property
    def preference(self) -> dict[str, float]:
        """The mean of the belief: what to steer by, `{objective: weight}`."""
        return dict(zip(self.objectives, self.mean.tolist(), strict=True))

    @property
    def mean(self) -> FloatArray:
        """The same as an array, `(N,)`."""
        point: FloatArray = self._share() @ self._points
        return point / point.sum()

    @property
    def expected_error(self) -> float:
        """How far, on average over the belief, the weight that is most wrong is from the truth (L∞)."""
        return float(self._share() @ np.abs(self._points - self.mean).max(axis=1))

    @property
    def sharpness(self) -> float:
        """Mean of κ: how reliably the person chooses."""
        weights = np.exp(self._likelihood - logsumexp(self._likelihood)).sum(axis=0)
        return float(weights @ self._kappa)

    def region(self, level: float = 0.8) -> CredibleRegion:
        """The smallest set of preferences that holds λ with a probability of `level`.

        Raises:
            HoEError: a level that is not between 0 and 1.
        """
        level = checks.level(level)
        share = self._share()
        order = np.argsort(-share, kind="stable")
        count = int(np.searchsorted(share[order].cumsum(), level)) + 1
        inside = self._points[
            share >= share[order[count - 1]] * (1 - 1e-9)
        ]  # all of those that are as credible as the last
        low, high = inside.min(axis=0).tolist(), inside.max(axis=0).tolist()
        intervals = {name: (a, b) for name, a, b in zip(self.objectives, low, high, strict=True)}
        least = float(self._log_density(self._points[order[count - 1]][None], len(self))[0])
        return CredibleRegion(level, intervals, inside, self, len(self), least - 1e-9)

    def _share(self) -> FloatArray:
        """Probability of each grid point, `(G,)`."""
        share: FloatArray = np.exp(logsumexp(self._likelihood, axis=1) - logsumexp(self._likelihood))
        return share / share.sum()

    def _log_density(self, points: FloatArray, choices: int) -> FloatArray:
        """Log-likelihood `(M,)` of points `(M, N)` after so many choices, κ averaged out."""
        likelihood = np.zeros((len(points), len(self._kappa)))
        for difference in self._differences[:choices]:
            likelihood += log_choice(points @ difference, self._kappa)
        found: FloatArray = logsumexp(likelihood, axis=1)
        return found
