"""Writing an adapter in one step: everything goes to a sibling directory that is renamed when it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import HoEConfig
from ..errors import CheckpointError
from ..tuner.lengths import gram
from .architecture import LinearModule
from .checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX


def check_output(output: Path, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Refuse to write over anything but an empty directory, or an adapter when told to; never over a source.

    Raises:
        CheckpointError: what is there, and how to go on.
    """
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"output directory {str(output)!r} is a file; give another path")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if any(output.samefile(source) for source in sources):
        raise CheckpointError(f"output directory {str(output)!r} is a source of this build; give another path")
    if not overwrite:
        raise CheckpointError(
            f"output directory {str(output)!r} is not empty; give another path, or pass overwrite=True (--overwrite)"
        )
    if not (output / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"output directory {str(output)!r} holds no adapter, so it will not be overwritten; give another path"
        )


@contextmanager
def complete_directory(output: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `output` when the block ends well, and vanishes when it does not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".building", dir=output.parent))
    try:
        yield building
        umask = os.umask(0)
        os.umask(umask)
        building.chmod(0o777 & ~umask)  # mkdtemp's directories are private, and so are safetensors' files
        for file in building.iterdir():
            file.chmod(0o666 & ~umask)
        _replace(building, output)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _replace(building: Path, output: Path) -> None:
    if not output.is_dir():
        building.rename(output)
        return
    # Directories cannot be exchanged in one portable step: the old one is moved aside, and back if that fails.
    aside = building.with_suffix(".replaced")
    output.rename(aside)
    try:
        building.rename(output)
    except BaseException:
        aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


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
    save_file(dict(tensors), directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(directory))  # second: it writes a model card where there are weights
