"""The files of an adapter: its tensors in PEFT's layout, its configuration and its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import HoEConfig
from ..errors import CheckpointError
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..output_directory import CARD
from ..tuner.lengths import gram
from .architecture import LinearModule
from .checkpoints import PEFT_PREFIX
from .report import REPORT_FILE

_EXPERTS = ".hoe_A.weight"
# What a build writes
WRITTEN = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, REPORT_FILE)


def module_tensors(
    target: LinearModule,
    factors: list[tuple[Tensor, Tensor]],
    votes: Tensor,
    dtype: torch.dtype,
    interpolation: str,
) -> dict[str, Tensor]:
    """The tensors of one module, experts one after the other along the rank.

    Args:
        target: the module.
        factors: B `(d_out, r_j)` and A `(r_j, d_in)` of each expert, in the config's order.
        votes: initial biases of the routers, `(V,)`; V may be 0.
        dtype: what is written.
        interpolation: "norm" adds the inner products of the experts, in float32.

    Raises:
        CheckpointError: a value that the dtype cannot hold.
    """
    stem = f"{PEFT_PREFIX}{target.name}"
    tensors = {
        f"{stem}.hoe_A.weight": torch.cat([a for _, a in factors]),
        f"{stem}.hoe_B.weight": torch.cat([b for b, _ in factors], dim=1),
    }
    if len(votes):
        tensors[f"{stem}.hoe_router.weight"] = torch.zeros(len(votes), target.d_in)
        tensors[f"{stem}.hoe_router.bias"] = votes.clone()  # safetensors refuses shared memory
    cast = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} does not fit {dtype}; build with dtype=torch.float32 (--dtype float32)")
    if interpolation == "norm":
        ranks = tuple(b.shape[1] for b, _ in factors)
        products = gram(cast[f"{stem}.hoe_A.weight"], cast[f"{stem}.hoe_B.weight"], ranks)
        cast[f"{stem}.hoe_length.gram"] = products.float()
    return cast


def write_adapter(directory: Path, config: HoEConfig, tensors: Mapping[str, Tensor]) -> None:
    """adapter_config.json, the model card and adapter_model.safetensors."""
    tensors = dict(tensors)
    for key in list(tensors):
        if key.endswith(_EXPERTS):
            stem = key.removesuffix(_EXPERTS)
            code = config.identity(stem.removeprefix(PEFT_PREFIX))
            tensors[f"{stem}.hoe_identity.code"] = torch.from_numpy(code)
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(directory))  # second: it writes a model card where there are weights
