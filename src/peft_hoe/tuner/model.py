"""HoEModel: injects the layers and offers steering on the result."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from .. import versions
from ..config import HoEConfig
from ..errors import HoEWarning, ModuleError
from ..patterns import matches
from ..routing import Route
from . import functional
from .adapter import Adapter
from .calls import THIS_THREAD
from .embedding import follows_embeddings, tie_heads
from .growing import Growing
from .injection import (
    check_injectable,
    check_named,
    check_same_kind,
    kind_of,
    warn_of_another_base,
    warn_of_fused_experts,
)
from .layer import HoELayer
from .linear import HoELinear
from .loading import check_state_dict, check_whole, settle_loaded
from .merging import Merging
from .steering import Steering
from .trace import RoutingTrace, trace_routing


class HoEModel(Growing, Merging, BaseTuner):
    """A base model whose linear modules carry hierarchical experts (HoE, arXiv 2505.20925).

    Made by `peft.get_peft_model(base, HoEConfig(...))`; everything here is reached through the PeftModel.

    >>> from peft import get_peft_model
    >>> from peft_hoe import HoEConfig, HoEModel, demo
    >>> config = HoEConfig(objectives=["helpful", "harmless"], target_modules="all-linear", task_type="CAUSAL_LM")
    >>> model = get_peft_model(demo.load_base(), config)
    >>> isinstance(model.base_model, HoEModel)
    True
    >>> model.set_preference([0.7, 0.3])
    >>> dict(model.preference)
    {'helpful': 0.7, 'harmless': 0.3}
    """

    prefix: str = "hoe_"
    tuner_layer_cls = HoELayer
    # The package's __init__ sets it: what serves models stands above the tuner.
    export_lora: ClassVar[Callable[..., Any]]
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # -- injection ---

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, peft_config, *args, **kwargs)
        # PeftModel gives a dictionary; a configuration alone comes from transformers' load_adapter or inject_adapter_in_model.
        if isinstance(peft_config, HoEConfig) and isinstance(model, PreTrainedModel):
            refused = versions.refused_without_peft_model()
            if refused is not None:
                warnings.warn(refused, HoEWarning, stacklevel=4)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see PEFT.

        Raises:
            ExpertError: the configuration names no objectives, or the adapter's name holds a dot.
        """
        config: Any = self.peft_config[adapter_name]
        check_named(model, config)
        everything = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
        config.renew()
        check_injectable(adapter_name, model)
        self.steering = Steering.find(model) or Steering()
        configs: Any = self.peft_config
        adapter = Adapter(adapter_name, configs, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        tie_heads(model, adapter_name)
        self.steering.add(adapter)
        self.steering.hooks.attach(model, check_state_dict, settle_loaded)
        warn_of_fused_experts(model, config, None if everything else self._check_target_module_exists)
        warn_of_another_base(model, adapter_name, config)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """What PEFT (0.21 and newer) is about to save; see `check_whole`."""
        return check_whole(super()._get_adapter_state_dict(*args, **kwargs))

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """PEFT's, but patterns, which may be a stranger's, are matched with a limit of time (`patterns.py`)."""
        if peft_config.votes_statically(key):
            return True
        names: dict[str, Any] = {}
        for field in ("target_modules", "exclude_modules"):
            pattern = getattr(peft_config, field)
            if isinstance(pattern, str):
                names[field] = {key} if matches(pattern, key, field) else {"-"}
        saved = [name for name in peft_config.modules_to_save or () if matches(rf"(^|.*\.){name}($|\..*)", key, name)]
        exact = copy(peft_config)
        for field, value in {**names, "modules_to_save": [re.escape(key)] if saved else None}.items():
            setattr(exact, field, value)
        return BaseTuner._check_target_module_exists(exact, key)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """PEFT's refusals by type of model, which it has for its own methods alone; they hold for any linear adapter."""
        as_lora: Any = SimpleNamespace(peft_type="LORA")
        try:
            super()._check_target_module_compatiblity(as_lora, model, target_name)
        except ValueError as error:
            raise ModuleError(str(error).replace("[PEFT:LORA] ", ""), module=target_name) from None

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        static = peft_config.votes_statically(current_key)
        if isinstance(target, HoELayer):
            check_same_kind(target, static, adapter_name)
            target.update_layer(adapter_name, peft_config)
            return
        if static and follows_embeddings(target, self.model, peft_config):
            return
        kind: Any = HoELinear if not static else kind_of(target)
        module = kind(target, adapter_name, peft_config, current_key, self.steering)
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's, which makes 16-bit adapters float32 for those who train them; frozen experts then take the base's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.model.modules():
            if isinstance(layer, HoELinear) and adapter_name in layer.hoe_layouts:
                layer.settle_dtypes(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its preferences."""
        super().delete_adapter(adapter_name)
        self.steering.remove(adapter_name)

    # -- calls ---

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with `preference=` for all rows or one per row, and `routers=` as in `use_preference`."""
        if torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        outer = THIS_THREAD.forward
        try:
            return self.model(*args, **kwargs)  # not its forward: the root's hooks are the entry
        finally:
            THIS_THREAD.forward = outer

    def generate(self, *args: Any, preference: Any = None, routers: str | None = None, **kwargs: Any) -> Any:
        """Generate as transformers does, with a preference, or one per row of the batch, for the whole call.

        `routers` is as in `use_preference`. A `preference` of the `generation_config` that is passed counts where the call
        brings none.

        A KV cache belongs to the preference that filled it: do not hand it to a call with another one.
        """
        return self.model.generate(*args, preference=preference, routers=routers, **kwargs)

    def generate_batch(self, *args: Any, preference: Any = None, routers: str | None = None, **kwargs: Any) -> Any:
        """Transformers' continuous batching, with one preference for all requests: the call's, the block's or the default.

        Raises:
            PreferenceError: one preference per request.
        """
        with self.steering.hooks.batching(preference, routers):
            return self.model.generate_batch(*args, **kwargs)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's entry for adapters that differ between rows, which it would otherwise drop without a word."""
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "HoE does not mix adapters in a batch: adapter_names is not supported. Rows differ by preference=[...]"
            )
        yield

    # -- steering ---

    @property
    def preference(self) -> Mapping[str, float]:
        """What a call without `preference=` uses here and now, `{objective: weight}`, read-only (first active adapter)."""
        return functional.get_preference(self.model)

    def set_preference(self, preference: Any, *, calibrated: bool = False) -> None:
        """Make `preference` the default of this model.

        It is used by every later call that brings none of its own and is not inside a `use_preference` block, in all threads,
        and is saved with the adapter. Nothing becomes trainable or frozen by it.

        Args:
            preference: N numbers, a tensor, `{objective: weight}`, or `{adapter: preference}` for several HoE adapters.
            calibrated: read it as a position of the calibrated dial (`evaluation.calibrate`), whose equal steps are equal steps
                along the front; the preference that it leads to becomes the default.

        Raises:
            PreferenceError: not a point of the simplex, or unknown names, or there is no calibration of these experts and
                routers; the old preference stays.
        """
        self.steering.set_preference(preference, calibrated=calibrated)

    def use_preference(
        self, preference: Any = None, *, routers: str | None = None, calibrated: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """A block in which `preference` is in effect, for this thread or asyncio task only.

        A thread started inside does not inherit it: pass `preference=` to the call there.

        Args:
            preference: as in `set_preference`, or one per row; None for the one in effect.
            routers: "keep": trained routers vote by the input, as always. "static": all routers vote as they did before they
                were trained. "drop": no router votes, which is the interpolation of the LoRA experts alone. Calls, `route`
                and merging inside go by it, and an inner block that says nothing about it.
            calibrated: as in `set_preference`.

        Raises:
            PreferenceError: not a point of the simplex, or unknown names.
            HoEError: `routers` is none of these.
        """
        return self.steering.use_preference(preference, routers=routers, calibrated=calibrated)

    def route(self, preference: Any = None, adapter_name: str | None = None) -> Route:
        """Which experts and routers a preference (default: the current one) leads to; no forward is run."""
        return self.steering.route(preference, adapter_name)

    def trace_routing(
        self, modules: Sequence[str] | None = None, *, adapter_name: str | None = None
    ) -> contextlib.AbstractContextManager[RoutingTrace]:
        """`with model.trace_routing() as trace:` keeps which expert worked on which token; see `peft_hoe.trace_routing`."""
        return trace_routing(self.model, modules, adapter_name=adapter_name)

    def mark_trained(
        self, routers: str | list[str] | None = None, *, trained: bool = True, adapter_name: str | None = None
    ) -> None:
        """Say that the weights of routers (default: all) have been set, so that their softmax votes from now on.

        Raises:
            ExpertError: there is no such router.
        """
        functional.mark_trained(self.model, routers, trained=trained, adapter_name=adapter_name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for HoE: a preference is the weighting."""
        raise NotImplementedError(
            "HoE adapters are weighted by a preference, not by add_weighted_adapter: use set_preference, or give each row "
            "its own with preference=; to merge policies into a new expert, use peft_hoe.build_adapter"
        )
