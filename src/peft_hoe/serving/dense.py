"""A preference merged into its base: a checkpoint that any engine loads, without adapters."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import transformers
from peft import LoraConfig, PeftModel
from torch import nn

from ..errors import HoEError, StaticMergeError
from ..output_directory import check_output, complete_directory
from ..tasks import AUTO_CLASSES
from .export_report import ExportReport
from .lora import export_lora


def export_merged(
    source: nn.Module | str | os.PathLike[str],
    preference: Any,
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    **options: Any,
) -> ExportReport:
    """Write base and adapter at a preference as one dense checkpoint, with the base's tokenizer.

    Args:
        source: as for `export_lora`.
        preference: as for `export_lora`.
        base: directory or Hub id; loaded on the CPU in its own dtype, which the merged weights are rounded to.
        output: directory for the checkpoint.
        **options: as for `export_lora`, but `overwrite`.

    Raises:
        StaticMergeError: the base is quantised, or trained routers vote and nothing says how to freeze them.
        HoEError: the base cannot be loaded, or what else `export_lora` raises.
    """
    directory = Path(output)
    check_output(directory, overwrite=False, sources=[])
    with tempfile.TemporaryDirectory() as lora:
        report = export_lora(source, preference, Path(lora) / "lora", **options)
        model = _load(base, Path(lora) / "lora")
        merged = model.merge_and_unload(safe_merge=True)
    report.output = str(directory)
    report.notes = [f"merged into {os.fspath(base)}; load it as an ordinary checkpoint"]
    with complete_directory(directory) as building:
        merged.save_pretrained(building)
        try:
            transformers.AutoTokenizer.from_pretrained(base).save_pretrained(building)
        except (OSError, ValueError) as error:
            report.notes.append(f"the base's tokenizer was not copied: {error}")
        report.save(building / "export_report.json")
    return report


def _load(base: str | os.PathLike[str], lora: Path) -> Any:
    task = LoraConfig.from_pretrained(str(lora)).task_type
    auto = getattr(transformers, AUTO_CLASSES[task or "CAUSAL_LM"])
    try:
        model = auto.from_pretrained(base, dtype="auto")
    except (OSError, ValueError) as error:
        raise HoEError(f"cannot load the base {os.fspath(base)!r}: {error}") from None
    if getattr(model, "is_quantized", False):
        raise StaticMergeError(
            f"the base {os.fspath(base)!r} is quantised, and adding to its weights would lose or change the adapter; "
            "give the base with plain weights"
        )
    return PeftModel.from_pretrained(model, lora)
