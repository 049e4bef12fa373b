"""The configuration file of an exported LoRA."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig

from .source import AdapterSource


def lora_config(source: AdapterSource, ranks: Mapping[str, int]) -> LoraConfig:
    """The configuration of a LoRA whose scale is 1 in every module, whatever its rank."""
    common = max(ranks.values())
    # PEFT looks patterns up by a name's end: the caret keeps a name that is the end of another one to itself.
    names = [name for name in ranks if ranks[name] != common]
    patterns = {f"^{name}" if _is_end(name, ranks) else name: ranks[name] for name in names}
    config = source.config
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=sorted(ranks),
        modules_to_save=[*(config.modules_to_save or ()), *source.base.saved_whole()] or None,
        fan_in_fan_out=bool(config.fan_in_fan_out if source.stored_transposed is None else source.stored_transposed),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _is_end(name: str, others: Mapping[str, int]) -> bool:
    return any(other.endswith(f".{name}") for other in others)
