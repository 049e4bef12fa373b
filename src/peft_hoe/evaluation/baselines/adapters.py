"""Adapters that baselines build once in a folder and find again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils.peft_utils import find_adapter_config_file

from ...errors import HoEError
from ...experts import Loading, build_adapter
from ..methods.fingerprints import Source, source_digest


def load_base(base: Source, model_options: Mapping[str, Any] | None = None) -> Any:
    """A causal language model for inference."""
    return AutoModelForCausalLM.from_pretrained(os.fspath(base), **(model_options or {})).eval()


def load_policy(base: Source, policy: Source, model_options: Mapping[str, Any] | None = None) -> Any:
    """A policy with weights of its own: a full model, or the base with a LoRA adapter merged into it."""
    path = os.fspath(policy)
    if find_adapter_config_file(path) is None:
        return load_base(path, model_options)
    return PeftModel.from_pretrained(load_base(base, model_options), path).merge_and_unload().eval()


def load_adapted(base: Source, adapter: Path, model_options: Mapping[str, Any] | None = None) -> Any:
    """The base with an adapter."""
    return PeftModel.from_pretrained(load_base(base, model_options), str(adapter)).eval()


def built_adapter(
    folder: Source, base: Source, policies: Mapping[str, Source], *, experts: Sequence[Any] = (), **options: Any
) -> Path:
    """A HoE adapter of the policies' experts and `experts`, built unless `folder` has it.

    Args:
        folder: the adapter's own.
        base: directory or Hub id.
        policies: `{objective: directory or Hub id}`.
        experts: multi-objective ones.
        options: of `build_adapter`.

    Raises:
        HoEError: the folder holds another adapter.
    """
    path = Path(folder)
    request = {
        "base": source_digest(base), "policies": {name: source_digest(source) for name, source in policies.items()},
        "experts": [list(point) for point in experts], "options": {name: str(options[name]) for name in sorted(options)},
    }  # fmt: skip
    made_with = path.with_name(f"{path.name}.json")  # written first: an adapter appears when it is complete
    if path.exists() or made_with.exists():
        check_made_with(path, made_with, request)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made_with.write_text(json.dumps(request) + "\n", encoding="utf-8")
        options = {"loading": Loading(keep_shards=True), **options}  # there is a build for every preference
        build_adapter(os.fspath(base), policies, path, experts=list(experts), progress=False, **options)
    return path


def check_made_with(path: Path, record: Path, request: Mapping[str, Any], made: str = "made") -> None:
    """See that an adapter that is found is the one that is asked for.

    Args:
        path: of the adapter.
        record: the file beside it that says what it was made with.
        request: what must be the same, as plain JSON.
        made: how it came to be, for the error.

    Raises:
        HoEError: it was made with something else, or nobody knows with what.
    """
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    different = [name for name, value in request.items() if found.get(name) != value]
    if different:
        raise HoEError(
            f"{path} was {made} with another {', '.join(different)} (as {record.name} beside it says); give another folder=, "
            "or remove both yourself",
            argument="folder", value=os.fspath(path),
        )  # fmt: skip


def one_hot_adapter(
    folder: Source, base: Source, policies: Mapping[str, Source], *, interpolation: str = "linear", **options: Any
) -> Path:
    """The policies' experts only: steering it interpolates their deltas exactly, or with their length kept ("norm")."""
    path = Path(folder) / ("one_hot" if interpolation == "linear" else f"one_hot_{interpolation}")
    return built_adapter(path, base, policies, interpolation=interpolation, **options)
