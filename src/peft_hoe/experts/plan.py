"""What a build will take, before anything is read or fetched: sizes, memory, disk and time.

Shapes come from configurations alone. Time is an estimate (`plan_times`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import HoEConfig
from ..errors import ExpertError
from ..files import ADAPTER_CONFIG, read_json
from ..specs import check_names
from .adapter_config import adapter_config, expert_specs
from .architecture import Architecture, LinearModule, read_architecture
from .build_inputs import shards_to_fetch
from .checkpoints import PathOrHubId, fetch
from .lora_policy import is_adapter
from .module_builder import expert_shares
from .option_groups import Loading
from .options import AUTO_CAPTURE, DEFAULT_CAPTURE, DEFAULT_RESCALE, BuildOptions
from .plan_times import DIRECTIONS, estimated_seconds
from .search import Search, check_settings

_PROCESS = 450 << 20  # bytes of a process that has imported everything


@dataclass(frozen=True)
class BuildPlan:
    """What a build will take, by `plan_build`.

    >>> from peft_hoe import demo
    >>> from peft_hoe.experts import plan_build
    >>> plan_build(demo.BASE, demo.POLICIES).to_dict()["passes"]
    2

    Attributes:
        modules: how many linear layers, and embeddings and heads that are captured, are in scope.
        weights: how many weights they have.
        experts: names, preferences and ranks.
        adapter_bytes: size of the adapter; at most, where ranks follow from the energy.
        passes: how often weights in scope are read: 2 with one pruning threshold for all of them, else 1; 0 where all
            policies are LoRA adapters.
        read_bytes: all that is read, all passes and models together.
        fetch_bytes: what is not on this disk yet, at most, in all passes.
        disk_bytes: the adapter and what is fetched, at the peak.
        memory_bytes: at the peak, of each process; about.
        device_bytes: of a GPU, likewise; 0 on the CPU.
        seconds: of one thread, about; divided by `num_processes`.
        parts: the same by kind of work.
        builds: how many a search makes, at most, the last one included; 1 without. Bytes that are read and seconds count them
            all, without the scores.
    """

    modules: int
    weights: int
    experts: list[dict[str, Any]]
    adapter_bytes: int
    passes: int
    read_bytes: int
    fetch_bytes: int
    disk_bytes: int
    memory_bytes: int
    device_bytes: int
    seconds: float
    parts: dict[str, float]
    builds: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def table(self) -> str:
        """A summary for a terminal."""
        ranks = ", ".join(f"{expert['name']} (rank {expert['r']})" for expert in self.experts)
        times = {0: "nothing", 1: "once", 2: "twice"}[self.passes]
        parts = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in self.parts.items() if seconds >= 1)
        return "\n".join(
            [
                f"in scope   {self.modules} linear layers, {self.weights / 1e9:.2f} billion weights",
                f"experts    {ranks}",
                f"adapter    {_size(self.adapter_bytes)}",
                f"read       {_size(self.read_bytes)}; weights in scope {times}",
                f"fetch      {_size(self.fetch_bytes)}",
                f"disk       {_size(self.disk_bytes)}",
                f"memory     about {_size(self.memory_bytes)} for each process"
                + (f", and {_size(self.device_bytes)} of the GPU" if self.device_bytes else ""),
                f"time       about {_duration(self.seconds)}" + (f" ({parts})" if parts else ""),
                *([f"search     {self.builds} builds, without their scores"] if self.builds > 1 else []),
            ]
        )


class _DeclaredLora:
    """What is known of a LoRA policy from its configuration."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.rank = int(config.get("r", 8))
        self.dtype = torch.float32


@dataclass(frozen=True)
class _Declared:
    """The part of `BuildInputs` that a configuration is made from."""

    architecture: Architecture
    objectives: list[str]
    policies: dict[str, Any]


def plan_build(
    base: PathOrHubId,
    policies: Mapping[str, PathOrHubId],
    *,
    experts: Sequence[Any] | None = None,
    routers: Sequence[Any] | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    loading: Loading = Loading(),  # noqa: B008  frozen
    **settings: Any,
) -> BuildPlan:
    """What `build_adapter` will take with the same arguments; only configurations are read, and fetched where they must be.

    Args:
        base: directory or Hub id.
        policies: `{objective: directory or Hub id}`.
        experts: as for `build_adapter`, and so are the rest.
        routers: see there.
        target_modules: see there.
        exclude_modules: see there.
        loading: see there.
        settings: r, pruning, merging, svd, rescale, interpolation, capture, seed, dtype, num_processes, device. With
            `capture="auto"` embeddings are not counted, since no weight is read.

    Raises:
        CheckpointError, ExpertError, PreferenceError: as `build_adapter`, as far as it can be known.

    >>> from peft_hoe import demo
    >>> from peft_hoe.experts import plan_build
    >>> plan = plan_build(demo.BASE, demo.POLICIES, pruning=None)
    >>> plan.modules, plan.passes, [expert["name"] for expert in plan.experts]
    (21, 1, ['cheerful', 'vivid', 'centroid'])
    """
    if not policies:
        raise ExpertError(
            "policies is empty; give at least one, as {objective: directory or Hub id}",
            argument="policies", value=policies, allowed="at least one",
        )  # fmt: skip
    settings, builds = {**_DEFAULTS, **settings}, 1
    if isinstance(settings["rescale"], Search):
        check_settings(settings["rescale"].space, settings)
        builds, loading = 1 + settings["rescale"].candidates, replace(loading, keep_shards=True)
        settings["rescale"] = DEFAULT_RESCALE
    options = BuildOptions.checked(**settings)
    hub: dict[str, Any] = {"allow_pickle": loading.allow_pickle, "token": loading.token}
    specs = expert_specs(experts, check_names(list(policies), "objective"))
    sources = {**policies, **{str(spec.name): spec.policy for spec in specs if spec.policy is not None}}
    places = {name: fetch(source, weights=False, **hub) for name, source in sources.items()}
    base_place = fetch(base, weights=False, revision=loading.revision, **hub)
    architecture = read_architecture(
        base_place,
        target_modules=target_modules, exclude_modules=exclude_modules, task_type=loading.task_type,
        capture=() if options.capture == AUTO_CAPTURE else options.capture,
    )  # fmt: skip
    declared = _Declared(architecture, list(policies), {name: _declared(place) for name, place in places.items()})
    config = adapter_config(declared, options, specs, routers)
    full = [name for name, lora in declared.policies.items() if lora is None]
    passes = 0 if not full else 2 if options.pruning.share > 0 and options.pruning.scope == "global" else 1
    models = [(base, base_place), *((sources[name], places[name]) for name in full)] if full else []
    size = sum(architecture.sizes.values()) * (architecture.dtype or torch.float32).itemsize
    fetched = [_fetched(source, place, loading, size, passes) for source, place in models]
    once = _plan(declared, options, config, passes, fetched)
    return replace(
        once, builds=builds, read_bytes=builds * once.read_bytes, seconds=builds * once.seconds,
        parts={name: builds * seconds for name, seconds in once.parts.items()},
    )  # fmt: skip


_DEFAULTS: dict[str, Any] = {
    "r": "auto", "pruning": 0.4, "merging": "ties", "svd": "randomized", "rescale": DEFAULT_RESCALE, "interpolation": "norm",
    "capture": DEFAULT_CAPTURE, "seed": 0, "dtype": None,
}  # fmt: skip


def _declared(place: Path) -> Any:
    return _DeclaredLora(read_json(place / ADAPTER_CONFIG)) if is_adapter(place) else None


def _fetched(source: PathOrHubId, place: Path, loading: Loading, size: int, passes: int) -> tuple[int, int]:
    """Bytes of one model's weights that are fetched, and how many of them are on this disk at once."""
    if Path(source).is_dir():
        return 0, 0
    shards = shards_to_fetch(source, place, loading)
    return (passes * size, size // len(shards)) if shards else (size, size)


def _plan(
    declared: _Declared, options: BuildOptions, config: HoEConfig, passes: int, fetched: Sequence[tuple[int, int]]
) -> BuildPlan:
    targets, full = declared.architecture.targets, [name for name, lora in declared.policies.items() if lora is None]
    dtype = declared.architecture.dtype or torch.float32
    weights = sum(target.d_in * target.d_out for target in targets)
    everything = sum(declared.architecture.sizes.values()) * dtype.itemsize
    models = len(full) + 1 if full else 0
    parts = estimated_seconds(targets, options, config, expert_shares(declared, config), full)
    seconds = sum(parts.values())
    gpu, working = options.device.type != "cpu", _working_bytes(targets, config, len(full))
    adapter_bytes = _adapter_bytes(declared.architecture, options, config, options.dtype or dtype)
    return BuildPlan(
        modules=len(targets),
        weights=weights,
        experts=[
            {"name": spec.name, "preference": list(spec.preference), "r": spec.r} for spec in config.experts or []
        ],
        adapter_bytes=adapter_bytes,
        passes=passes,
        read_bytes=models * (everything + (passes - 1) * weights * dtype.itemsize),
        fetch_bytes=sum(fetch for fetch, _ in fetched),
        disk_bytes=adapter_bytes + sum(disk for _, disk in fetched),
        memory_bytes=_PROCESS + (0 if gpu else working),
        device_bytes=working if gpu else 0,
        seconds=seconds / options.num_processes,
        parts={name: part / options.num_processes for name, part in parts.items()},
    )


def _adapter_bytes(architecture: Architecture, options: BuildOptions, config: HoEConfig, dtype: torch.dtype) -> int:
    slots = sum(len(members) for members in config.votes())
    norms = [name for names in architecture.norms.values() for name in names]
    total = len(config.experts or []) * sum(architecture.sizes[name] for name in norms)
    for target in architecture.targets:
        ranks = [options.r.in_module(target.name, spec.r) for spec in config.experts or []]
        rank = sum(min(wanted, target.d_in, target.d_out) for wanted in ranks)
        total += rank * (target.d_in + target.d_out) + (0 if target.apart else slots) * (target.d_in + 1)
    return total * dtype.itemsize


def _working_bytes(targets: Sequence[LinearModule], config: HoEConfig, models: int) -> int:
    """The largest module: task vectors, one that is pruned or merged and its factors, in float32; and counts."""
    entries = max(target.d_in * target.d_out for target in targets)
    ends = max(target.d_in + target.d_out for target in targets)
    rank = max(spec.r for spec in config.experts or [])
    space = 12 * min(int(DIRECTIONS * rank), ends) * ends  # a basis in float32 and its image in float64
    return 4 * entries * (models + 2) + space + (16 << 20) * models if models else 8 * rank * ends


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
