"""What tells one model from another: short texts that change with the weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...experts.checkpoints import PEFT_PREFIX
from ...tuner.functional import adapter_of

_EDGE = 1 << 16  # bytes of a file's start and end that are read

Source = str | os.PathLike[str]


def weights_digest(model: Any, prefix: str = "") -> str:
    """Of a model in memory: HoE tensors whole; of the others 256 numbers, which no training leaves as they were.

    Args:
        model: the model.
        prefix: before all names, unless they have it.
    """
    digest = hashlib.sha256()
    tensors = model.state_dict()
    prefix = "" if any(name.startswith(prefix) for name in tensors) else prefix
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{prefix}{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            step = 1 if "hoe_" in name else max(1, tensor.numel() // 256)
            some = tensor.detach().flatten()[::step].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_fingerprint(model: Any, adapter: str) -> str:
    """Of a model with HoE layers: changes with the adapter's tensors, preferences and `trained` marks, and with the base.

    The same for a PeftModel and the model inside it.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(adapter_of(model, adapter).describe()).encode())
    digest.update(weights_digest(model, PEFT_PREFIX).encode())
    return digest.hexdigest()


def source_digest(source: Source) -> str:
    """Of a model by its place: of a directory names, sizes and edges of the files of weights; a Hub id as it is."""
    path = Path(source)
    if not path.is_dir():
        return os.fspath(source)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix not in (".safetensors", ".bin"):
            continue
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, file.stat().st_size - _EDGE))
            digest.update(stream.read())
    return digest.hexdigest()
