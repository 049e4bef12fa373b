"""What people hand over as files: prompts, preferences, and an adapter on its base."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import HoEError
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .preference import read_preference

# What peft, transformers and safetensors raise over files; KeyError of an unknown kind of adapter.
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
_TOKENIZER = re.compile("token|vocab|spiece|spm|tekken|sentencepiece|bpe", re.IGNORECASE)  # in a file's name


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

    Args:
        adapter: directory or Hub id.
        base: directory or Hub id; None for the one that the adapter names.

    Raises:
        HoEError: adapter, base or tokenizer cannot be loaded, and which of them; or nobody names the base.
    """
    from peft import PeftModel

    named = base or _named_base(adapter)
    who = "" if base else f". {adapter!r} names it; if it stands elsewhere, give --base (base=)"
    model = _load_base(named, who)
    try:
        return PeftModel.from_pretrained(model, adapter), load_tokenizer(named)
    except UNREADABLE as error:
        if isinstance(error, HoEError) and error.argument == "base":  # of the tokenizer
            raise
        raise HoEError(
            f"cannot put the adapter {adapter!r} on the base {named!r}: {_weights_missing(adapter) or said(error)}",
            argument="adapter", value=adapter,
        ) from error  # fmt: skip


def _named_base(adapter: str) -> str:
    """The base that an adapter's configuration names.

    Raises:
        HoEError: the configuration cannot be read, or names none.
    """
    from peft import PeftConfig

    try:
        found: str | None = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except UNREADABLE as error:
        raise HoEError(
            f"cannot read the configuration of the adapter {adapter!r}: {said(error)}", argument="adapter", value=adapter
        ) from error  # fmt: skip
    if not found:
        raise HoEError(f"{adapter} does not name its base model; give --base (base=)", argument="base", value=found)
    return found


def refuse_no_base(base: str, who: str = "") -> None:
    """Refuse what transformers would ask the Hub for though it is a path, or would put an adapter on, silently.

    Args:
        base: directory or Hub id.
        who: ends errors with where the name is from.

    Raises:
        HoEError: there is no such folder, or it holds an adapter.
    """
    if is_path(base) and not Path(base).is_dir():
        raise HoEError(f"there is no folder {base!r} for the base{who}", argument="base", value=base)
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise HoEError(
            f"{base!r} is an adapter itself, no base model; give the model that it stands on",
            argument="base",
            value=base,
        )


def _load_base(base: str, who: str) -> Any:
    """A base model; `who` ends errors with where its name is from."""
    from transformers import AutoModelForCausalLM

    refuse_no_base(base, who)
    try:
        return AutoModelForCausalLM.from_pretrained(base)
    except UNREADABLE as error:
        raise HoEError(f"cannot load the base {base!r}: {said(error)}{who}", argument="base", value=base) from error


def is_path(name: str) -> bool:
    """Whether it can be no id on the Hub, which is `name` or `owner/name`."""
    return Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1


def _weights_missing(adapter: str) -> str | None:
    """What is wrong with a directory without weights, for which PEFT asks the Hub."""
    files = [file.name for file in Path(adapter).iterdir()] if Path(adapter).is_dir() else None
    if files is None or any(name.startswith("adapter_model") for name in files):
        return None
    return f"the folder holds no {ADAPTER_WEIGHTS}, only {sorted(files)}; save or download the adapter again"


def said(error: Exception) -> str:
    """An error's text, and what it is where the text alone says little."""
    return str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


def load_tokenizer(base: str) -> Any:
    """A policy's tokenizer, padding on the left.

    Raises:
        HoEError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if Path(base).is_dir() and not any(_TOKENIZER.search(file.name) for file in Path(base).iterdir()):
        raise HoEError(
            f"{base!r} holds no tokenizer; save the model's there, with tokenizer.save_pretrained(...)",
            argument="base", value=base,
        )  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    except (OSError, ValueError) as error:
        raise HoEError(f"cannot load the tokenizer of {base!r}: {error}", argument="base", value=base) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
