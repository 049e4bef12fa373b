"""Which outputs of a model are rewards, and whether high or low is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RewardError


def output_index(config: Any, output: int | str) -> int:
    """Which logit of a classifier an index or a label of its configuration means.

    Raises:
        RewardError: there is no such output.
    """
    if isinstance(output, str) and output in config.label2id:
        return int(config.label2id[output])
    if isinstance(output, int) and 0 <= output < config.num_labels:
        return output
    raise RewardError(
        f"the classifier has no output {output!r}; it has {config.num_labels}: {dict(config.id2label)}",
        argument="output",
        value=output,
        allowed=dict(config.id2label),
    )


def signs_of(sign: int | Sequence[int], count: int) -> Tensor:
    """1 or -1 for each of `count` outputs, `(count,)` in float32, from one sign for all or one for each.

    Raises:
        RewardError: another number, or another number of them.
    """
    signs = [sign] * count if isinstance(sign, int) else list(sign)
    if len(signs) != count or any(number not in (1, -1) for number in signs):
        raise RewardError(
            f"sign is {sign!r}; give 1 or -1, or one of them for each of the {count} outputs",
            argument="sign",
            value=sign,
            allowed=(1, -1),
        )
    return torch.tensor(signs, dtype=torch.float32)


def device_of(model: Any) -> torch.device:
    """Where a model computes; the CPU where it has no Parameter."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
