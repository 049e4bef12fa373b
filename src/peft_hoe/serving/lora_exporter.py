"""Writes preferences of one adapter as PEFT LoRAs: votes, factors, files and report, each a step of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import HoEError, StaticMergeError
from ..experts.options import DTYPES
from ..files import ADAPTER_WEIGHTS
from ..specs import checked_rank
from .calibration import Calibration
from .engine_limits import engine_notes
from .export_report import REPORT_FILE, ExportReport
from .front_lost import Exported, FrontLost
from .frozen_votes import FrozenVotes, freeze
from .lora_config import lora_config
from .lora_factors import LoraFactors, lora_factors
from .source import PREFIX, AdapterSource


class LoraExporter:
    """Writes preferences of one adapter, as `export_lora` says."""

    def __init__(
        self,
        source: AdapterSource,
        *,
        rank: int | None = None,
        dtype: torch.dtype | str | None = None,
        even: bool = False,
        routers: str = "keep",
        calibration: Calibration | None = None,
        front: FrontLost | None = None,
    ) -> None:
        self.source = source
        self.rank = None if rank is None else checked_rank(rank, "rank")
        self.dtype = _checked_dtype(dtype)
        self.even = even
        self.routers = routers
        self.calibration = calibration
        self.front = front

    @property
    def how(self) -> list[Any]:
        """All besides the adapter's files that the LoRAs depend on, in plain JSON types."""
        return [self.rank, str(self.dtype), self.even, self.routers]

    def votes(self, preference: Any) -> FrozenVotes:
        """The votes of a preference, frozen.

        Raises:
            PreferenceError: not a point of the simplex.
            StaticMergeError: trained routers vote, and there are no prompts.
        """
        self.check(preference)
        votes = freeze(self.source.config, preference, self.routers).read(self.source)
        if self.routers != "keep" or not votes.trained or self.calibration is None:
            return votes
        measured = self.calibration.mean_votes(votes.route.requested)
        n = len(self.calibration.prompts)
        return votes.calibrated(measured, f"mean votes of each module over {n} prompt{'s' if n > 1 else ''}")

    def check(self, preference: Any) -> None:
        """Refuse what `votes` would, before anything is read.

        Raises:
            PreferenceError: not a point of the simplex.
            StaticMergeError: trained routers vote, and there are no prompts.
        """
        votes = freeze(self.source.config, preference, self.routers)
        if self.routers == "keep" and votes.trained and self.calibration is None:
            raise StaticMergeError(
                f"at {list(votes.route.requested)} the trained routers {list(votes.trained)} choose experts by the input, "
                "which an ordinary LoRA cannot. Give a model and prompts (--prompts FILE) to freeze them to their mean votes, "
                'or routers="drop" (--routers drop) for the interpolation of the LoRA experts',
                value=list(votes.route.requested),
                routers=votes.trained,
            )

    def bytes(self, preference: Any) -> int:
        """The size of the weights that the LoRA of a preference will have at most; nothing is computed.

        Raises:
            PreferenceError: not a point of the simplex.
        """
        ranks = self._ranks(preference)
        factors = sum(
            ranks[module] * widths * (self.dtype or exact).itemsize for module, (widths, exact) in self._shapes.items()
        )
        return factors + self._norm_bytes

    def rank_at(self, preference: Any) -> int:
        """The largest rank that the LoRA of a preference will have at most; no weights are read.

        Raises:
            PreferenceError: not a point of the simplex.
        """
        return max(self._ranks(preference).values())

    def _ranks(self, preference: Any) -> dict[str, int]:
        votes = freeze(self.source.config, preference, self.routers)
        reached = set(torch.nonzero(votes.shared).flatten().tolist())
        if self.routers == "keep":
            names, members = self.source.config.router_names, self.source.config.votes()
            reached |= {expert for name in (*votes.trained, *votes.modular) for expert in members[names.index(name)]}
        ranks = {}
        for module in self.source.modules:
            whole = sum(rank for j, rank in enumerate(self.source.ranks(module)) if j in reached)
            ranks[module] = min(max(1, whole), self.rank or max(1, whole))
        return ranks | {head: ranks[embedding] for head, embedding in self.source.base.tied_heads.items()}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, torch.dtype]]:
        """d_in + d_out, and the dtype of an exact export, by module."""
        shapes = {}
        for module in self.source.modules:
            a, b = self.source.factors(module)
            shapes[module] = (a.shape[1] + b.shape[0], torch.promote_types(a.dtype, torch.float32))
        return shapes | {head: shapes[embedding] for head, embedding in self.source.base.tied_heads.items()}

    @cached_property
    def _norm_bytes(self) -> int:
        """The size of all norms with experts, which is the same at every preference."""
        none = torch.zeros(len(self.source.config.expert_names), dtype=torch.float64)
        return sum(tensor.nbytes for tensor in self.norms(none).values())

    def factors(self, votes: FrozenVotes) -> dict[str, LoraFactors]:
        """The factors of every module at these votes, of heads that are tied to embeddings with experts too."""
        factors = {
            module: lora_factors(self.source, module, votes.of(module), rank=self.rank, dtype=self.dtype)
            for module in self.source.modules
        }
        self.add_tied_heads(factors)
        widest = max(each.rank for each in factors.values())
        return {module: each.widened(widest) for module, each in factors.items()} if self.even else factors

    def add_tied_heads(self, factors: dict[str, LoraFactors]) -> None:
        """Give heads that are tied to embeddings with experts the factors of these, transposed."""
        tied = self.source.base.tied_heads
        factors |= {head: factors[embedding].transposed() for head, embedding in tied.items()}

    def norms(self, votes: Tensor) -> dict[str, Tensor]:
        """The weights and biases `(d,)` of all norms with experts at votes `(L,)`, base plus deltas, by parameter.

        Raises:
            CheckpointError: the base lacks one.
        """
        found = {}
        for module, parameters in self.source.base.norms.items():
            for name, read in parameters.items():
                delta, before = self.source.norm_deltas(module, name), read()
                wide = torch.promote_types(torch.promote_types(before.dtype, delta.dtype), torch.float32)
                found[f"{module}.{name}"] = before.to(wide) + votes.to(wide) @ delta.to(wide)
        return found

    def weights(self, preference: Any) -> tuple[FrozenVotes, dict[str, LoraFactors], dict[str, Tensor]]:
        """Votes, factors and norms of a preference, as `votes`, `factors` and `norms` say."""
        votes = self.votes(preference)
        return votes, self.factors(votes), self.norms(votes.shared)

    @cached_property
    def _hypervolume(self) -> dict[str, float] | None:
        """What all LoRAs of the front lose, the same for each of them; None without a sweep."""
        if self.front is None:
            return None

        def export(preference: Sequence[float]) -> Exported:
            votes, factors, norms = self.weights(preference)
            exact = self.routers == "keep" and not votes.trained and all(each.lost == 0 for each in factors.values())
            return factors, norms, exact

        return asdict(self.front.measure(export))

    def tensors(self, factors: Mapping[str, LoraFactors], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a LoRA by their names in PEFT's file."""
        tensors = {PREFIX + key: tensor.contiguous() for key, tensor in (*self.source.whole_tensors(), *norms.items())}
        for module, each in factors.items():
            looks_up = module in self.source.base.embeddings  # PEFT has another name for these
            for part, tensor in (("A", each.a), ("B", each.b)):
                key = f"lora_embedding_{part}" if looks_up else f"lora_{part}.weight"
                tensors[f"{PREFIX}{module}.{key}"] = tensor
        return tensors

    def write(self, preference: Any, directory: Path, shown_as: Path | None = None) -> ExportReport:
        """Write a LoRA into an existing directory; the report calls it `shown_as`."""
        votes, factors, norms = self.weights(preference)
        save_file(self.tensors(factors, norms), directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        ranks = {module: each.rank for module, each in factors.items()}
        lora_config(self.source, ranks).save_pretrained(str(directory))
        report = self.report(votes, factors, norms, directory if shown_as is None else shown_as)
        report.notes += engine_notes(report, self.source, factors)
        report.save(directory / REPORT_FILE)
        return report

    def report(
        self, votes: FrozenVotes, factors: Mapping[str, LoraFactors], norms: Mapping[str, Tensor], output: Path
    ) -> ExportReport:
        """What these factors and norms are worth; with prompts the model runs on them."""
        source, route = self.source, votes.route
        norm, lost = (
            math.hypot(*(each.norm for each in factors.values())),
            math.hypot(*(each.lost for each in factors.values())),
        )
        logits: dict[str, float] | None = None
        if self.calibration is not None:
            written = {module: (each.a, each.b) for module, each in factors.items()}
            difference = asdict(self.calibration.difference(route.requested, written, norms))
            logits = {name: float(number) for name, number in difference.items()}
        return ExportReport(
            source=source.label,
            output=str(output),
            preference=dict(zip(source.objectives, route.requested, strict=True)),
            effective=dict(zip(source.objectives, route.effective, strict=True)),
            experts=dict(route.experts),
            trained_routers=list(votes.trained),
            routers=votes.method,
            modules=len(factors),
            norms=len(source.base.norms),
            rank=max(each.rank for each in factors.values()),
            even=len({each.rank for each in factors.values()}) == 1,
            dtype=str(next(iter(factors.values())).a.dtype).removeprefix("torch."),
            bytes=sum(each.bytes for each in factors.values()) + sum(norm.nbytes for norm in norms.values()),
            lost=lost / norm if norm else 0.0,
            most_lost=max(each.lost / each.norm if each.norm else 0.0 for each in factors.values()),
            logits=logits,
            hypervolume=self._hypervolume,
            notes=[] if route.distance == 0 else ["the preference lies outside the experts' hull: see `effective`"],
        )


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype not in DTYPES:
        raise HoEError(
            f"dtype is {dtype!r}; allowed are {sorted(DTYPES)}, or None for the adapter's own",
            argument="dtype",
            value=dtype,
            allowed=sorted(DTYPES),
        )
    return DTYPES[dtype]
