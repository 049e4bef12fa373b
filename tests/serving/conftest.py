from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_hoe import HoELayer


@pytest.fixture
def steerable(toys: Any) -> Callable[..., PeftModel]:
    """A toy in float64 whose routers do something; `trained=` names those that vote by the input."""

    def make(*, trained: tuple[str, ...] = (), input_matters: bool = True, **changes: Any) -> PeftModel:
        model = toys.make_policy(**changes).double()
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if "hoe_router" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data = noise * (0.5 if input_matters or name.endswith("bias") else 0.0)
        for layer in model.modules():
            if isinstance(layer, HoELayer):
                layer.measure_lengths("default")
        if trained:
            model.mark_trained(list(trained))
        return model.eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 9) token ids of the toy."""
    return torch.randint(4, 32, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def as_lora(toys: Any) -> Callable[..., Any]:
    """Logits of the toy's base under an exported LoRA, as PEFT alone computes them, in float64."""

    def logits(directory: Any, ids: torch.Tensor, *, tied: bool = False) -> torch.Tensor:
        base = toys.make_base(tied=tied).double()
        return PeftModel.from_pretrained(base, directory, autocast_adapter_dtype=False).double()(input_ids=ids).logits

    return logits
