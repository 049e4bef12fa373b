"""PEFT's name for the tuner: a member of its enumeration of methods."""

from __future__ import annotations

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
