"""How llama.cpp calls the modules of a base, and in which order it keeps their rows.

Its Llama keeps the rows of q and k in another order (rotary pairs side by side), which in a LoRA is an order of B's rows.
Shapes: B `(d_out, r)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor
from transformers import AutoConfig

from ..errors import CheckpointError, HoEError
from ..inputs import refuse_no_base

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


@dataclass(frozen=True)
class GGUFNaming:
    """How llama.cpp calls the modules of one base, and how it orders their rows.

    Attributes:
        architecture: llama.cpp's name of it.
        layers: number of blocks.
        heads: number of heads whose rows are reordered, by the end of a module's name; empty where none are.
        tied: whether the output head is the embeddings, which have the only tensor.
    """

    architecture: str
    layers: int
    heads: dict[str, int]
    tied: bool

    @classmethod
    def of(cls, base: str | os.PathLike[str]) -> GGUFNaming:
        """From the config of a base.

        Raises:
            CheckpointError: it cannot be read, or its architecture is not in `ARCHITECTURES`.
            HoEError: there is no such folder, or it holds an adapter.
        """
        refuse_no_base(os.fspath(base))
        try:
            config = AutoConfig.from_pretrained(base)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read the config of the base {os.fspath(base)!r}: {error}",
                argument="base",
                value=os.fspath(base),
            ) from None
        if config.model_type not in ARCHITECTURES:
            raise CheckpointError(
                f"the base {os.fspath(base)!r} is a {config.model_type!r}; GGUF files are written for {sorted(ARCHITECTURES)}. "
                "For others export an ordinary LoRA with --even, and convert it with llama.cpp's convert_lora_to_gguf.py",
                value=config.model_type,
                allowed=sorted(ARCHITECTURES),
            )
        architecture, reorders = ARCHITECTURES[config.model_type]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if reorders else {}
        return cls(architecture, int(config.num_hidden_layers), heads, bool(config.tie_word_embeddings))

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
        if name is None or (self.tied and name == "output.weight"):
            why = ", since its head is the embeddings" if name else ""
            raise CheckpointError(
                f"llama.cpp's {self.architecture} has no tensor for the module {module!r}{why}; exclude it, or convert a "
                "merged checkpoint (--merged)",
                tensor=f"{module}.weight", argument="target_modules", value=module,
            )  # fmt: skip
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
