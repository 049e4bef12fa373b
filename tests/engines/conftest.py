"""Tests with real engines; `make engines` makes their environment. Elsewhere they skip, since the engines are not installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

OBJECTIVES = ("positive", "rich")


@pytest.fixture(scope="session")
def models(shared_dir: Path) -> Path:
    """A base and policies whose heads have 32 dimensions, which vLLM's attention on the CPU takes."""
    return shared_dir / "models" / "heads32"


@pytest.fixture(scope="session")
def vllm_engines(start_server: Any) -> ModuleType:  # which is loaded first: it imports that
    """`vllm_engines.py`: vLLM in this process, and as a server."""
    for needed in ("vllm", "openai"):
        pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location("vllm_engines", Path(__file__).with_name("vllm_engines.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def prompts(shared_dir: Path) -> list[str]:
    return json.loads((shared_dir / "data" / "stories" / "prompts.json").read_text())["test"][:3]


@pytest.fixture(scope="session")
def adapter(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies as experts and their merge, which keep their length between them; nothing votes by the input."""
    return build(tmp_path_factory.mktemp("engines") / "adapter")


@pytest.fixture(scope="session")
def model(load: Callable[[Path], Any], adapter: Path) -> Any:
    return load(adapter)


@pytest.fixture(scope="session")
def embedded(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with experts of the embeddings, to which this base's head is tied."""
    return build(tmp_path_factory.mktemp("embedded") / "adapter", capture=["embeddings"])


@pytest.fixture(scope="session")
def embedded_model(load: Callable[[Path], Any], embedded: Path) -> Any:
    return load(embedded)


@pytest.fixture(scope="session")
def trained(
    models: Path,
    shared_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    build: Callable[..., Path],
    load: Callable[[Path], Any],
) -> Path:
    """The same with two routers that were trained (by distillation), and vote otherwise than before."""
    from transformers import AutoTokenizer

    from peft_hoe import HoEDistillationConfig, train_routers

    folder = tmp_path_factory.mktemp("trained")
    policy = load(build(folder / "untrained", routers=[[0.25, 0.75], [0.75, 0.25]]))
    texts = json.loads((shared_dir / "data" / "stories" / "prompts.json").read_text())["train"][:64]
    arguments = HoEDistillationConfig(
        output_dir=str(folder / "run"),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        max_new_tokens=16,
        report_to="none",
        save_strategy="no",
        seed=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    rows = [{"prompt": text} for text in texts]
    train_routers(policy, arguments, trainer="distill", train_dataset=rows, processing_class=tokenizer)
    policy.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="session")
def trained_model(load: Callable[[Path], Any], trained: Path) -> Any:
    return load(trained)


@pytest.fixture(scope="session")
def build(models: Path) -> Callable[..., Path]:
    """Makes adapters of the policies, with options of `build_adapter`."""

    def make(output: Path, **options: Any) -> Path:
        import peft_hoe

        policies = {name: models / name for name in OBJECTIVES}
        peft_hoe.build_adapter(models / "base", policies, output, pruning=None, progress=False, **options)
        return output

    return make


@pytest.fixture(scope="session")
def load(models: Path) -> Callable[[Path], Any]:
    """Loads the base with an adapter."""

    def make(adapter: Path) -> Any:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
        base.generation_config.max_length = None  # tests say how many tokens are new
        return PeftModel.from_pretrained(base, adapter).eval()

    return make


@pytest.fixture(scope="session")
def differs() -> Callable[..., float | None]:
    """Compares an engine's greedy tokens with a model's: None where they are the same, else the gap of the two likeliest."""

    @torch.inference_mode()
    def compare(
        model: Any, prompt: Sequence[int], found: Sequence[int], preference: Sequence[float] | None, **options: Any
    ) -> float | None:
        options |= {} if preference is None else {"preference": list(preference)}
        wanted = model.generate(
            input_ids=torch.tensor([list(prompt)]),
            max_new_tokens=len(found),
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
            **options,
        )[0, len(prompt) :].tolist()
        places = [i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b]
        if not places and len(wanted) == len(found):
            return None
        first = places[0] if places else min(len(wanted), len(found))
        logits = model(input_ids=torch.tensor([[*prompt, *wanted[:first]]]), **options).logits[0, -1]
        top = logits.topk(2).values
        return float(top[0] - top[1])

    return compare
