"""One merge for each preference: task arithmetic, TIES and PCB-Merging.

For every λ the raw task vectors are merged anew and truncated to the rank of HoE's experts, their length restored as
`build_adapter` restores it (`rescale`); a one-hot λ is that policy's expert. Nothing is shared between preferences: M of them
need M merges, each as long as building an expert. Each λ has an adapter of its own, with the policies' experts beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import HoEError
from ...experts import Merging
from ...generation.completer import Completer
from ...preference import FloatArray
from ...routing import corner
from ...tuner.functional import use_preference
from ..methods.fingerprints import Source
from .adapters import built_adapter, load_adapted, load_base, one_hot_adapter
from .per_preference import PerPreference, sources_identity

# Name in tables: build_adapter's name of the merge
_MERGES = {"TA": "linear", "TIES": "ties", "PCB-Merging": "pcb"}


def _make(
    name: str,
    base: Source,
    policies: Mapping[str, Source],
    *,
    tokenizer: Any,
    folder: Source,
    decoding: Any = None,
    model_options: Mapping[str, Any] | None = None,
    merge_options: Mapping[str, float] | None = None,
    **build: Any,
) -> Merges:
    if "merging" in build:
        raise HoEError(
            f"{name} merges by {_MERGES[name]!r}; give its options as merge_options= instead of merging=",
            argument="merging", value=build["merging"],
        )  # fmt: skip
    merging = Merging(_MERGES[name], merge_options or {})
    completer = Completer(load_base(base, model_options), tokenizer, decoding)
    return Merges(name, base, policies, completer, Path(folder), model_options, merging, build)


ta = partial(_make, "TA")
ties = partial(_make, "TIES")
pcb = partial(_make, "PCB-Merging")


class Merges(PerPreference):
    """The model of the last preference is kept."""

    def __init__(
        self,
        name: str,
        base: Source,
        policies: Mapping[str, Source],
        completer: Completer,
        folder: Path,
        model_options: Mapping[str, Any] | None,
        merging: Merging,
        build: Mapping[str, Any],
    ) -> None:
        super().__init__(name, list(policies), completer, sources_identity(base, policies, merging=merging, **build))
        self.base, self.policies, self.folder, self.build = base, policies, folder, dict(build)
        self.model_options, self.merging = model_options, merging
        self._last: tuple[bytes, Any] | None = None

    @contextlib.contextmanager
    def at(self, preference: FloatArray) -> Iterator[Any]:
        """The model at a preference `(N,)`."""
        key = preference.tobytes()
        if self._last is None or self._last[0] != key:
            self._last = None  # never two models at once
            self._last = key, load_adapted(self.base, self.adapter(preference), self.model_options)
        model = self._last[1]
        with use_preference(model, {model.active_adapter: preference.tolist()}):
            yield model

    def adapter(self, preference: FloatArray) -> Path:
        """The folder of a preference's adapter, built where it is missing."""
        if corner(preference) is not None:
            return one_hot_adapter(self.folder, self.base, self.policies, **self.build)
        path = self.folder / self.merging.method / "_".join(f"{weight:.6g}" for weight in preference)
        return built_adapter(
            path, self.base, self.policies, experts=[preference.tolist()], merging=self.merging, **self.build
        )
