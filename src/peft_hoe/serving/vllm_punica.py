"""vLLM's LoRA arithmetic with the gate in it: `add_expand` gates what `add_shrink` made, then expands as ever.

vLLM makes these classes, by the name that its platform gives (`vllm_seams.py`). LoRAs without routers, and tokens without a
LoRA, pass through. It is imported by vLLM's processes alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from . import vllm_gate
from .routed_lora import RoutedFormat
from .vllm_settings import refuse_parts


@torch.library.custom_op("peft_hoe::gate_lora", mutates_args=("inner",))
def gate_lora(inner: Tensor, lora_b: Tensor, memory: Tensor, experts: int, slots: int) -> None:
    """`vllm_gate.gate` as an operation that compilers take as it is, with a kernel of its own on a GPU."""
    layout = RoutedFormat(experts, slots)
    if inner.is_cuda:
        from . import vllm_gate_triton

        vllm_gate_triton.gate(inner, lora_b, memory, layout)
    else:
        vllm_gate.gate(inner, lora_b, memory, layout)


class _Gated:
    """What both wrappers have in common.

    Attributes:
        layout: of the LoRAs with routers; set before vLLM makes a wrapper.

    Raises:
        HoEError: the model is split over several devices, each of which would see a part of the routers' logits.
    """

    layout: ClassVar[RoutedFormat]
    _token_lora_indices: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_parts(get_tensor_model_parallel_world_size())

    def add_expand(self, y: Tensor, x: Any, lora_b_stacked: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        """Gate x, for each slice `(T, r)` float32, and expand it."""
        for inner, lora_b in zip(x, lora_b_stacked, strict=True):
            gate_lora(inner, lora_b, self._token_lora_indices[: len(inner)], self.layout.experts, self.layout.slots)
        return super().add_expand(y, x, lora_b_stacked, *args, **kwargs)  # type: ignore[misc]


class RoutedPunicaCPU(_Gated, PunicaWrapperCPU):
    """PunicaWrapperCPU with the gate."""


class RoutedPunicaGPU(_Gated, PunicaWrapperGPU):
    """PunicaWrapperGPU with the gate."""


def set_layout(layout: RoutedFormat) -> None:
    """Say how LoRAs with routers are laid out; before vLLM makes a wrapper."""
    _Gated.layout = layout
