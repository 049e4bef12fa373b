"""Where a build computes: on the CPU, or on a GPU that torch sees.

Weights come from files and adapters go to files, so every module begins and ends on the CPU. In between its task vectors,
merges and decompositions stay on one device. Random numbers are drawn on the CPU and moved, the same everywhere.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ExpertError

CPU = torch.device("cpu")


def check_device(given: Any) -> torch.device:
    """A device from what a user wrote.

    >>> check_device("cpu")
    device(type='cpu')

    Raises:
        ExpertError: no device, one of another kind, or one that is not there; names those that are.
    """
    allowed = ["cpu", *_gpus()]
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ExpertError(
            f"device is {str(given)!r}; allowed are 'cpu' and 'cuda', and here {allowed}: other devices lack the "
            "float64 or the decompositions that a build needs",
            argument="device", value=given, allowed=allowed,
        )  # fmt: skip
    if device.type == "cuda" and str(device) not in allowed:
        raise ExpertError(
            f"device is {str(given)!r}, but torch {torch.__version__} sees {torch.cuda.device_count() or 'no'} GPU here; "
            f"allowed are {allowed}. Build on the CPU (the default), or install a torch that fits this machine's GPU",
            argument="device", value=given, allowed=allowed,
        )  # fmt: skip
    return device


def device_name(device: torch.device) -> str:
    """What decides the last bits of a result: the kind of a device, and the model of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was told to; for clocks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
