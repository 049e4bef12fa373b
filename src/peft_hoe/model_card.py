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

_BEGIN, _END = "<!-- peft_hoe: begin -->", "<!-- peft_hoe: end -->"


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
    block = f"{_BEGIN}\n{describe(config)}\n{_END}"
    text = card.text
    if _BEGIN in text and _END in text:
        text = re.sub(re.escape(_BEGIN) + r".*?" + re.escape(_END), lambda _: block, text, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    card.text = text
    card.data.tags = sorted({*(card.data.tags or []), "peft_hoe"})
    card.save(path)


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
