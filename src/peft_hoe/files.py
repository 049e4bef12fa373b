"""Checks of files that several parts of the package read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}", path=path) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object", path=path)
    return content


def hoe_settings(directory: Path, label: str) -> dict[str, Any]:
    """What the configuration of a HoE adapter's directory says, as it stands there.

    Args:
        directory: of the adapter.
        label: how errors call it.

    Raises:
        CheckpointError: there is no HoE adapter.
    """
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{label} holds no adapter: there is no {ADAPTER_CONFIG}; give the directory or Hub id of a HoE adapter",
            path=path,
        )
    settings = read_json(path)
    if (kind := settings.get("peft_type")) != "HOE":
        raise CheckpointError(
            f"{label} holds an adapter of type {kind!r}, not 'HOE'; give the directory or Hub id of a HoE adapter",
            path=path, argument="peft_type", value=kind, allowed=["HOE"],
        )  # fmt: skip
    return settings


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON object into a file, which holds the old one or the new one, whatever happens meanwhile."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


class TensorInfo(NamedTuple):
    """A tensor as a safetensors file's header describes it: its dtype ("F32") and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by key, from its header, which also says how long the file must be.

    Raises:
        CheckpointError: names the file and the remedy.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
            return {key: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{os.fspath(path)} is truncated or not a safetensors file ({error}); save or download the adapter again",
            path=path,
        ) from error


def read_hub_header(
    repository: str,
    filename: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **unused: Any,
) -> dict[str, TensorInfo] | None:
    """As `read_header`, of a file on the Hub that need not be here yet: of its bytes only the header is fetched.

    Args:
        repository: its id.
        filename: the path in it.
        revision: branch, tag or commit.
        token: of the Hub.
        cache_dir: where files of the Hub are kept.
        unused: other arguments of `hf_hub_download`.

    Returns:
        None where it cannot be read, since it is not there, or the Hub cannot be reached; whoever loads the file will say so.

    Raises:
        CheckpointError: it is kept here, and no safetensors file.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, SafetensorsParsingError

    kept = try_to_load_from_cache(repository, filename, cache_dir=cache_dir, revision=revision)
    if isinstance(kept, str):
        return read_header(kept)
    try:
        found = HfApi(token=token).parse_safetensors_file_metadata(repository, filename, revision=revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, SafetensorsParsingError, OSError):
        return None
    return {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in found.tensors.items()}
