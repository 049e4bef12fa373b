"""HoEModel: injects the layers and offers steering on the result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..config import HoEConfig
from ..errors import ExpertError
from ..routing import Route
from . import functional
from .frames import extent
from .layer import HoELayer
from .linear import HoELinear
from .plan import AdapterRouting
from .steering import Steering


class HoEModel(BaseTuner):
    """A base model whose linear modules carry hierarchical experts (HoE, arXiv 2505.20925).

    Made by `peft.get_peft_model(base, HoEConfig(...))`; everything here is reached through the PeftModel.
    """

    prefix: str = "hoe_"
    tuner_layer_cls = HoELayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # -- injection ---

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see PEFT.

        Raises:
            ExpertError: the configuration names no objectives, or the adapter's name holds a dot.
        """
        config: Any = self.peft_config[adapter_name]
        _check_injectable(config, adapter_name)
        self.steering = Steering.find(model) or Steering()
        self.steering.add(adapter_name, AdapterRouting(config))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.steering.attach(model)
        self.steering.refresh()

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
        if isinstance(target, HoELayer):
            target.update_layer(adapter_name, peft_config)
            return
        module = HoELinear(target, adapter_name, peft_config, current_key, self.steering)
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its preferences."""
        super().delete_adapter(adapter_name)
        self.steering.remove(adapter_name)

    # -- steering ---

    @property
    def preference(self) -> Mapping[str, float]:
        """What a call without `preference=` uses here and now, `{objective: weight}`, read-only (first active adapter)."""
        return functional.get_preference(self.model)

    def set_preference(self, preference: Any) -> None:
        """Make `preference` the default of this model.

        It is used by every later call that brings none of its own and is not inside a `use_preference` block, in all threads,
        and is saved with the adapter. Nothing becomes trainable or frozen by it.

        Args:
            preference: N numbers, a tensor, `{objective: weight}`, or `{adapter: preference}` for several HoE adapters.

        Raises:
            PreferenceError: not a point of the simplex, or unknown names; the old preference stays.
        """
        self.steering.set_preference(preference)

    def use_preference(self, preference: Any) -> contextlib.AbstractContextManager[None]:
        """A block in which `preference` is in effect, for this thread or asyncio task only.

        A thread started inside does not inherit it: pass `preference=` to the call there.
        """
        return self.steering.use_preference(preference)

    def route(self, preference: Any = None, adapter_name: str | None = None) -> Route:
        """Which experts and routers a preference (default: the current one) leads to; no forward is run."""
        return self.steering.route(preference, adapter_name)

    def mark_trained(
        self, routers: str | list[str] | None = None, *, trained: bool = True, adapter_name: str | None = None
    ) -> None:
        """Say that the weights of routers (default: all) have been set, so that their softmax votes from now on.

        Raises:
            ExpertError: there is no such router.
        """
        functional.mark_trained(self.model, routers, trained=trained, adapter_name=adapter_name)

    def generate(self, *args: Any, preference: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers does, with a preference, or one per row of the batch, for the whole call.

        A KV cache belongs to the preference that filled it: do not hand it to a call with another one.
        """
        settings = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        counts = [
            kwargs.get(name, getattr(settings, name, None)) or 1 for name in ("num_beams", "num_return_sequences")
        ]
        with self.steering.entered(preference, max(counts), extent(args, kwargs)[0]):
            return self.model.generate(*args, **kwargs)

    # -- merging ---

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, routers: str = "keep"
    ) -> None:
        """Bake the current preference into the base weights; see PEFT.

        Args:
            adapter_names: default the active ones.
            safe_merge: check for NaN before replacing weights.
            routers: "keep" refuses trained routers; "drop" bakes their static interpolation.

        Raises:
            StaticMergeError: before anything is changed.
        """
        with self._merging(adapter_names, routers):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        routers: str = "keep",
    ) -> nn.Module:
        """The base model with the current preference baked in; see PEFT, and `merge_adapter` for `routers`."""
        with self._merging(adapter_names, routers):
            model: nn.Module = super().merge_and_unload(
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        self.steering.detach()
        return model

    def unload(self) -> nn.Module:
        """The base model without the adapters."""
        model: nn.Module = super().unload()
        self.steering.detach()
        return model

    @contextlib.contextmanager
    def _merging(self, adapter_names: list[str] | None, routers: str) -> Iterator[None]:
        if routers not in ("keep", "drop"):
            raise ExpertError(f'routers is {routers!r}; use "keep" or "drop"')
        self.steering.drop_routers = routers == "drop"
        try:
            for layer in _layers(self.model):
                for adapter in self.active_adapters if adapter_names is None else adapter_names:
                    if adapter in layer.hoe_A and adapter not in layer.merged_adapters:
                        layer.check_mergeable(adapter)
            yield
        finally:
            self.steering.drop_routers = False

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for HoE: a preference is the weighting."""
        raise NotImplementedError(
            "HoE adapters are weighted by a preference, not by add_weighted_adapter: use set_preference, or give each row "
            "its own with preference=; to merge policies into a new expert, use peft_hoe.build_adapter"
        )


def _check_injectable(config: HoEConfig, adapter_name: str) -> None:
    if config.objectives is None:
        raise ExpertError('HoEConfig names no objectives; write HoEConfig(objectives=["helpful", "harmless"], ...)')
    if "." in adapter_name:
        raise ExpertError(f"the adapter name {adapter_name!r} holds a dot, which PEFT cannot save; choose another")


def _layers(model: nn.Module) -> Iterator[HoELinear]:
    return (module for module in model.modules() if isinstance(module, HoELinear))
