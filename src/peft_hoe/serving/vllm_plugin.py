"""vLLM with a preference in the model's name: a resolver of vLLM's turns it into an exact LoRA when it is first asked for.

vLLM loads this through the entry point `vllm.general_plugins` in each of its processes. It does nothing unless the environment
names adapters (`vllm_names.Settings`). vLLM answers 404 to a name that is none of ours; its prefix cache keeps names apart, so
preferences never share a key-value cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import HoEError, HoEWarning
from . import vllm_seams
from .vllm_names import Names, ServedAdapter
from .vllm_settings import Settings, refuse_parts

log = logging.getLogger(__name__)

RESOLVER = "peft_hoe"


def register() -> None:
    """The entry point: give vLLM the resolver, if the environment names adapters. Doing it again is harmless.

    Where trained routers vote, their gate goes into vLLM too. A vLLM that has no place for it serves the interpolation of the
    LoRA experts, with a warning.

    Raises:
        HoEError: what the environment asks for cannot be served, or the command line does not suffice for it.
    """
    settings = Settings.from_environment()
    if settings is None:
        return
    names = Names(settings)
    if (layout := names.layout) is not None:
        if found := vllm_seams.problems():
            warnings.warn(
                "trained routers cannot vote inside this vLLM, so that their preferences get the interpolation of the LoRA "
                f"experts (peft-hoe vllm-check): {'; '.join(found)}",
                HoEWarning,
                stacklevel=2,
            )
            names = Names(replace(settings, routers="drop"))
        else:
            check_devices(sys.argv)
            vllm_seams.install(layout)
    check_command_line(names, sys.argv)
    from vllm.lora.resolver import LoRAResolverRegistry

    if RESOLVER not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(RESOLVER, make_resolver(names))
    log.info("preferences of %s are served; --max-lora-rank %d is enough", ", ".join(names.adapters), names.max_rank)


def make_resolver(names: Names) -> Any:
    """VLLM's resolver for these names."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class PreferenceResolver(LoRAResolver):
        """Names with a preference become LoRAs."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """The LoRA of a name, or None where it is none of ours."""
            path = await asyncio.to_thread(names.path, lora_name)
            if path is None:
                return None
            _check_base(names.adapters[lora_name.partition("@")[0]], base_model_name)
            return LoRARequest(lora_name=lora_name, lora_int_id=lora_id(lora_name), lora_path=str(path))

    return PreferenceResolver()


def lora_id(name: str) -> int:
    """A number for a name, the same in every process; an API server replaces it by one of its own."""
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % (2**31 - 1)


def check_command_line(names: Names, arguments: list[str]) -> None:
    """See that `vllm serve` was started with a rank that suffices, where its command line says one.

    Raises:
        HoEError: it does not; says which does.
    """
    needed, text = names.max_rank, " ".join(arguments)
    found = re.findall(r"--max[-_]lora[-_]rank[ =](\d+)", text)
    given = int(found[-1]) if found else 16 if "--enable-lora" in text else None
    if given is not None and given < needed:
        raise HoEError(
            f"LoRAs of the grid have ranks up to {needed}, but --max-lora-rank is {given}; start vLLM with "
            f"--max-lora-rank {needed}; or {names.remedy(given)}",
            argument="--max-lora-rank", value=given, allowed=f"at least {needed}",
        )  # fmt: skip


def check_devices(arguments: list[str]) -> None:
    """See that a command line does not split the model, which would split the routers' input.

    Raises:
        HoEError: it does.
    """
    found = re.findall(r"(?:--tensor[-_]parallel[-_]size|-tp)[ =](\d+)", " ".join(arguments))
    if found:
        refuse_parts(int(found[-1]))


def _check_base(adapter: ServedAdapter, served: str) -> None:
    if adapter.base and Path(adapter.base).name != Path(served).name:
        log.warning("adapter %s was built on %s, but %s is served", adapter.name, adapter.base, served)
