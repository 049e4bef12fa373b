"""GGUF LoRA files for llama.cpp: one for each expert, to be mixed by scales in every request, or one for a preference.

llama.cpp multiplies a file's deltas by scale * alpha / rank, with one alpha for the file. Modules are therefore filled up to
one rank with zeros, and alpha is that rank. Shapes: A `(r, d_in)`, B `(d_out, r)`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, check_choice
from ..output_directory import check_output, complete_directory
from .engine_limits import refuse_apart
from .export_report import REPORT_FILE, ExportReport
from .gguf_naming import GGUFNaming, load_gguf
from .lora import for_files, open_source
from .lora_exporter import LoraExporter
from .lora_factors import LoraFactors, lora_factors
from .source import AdapterSource

INDEX_FILE = "llama_cpp.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def export_gguf(
    source: nn.Module | str | os.PathLike[str],
    preference: Any,
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: str = "float32",
    routers: str = "keep",
    prompts: Sequence[Any] | None = None,
    tokenizer: Any = None,
    adapter_name: str | None = None,
) -> ExportReport:
    """Write a preference as one GGUF LoRA, `lora.gguf`, exactly also with `interpolation="norm"`; its scale is 1.

    Args:
        source: as for `export_lora`, and so are the options below.
        preference: as for `export_lora`.
        base: directory or Hub id; only its config is read.
        output: directory for the file and its report.
        rank: as for `export_lora`.
        dtype: "float32" or "float16".
        routers: as for `export_lora`.
        prompts: as for `export_lora`.
        tokenizer: as for `export_lora`.
        adapter_name: as for `export_lora`.

    Raises:
        CheckpointError: the base's architecture or a module is not known here, or what `export_lora` raises.
    """
    check_choice("dtype", dtype, list(DTYPES))
    adapter, calibration = open_source(source, prompts, tokenizer, adapter_name, for_files(source, base))
    _check_parts(adapter)
    check_output(Path(output), overwrite=None)
    naming = GGUFNaming.of(base)
    exporter = LoraExporter(
        adapter, rank=rank, dtype=DTYPES[dtype], even=True, routers=routers, calibration=calibration
    )
    votes = exporter.votes(preference)
    factors = exporter.factors(votes)
    with complete_directory(Path(output)) as building:
        write_gguf_lora(building / "lora.gguf", naming, factors, adapter.base.embeddings)
        report = exporter.report(votes, factors, {}, Path(output))
        report.save(building / REPORT_FILE)
    return report


def export_gguf_experts(
    source: nn.Module | str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    adapter_name: str | None = None,
) -> list[Path]:
    """Write every expert as a GGUF LoRA of its own, and `llama_cpp.json` with their order.

    A request then mixes them with the scales that `expert_scales` gives.

    Args:
        source: as for `export_lora`.
        base: directory or Hub id; only its config is read.
        output: directory for the files.
        dtype: "float32" or "float16".
        adapter_name: as for `export_lora`.

    Returns:
        the files, in the order of the experts, which is that of `--lora` on llama-server's command line.

    Raises:
        CheckpointError: the base's architecture or a module is not known here, or what `export_lora` raises.
    """
    check_choice("dtype", dtype, list(DTYPES))
    adapter, _ = open_source(source, None, None, adapter_name, for_files(source, base))
    _check_parts(adapter)
    check_output(Path(output), overwrite=None)
    naming = GGUFNaming.of(base)
    names = adapter.config.expert_names
    files = [f"{index:02d}-{re.sub(r'[^0-9A-Za-z.-]+', '_', name)}.gguf" for index, name in enumerate(names)]
    with complete_directory(Path(output)) as building:
        for index, file in enumerate(files):
            write_gguf_lora(building / file, naming, _expert(adapter, index, DTYPES[dtype]), adapter.base.embeddings)
        index_content = {"objectives": adapter.objectives, "experts": names, "files": files}
        (building / INDEX_FILE).write_text(json.dumps(index_content, indent=2) + "\n", encoding="utf-8")
    return [Path(output) / file for file in files]


def _check_parts(adapter: AdapterSource) -> None:
    """Refuse what a GGUF LoRA cannot hold."""
    if adapter.config.modules_to_save:
        raise CheckpointError(
            f"{adapter.label} saves {sorted(adapter.config.modules_to_save)} whole, which a GGUF LoRA cannot hold; merge it "
            "into its base (--merged), and convert that",
            argument="modules_to_save", value=sorted(adapter.config.modules_to_save),
        )  # fmt: skip
    refuse_apart(adapter, "a GGUF LoRA cannot change a norm", norms_alone=True)
    if tied := list(adapter.base.tied_heads):
        refuse_apart(adapter, f"llama.cpp cannot add the LoRA of the embeddings to {tied}, which are tied to them")


def _expert(adapter: AdapterSource, index: int, dtype: torch.dtype) -> dict[str, LoraFactors]:
    """One expert alone, filled up to one rank."""
    only = torch.zeros(len(adapter.config.expert_names), dtype=torch.float64)
    only[index] = 1.0
    factors = {module: lora_factors(adapter, module, only, dtype=dtype) for module in adapter.modules}
    rank = max(each.rank for each in factors.values())
    return {module: each.widened(rank) for module, each in factors.items()}


def write_gguf_lora(
    path: Path, naming: GGUFNaming, factors: Mapping[str, LoraFactors], embeddings: Collection[str] = ()
) -> None:
    """Write modules' factors, all of one rank, as one GGUF LoRA whose own scale is 1.

    Of `embeddings`, A is stored the other way round: llama.cpp looks its rows up.

    Raises:
        CheckpointError: llama.cpp's architecture has no tensor for a module.
    """
    gguf = load_gguf()
    tensors = {}
    for module, each in factors.items():
        name, reorder = naming.tensor(module)
        tensors[f"{name}.lora_a"] = each.a.T.contiguous() if module in embeddings else each.a
        tensors[f"{name}.lora_b"] = reorder(each.b).contiguous()
    writer = gguf.GGUFWriter(path, naming.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(next(iter(factors.values())).rank))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
