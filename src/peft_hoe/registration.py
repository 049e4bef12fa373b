"""Makes PEFT know HoE: an enum member, then PEFT's own `register_peft_method`. Nothing else of PEFT is touched."""

from __future__ import annotations

import warnings

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .config import HoEConfig
from .peft_type import NAME, peft_type
from .tuner.model import HoEModel

_RENAMED = "`is_gradient_checkpointing` is deprecated"


def register() -> None:
    """Register config and model with PEFT; doing it again is harmless.

    PEFT 0.21 asks every model for an attribute that transformers has renamed in 5.23, so that each adapter would come with a
    warning that its user can do nothing about. The filter is the last one: a user's own, such as `-W error`, go before it.
    """
    warnings.filterwarnings("ignore", _RENAMED, FutureWarning, append=True)
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME, config_cls=HoEConfig, model_cls=HoEModel)
