"""The names that a vLLM server knows: `my-hoe@helpful=0.7,harmless=0.3`, or `my-hoe@0.7,0.3`, and the LoRA of each.

vLLM remembers and lists every name that it has resolved, for ever. So there is a grid of preferences, and each point has
exactly these two spellings; any other name is none of ours.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HoEError, PreferenceError
from ..preference import FloatArray, parse_preference, read_preference
from .atlas import INDEX_FILE
from .frozen_votes import freeze
from .lora_cache import LoraCache
from .lora_exporter import VLLM_RANKS, VLLM_SAVED_WHOLE, LoraExporter
from .preference_grid import PreferenceGrid
from .source import AdapterSource, adapter_from_files

log = logging.getLogger(__name__)

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
        routers: what trained routers do: "static" or "drop"; "keep" refuses adapters whose routers vote by the input.
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
                    f"{PREFIX}ADAPTERS is {given!r}; write name=directory, separated by commas, each name once"
                )
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
        return cls(adapters, **more)


class ServedAdapter:
    """One adapter on a grid: from a preference's spelling to the folder of its LoRA.

    Args:
        name: in front of the `@`.
        source: directory or Hub id of the adapter, or the directory of an atlas.
        settings: of the server.

    Attributes:
        max_rank: largest rank of a LoRA on the grid.
        base: the base model that the adapter names, or "".

    Raises:
        HoEError: trained routers vote by the input, or the adapter cannot be read.
    """

    def __init__(self, name: str, source: str, settings: Settings) -> None:
        self.name = name
        self._cache: LoraCache | None = None
        self._atlas = Path(source)
        if (self._atlas / INDEX_FILE).is_file():
            index = json.loads((self._atlas / INDEX_FILE).read_text(encoding="utf-8"))
            self.grid = PreferenceGrid(index["objectives"], index["step"])
            self.max_rank = max(int(entry["rank"]) for entry in index["adapters"].values())
            self.base = ""
            return
        adapter = adapter_from_files(source)
        _check_saved_whole(name, adapter)
        self.grid = PreferenceGrid(adapter.objectives, settings.step)
        self.base = str(adapter.config.base_model_name_or_path or "")
        voting = {
            name for point in self.grid.points for name in freeze(adapter.config, point, settings.routers).trained
        }
        if voting and settings.routers == "keep":
            raise HoEError(
                f"adapter {name!r}: the trained routers {sorted(voting)} choose experts by the input, which a LoRA cannot. Set "
                f"{PREFIX}ROUTERS=drop for the interpolation of the LoRA experts, or export an atlas over prompts (peft-hoe "
                f"export --grid {settings.step:g} --prompts FILE) and give its directory"
            )
        exporter = LoraExporter(adapter, rank=settings.rank, routers=settings.routers)
        self._cache = LoraCache(settings.folder.expanduser(), exporter, self.grid, settings.max_bytes)
        self.max_rank = self._cache.max_rank

    def read(self, spelled: str) -> FloatArray | None:
        """The grid point of a spelling, or None: of no preference, of one beside the grid, or not spelled as it should be."""
        try:
            point = parse_preference(read_preference(spelled), self.grid.objectives)
        except PreferenceError as error:
            log.info("%s@%s: %s", self.name, spelled, error)
            return None
        spellings = self.spellings(point)
        if spelled in spellings:
            return self.grid.nearest(point)
        log.info("%s@%s is not spelled as it should be; the nearest is %s", self.name, spelled, " or ".join(spellings))
        return None

    def spellings(self, preference: Any) -> tuple[str, str]:
        """The two spellings of the nearest grid point."""
        numbers = self.grid.spell(preference)
        named = zip(self.grid.objectives, numbers.split(","), strict=True)
        return numbers, ",".join(f"{objective}={weight}" for objective, weight in named)

    def path(self, preference: Any) -> Path:
        """The folder of the LoRA of a grid point.

        Raises:
            HoEError: it cannot be written.
        """
        return self._atlas / self.grid.spell(preference) if self._cache is None else self._cache.path(preference)


class Names:
    """All names that a server knows.

    Args:
        settings: of the server.

    Raises:
        HoEError: an adapter cannot be served.
    """

    def __init__(self, settings: Settings) -> None:
        self.adapters = {name: ServedAdapter(name, source, settings) for name, source in settings.adapters.items()}

    @property
    def max_rank(self) -> int:
        """What vLLM's `--max-lora-rank` must be at least.

        Raises:
            HoEError: above what vLLM takes.
        """
        needed = max(adapter.max_rank for adapter in self.adapters.values())
        if needed > VLLM_RANKS[-1]:
            raise HoEError(
                f"LoRAs have ranks up to {needed}, and vLLM takes {VLLM_RANKS[-1]}; set {PREFIX}RANK={VLLM_RANKS[-1]}, which "
                "reduces them by SVD (peft-hoe export says what that loses)"
            )
        return next(rank for rank in VLLM_RANKS if rank >= needed)

    def path(self, name: str) -> Path | None:
        """The LoRA of a name such as `my-hoe@0.7,0.3`; None for any other name.

        Raises:
            HoEError: it is one of ours, but its LoRA cannot be written.
        """
        adapter, _, spelled = name.partition("@")
        if adapter not in self.adapters:
            return None
        point = self.adapters[adapter].read(spelled)
        return None if point is None else self.adapters[adapter].path(point)


def _check_saved_whole(name: str, adapter: AdapterSource) -> None:
    """Refuse modules that the adapter saves whole and vLLM would refuse later, one request at a time."""
    if wrong := sorted(set(adapter.config.modules_to_save or ()) - set(VLLM_SAVED_WHOLE)):
        raise HoEError(
            f"adapter {name!r} saves {wrong} whole, and of such modules vLLM takes {list(VLLM_SAVED_WHOLE)} alone; serve it "
            "with peft-hoe serve, or export dense checkpoints (peft-hoe export --merged BASE)",
            argument="modules_to_save",
            value=wrong,
            allowed=list(VLLM_SAVED_WHOLE),
        )


def _read(name: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise HoEError(f"{name} is {text!r}, which cannot be read") from None


def _read_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.upper())
    if found is None:
        raise ValueError(text)
    return int(float(found[1]) * _UNITS[found[2]])
