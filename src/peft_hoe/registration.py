"""Makes PEFT know HoE: an enum member, then PEFT's own `register_peft_method`. Nothing else of PEFT is touched."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .config import HoEConfig
from .peft_type import NAME, peft_type
from .tuner.model import HoEModel


def register() -> None:
    """Register config and model with PEFT; doing it again is harmless."""
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME, config_cls=HoEConfig, model_cls=HoEModel)
