"""Adding an expert or a trained router to a loaded adapter."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import HoEError, check_choice
from ..experts.new_expert import build_expert
from ..experts.saved_adapter import SavedAdapter
from ..specs import KINDS, ExpertSpec, RouterSpec
from ..training.every_router import finished_routers, train_routers, trainer_class
from ..tuner.functional import adapter_of
from ..tuner.growing import layers_of

_REWARDS = {"ppo": "reward_model", "grpo": "reward_funcs"}  # what trainers call them; distillation has none


@dataclass
class Additions:
    """What can be added, and how.

    Attributes:
        model: a PeftModel with a HoE adapter.
        tokenizer: the policy's.
        rewards: what routers train on.
        source: the adapter on disk, whose build says how a merged expert is made; None for no experts.
        base: the base model's directory or Hub id; None for what `source` names.
        args: the trainer's configuration; None for no routers.
        trainer: "ppo", "grpo" or "distill".
        train_dataset: what routers train on.
        router_kind: "token" or "module".
        say: gets a line on a training that found its own end.
        normalizer: the scale of the rewards in training, measured once.

    Raises:
        HoEError: neither an expert nor a router could be added, or `args` is another trainer's.
    """

    model: Any
    tokenizer: Any
    rewards: Any
    source: SavedAdapter | None
    base: Any
    args: Any
    trainer: str
    train_dataset: Any
    router_kind: str
    say: Callable[[str], Any]
    normalizer: Any = None

    def __post_init__(self) -> None:
        if self.source is None and self.args is None:
            raise HoEError(
                "there is nothing to place: give source= (the adapter's directory, for merged experts), args= and "
                "train_dataset= (for routers), or both",
                argument="source",
            )
        if self.args is not None:
            check_choice("trainer", self.trainer, (*_REWARDS, "distill"))
            check_choice("router_kind", self.router_kind, KINDS)
            trainer_class(self.trainer, self.args)
            if self.train_dataset is None:
                raise HoEError("routers need train_dataset=, prompts to train on", argument="train_dataset")

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is tried at a preference, in this order: a merged expert is not trained."""
        experts = () if self.source is None else ("expert",)
        return experts if self.args is None else (*experts, "router")

    def add(self, kind: str, preference: tuple[float, ...]) -> str:
        """Add a merged expert, or a router that is not trained yet; its name."""
        if kind == "router":
            self.model.add_router(RouterSpec(list(preference), kind=self.router_kind))
            return adapter_of(self.model).router_names[-1]
        if self.source is None:
            raise HoEError("there is no adapter on disk to make an expert by; give source=", argument="source")
        spec = ExpertSpec(list(preference))
        with tempfile.TemporaryDirectory() as folder:
            weights = build_expert(self.source, spec, self.base, Path(folder)).weights
            self.model.add_expert(spec, dict(weights))
        return adapter_of(self.model).expert_names[-1]

    def train(self, router: str) -> None:
        """Train a router.

        Raises:
            KeyboardInterrupt: SIGINT stopped it.
        """
        args = copy.copy(self.args)
        args.output_dir = str(Path(str(args.output_dir)) / f"placing-{router}")
        rewards = {_REWARDS[self.trainer]: self.rewards} if self.trainer in _REWARDS else {}
        self.normalizer = train_routers(
            self.model, args, trainer=self.trainer, train_dataset=self.train_dataset, routers=[router],
            normalizer=self.normalizer, processing_class=self.tokenizer, progress=False,
            say=lambda line: self.say(f"  {line}"), **rewards,
        )  # fmt: skip
        if router not in finished_routers(args.output_dir):
            raise KeyboardInterrupt(f"the training of router {router!r} was interrupted")


def parameters_of(model: nn.Module, adapter: str) -> int:
    """Of all experts and routers together."""
    tensors = (item for layer in layers_of(model, adapter) for item in layer.adapter_tensors(adapter).items())
    return sum(tensor.numel() for name, tensor in tensors if not name.startswith("hoe_length"))
