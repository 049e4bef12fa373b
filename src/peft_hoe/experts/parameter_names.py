"""Where a checkpoint keeps each parameter of a model: names in files differ from names in the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ParameterNames:
    """How checkpoints of one architecture call its parameters.

    Attributes:
        known: the model's own names.
        tied: `{parameter: the parameter whose memory it shares}`.
        prefix: the name under which a headed class holds the headless model.
    """

    known: frozenset[str]
    tied: dict[str, str]
    prefix: str
    _rename: Callable[[str], str | None] = field(repr=False)

    @classmethod
    def of(cls, model: Any) -> ParameterNames:
        """The names of a transformers model; its weights may be on the meta device."""
        known = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        return cls(known, _tied(model), model.base_model_prefix, _renamer(model))

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which gets names that were located before: what renames them does not travel."""
        return {**vars(self), "_rename": None}

    def forms(self, name: str) -> tuple[str, str, str]:
        """A name as it is, without, and with the prefix: headed and headless classes save differently."""
        return name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}"

    def share(self, name: str, other: str) -> bool:
        """Whether two parameters are one."""
        return self.tied.get(name, name) == self.tied.get(other, other)

    def locate(self, names: Iterable[str]) -> dict[str, str]:
        """Where the tensors of a file belong: `{parameter name: name in the file}`.

        transformers renames weights when it loads, and tied weights are saved once. A name that belongs to no parameter
        is kept under itself.
        """
        located = {}
        for name in names:
            renamed = self._rename(name)
            # None: transformers computes the parameter from this tensor and others.
            forms = self.forms(renamed) if renamed is not None else ()
            located[next((form for form in forms if form in self.known), name)] = name
        for alias, source in self.tied.items():
            for missing, other in ((alias, source), (source, alias)):
                if missing not in located and other in located:
                    located[missing] = located[other]
        return located


def _tied(model: Any) -> dict[str, str]:
    tied = getattr(model, "all_tied_weights_keys", None)  # transformers 5
    if tied is not None:
        return dict(tied)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or embedding is None:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    source = f"{names[id(embedding)]}.weight"
    aliases = [f"{name}.embed_tokens.weight" for name in ("encoder", "decoder") if hasattr(model, name)]
    aliases += [f"{names[id(head)]}.weight"] if head is not None else []
    return {alias: source for alias in aliases if alias != source}


def _renamer(model: Any) -> Callable[[str], str | None]:
    """How transformers names a tensor of the file; None where it computes the parameter from several of them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # transformers 4 has regular expressions on the class
        patterns = dict(getattr(model, "_checkpoint_conversion_mapping", None) or {})

        def rename(name: str) -> str | None:
            for pattern, replacement in patterns.items():
                name, hits = re.subn(pattern, replacement, name)
                if hits:
                    break
            return name

        return rename
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]

    def rename_or_skip(name: str) -> str | None:
        renamed, converter = rename_source_key(name, renamings, converters)  # type: ignore[arg-type]
        return renamed if converter is None else None

    return rename_or_skip
