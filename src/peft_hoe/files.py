"""Checks of files that several parts of the package read."""

from __future__ import annotations

import os

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError


def check_readable(path: str | os.PathLike[str]) -> None:
    """Read a safetensors file's header, which says how long the file must be.

    Raises:
        CheckpointError: names the file and the remedy.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{os.fspath(path)} is truncated or not a safetensors file ({error}); save or download the adapter again",
            path=path,
        ) from error
