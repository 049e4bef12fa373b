"""The names that a vLLM server knows: `my-hoe@helpful=0.7,harmless=0.3`, or `my-hoe@0.7,0.3`, and the LoRA of each.

vLLM remembers and lists every name that it has resolved, for ever. So there is a grid of preferences, and each point has
exactly these two spellings; any other name is none of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, HoEError, PreferenceError
from ..files import read_json
from ..preference import FloatArray, parse_preference, read_preference
from .atlas import INDEX_FILE
from .engine_limits import VLLM_RANKS, VLLM_SAVED_WHOLE, refuse_apart
from .lora_cache import LoraCache
from .lora_exporter import LoraExporter
from .preference_grid import PreferenceGrid
from .routed_exporter import RoutedExporter, room
from .routed_lora import RoutedFormat
from .source import AdapterSource, adapter_from_files
from .vllm_settings import PREFIX, Settings

log = logging.getLogger(__name__)


class ServedAdapter:
    """One adapter on a grid: from a preference's spelling to the folder of its LoRA.

    Args:
        name: in front of the `@`.
        grid: its preferences.
        base: the base model that it names, or "".
        max_rank: the largest rank of a LoRA on the grid.
        cache: of its LoRAs; or the directory of an atlas, which has them.
    """

    def __init__(self, name: str, grid: PreferenceGrid, base: str, max_rank: int, cache: LoraCache | Path) -> None:
        self.name, self.grid, self.base, self.max_rank, self._cache = name, grid, base, max_rank, cache

    @staticmethod
    def atlas(name: str, directory: Path) -> ServedAdapter:
        """The LoRAs of an atlas, as they are.

        Raises:
            CheckpointError: they are not all there.
        """
        index = read_json(directory / INDEX_FILE)
        try:
            grid = PreferenceGrid(index["objectives"], index["step"])
            ranks = [int(index["adapters"][grid.spell(point)]["rank"]) for point in grid.points]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{directory / INDEX_FILE} is not the list of an atlas ({type(error).__name__}: {error}); write the atlas anew "
                "with peft-hoe export --grid",
                path=directory / INDEX_FILE,
            ) from error
        if gone := [folder for point in grid.points if not (directory / (folder := grid.spell(point))).is_dir()]:
            raise CheckpointError(
                f"the atlas {directory} lacks {gone}, which {INDEX_FILE} lists; write it anew with peft-hoe export --grid",
                path=directory, value=gone,
            )  # fmt: skip
        return ServedAdapter(name, grid, "", max(ranks), directory)

    @staticmethod
    def adapter(name: str, source: AdapterSource, settings: Settings, layout: RoutedFormat | None) -> ServedAdapter:
        """The LoRAs of an adapter, written when they are asked for.

        Args:
            name: in front of the `@`.
            source: the adapter.
            settings: of the server.
            layout: how LoRAs carry routers, where trained ones vote.

        Raises:
            HoEError: the adapter cannot be served.
        """
        _check_saved_whole(name, source)
        refuse_apart(source, "vLLM's LoRAs cannot change a norm", norms_alone=True)
        grid = PreferenceGrid(source.objectives, settings.step)
        if layout is None:
            exporter = LoraExporter(source, rank=settings.rank, routers=settings.routers)
        else:
            exporter = RoutedExporter(source, layout)
        cache = LoraCache(settings.folder.expanduser(), exporter, grid, settings.max_bytes)
        return ServedAdapter(name, grid, str(source.config.base_model_name_or_path or ""), cache.max_rank, cache)

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
        if isinstance(self._cache, Path):
            return self._cache / self.grid.spell(preference)
        return self._cache.path(preference)


class Names:
    """All names that a server knows.

    Args:
        settings: of the server.

    Attributes:
        adapters: by name.
        layout: how LoRAs carry routers; None where no trained router votes, so that all LoRAs are ordinary ones.

    Raises:
        HoEError: an adapter cannot be served.
    """

    def __init__(self, settings: Settings) -> None:
        atlases = {name: Path(path) for name, path in settings.adapters.items() if (Path(path) / INDEX_FILE).is_file()}
        sources = {name: adapter_from_files(path) for name, path in settings.adapters.items() if name not in atlases}
        self.layout = _room(sources, settings) if settings.routers == "keep" else None
        self.adapters: dict[str, ServedAdapter] = {}
        for name in settings.adapters:
            if name in atlases:
                self.adapters[name] = ServedAdapter.atlas(name, atlases[name])
            else:
                self.adapters[name] = ServedAdapter.adapter(name, sources[name], settings, self.layout)

    @property
    def max_rank(self) -> int:
        """What vLLM's `--max-lora-rank` must be at least.

        Raises:
            HoEError: above what vLLM takes.
        """
        needed = max(adapter.max_rank for adapter in self.adapters.values())
        if needed > VLLM_RANKS[-1]:
            raise HoEError(
                f"LoRAs have ranks up to {needed}, and vLLM takes {VLLM_RANKS[-1]}; {self.remedy(VLLM_RANKS[-1])}",
                argument="rank", value=needed, allowed=f"at most {VLLM_RANKS[-1]}",
            )  # fmt: skip
        return next(rank for rank in VLLM_RANKS if rank >= needed)

    def remedy(self, rank: int) -> str:
        """How LoRAs of a larger rank come down to this one, in words."""
        if self.layout is not None:  # the experts of a vote are not reduced together
            return (
                f"trained routers vote for experts that are as large as that: take them out with {PREFIX}ROUTERS=drop"
            )
        return f"set {PREFIX}RANK={rank}, which reduces them by SVD (peft-hoe export says what that loses)"

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


def _room(sources: Mapping[str, AdapterSource], settings: Settings) -> RoutedFormat | None:
    """The room for the routers of all adapters."""
    grids = [(source, PreferenceGrid(source.objectives, settings.step).points) for source in sources.values()]
    layout = room([(source.config, points) for source, points in grids])
    if layout is not None and settings.rank is not None:
        raise HoEError(
            f"{PREFIX}RANK is {settings.rank}, but trained routers vote for experts, whose ranks cannot be reduced together; "
            f"leave it out, or set {PREFIX}ROUTERS=drop",
            argument="rank",
            value=settings.rank,
        )
    return layout


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
