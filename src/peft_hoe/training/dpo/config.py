"""HoEDPOConfig: DPOConfig, and what the training of a router adds to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trl import DPOConfig  # type: ignore[attr-defined]

from ...errors import HoEError, check_choice
from ..run.arguments import RouterArguments
from ..run.refused_arguments import refuse_changed

# Losses of the difference between chosen and rejected alone.
_OF_THE_DIFFERENCE = {"sigmoid", "hinge", "robust", "exo_pair", "discopop", "sft"}
_ACROSS_PAIRS = {"aot", "aot_unpaired"}
REFUSED = {
    "average_tokens_across_devices": "the loss is a mean over pairs, of which all processes have as many",
    "label_names": "evaluation takes the tokens of the answers for labels",
    "fp16": "there is no loss scaling here; use bf16=True",
    "sync_ref_model": "the reference is the base model, which never moves, or the ref_model that you give",
}


@dataclass
class HoEDPOConfig(RouterArguments, DPOConfig):  # type: ignore[misc]
    """Configuration of `HoEDPOTrainer`; what DPOConfig has means the same here, with the exceptions below.

    Args:
        margin: what the other objectives think of a pair: "experts", "column" or "none", see `HoEDPOTrainer`.
        margin_beta: β of the experts' implicit rewards, with `margin="experts"` only; None for `beta`.

    The rest of what is new is in `RouterArguments`.

    >>> from peft_hoe import HoEDPOConfig
    >>> HoEDPOConfig(output_dir="run", router="r0", beta=0.2, use_cpu=True, bf16=False).beta
    0.2
    """

    margin: str = field(default="experts", metadata={"help": "experts, column or none."})
    margin_beta: float | None = field(default=None, metadata={"help": "Beta of the experts' rewards; default beta."})

    def __post_init__(self) -> None:
        refuse_changed(self, REFUSED)
        super().__post_init__()
        check_choice("margin", self.margin, ("experts", "column", "none"))
        for name in ("beta", "margin_beta"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise HoEError(
                    f"{name} is {value}; it must be a number above 0", argument=name, value=value, allowed="above 0"
                )
        if self.margin_beta is not None and self.margin != "experts":
            raise HoEError(
                f"margin_beta is {self.margin_beta}, but margin={self.margin!r} has no experts' rewards that it could scale; "
                'leave it out, or set margin="experts"',
                argument="margin_beta",
                value=self.margin_beta,
            )
        self._check_losses()

    def _check_losses(self) -> None:
        """Margin and λ enter as each pair's own reference and β: see that the loss is one where that is right."""
        if self.margin == "none":
            return
        losses = set(self.loss_type)
        if losses & _ACROSS_PAIRS:
            raise HoEError(
                f"loss_type {sorted(losses & _ACROSS_PAIRS)} sorts the pairs of a batch, so that one pair's margin and λ would "
                'meet another pair; use margin="none" or another loss',
                argument="loss_type",
                value=self.loss_type,
            )
        if self.f_divergence_type != "reverse_kl":
            raise HoEError(
                f"f_divergence_type is {self.f_divergence_type!r}, under which rewards are no log-ratios, so that a margin "
                'cannot be subtracted from them; use reverse_kl or margin="none"',
                argument="f_divergence_type",
                value=self.f_divergence_type,
                allowed=("reverse_kl",),
            )
        if self.margin == "column" and losses - _OF_THE_DIFFERENCE:
            raise HoEError(
                f'margin="column" is the difference between two answers, but loss_type {sorted(losses - _OF_THE_DIFFERENCE)} '
                f"looks at each answer by itself; use one of {sorted(_OF_THE_DIFFERENCE)}",
                argument="loss_type",
                value=self.loss_type,
                allowed=sorted(_OF_THE_DIFFERENCE),
            )
