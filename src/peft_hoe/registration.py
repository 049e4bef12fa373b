"""Makes PEFT know HoE: an enum member, then PEFT's own `register_peft_method`. Nothing else of PEFT is touched."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "hoe"


def peft_type() -> PeftType:
    """`PeftType.HOE`, added to the enumeration when it is not there yet.

    PEFT's registry looks members up in the enumeration, and transformers derives the parameter prefix from the member's
    value, so a plain string does not do.
    """
    name = NAME.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
        member.__objclass__ = PeftType  # type: ignore[attr-defined]
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType[name]


def register() -> None:
    """Register config and model with PEFT; doing it again is harmless."""
    from .config import HoEConfig
    from .tuner.model import HoEModel

    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME, config_cls=HoEConfig, model_cls=HoEModel)
