"""What engines take of an exported LoRA, and what they cannot take and would refuse or get wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import HoEError
from .export_report import ExportReport
from .lora_factors import LoraFactors, cut_error
from .source import AdapterSource

# What vLLM takes as --max-lora-rank (0.32 and 0.33).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_SAVED_WHOLE = ("classifier", "score")  # modules_to_save, of a classifier


def engine_notes(report: ExportReport, source: AdapterSource, factors: Mapping[str, LoraFactors]) -> list[str]:
    """What a reader may trip over when an engine loads a LoRA, a sentence each."""
    notes = []
    limit = VLLM_RANKS[-1]
    if report.rank > limit:
        norm = math.hypot(*(each.norm for each in factors.values())) or 1.0
        cost = math.hypot(*(cut_error(each, limit) for each in factors.values())) / norm
        notes.append(
            f"rank {report.rank} is above {limit}, the most that vLLM takes; --rank {limit} fits, and costs {cost:.2%} of the "
            "delta's norm"
        )
    else:
        allowed = next(rank for rank in VLLM_RANKS if rank >= report.rank)
        notes.append(f"vLLM needs --max-lora-rank {allowed} or more")
    if not report.even:
        notes.append("modules differ in rank; an engine that does not read rank_pattern needs --even")
    if saved := sorted(source.config.modules_to_save or ()):
        taken = "as vLLM does" if set(saved) <= set(VLLM_SAVED_WHOLE) else "vLLM takes only classifier and score"
        notes.append(f"{saved} are saved whole; PEFT loads them, {taken}")
    return notes + _notes_apart(source)


def _notes_apart(source: AdapterSource) -> list[str]:
    """The same of experts of embeddings, heads and norms."""
    notes = []
    if norms := list(source.base.norms):
        notes.append(
            f"{len(norms)} norms ({norms[0]} ...) are saved whole, as modules_to_save; PEFT loads them, and engines that know "
            "LoRAs alone (vLLM, llama.cpp) need --merged BASE"
        )
    for head, embedding in source.base.tied_heads.items():
        notes.append(
            f"{head} is tied to {embedding}, and has the same LoRA transposed; PEFT computes the two right, but its "
            "merge_and_unload would add both to the one weight: merge with --merged BASE"
        )
    return notes


def refuse_apart(source: AdapterSource, engine: str, *, norms_alone: bool = False) -> None:
    """Refuse experts outside linear modules, for an engine that cannot take them.

    Args:
        source: the adapter.
        engine: its name, and what it takes.
        norms_alone: whether it takes embeddings and heads.

    Raises:
        HoEError: the adapter has some; names them.
    """
    refused = list(source.config.target_norms or ()) if norms_alone else source.apart
    if refused:
        fields = "target_norms" if norms_alone else "target_embeddings, target_norms"
        raise HoEError(
            f"{source.label} has experts of {refused} ({fields}), and {engine}; "
            "write dense checkpoints of the preferences that you need (peft-hoe export --merged BASE), or serve it with "
            "peft-hoe serve",
            argument="source",
            value=refused,
        )
