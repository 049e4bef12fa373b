"""Export: a preference becomes an ordinary PEFT LoRA, exactly, that any engine can serve.

Nothing of this package is needed to load the result. The factors of the selected experts stand one after the other, weighted by
their votes (`lora_factors.py`). The base model is not read, unless experts of embeddings or norms are in it (`base_parts.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import HoEError, StaticMergeError
from ..output_directory import check_output, complete_directory
from .calibration import Calibration
from .export_report import ExportReport
from .front_lost import FrontLost
from .lora_exporter import LoraExporter
from .source import AdapterSource, adapter_from_files, adapter_from_model


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
    base: str | os.PathLike[str] | None = None,
    sweep: Any = None,
    rewards: Any = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a preference of a HoE adapter as an ordinary PEFT LoRA.

    The LoRA computes the same as the adapter at that preference: it is the experts' factors, not an approximation of them.
    Where a trained router votes by the input, its votes have to be frozen first; `routers` and `prompts` say how.
    Experts of embeddings and heads are LoRAs there too. Norms are saved whole (`modules_to_save`), the base's with the deltas.

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
        base: directory or Hub id of the base, for an adapter's directory with experts of embeddings or norms: which heads are
            tied, and what norms weigh. Default what the adapter names.
        sweep: a `Sweep` of the model with its routers, or its directory; the report then tells the hypervolume that exports
            with these options lose: the LoRAs of its preferences write its prompts again. Needs `rewards` and `tokenizer`.
        rewards: those of the sweep.
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
    adapter, calibration = open_source(source, prompts, tokenizer, adapter_name, base)
    refuse_unread(adapter, base)
    check_output(directory, overwrite, [] if adapter.directory is None else [adapter.directory], replaces="LORA")
    front = open_front(source, tokenizer, sweep, rewards)
    exporter = LoraExporter(
        adapter, rank=rank, dtype=dtype, even=even, routers=routers, calibration=calibration, front=front
    )
    with complete_directory(directory) as building:
        report = exporter.write(preference, building, shown_as=directory)
    return report


def for_files(source: Any, base: str | os.PathLike[str]) -> str | os.PathLike[str] | None:
    """The base, for an adapter that has none in memory."""
    return None if isinstance(source, nn.Module) else base


def open_source(
    source: nn.Module | str | os.PathLike[str],
    prompts: Sequence[Any] | None,
    tokenizer: Any,
    adapter_name: str | None,
    base: str | os.PathLike[str] | None = None,
) -> tuple[AdapterSource, Calibration | None]:
    """The adapter, and what its routers are calibrated on.

    Raises:
        StaticMergeError: prompts were given without a model.
        HoEError: `base` was given with a model.
    """
    if isinstance(source, nn.Module):
        if base is not None:
            raise HoEError(
                f"base is {os.fspath(base)!r}, but the model that is exported has its base; leave it out",
                argument="base",
                value=os.fspath(base),
            )
        adapter = adapter_from_model(source, adapter_name)
        return adapter, None if prompts is None else Calibration(source, tokenizer, prompts, adapter.name)
    if prompts is not None or adapter_name is not None:
        raise StaticMergeError(
            f"prompts and adapter_name need a model, but {os.fspath(source)!r} is a directory or Hub id; load it with "
            "PeftModel.from_pretrained and export the model",
            argument="source", value=os.fspath(source), allowed="a model",
        )  # fmt: skip
    return adapter_from_files(source, base), None


def open_front(source: Any, tokenizer: Any, sweep: Any, rewards: Any) -> FrontLost | None:
    """What measures the hypervolume that is lost; None without a sweep.

    Raises:
        HoEError: sweep, rewards and model are not all there, or do not belong together.
        RewardError: a reward is missing or fails.
    """
    if sweep is None and rewards is None:
        return None
    if sweep is None or not isinstance(source, nn.Module):
        given, missing = ("rewards", "a sweep") if sweep is None else ("sweep", "a model that writes its prompts again")
        raise HoEError(
            f"{given}= was given without {missing}; the hypervolume that an export loses needs both", argument=given
        )
    return FrontLost(source, tokenizer, sweep, rewards)


def refuse_unread(adapter: AdapterSource, base: str | os.PathLike[str] | None) -> None:
    """Refuse a base that nothing would be read of.

    Raises:
        HoEError: the adapter has experts of linear modules alone.
    """
    if base is not None and not adapter.apart:
        raise HoEError(
            f"base is {os.fspath(base)!r}, but nothing of it would be read: {adapter.label} has experts of linear modules "
            "alone; leave it out",
            argument="base",
            value=os.fspath(base),
        )
