"""A preference merged into its base: a checkpoint that any engine loads, without adapters."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, HoEError, StaticMergeError
from ..inputs import UNREADABLE, refuse_no_base, said
from ..output_directory import check_output, complete_directory
from ..tasks import AUTO_CLASSES
from .export_report import REPORT_FILE, ExportReport
from .lora import for_files, open_front, open_source
from .lora_exporter import LoraExporter
from .lora_factors import LoraFactors


def export_merged(
    source: nn.Module | str | os.PathLike[str],
    preference: Any,
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    routers: str = "keep",
    prompts: Sequence[Any] | None = None,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    sweep: Any = None,
    rewards: Any = None,
) -> ExportReport:
    """Write base and adapter at a preference as one dense checkpoint, with the base's tokenizer.

    Args:
        source: as for `export_lora`.
        preference: as for `export_lora`.
        base: directory or Hub id; loaded on the CPU in its own dtype, which the merged weights are rounded to once.
        output: directory for the checkpoint.
        rank: as for `export_lora`.
        dtype: of the LoRA before it is merged; as for `export_lora`.
        routers: as for `export_lora`.
        prompts: as for `export_lora`.
        tokenizer: as for `export_lora`.
        adapter_name: as for `export_lora`.
        sweep: as for `export_lora`.
        rewards: as for `export_lora`.

    Raises:
        StaticMergeError: the base is quantised, or trained routers vote and nothing says how to freeze them.
        CheckpointError: the base is another one than the adapter was built for.
        HoEError: the base cannot be loaded, or what else `export_lora` raises.
    """
    directory = Path(output)
    refuse_no_base(os.fspath(base))
    check_output(directory, overwrite=None)
    adapter, calibration = open_source(source, prompts, tokenizer, adapter_name, for_files(source, base))
    front = open_front(source, tokenizer, sweep, rewards)
    exporter = LoraExporter(adapter, rank=rank, dtype=dtype, routers=routers, calibration=calibration, front=front)
    votes, factors, norms = exporter.weights(preference)
    report = exporter.report(votes, factors, norms, directory)
    report.notes.append(f"merged into {os.fspath(base)}; load it as an ordinary checkpoint")
    model = _load(base, adapter.config.task_type)
    merge(model, factors, {**dict(adapter.whole_tensors()), **norms}, adapter.base.tied_heads, os.fspath(base))
    with complete_directory(directory) as building:
        model.save_pretrained(building)
        try:
            transformers.AutoTokenizer.from_pretrained(base).save_pretrained(building)
        except (OSError, ValueError, ImportError) as error:
            report.notes.append(f"the base's tokenizer was not copied: {error}")
        report.save(building / REPORT_FILE)
    return report


def _load(base: str | os.PathLike[str], task: str | None) -> Any:
    auto, label = getattr(transformers, AUTO_CLASSES[task or "CAUSAL_LM"]), os.fspath(base)
    try:
        model = auto.from_pretrained(base, dtype="auto")
        quantised = getattr(model, "is_quantized", False)
    except UNREADABLE as error:
        # What quantised it may be missing here, and must not be installed to be refused then.
        if not (quantised := _says_quantised(base)):
            raise HoEError(f"cannot load the base {label!r}: {said(error)}", argument="base", value=label) from error
    if quantised:
        raise StaticMergeError(
            f"the base {label!r} is quantised, and adding to its weights would lose or change the adapter; give the base with "
            "plain weights",
            argument="base", value=label, allowed="a base with plain weights",
        )  # fmt: skip
    return model


def _says_quantised(base: str | os.PathLike[str]) -> bool:
    try:
        return getattr(transformers.AutoConfig.from_pretrained(base), "quantization_config", None) is not None
    except UNREADABLE:
        return False


@torch.no_grad()
def merge(
    model: Any, factors: Mapping[str, LoraFactors], whole: Mapping[str, Tensor], tied_heads: Collection[str], label: str
) -> None:
    """Add B A to the weights of a model, summed in float32 or wider, and put whole tensors in the place of its own.

    A head that is tied to adapted embeddings stays so; one that is adapted alone gets a weight of its own.

    Args:
        model: the base.
        factors: by module.
        whole: by the name of the parameter.
        tied_heads: modules whose weight is that of others in `factors`, and changes once.
        label: how errors call the base.

    Raises:
        CheckpointError: it has no such module, or one of another shape.
    """
    _untie_head(model, {module for module in factors if module not in tied_heads})
    own, modules = model.state_dict(), dict(model.named_modules())
    for module, each in factors.items():
        if module in tied_heads:
            continue
        wide = torch.promote_types(each.a.dtype, torch.float32)
        delta = each.b.to(wide) @ each.a.to(wide)
        delta = delta.T if isinstance(modules.get(module), (Conv1D, nn.Embedding)) else delta
        before = _own(own, f"{module}.weight", delta, label)
        before.copy_(before.to(torch.promote_types(before.dtype, wide)) + delta)
    for name, tensor in whole.items():
        _own(own, name, tensor, label).copy_(tensor)


def _own(own: Mapping[str, Tensor], name: str, change: Tensor, label: str) -> Tensor:
    """The base's tensor that a change is for."""
    found = own.get(name)
    if found is None or found.shape != change.shape:
        there = "no such tensor" if found is None else f"one of shape {tuple(found.shape)}"
        raise CheckpointError(
            f"the adapter changes {name!r} of shape {tuple(change.shape)}, but the base {label!r} has {there}; give the base "
            "that it was built for",
            tensor=name,
        )
    return found


def _untie_head(model: Any, changed: Collection[str]) -> None:
    """Give an output head that changes a weight of its own where embeddings that do not change share it."""
    try:
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return
    names = {id(module): name for name, module in model.named_modules()}
    if not isinstance(head, nn.Linear) or names[id(head)] not in changed:
        return
    if head.weight is not getattr(embeddings, "weight", None):
        return
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
