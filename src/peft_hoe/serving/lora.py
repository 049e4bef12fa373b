"""Export: a preference becomes an ordinary PEFT LoRA, exactly, that any engine can serve.

Nothing of this package is needed to load the result. The base model is not read: the factors of the selected experts stand one
after the other, weighted by their votes (`lora_factors.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from ..errors import HoEError, StaticMergeError
from ..experts.options import DTYPES
from ..files import ADAPTER_WEIGHTS
from ..output_directory import check_output, complete_directory
from ..specs import checked_rank
from .calibration import Calibration, Difference
from .export_report import REPORT_FILE, ExportReport
from .frozen_votes import FrozenVotes, freeze
from .lora_factors import LoraFactors, cut_error, lora_factors
from .source import PREFIX, AdapterSource, adapter_from_files, adapter_from_model

# What vLLM takes as --max-lora-rank (0.32 and 0.33).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def export_lora(
    source: nn.Module | str | os.PathLike[str],
    preference: Any,
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    even: bool = False,
    routers: str = "keep",
    prompts: Sequence[Any] | None = None,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a preference of a HoE adapter as an ordinary PEFT LoRA.

    The LoRA computes the same as the adapter at that preference: it is the experts' factors, not an approximation of them.
    Where a trained router votes by the input, its votes have to be frozen first; `routers` and `prompts` say how.

    Args:
        source: the adapter's directory or Hub id, or a model that carries it.
        preference: N numbers or `{objective: weight}`.
        output: directory for the LoRA; with `export_report.json` beside it.
        rank: reduce modules of a larger rank to this one by SVD; the report tells the error. Default exact.
        dtype: of the weights; default what the adapter is stored in, but at least float32, in which votes fold in exactly.
        even: fill all modules up to one rank with zeros, for engines that do not read `rank_pattern`.
        routers: "keep" freezes trained routers to their mean votes over `prompts`, per module, and refuses without prompts;
            "static" takes the votes before training; "drop" leaves routers out: the interpolation of the LoRA experts.
        prompts: texts or lists of chat messages, for "keep" and to measure the difference in logits; they need a model.
        tokenizer: the model's, with `prompts`.
        adapter_name: of a model's adapter; default the first active one.
        overwrite: replace an adapter that is there.

    Raises:
        PreferenceError: not a point of the simplex.
        StaticMergeError: trained routers vote by the input, and nothing says how to freeze them.
        CheckpointError: the adapter is damaged, or `output` is not empty.
        HoEError: another argument cannot be used.

    >>> from peft_hoe import demo, export_lora
    >>> report = demo.build_demo_adapter("adapter")
    >>> exported = export_lora("adapter", [0.7, 0.3], "lora")
    >>> from peft import PeftModel
    >>> _ = PeftModel.from_pretrained(demo.load_base(), "lora")  # an ordinary LoRA
    """
    directory = Path(output)
    adapter, calibration = open_source(source, prompts, tokenizer, adapter_name)
    check_output(directory, overwrite, [] if adapter.directory is None else [adapter.directory], replaces="LORA")
    exporter = LoraExporter(adapter, rank=rank, dtype=dtype, even=even, routers=routers, calibration=calibration)
    with complete_directory(directory) as building:
        report = exporter.write(preference, building, shown_as=directory)
    return report


def open_source(
    source: nn.Module | str | os.PathLike[str], prompts: Sequence[Any] | None, tokenizer: Any, adapter_name: str | None
) -> tuple[AdapterSource, Calibration | None]:
    """The adapter, and what its routers are calibrated on.

    Raises:
        StaticMergeError: prompts were given without a model.
    """
    if isinstance(source, nn.Module):
        adapter = adapter_from_model(source, adapter_name)
        return adapter, None if prompts is None else Calibration(source, tokenizer, prompts, adapter.name)
    if prompts is not None or adapter_name is not None:
        raise StaticMergeError(
            f"prompts and adapter_name need a model, but {os.fspath(source)!r} is a directory or Hub id; load it with "
            "PeftModel.from_pretrained and export the model"
        )
    return adapter_from_files(source), None


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
    ) -> None:
        self.source = source
        self.rank = None if rank is None else checked_rank(rank, "rank")
        self.dtype = _checked_dtype(dtype)
        self.even = even
        self.routers = routers
        self.calibration = calibration

    def votes(self, preference: Any) -> FrozenVotes:
        """The votes of a preference, frozen.

        Raises:
            PreferenceError: not a point of the simplex.
            StaticMergeError: trained routers vote, and there are no prompts.
        """
        votes = freeze(self.source.config, preference, self.routers)
        if self.routers != "keep" or not votes.trained:
            return votes
        if self.calibration is None:
            raise StaticMergeError(
                f"at {list(votes.route.requested)} the trained routers {list(votes.trained)} choose experts by the input, "
                "which an ordinary LoRA cannot. Give a model and prompts (--prompts FILE) to freeze them to their mean votes, "
                'or routers="drop" (--routers drop) for the interpolation of the LoRA experts',
                value=list(votes.route.requested),
                routers=votes.trained,
            )
        measured = self.calibration.mean_votes(votes.route.requested)
        n = len(self.calibration.prompts)
        return votes.calibrated(measured, f"mean votes of each module over {n} prompt{'s' if n > 1 else ''}")

    def bytes(self, preference: Any) -> int:
        """The size of the weights that the LoRA of a preference will have at most; nothing is computed.

        Raises:
            PreferenceError: not a point of the simplex.
        """
        votes = freeze(self.source.config, preference, self.routers)
        reached = set(torch.nonzero(votes.shared).flatten().tolist())
        if self.routers == "keep":
            names, members = self.source.config.router_names, self.source.config.votes()
            reached |= {expert for name in votes.trained for expert in members[names.index(name)]}
        total = 0
        for module, (widths, exact) in self._shapes.items():
            rank = max(1, sum(rank for j, rank in enumerate(self.source.ranks(module)) if j in reached))
            total += min(rank, self.rank or rank) * widths * (self.dtype or exact).itemsize
        return total

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, torch.dtype]]:
        """d_in + d_out, and the dtype of an exact export, by module."""
        shapes = {}
        for module in self.source.modules:
            a, b = self.source.factors(module)
            shapes[module] = (a.shape[1] + b.shape[0], torch.promote_types(a.dtype, torch.float32))
        return shapes

    def write(self, preference: Any, directory: Path, shown_as: Path | None = None) -> ExportReport:
        """Write a LoRA into an existing directory; the report calls it `shown_as`."""
        votes = self.votes(preference)
        factors = {
            module: lora_factors(self.source, module, votes.of(module), rank=self.rank, dtype=self.dtype)
            for module in self.source.modules
        }
        widest = max(each.rank for each in factors.values())
        if self.even:
            factors = {module: each.widened(widest) for module, each in factors.items()}
        tensors = {PREFIX + key: tensor.contiguous() for key, tensor in self.source.whole_tensors()}
        for module, each in factors.items():
            tensors[f"{PREFIX}{module}.lora_A.weight"] = each.a
            tensors[f"{PREFIX}{module}.lora_B.weight"] = each.b
        save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        ranks = {module: each.rank for module, each in factors.items()}
        lora_config(self.source, ranks).save_pretrained(str(directory))
        report = _report(self, votes, factors, directory if shown_as is None else shown_as)
        report.save(directory / REPORT_FILE)
        return report


def lora_config(source: AdapterSource, ranks: Mapping[str, int]) -> LoraConfig:
    """The configuration of a LoRA whose scale is 1 in every module, whatever its rank."""
    common = max(ranks.values())
    # PEFT looks patterns up by a name's end: the caret keeps a name that is the end of another one to itself.
    names = [name for name in ranks if ranks[name] != common]
    patterns = {f"^{name}" if _is_end(name, ranks) else name: ranks[name] for name in names}
    config = source.config
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=sorted(ranks),
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=bool(config.fan_in_fan_out if source.stored_transposed is None else source.stored_transposed),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _is_end(name: str, others: Mapping[str, int]) -> bool:
    return any(other.endswith(f".{name}") for other in others)


def _report(
    exporter: LoraExporter, votes: FrozenVotes, factors: Mapping[str, LoraFactors], output: Path
) -> ExportReport:
    source = exporter.source
    objectives, route = source.objectives, votes.route
    ranks = {each.rank for each in factors.values()}
    norms = sum(each.norm**2 for each in factors.values()) ** 0.5
    lost = sum(each.lost**2 for each in factors.values()) ** 0.5
    differences: Difference | None = None
    if exporter.calibration is not None:
        written = {module: (each.a, each.b) for module, each in factors.items()}
        differences = exporter.calibration.difference(route.requested, written)
    report = ExportReport(
        source=source.label,
        output=str(output),
        preference=dict(zip(objectives, route.requested, strict=True)),
        effective=dict(zip(objectives, route.effective, strict=True)),
        experts=dict(route.experts),
        trained_routers=list(votes.trained),
        routers=votes.method,
        modules=len(factors),
        rank=max(ranks),
        even=len(ranks) == 1,
        dtype=str(next(iter(factors.values())).a.dtype).removeprefix("torch."),
        bytes=sum(each.bytes for each in factors.values()),
        lost=lost / norms if norms else 0.0,
        most_lost=max(each.lost / each.norm if each.norm else 0.0 for each in factors.values()),
        logits=None if differences is None else {name: float(number) for name, number in asdict(differences).items()},
    )
    report.notes = _notes(report, source, factors, norms)
    return report


def _notes(report: ExportReport, source: AdapterSource, factors: Mapping[str, LoraFactors], norm: float) -> list[str]:
    notes = []
    limit = VLLM_RANKS[-1]
    if report.rank > limit:
        cost = sum(cut_error(each, limit) ** 2 for each in factors.values()) ** 0.5
        notes.append(
            f"rank {report.rank} is above {limit}, the most that vLLM takes; --rank {limit} fits, and costs "
            f"{cost / norm if norm else 0.0:.2%} of the delta's norm"
        )
    else:
        allowed = next(rank for rank in VLLM_RANKS if rank >= report.rank)
        notes.append(f"vLLM needs --max-lora-rank {allowed} or more")
    if not report.even:
        notes.append("modules differ in rank; an engine that does not read rank_pattern needs --even")
    if source.config.modules_to_save:
        notes.append(f"{sorted(source.config.modules_to_save)} are saved whole; PEFT loads them, vLLM refuses them")
    if report.effective != report.preference:
        notes.append(f"the preference lies outside the experts' hull; in effect is {report.effective}")
    return notes


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
