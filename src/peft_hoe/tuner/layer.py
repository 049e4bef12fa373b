"""The HoE layer: the tensors of adapters in a module, the steering that they answer to, and the plan in effect.

The sum that experts make of an input is in `mixture.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import HoEConfig
from ..errors import PreferenceError
from ..preference import FloatArray
from .adapter_tensors import AdapterTensors
from .base_modules import GuardedWeight
from .calls import THIS_THREAD, Call, ForwardMemory
from .plan import Plan
from .steering import Steering


class ModuleBias(nn.Module):
    """What trains of a router that votes by module, in one module: b `(slots,)`.

    Args:
        bias: where it starts.
    """

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())


class HoELayer(AdapterTensors):
    """What makes a module a HoE layer: adapter tensors, trainability, votes and the plan in effect.

    >>> from peft_hoe import HoELayer, demo
    >>> layers = [module for module in demo.load_demo_adapter().modules() if isinstance(module, HoELayer)]
    >>> layers[0].module_name
    'model.layers.0.self_attn.q_proj'
    """

    def __init__(self, base_layer: nn.Module, name: str, steering: Steering) -> None:
        super().__init__(base_layer, name)
        self.hoe_steering = steering
        # A router that trains has Parameters of its own: by adapter, its voting slots and what computes their logits.
        self.trained_rows: dict[str, tuple[slice, nn.Module]] = {}
        self._merged: dict[str, tuple[FloatArray, torch.Tensor]] = {}  # preference and votes merged in
        self._memory = ForwardMemory()

    # -- adapters ---

    def update_layer(self, adapter_name: str, config: HoEConfig) -> None:
        """Add an adapter: experts with a zero delta, routers that repeat their static votes."""
        super().update_layer(adapter_name, config)
        self.hoe_steering.lies_at(next(iter(self.adapter_tensors(adapter_name).values())))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.hoe_steering.remove(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Activate adapters. Experts stay frozen unless the adapter was made with `train_experts=True`."""
        super().set_adapter(adapter_names, *args, **kwargs)
        self.hoe_steering.active = tuple(self.active_adapters)

    # -- the plan in effect ---

    @property
    def weight(self) -> torch.Tensor:
        """The base weight. While the model runs steered, it is guarded against being computed with past this layer."""
        weight: torch.Tensor = super().weight
        steered = any(name in self.hoe_layouts for name in self.active_adapters) and not (
            self.merged or self.disable_adapters
        )
        plain = type(weight) in (nn.Parameter, torch.Tensor)
        if (
            plain
            and steered
            and not torch.compiler.is_compiling()
            and THIS_THREAD.call_of(self.hoe_steering) is not None
        ):
            return GuardedWeight.of(weight, self.module_name)
        return weight

    def _plan(self) -> tuple[Plan, Call | None]:
        """The plan in effect, and the call that it comes from (None while compiling with the defaults)."""
        steering = self.hoe_steering
        call = THIS_THREAD.forward
        if call is None or call.steering is not steering or call.plan is None:
            call = THIS_THREAD.call_of(steering)
        if torch.compiler.is_compiling():
            return (steering.default if call is None or call.plan is None else call.plan), call
        if torch._C._current_graph_task_id() != -1:
            replayed = self._memory.replay(self.module_name)
            if replayed is not None and replayed.plan is not None:
                return replayed.plan, replayed
        if call is None or call.plan is None:  # a part of the model is called by itself
            call = Call(steering, steering.plan_for(), grad=torch.is_grad_enabled() or self.training)
        if call.grad:
            self._memory.remember(call)
        return call.plan or steering.default, call

    def check_merged(self, plan: Plan) -> None:
        """See that a forward asks for what is merged in.

        Raises:
            PreferenceError: it asks for another preference.
        """
        for adapter, (preference, _) in self._merged.items():
            wanted = plan.adapters.get(adapter)
            if wanted is not None and not np.allclose(wanted.preferences, preference, rtol=0, atol=1e-9):
                raise PreferenceError(
                    f"adapter {adapter!r} is merged at {preference.tolist()}, but {wanted.preferences.tolist()} is asked for; "
                    "call unmerge_adapter() first, or merge_and_unload() for a model of its own",
                    argument="preference",
                    value=wanted.preferences.tolist(),
                    allowed=preference.tolist(),
                )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True where no router that was trained votes by the input at the current preference."""
        try:
            self.hoe_steering.mergeable_plan(adapter_name)
        except ValueError:
            return False
        return True
