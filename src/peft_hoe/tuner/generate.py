"""A root model's `generate`, which a preference can be given to: by the call, or by its `generation_config`.

transformers' own refuses arguments that it does not know, and ignores what else a GenerationConfig holds. So the root carries a
`generate` of its own, as PEFT puts its `prepare_inputs_for_generation` there: plain models with a loaded adapter, pipelines and
servers of transformers then take a preference as a PeftModel does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from transformers import GenerationConfig

from ..errors import PreferenceError
from .calls import THIS_THREAD


class Hooks(Protocol):
    """What `generate` asks of the root's hooks."""

    steering: Any

    @property
    def generating(self) -> Callable[..., AbstractContextManager[None]]:
        """A block with one plan for all forwards inside."""


class SteeredGenerate:
    """`generate` of one root model.

    Args:
        root: the model.
        hooks: on its forward.
    """

    def __init__(self, root: Any, hooks: Hooks) -> None:
        self._root, self._hooks = root, hooks
        self._inner = vars(root).get("generate")  # put there by somebody else
        self.__doc__ = type(root).generate.__doc__

    def restore(self) -> None:
        """Leave the root as it was."""
        del self._root.generate
        if self._inner is not None:
            self._root.generate = self._inner

    def __call__(self, *args: Any, preference: Any = None, routers: str | None = None, **kwargs: Any) -> Any:
        """Generate as transformers does, with a preference, or one per row of the batch, for the whole call.

        Args:
            *args: as transformers takes.
            preference: for all rows or one for each; default that of the call's `generation_config`, if it has one.
            routers: as in `use_preference`.
            **kwargs: as transformers takes.

        Raises:
            PreferenceError: not a point of the simplex, or rows that are not the batch's.
        """
        configs = [item for item in (*args, kwargs.get("generation_config")) if isinstance(item, GenerationConfig)]
        if preference is None:
            preference = next((found for config in configs if (found := getattr(config, "preference", None))), None)
        around = THIS_THREAD.generating
        inside = around is not None and around.steering is self._hooks.steering
        if inside and preference is None and routers is None:  # a generate that calls itself
            return self._generate(*args, **kwargs)
        own = getattr(self._root, "generation_config", None)
        _check_own(own, configs)
        steered = self._hooks.generating(
            self._root,
            args,
            kwargs,
            preference=preference,
            routers=routers,
            expansions=set(_expansions(kwargs, [*configs, own])),
        )
        with steered:
            return self._generate(*args, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if self._inner is not None:
            return self._inner(*args, **kwargs)
        return type(self._root).generate(self._root, *args, **kwargs)


def _check_own(own: Any, configs: Iterable[GenerationConfig]) -> None:
    preference = getattr(own, "preference", None)
    if preference is not None and all(config is not own for config in configs):
        raise PreferenceError(
            f"the model's own generation_config has the preference {preference!r}, which is not read: model.set_preference "
            "makes a default; a generation_config that is passed to generate counts for that call",
            argument="preference",
            value=preference,
        )


def _expansions(kwargs: dict[str, Any], configs: Iterable[Any]) -> Iterator[int]:
    """How often rows may be repeated; which source counts is transformers' affair, and differs between its versions."""
    sources = [kwargs, *(vars(config) for config in configs if config)]
    beams, returned = ({source.get(name) or 1 for source in sources} for name in ("num_beams", "num_return_sequences"))
    # Most models repeat rows by the greater of the two; Whisper by one, then by the other.
    yield from beams | returned
    yield from (beam * copies for beam in beams for copies in returned)
