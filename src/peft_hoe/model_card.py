"""Completes the model card that PEFT writes, inside a marked block, as often as it is saved."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .preference import example
from .tasks import AUTO_CLASSES

_STEERING = ("<!-- peft_hoe: begin -->", "<!-- peft_hoe: end -->")
_SOURCES = ("<!-- peft_hoe sources: begin -->", "<!-- peft_hoe sources: end -->")


def complete(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Put what a user of the adapter must know into `directory/README.md`.

    PEFT writes the card before the configuration. A named adapter's folder has weights but no card: it gets one. Where
    there is neither, nothing is written.

    Args:
        directory: where the adapter is saved.
        config: of the adapter, as `HoEConfig.to_dict` gives it.
    """
    if config["objectives"] is None:
        return
    path = os.path.join(directory, "README.md")
    if os.path.exists(path):
        card = ModelCard.load(path)
    elif os.path.exists(os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)):
        card = ModelCard.from_template(ModelCardData(library_name="peft"))
    else:
        return
    card.text = _with_block(card.text, describe(config), *_STEERING)
    card.data.tags = sorted({*(card.data.tags or []), "peft_hoe"})
    card.save(path)


def add_sources(directory: str | os.PathLike[str], sources: Mapping[str, Any]) -> None:
    """Put into `directory/README.md` what the adapter was built from.

    Args:
        directory: with a card.
        sources: `{"base": source, "policies": {objective: source}}`, each with id, commit, license and hash.
    """
    rows = [("base", sources["base"]), *((f"policy {name}", source) for name, source in sources["policies"].items())]
    lines = ["## Built from", "", "| | model | commit | licence | hash |", "|---|---|---|---|---|"]
    lines += [
        _row(name, *(str(source[key] or "unknown").replace("|", "\\|") for key in ("id", "commit", "license", "hash")))
        for name, source in rows
    ]
    path = os.path.join(directory, "README.md")
    card = ModelCard.load(path)
    card.text = _with_block(card.text, "\n".join(lines), *_SOURCES)
    card.save(path)


def _with_block(text: str, content: str, begin: str, end: str) -> str:
    """The text with a marked block of this content, in the place of the one that it has."""
    block = f"{begin}\n{content}\n{end}"
    if begin in text and end in text:
        return re.sub(re.escape(begin) + r".*?" + re.escape(end), lambda _: block, text, flags=re.DOTALL)
    return f"{text.rstrip()}\n\n{block}\n"


def describe(config: Mapping[str, Any]) -> str:
    """The block's Markdown: how to load and steer, objectives, experts, routers, default preference."""
    objectives = list(config["objectives"] or [])
    task = str(config["task_type"] or "CAUSAL_LM").removeprefix("TaskType.")
    auto = AUTO_CLASSES.get(task, "AutoModel")
    base = config["base_model_name_or_path"] or "BASE_MODEL"
    default = _numbers(config["default_preference"]) if config["default_preference"] else "uniform"
    lines = [
        "## Steering this adapter",
        "",
        f"This is a HoE adapter (hierarchical experts, arXiv 2505.20925) for {len(objectives)} objectives: "
        f"{', '.join(objectives)}. One model serves any preference among them.",
        "",
        "```python",
        "# pip install peft-hoe",
        "import peft_hoe  # registers HOE with PEFT; without it PEFT says KeyError: 'HOE'",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'base = {auto}.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "PATH_OR_HUB_ID")',
        f"model.set_preference({example(objectives)})",
        "```",
        "",
        "Every call can bring its own preference, or one per row: `model.generate(**batch, preference=[...])`.",
        "",
        f"Default preference: {default}.",
        "",
        f"| expert | {' | '.join(objectives)} | rank |",
        "|---|" + "---|" * (len(objectives) + 1),
        *(_row(spec["name"], _cells(spec["preference"]), spec["r"]) for spec in config["experts"] or []),
    ]
    if config["routers"]:
        lines += [
            "",
            f"| router | {' | '.join(objectives)} | votes for | trained |",
            "|---|" + "---|" * (len(objectives) + 2),
            *(
                _row(
                    spec["name"],
                    _cells(spec["preference"]),
                    ", ".join(spec["votes_for"]),
                    "yes" if spec["trained"] else "no",
                )
                for spec in config["routers"]
            ),
        ]
    return "\n".join(lines)


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _cells(preference: list[float]) -> str:
    return " | ".join(f"{weight:.4g}" for weight in preference)


def _numbers(preference: list[float]) -> str:
    return "[" + ", ".join(f"{weight:.4g}" for weight in preference) + "]"
