"""What the training of one router carries from update to update, whichever trainer makes them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ...errors import ExpertError, HoEWarning
from ...objectives.normalizer import RewardNormalizer
from ...objectives.weights import ObjectiveWeights
from ...tuner.functional import adapter_of, mark_trained
from ...tuner.steering import Steering
from .model_settings import ModelSettings
from .plateau import Plateau
from .steered_policy import checkpointed, steered
from .trained_router import RunningMean, TrainedRouter


class RouterTrainingState:
    """A policy, the router of it that trains, and what its training knows so far; needs no Trainer.

    Args:
        policy: a PeftModel with a HoE adapter.
        router: the router's name; None for the only one.
        adapter: the adapter's name; None for the first active one.
        auto_stop: whether the run finds its own end.
        average: whether the mean of the router over the updates is kept, and put into the model in place of the last.
        others: more models that are used while it trains, such as a reference; their forwards are put back too.

    Attributes:
        policy: as given.
        router: its Parameters.
        objectives: N names.
        experts: L names.
        weights: of the objectives, where there are rewards.
        normalizer: the scale of these rewards.
        average: the mean, if asked for.
        plateau: how the worst gap went, where the run finds its own end.
        model_settings: what trainers write into the policy.
        run_id: of `train_routers`: which of its runs this belongs to.
        helps: what a verdict said of the router; None without one. One that does not help is left untrained.

    Raises:
        ExpertError, PreferenceError: adapter or router cannot be trained.
    """

    def __init__(
        self,
        policy: Any,
        router: str | None = None,
        adapter: str | None = None,
        *,
        average: bool = False,
        auto_stop: bool = False,
        others: tuple[nn.Module, ...] = (),
    ) -> None:
        self.policy = policy
        self.model_settings = ModelSettings(policy, *others)
        self.router = TrainedRouter(policy, router, adapter)
        name = self.router.adapter
        if name not in Steering.of(policy).active:
            raise ExpertError(
                f"adapter {name!r} is not active, so its router would not vote; call model.set_adapter({name!r}) first",
                argument="model_adapter_name",
                value=name,
            )
        served = adapter_of(policy, name)
        self.objectives, self.experts = served.objectives, served.expert_names
        self.average = RunningMean() if average else None
        self.plateau = Plateau() if auto_stop else None
        self.weights: ObjectiveWeights | None = None
        self.normalizer: RewardNormalizer | None = None
        self.run_id: str | None = None
        self.helps: bool | None = None

    @contextlib.contextmanager
    def training(self, args: Any) -> Iterator[None]:
        """While the block lasts, the policy serves the router's preference and the router votes from its own Parameters.

        Args:
            args: TrainingArguments; what they say of gradient checkpointing is done.
        """
        with self.model_settings.applied(), steered(self.policy, self.router), checkpointed(self.policy, args):
            self.router.read()
            yield

    def put_router(self) -> None:
        """Write the router, or its mean over the updates, into its place in the model, and mark it trained if it may help."""
        averaged = self.average is not None and self.average.count > 0
        self.router.write(self.average.values if averaged and self.average is not None else None)
        trained = self.helps is not False
        mark_trained(self.policy, self.router.router, trained=trained, adapter_name=self.router.adapter)
        config = adapter_of(self.policy, self.router.adapter).config
        # Where the calibration was made without the router, its mark makes it no longer fit.
        if config.calibration is not None and self.router.router in config.calibration["made_for"].get("trained", ()):
            config.calibration = None
            warnings.warn(
                f"the adapter's calibration was made before router {self.router.router!r} was trained again, so it is dropped; "
                "calibrate again",
                HoEWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "run": self.run_id,
            "router": self.router.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "weights": None if self.weights is None else self.weights.state_dict(),
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
            "normalizer": None if self.normalizer is None else self.normalizer.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any], device: Any) -> None:
        """Continue from `state_dict`.

        Raises:
            HoEError: it belongs to other settings of the objectives' weights.
        """
        if self.weights is not None:
            self.weights.load_state_dict(saved["weights"])
        if self.plateau is not None:
            self.plateau.load_state_dict(saved["plateau"])
        self.load_router(saved, device)
        if saved["normalizer"] is not None:
            self.normalizer = RewardNormalizer.from_state_dict(saved["normalizer"])

    def load_router(self, saved: Mapping[str, Any], device: Any) -> None:
        """The router of `state_dict` and its mean, and nothing else."""
        self.router.load_state_dict(saved["router"])
        if self.average is not None and saved["average"] is not None:
            self.average.load_state_dict(saved["average"], device)
