"""GGUF LoRA files for llama.cpp: one for each expert, to be mixed by scales in every request, or one for a preference.

llama.cpp multiplies a file's deltas by scale * alpha / rank, with one alpha for the file. Modules are therefore filled up to
one rank with zeros, and alpha is that rank. Its Llama keeps the rows of q and k in another order (rotary pairs side by side),
which here is an order of B's rows. Shapes: A `(r, d_in)`, B `(d_out, r)`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from ..errors import CheckpointError, HoEError, check_choice
from ..output_directory import check_output, complete_directory
from .engine_limits import refuse_apart
from .export_report import ExportReport
from .lora import open_source
from .lora_exporter import LoraExporter
from .lora_factors import LoraFactors, lora_factors
from .source import AdapterSource

INDEX_FILE = "llama_cpp.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
# transformers' model types whose tensors are known: llama.cpp's architecture, and whether it reorders the rows of q and k.
ARCHITECTURES = {
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "granite": ("granite", True),
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "phi3": ("phi3", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "smollm3": ("smollm3", True),
}


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
    adapter, calibration = open_source(source, prompts, tokenizer, adapter_name)
    _check_linear(adapter)
    check_output(Path(output), overwrite=False)
    naming = GGUFNaming.of(base)
    exporter = LoraExporter(
        adapter, rank=rank, dtype=DTYPES[dtype], even=True, routers=routers, calibration=calibration
    )
    votes = exporter.votes(preference)
    factors = exporter.factors(votes)
    with complete_directory(Path(output)) as building:
        write_gguf_lora(building / "lora.gguf", naming, factors)
        report = exporter.report(votes, factors, {}, Path(output))
        report.save(building / "export_report.json")
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
    adapter, _ = open_source(source, None, None, adapter_name)
    _check_linear(adapter)
    check_output(Path(output), overwrite=False)
    naming = GGUFNaming.of(base)
    names = adapter.config.expert_names
    files = [f"{index:02d}-{re.sub(r'[^0-9A-Za-z.-]+', '_', name)}.gguf" for index, name in enumerate(names)]
    with complete_directory(Path(output)) as building:
        for index, file in enumerate(files):
            write_gguf_lora(building / file, naming, _expert(adapter, index, DTYPES[dtype]))
        index_content = {"objectives": adapter.objectives, "experts": names, "files": files}
        (building / INDEX_FILE).write_text(json.dumps(index_content, indent=2) + "\n", encoding="utf-8")
    return [Path(output) / file for file in files]


def _check_linear(adapter: AdapterSource) -> None:
    if adapter.config.modules_to_save:
        raise CheckpointError(
            f"{adapter.label} saves {sorted(adapter.config.modules_to_save)} whole, which a GGUF LoRA cannot hold; merge it "
            "into its base (--merged), and convert that"
        )
    refuse_apart(adapter, "GGUF LoRAs are written of linear modules alone")


def _expert(adapter: AdapterSource, index: int, dtype: torch.dtype) -> dict[str, LoraFactors]:
    """One expert alone, filled up to one rank."""
    only = torch.zeros(len(adapter.config.expert_names), dtype=torch.float64)
    only[index] = 1.0
    factors = {module: lora_factors(adapter, module, only, dtype=dtype) for module in adapter.modules}
    rank = max(each.rank for each in factors.values())
    return {module: each.widened(rank) for module, each in factors.items()}


def write_gguf_lora(path: Path, naming: GGUFNaming, factors: Mapping[str, LoraFactors]) -> None:
    """Write modules' factors, all of one rank, as one GGUF LoRA whose own scale is 1.

    Raises:
        CheckpointError: llama.cpp's architecture has no tensor for a module.
    """
    gguf = load_gguf()
    tensors = {}
    for module, each in factors.items():
        name, reorder = naming.tensor(module)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = each.a, reorder(each.b).contiguous()
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


@dataclass(frozen=True)
class GGUFNaming:
    """How llama.cpp calls the modules of one base, and how it orders their rows.

    Attributes:
        architecture: llama.cpp's name of it.
        layers: number of blocks.
        heads: number of heads whose rows are reordered, by the end of a module's name; empty where none are.
    """

    architecture: str
    layers: int
    heads: dict[str, int]

    @classmethod
    def of(cls, base: str | os.PathLike[str]) -> GGUFNaming:
        """From the config of a base.

        Raises:
            CheckpointError: it cannot be read, or its architecture is not in `ARCHITECTURES`.
        """
        try:
            config = AutoConfig.from_pretrained(base)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read the config of the base {os.fspath(base)!r}: {error}") from None
        if config.model_type not in ARCHITECTURES:
            raise CheckpointError(
                f"the base {os.fspath(base)!r} is a {config.model_type!r}; GGUF files are written for {sorted(ARCHITECTURES)}. "
                "For others export an ordinary LoRA with --even, and convert it with llama.cpp's convert_lora_to_gguf.py",
                value=config.model_type,
                allowed=sorted(ARCHITECTURES),
            )
        architecture, reorders = ARCHITECTURES[config.model_type]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if reorders else {}
        return cls(architecture, int(config.num_hidden_layers), heads)

    def tensor(self, module: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The name of a module's weight, and what puts the rows of B in order.

        Raises:
            CheckpointError: there is no such tensor.
        """
        gguf = load_gguf()
        architecture = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        name = gguf.get_tensor_name_map(architecture, self.layers).get_name(
            f"{module}.weight", try_suffixes=(".weight",)
        )
        if name is None:
            raise CheckpointError(
                f"llama.cpp's {self.architecture} has no tensor for the module {module!r}; exclude it"
            )
        heads = self.heads.get(module.rpartition(".")[2])
        return name, (lambda b: b) if heads is None else (lambda b: _pairs_side_by_side(b, heads))


def _pairs_side_by_side(b: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (x_1 ... x_n, y_1 ... y_n) to pairs (x_1, y_1, ... x_n, y_n)."""
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def load_gguf() -> ModuleType:
    """The package that writes the format.

    Raises:
        HoEError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise HoEError('GGUF files need the package gguf: pip install "peft-hoe[gguf]"') from None
    return gguf
