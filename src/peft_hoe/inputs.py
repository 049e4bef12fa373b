"""What people hand over as files: prompts, preferences, and an adapter on its base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import HoEError
from .preference import read_preference


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Rows with `prompt` and perhaps other columns, see `read_rows`."""
    return read_rows(path, "prompts", ("prompt",))


def read_rows(path: str, what: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a file: JSON (a list), JSON lines, or text, of which each line is a prompt.

    Args:
        path: the file.
        what: what errors call the rows.
        columns: of which each row needs one.

    Raises:
        HoEError: the file cannot be read, or holds no such rows.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            items = json.loads(text)
        elif path.endswith(".jsonl"):
            items = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            items = [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise HoEError(f"cannot read the {what} {path!r}: {error}", value=path) from None
    rows = [{"prompt": item} if isinstance(item, str) else item for item in items] if isinstance(items, list) else []
    if not rows or not all(isinstance(row, dict) and any(name in row for name in columns) for row in rows):
        strings = "strings, or objects" if "prompt" in columns else "objects"
        raise HoEError(
            f"{path} must hold a list of {what}: {strings} with {' or '.join(f'`{name}`' for name in columns)}",
            value=path, allowed=list(columns),
        )  # fmt: skip
    return rows


def read_preferences(text: str) -> Any:
    """`grid`, or the rows of a file.

    Raises:
        HoEError: the file cannot be read.
        PreferenceError: a line is no preference.
    """
    if text == "grid":
        return text
    try:
        content = Path(text).read_text(encoding="utf-8")
        if text.endswith(".json"):
            return json.loads(content)
    except (OSError, ValueError) as error:
        raise HoEError(
            f"cannot read the preferences {text!r}: {error}; write `grid` or a file's name",
            argument="preferences", value=text, allowed="`grid` or a file's name",
        ) from None  # fmt: skip
    return [read_preference(line) for line in content.splitlines() if line.strip()]


def load_adapter(adapter: str, base: str | None) -> tuple[Any, Any]:
    """A PeftModel and its base's tokenizer, padding on the left.

    Raises:
        HoEError: one of them cannot be loaded, or nobody names the base.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    try:
        base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
        if not base:
            raise HoEError(f"{adapter} does not name its base model; give --base", argument="base", value=base)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    except (OSError, ValueError) as error:
        raise HoEError(
            f"cannot load the adapter {adapter!r} on the base {base!r}: {error}", argument="adapter", value=adapter
        ) from None
    return model, load_tokenizer(base)


def load_tokenizer(base: str) -> Any:
    """A policy's tokenizer, padding on the left.

    Raises:
        HoEError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    except (OSError, ValueError) as error:
        raise HoEError(f"cannot load the tokenizer of {base!r}: {error}", argument="base", value=base) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
