"""Did a router help? Whether the front is wider with it than without it, on prompts that it did not train on.

The front is that of the dial around the router: its own preference and, from there, halfway to each expert that it votes for.
The experts are part of it, each objective's own as the payoff table has measured it, and the merged ones. A router that only
slides along the front moves all these points along it, which another preference does for nothing, and wins next to no volume.

A router that did not help is left untrained: it then votes as geometry says, costs nothing and merges. How sure that is, a
bootstrap says that draws the prompts, and those of the payoff table that the rewards are scaled by.

Shapes: P prompts, T texts for each, N objectives; K preferences of the dial, M merged experts, R replicates.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import HoEError, HoEWarning
from ...generation.completer import steered_responses
from ...generation.decoding import Decoding
from ...generation.prompts import PromptBatch
from ...generation.settings import evaluating, seeded
from ...objectives.drawn_scale import DrawnScale
from ...objectives.normalizer import RewardNormalizer, mean_over
from ...preference import FloatArray
from ...rewards.sources import Rewards
from .trained_router import TrainedRouter

SURE = 0.9  # share of the replicates in which a router must help to be kept
_REPLICATES = 1000


@dataclass(frozen=True)
class Verdict:
    """A router against its untrained self.

    Attributes:
        router: its name.
        untrained: hypervolume of the experts' points and the dial's without training, in normalised rewards above
            `REFERENCE_POINT`; higher is better.
        trained: the same with it.
        low: of the 95 % interval of `trained - untrained`, over prompts and those of the payoff table.
        high: likewise.
        share: of the replicates in which `trained - untrained` is above 0.
        prompts: P.
        texts: T.
        payoff_prompts: of the payoff table, drawn as well; 0 for a table that was given as numbers, which is taken as exact.
        undefined: replicates that drew no prompt with a reward for some objective, or a table in which all experts earn the
            same of it; not in the interval, and no help.
    """

    router: str
    untrained: float
    trained: float
    low: float
    high: float
    share: float
    prompts: int
    texts: int
    payoff_prompts: int = 0
    undefined: int = 0

    @property
    def helps(self) -> bool:
        """Whether the router is kept."""
        return self.share >= SURE

    def __str__(self) -> str:
        gain = self.trained - self.untrained
        measured = (
            f"router {self.router!r}: hypervolume around it {self.trained:.3f} trained, {self.untrained:.3f} untrained, "
            f"on {self.prompts} held-out prompts with {self.texts} texts each; larger by {gain:.3f} [{self.low:.3f}, "
            f"{self.high:.3f}]"
        )
        if not self.payoff_prompts:
            measured += ", the payoff table of given numbers taken as exact"
        if self.undefined:
            measured += f" (undefined in {self.undefined} of {_REPLICATES} replicates)"
        if self.helps:
            return measured
        return (
            f"{measured}. It did not help beyond chance, so it is left untrained; mark_trained({self.router!r}) uses it"
        )


@dataclass(frozen=True)
class HeldOut:
    """What rewards are measured with.

    Attributes:
        prompts: P of them, with what the rewards see.
        rewards: of N objectives.
        processing_class: the policy's tokenizer.
        decoding: how texts are written.
        batch_size: completions at once.
        seed: of sampling.
        bf16: whether the model runs in bfloat16 autocast.
    """

    prompts: PromptBatch
    rewards: Rewards
    processing_class: Any
    decoding: Decoding
    batch_size: int
    seed: int
    bf16: bool

    def measure(self, model: nn.Module, adapter: str, preference: FloatArray, texts: int, routers: str) -> FloatArray:
        """Mean rewards `(P, N)` over T texts of each prompt at a preference `(N,)`, with the same random numbers each time.

        Args:
            model: carries HoE layers.
            adapter: which is measured.
            preference: λ.
            texts: T.
            routers: as in `use_preference`.
        """
        count = len(self.prompts.ids)
        rows = self.prompts.select([row for row in range(count) for _ in range(texts)])
        device = next(model.parameters()).device
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16)
        with evaluating(model), seeded(self.seed), autocast:
            found, _ = steered_responses(
                model, adapter, rows, np.tile(preference, (count * texts, 1)), self.processing_class, self.decoding,
                self.batch_size, mixed=False, routers=routers,
            )  # fmt: skip
        table = self.rewards(
            rows.texts,
            found.texts,
            rows.columns,
            allow_empty=True,
            input_ids=torch.cat([rows.ids, found.ids], dim=1),
            attention_mask=torch.cat([rows.mask, found.mask], dim=1),
        )
        return mean_over(table.reshape(count, texts, -1), (1,))

    def scales(self, normalizer: RewardNormalizer) -> bool:
        """Whether a payoff table was measured on these prompts."""
        return normalizer.measurement.get("prompts_digest") == self.prompts.digest


def check_volumes(texts: int) -> None:
    """See before training that there can be a verdict after it.

    Args:
        texts: for each prompt of the verdict; 0 for none.

    Raises:
        HoEError: moocore is missing.
    """
    if not texts:
        return
    try:
        from ...metrics import hypervolume  # noqa: F401
    except ImportError as error:
        raise HoEError(
            f"eval_dataset is given, and the verdict on it measures hypervolumes: {error}. Install it, or set "
            "verdict_texts=0 for no verdict",
            argument="verdict_texts", value=texts, allowed=0,
        ) from None  # fmt: skip


def compare(
    held: HeldOut, model: nn.Module, router: TrainedRouter, texts: int, normalizer: RewardNormalizer
) -> Verdict:
    """Measure the dial around a router with and without its training, and the merged experts that it votes for.

    Args:
        held: what is measured, and how.
        model: carries the router, trained and marked so.
        router: that one.
        texts: T.
        normalizer: the scale.
    """

    def rewards(preferences: FloatArray, routers: str) -> FloatArray:
        each = [held.measure(model, router.adapter, row, texts, routers) for row in preferences]
        return np.stack(each) if each else np.empty((0, len(held.prompts.ids), len(normalizer.objectives)))

    dial, merged = router.dial, router.voted[router.voted.max(axis=1) < 1]
    return judge(
        router.router, rewards(dial, "static"), rewards(dial, "keep"), rewards(merged, "static"), texts, normalizer,
        own_prompts=held.scales(normalizer),
    )  # fmt: skip


def judge(
    router: str,
    untrained: FloatArray,
    trained: FloatArray,
    merged: FloatArray,
    texts: int,
    normalizer: RewardNormalizer,
    *,
    own_prompts: bool,
) -> Verdict:
    """Compare raw rewards, NaN where there is none, of the same prompts.

    Args:
        router: its name.
        untrained: of the dial without training, `(K, P, N)`.
        trained: with it, `(K, P, N)`.
        merged: of the merged experts that the router votes for, `(M, P, N)`.
        texts: T, of which each row is the mean.
        normalizer: the scale, and what the objectives' own experts earn.
        own_prompts: whether its table is of the same prompts; it is then drawn with them, else on its own.
    """
    from ...metrics import percentile_interval
    from ...metrics.volume import ROUNDING

    rewards = np.concatenate([merged, untrained, trained])
    k, prompts = untrained.shape[:2]
    draws = np.random.default_rng(0).integers(0, prompts, (_REPLICATES, prompts))
    scale = DrawnScale.of(normalizer, draws, own_prompts=own_prompts, seed=0)
    means = np.stack([mean_over(rewards[:, draw], (1,)) for draw in draws])
    replicates = scale.normalize(np.concatenate([scale.payoffs, means], axis=1))
    with_it, without = _volumes(normalizer.normalize(np.concatenate([normalizer.payoff, mean_over(rewards, (1,))])), k)
    gains = np.asarray([np.subtract(*_volumes(points, k)) for points in replicates])
    low, high = percentile_interval(with_it - without, gains)
    drawn = 0 if normalizer.samples is None else normalizer.samples.shape[1]
    return Verdict(
        router, without, with_it, float(low), float(high),
        float((gains > ROUNDING).mean()), prompts, texts, drawn, int(np.isnan(gains).sum()),
    )  # fmt: skip


def _volumes(points: FloatArray, k: int) -> tuple[float, float]:
    """Hypervolume with and without training, of normalised points: experts, the K of the dial without, and the K with it."""
    from ...metrics import REFERENCE_POINT, hypervolume

    if np.isnan(points).any():
        return np.nan, np.nan
    experts, without, with_it = np.split(points, [-2 * k, -k])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HoEWarning)  # a draw whose points all lie below the reference point
        first, second = (
            hypervolume(np.concatenate([experts, dial]), reference_point=REFERENCE_POINT) for dial in (with_it, without)
        )
    return first, second
