"""Other methods for the same sweep: `BASELINES[name].make(base, policies, ...)` is a method for `peft_hoe.sweep(generate=...)`.

All take the same first arguments (see `Baseline`); docs/baselines.md says which methods of the paper's Table 1 are here, and
which programs the others need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..methods.hoe import Generate
from .logit_fusion import mod
from .lora_moe import lora_moe
from .merges import pcb, ta, ties
from .morlhf import morlhf
from .prompting import prompting
from .soups import rs, rs_dense, rs_norm

__all__ = ["BASELINES", "Baseline"]


@dataclass(frozen=True)
class Baseline:
    """One method.

    Attributes:
        summary: in a line.
        make: `make(base, policies, *, tokenizer, folder, decoding=None, model_options=None, **options)` returns a method.
            `base` and the values of `policies`, `{objective: policy}`, are directories or Hub ids; `folder` is where adapters
            are built, and found again; `decoding` is what `Decoding.of` takes; `model_options` are for `from_pretrained`.

    >>> from peft_hoe.evaluation.baselines import BASELINES
    >>> BASELINES["mod"].summary
    "multi-objective decoding: the policies' logits are interpolated"
    """

    summary: str
    make: Callable[..., Generate | Any]


BASELINES: dict[str, Baseline] = {
    "rs": Baseline("rewarded soups: the policies' experts are interpolated", rs),
    "rs_norm": Baseline("rewarded soups, with the length that averaging loses given back", rs_norm),
    "rs_dense": Baseline("rewarded soups of whole policies: all weights are interpolated", rs_dense),
    "ta": Baseline("task arithmetic: one merge for each preference", ta),
    "ties": Baseline("TIES-Merging: one merge for each preference", ties),
    "pcb": Baseline("PCB-Merging: one merge for each preference", pcb),
    "mod": Baseline("multi-objective decoding: the policies' logits are interpolated", mod),
    "prompting": Baseline("the base model, told the preference", prompting),
    "morlhf": Baseline("one policy for each preference, trained for it", morlhf),
    "lora_moe": Baseline("the policies' experts and one router that knows no preference", lora_moe),
}
