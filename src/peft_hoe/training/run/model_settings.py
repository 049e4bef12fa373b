"""What trainers write into a user's model, there while a run lasts only."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

# The second is accelerate's, under autocast; the hooks are those of gradient checkpointing.
_WRITTEN = ("forward", "_original_forward", "model_tags", "_require_grads_hook", "_require_grads_hooks")
_ABSENT = object()
_RENAMED = r"`(is_)?gradient_checkpointing\w*` is deprecated"


class ModelSettings:
    """The settings that a run needs in a model, apart from the user's.

    TRL, transformers and accelerate write special tokens and `use_cache` into the configurations, set dropout to 0, tag the
    model, hook its embeddings, and give it a new `forward`, for autocast and, since TRL 1.16, for a fused language-model head.
    Their constructor, training and evaluation run inside `applied`. There transformers does not warn that a name has changed,
    since it is TRL and PEFT that use the old one. A model that was moved to another device stays there.

    Args:
        policy: a PeftModel.
        others: more models, of which the forwards are kept.
    """

    def __init__(self, policy: Any, *others: nn.Module) -> None:
        base = policy.get_base_model()
        self._models = [policy, base, *others]
        config = base.config
        texts = config.get_text_config() if hasattr(config, "get_text_config") else config
        embeddings = base.get_input_embeddings()
        written = [vars(config), vars(texts), embeddings._forward_hooks]
        if getattr(base, "generation_config", None) is not None:
            written.append(vars(base.generation_config))
        self._written = list({id(values): values for values in written}.values())
        self._dropouts = [module for module in base.modules() if isinstance(module, nn.Dropout)]
        self._runs: Any = None
        self._inside = False

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has what the block before left; afterwards it has again what the user gave it. May be nested."""
        if self._inside:
            yield
            return
        users, self._inside = self._read(), True
        if self._runs is not None:
            self._write(self._runs)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", _RENAMED, FutureWarning)
                yield
        finally:
            self._inside = False
            self._runs = self._read()
            self._write(users)

    def _read(self) -> Any:
        attributes = [{name: _copy(vars(model).get(name, _ABSENT)) for name in _WRITTEN} for model in self._models]
        rates = [dropout.p for dropout in self._dropouts]
        return attributes, [dict(values) for values in self._written], rates

    def _write(self, saved: Any) -> None:
        attributes, contents, rates = saved
        for model, values in zip(self._models, attributes, strict=True):
            for name, value in values.items():
                if value is _ABSENT:
                    vars(model).pop(name, None)
                else:
                    vars(model)[name] = value
        for values, content in zip(self._written, contents, strict=True):
            values.clear()
            values.update(content)
        for dropout, rate in zip(self._dropouts, rates, strict=True):
            dropout.p = rate


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
