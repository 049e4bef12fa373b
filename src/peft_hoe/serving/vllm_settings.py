"""What a vLLM server is to offer, as its environment says: vLLM's plugins get no arguments."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HoEError, check_choice
from ..tuner.adapter import ROUTERS

PREFIX = "PEFT_HOE_VLLM_"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Settings:
    """What a server offers.

    Attributes:
        adapters: `{name: directory or Hub id}` of HoE adapters, or of an atlas, whose LoRAs are served as they are.
        step: of the grid.
        folder: where LoRAs are written.
        max_bytes: of that folder.
        rank: reduce LoRAs to this rank; None keeps them exact.
        routers: what trained routers do: "keep", which lets them vote inside vLLM, "static" or "drop".
    """

    adapters: Mapping[str, str]
    step: float = 0.1
    folder: Path = Path("~/.cache/peft_hoe/vllm")
    max_bytes: int = 10 * 10**9
    rank: int | None = None
    routers: str = "keep"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings | None:
        """Read the variables that begin with `PEFT_HOE_VLLM_`.

        They are ADAPTERS (`name=directory`, separated by commas), GRID, CACHE, CACHE_BYTES (such as 20G), RANK and ROUTERS.

        Returns:
            None where no adapters are named.

        Raises:
            HoEError: a value cannot be read.
        """
        given = environment.get(f"{PREFIX}ADAPTERS", "").strip()
        if not given:
            return None
        adapters: dict[str, str] = {}
        for item in given.split(","):
            name, equals, path = (part.strip() for part in item.partition("="))
            if not (name and equals and path) or "@" in name or name in adapters:
                raise HoEError(
                    f"{PREFIX}ADAPTERS is {given!r}; write name=directory, separated by commas, each name once",
                    argument=f"{PREFIX}ADAPTERS", value=given, allowed="name=directory, separated by commas, each name once",
                )  # fmt: skip
            adapters[name] = path
        read = {
            "step": ("GRID", float),
            "folder": ("CACHE", Path),
            "max_bytes": ("CACHE_BYTES", _read_bytes),
            "rank": ("RANK", int),
            "routers": ("ROUTERS", str),
        }
        more: dict[str, Any] = {}
        for field, (name, kind) in read.items():
            if text := environment.get(PREFIX + name, "").strip():
                more[field] = _read(PREFIX + name, text, kind)
        check_choice(f"{PREFIX}ROUTERS", more.get("routers", "keep"), ROUTERS)
        return cls(adapters, **more)


def refuse_parts(devices: int) -> None:
    """Refuse a model that lies on several devices in parts.

    Raises:
        HoEError: there is more than one.
    """
    if devices > 1:
        raise HoEError(
            f"tensor_parallel_size is {devices}: each device would see a part of the input of o_proj and down_proj, and "
            "routers a part of their logits. Serve whole models (--data-parallel-size), or leave the routers out "
            f"({PREFIX}ROUTERS=drop)",
            argument="tensor_parallel_size",
            value=devices,
            allowed=1,
        )


def _read(name: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise HoEError(f"{name} is {text!r}, which cannot be read", argument=name, value=text) from None


def _read_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.upper())
    if found is None:
        raise ValueError(text)
    return int(float(found[1]) * _UNITS[found[2]])
