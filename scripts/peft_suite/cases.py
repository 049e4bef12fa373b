"""LoRA's rows of PEFT's test tables, said with HoEConfig.

Other methods' rows say nothing about HoE and are left out; LoRA's are the ones whose targets are linear layers too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

from _pytest.mark.structures import ParameterSet
from peft import LoraConfig

from peft_hoe import HoEConfig

MANDATORY: dict[str, Any] = {"objectives": ["a", "b"], "train_experts": True}
# What every row is run with: three experts; a trained router that votes; ranks that differ, three objectives.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "routed": {"routers": [{"preference": [0.25, 0.75], "trained": True}], "default_preference": [0.3, 0.7]},
    "ranks": {
        "objectives": ["a", "b", "c"],
        "experts": [
            {"preference": [1, 0, 0], "r": 1},
            {"preference": [0, 1, 0], "r": 2},
            {"preference": [0, 0, 1], "r": 3},
            {"preference": [0.4, 0.3, 0.3], "r": 4},
        ],
        "default_preference": [0.5, 0.3, 0.2],
    },
}
# Targets of PEFT's custom models that are neither nn.Linear nor Conv1D.
OTHER_LAYERS = {"emb", "conv1d@Conv1d", "conv2d", "conv3d", "mha", "gru", "embed_tokens"}

_SAME = {
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
}
_RENAMED = {"init_lora_weights": "init_weights"}
# HoE has no counterpart, and no test that stays looks at what it does.
_DROPPED = {"bias", "lora_alpha", "lora_dropout"}


class Untranslatable(Exception):
    """A row about something that only LoRA has."""


def translate(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """HoEConfig's arguments for LoraConfig's.

    Raises:
        Untranslatable: an argument that HoEConfig has no counterpart of.
    """
    translated = {}
    for name, value in arguments.items():
        if name == "init_lora_weights" and not isinstance(value, bool):
            raise Untranslatable(f"{name}={value!r}")
        if name in _SAME or name in _RENAMED:
            translated[_RENAMED.get(name, name)] = value
        elif name not in _DROPPED:
            raise Untranslatable(name)
    return translated


class Translated(HoEConfig):
    """Makes a HoEConfig from LoraConfig's arguments, for tests that write LoraConfig(...) in their body."""

    def __new__(cls, **arguments: Any) -> HoEConfig:  # type: ignore[misc]
        return HoEConfig(**MANDATORY, **translate(arguments))


def translate_instance(config: LoraConfig) -> HoEConfig:
    """The same with a finished LoraConfig."""
    default = LoraConfig()
    names = [field.name for field in dataclasses.fields(config) if field.init]
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
    given.pop("peft_version", None)
    return HoEConfig(**MANDATORY, **translate(given))


def rows(names: list[str], values: Iterable[Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(variant, row) for LoRA's rows of a table, each row once, with HoEConfig in place of LoraConfig.

    Args:
        names: the columns; config_cls or config_class, and any number that end in kwargs, kwargs_1 or kwargs_2.
        values: the rows.
    """
    seen = []
    for value in values:
        row = cells(names, value)
        column = next(name for name in names if name in ("config_cls", "config_class"))
        if row[column] is not LoraConfig:
            continue
        tables = [name for name in names if "kwargs" in name]
        if not tables:
            yield "translated", tuple(Translated if name == column else row[name] for name in names)
            continue
        try:
            row |= {name: translate(row[name]) for name in tables} | {column: HoEConfig}
        except Untranslatable:
            continue
        key = {name: value for name, value in row.items() if name != "test_name"}
        if key in seen or any(_other_layer(row.get("model_id"), row[name]) for name in tables):
            continue
        seen.append(key)
        for variant, extra in VARIANTS.items():
            varied = row | {name: {**MANDATORY, **extra, **row[name]} for name in tables}
            if varied.get("tuner_method") == "lora":
                varied["tuner_method"] = "hoe"
            if "test_name" in varied:
                varied["test_name"] = varied["test_name"].replace("LoRA", f"HoE {variant}")
            yield variant, tuple(varied[name] for name in names)


def cells(names: list[str], value: Any) -> dict[str, Any]:
    """{column: cell} of one row, as pytest.mark.parametrize takes it."""
    if isinstance(value, ParameterSet):
        return dict(zip(names, value.values, strict=True))
    return dict(zip(names, value if len(names) > 1 else [value], strict=True))


def _other_layer(model: str | None, arguments: Mapping[str, Any]) -> bool:
    targets = arguments.get("target_modules") or []
    targets = {targets} if isinstance(targets, str) else set(targets)
    return bool((targets | {f"{target}@{model}" for target in targets}) & OTHER_LAYERS)


# LoRA's parameters and prefix, but not the names of LoraConfig's arguments.
_LORA = re.compile(r"(?<![A-Za-z])(?<!init_)lora(?![A-Za-z])(?!_(alpha|dropout|bias|only|weights|ga))")


def rename(code: CodeType, keep: Container[str] = ()) -> CodeType:
    """The same code with hoe_A for lora_A, and so on, in strings and in names other than `keep`."""

    def kept(name: str) -> bool:
        return name == "lora" or "." in name or name in keep

    def renamed(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            return rename(constant, keep)
        if isinstance(constant, str):
            return _LORA.sub("hoe", constant)
        if isinstance(constant, tuple):
            return tuple(renamed(item) for item in constant)
        return constant

    return code.replace(
        co_consts=tuple(renamed(constant) for constant in code.co_consts),
        co_names=tuple(name if kept(name) else _LORA.sub("hoe", name) for name in code.co_names),
    )
