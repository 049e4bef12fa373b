"""Tests with real engines; `make engines` makes their environment. Elsewhere they skip, since the engines are not installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

OBJECTIVES = ("positive", "rich")


@pytest.fixture(scope="session")
def models(shared_dir: Path) -> Path:
    """A base and policies whose heads have 32 dimensions, which vLLM's attention on the CPU takes."""
    return shared_dir / "models" / "heads32"


@pytest.fixture(scope="session")
def prompts(shared_dir: Path) -> list[str]:
    return json.loads((shared_dir / "data" / "stories" / "prompts.json").read_text())["test"][:3]


@pytest.fixture(scope="session")
def adapter(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies as experts and their merge, which keep their length between them; nothing votes by the input."""
    import peft_hoe

    output = tmp_path_factory.mktemp("engines") / "adapter"
    policies = {name: models / name for name in OBJECTIVES}
    peft_hoe.build_adapter(models / "base", policies, output, pruning=None, progress=False)
    return output


@pytest.fixture(scope="session")
def model(models: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    base.generation_config.max_length = None  # tests say how many tokens are new
    return PeftModel.from_pretrained(base, adapter).eval()


@pytest.fixture(scope="session")
def differs(model: Any) -> Callable[..., float | None]:
    """Compares an engine's greedy tokens with ours: None where they are the same, else the gap of the two likeliest there."""

    @torch.inference_mode()
    def compare(prompt: Sequence[int], found: Sequence[int], preference: Sequence[float]) -> float | None:
        ids = torch.tensor([list(prompt)])
        output = model.generate(
            input_ids=ids,
            preference=list(preference),
            max_new_tokens=len(found),
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        wanted = output[0, len(prompt) :].tolist()
        places = [i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b]
        if not places and len(wanted) == len(found):
            return None
        first = places[0] if places else min(len(wanted), len(found))
        logits = model(input_ids=torch.tensor([[*prompt, *wanted[:first]]]), preference=list(preference)).logits[0, -1]
        top = logits.topk(2).values
        return float(top[0] - top[1])

    return compare
