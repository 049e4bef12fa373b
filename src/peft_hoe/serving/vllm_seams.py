"""Where routers get into vLLM, and whether this vLLM has the places that they were built for.

Its platform names the class that does the arithmetic of LoRAs; a subclass with the gate takes its place. That asks for no
more than three things: the platform's name for the class, a method that expands what another has shrunk, and the tensor that
says which token has which adapter. All of them are looked at before anything is replaced.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from .routed_lora import RoutedFormat

_HERE = "peft_hoe.serving.vllm_punica"
_OURS = {
    "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU": f"{_HERE}.RoutedPunicaCPU",
    "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU": f"{_HERE}.RoutedPunicaGPU",
}
_EXPAND = ("self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs", "kwargs")
_RESOLVE = ("self", "base_model_name", "lora_name")


def problems() -> list[str]:
    """What of this vLLM is not as it must be, in words; empty where routers can vote inside it."""
    try:
        from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
        from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
        from vllm.platforms import current_platform
        from vllm.utils.import_utils import resolve_obj_by_qualname
    except ImportError as error:
        return [f"vLLM is not there, or lies otherwise: {error}"]
    found = []
    if _parameters(LoRAResolver.resolve_lora) != _RESOLVE or not hasattr(LoRAResolverRegistry, "register_resolver"):
        found.append(f"LoRAResolver.resolve_lora takes {_parameters(LoRAResolver.resolve_lora)}, not {_RESOLVE}")
    name = _name_of(current_platform)
    if name not in (*_OURS, *_OURS.values()):
        found.append(f"the platform computes LoRAs with {name}; known are {sorted(_OURS)}")
        return found
    wrapper = resolve_obj_by_qualname(next(theirs for theirs, ours in _OURS.items() if name in (theirs, ours)))
    if _parameters(wrapper.add_expand) != _EXPAND:
        found.append(f"{wrapper.__name__}.add_expand takes {_parameters(wrapper.add_expand)}, not {_EXPAND}")
    source = re.sub(r"\s+", "", inspect.getsource(wrapper.add_lora_linear))
    calls = [source.find(call) for call in ("self.add_shrink(buffer,", "self.add_expand(y,buffer,lora_b_stacked,")]
    if -1 in calls or sorted(calls) != calls:
        found.append(f"{wrapper.__name__}.add_lora_linear does not shrink into a buffer and then expand it")
    if "self._token_lora_indices" not in inspect.getsource(PunicaWrapperBase.__init__):
        found.append("PunicaWrapperBase has no _token_lora_indices")
    return found


def install(layout: RoutedFormat) -> None:
    """Let vLLM make wrappers with the gate; to be called before it loads a model, where there are no `problems`."""
    from vllm.platforms import current_platform

    from . import vllm_punica

    vllm_punica.set_layout(layout)
    name = _name_of(current_platform)
    if name in _OURS:
        platform: Any = type(current_platform)
        platform.get_punica_wrapper = classmethod(lambda cls: _OURS[name])


def _name_of(platform: Any) -> str:
    try:
        return str(platform.get_punica_wrapper())
    except (AttributeError, NotImplementedError):
        return "nothing that it names"


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
