from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from peft_hoe.evaluation import Sweep
from peft_hoe.training.normalization import RewardNormalizer


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    """A tiny HoE Llama, its tokenizer and rewards: those of the training tests."""
    if "router_toys" not in sys.modules:
        path = Path(__file__).resolve().parents[1] / "training" / "router_toys.py"
        spec = importlib.util.spec_from_file_location("router_toys", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["router_toys"] = module
        spec.loader.exec_module(module)
    return sys.modules["router_toys"]


@pytest.fixture(scope="session")
def policy(toys: ModuleType) -> Any:
    """Two routers, the first of them trained to something of its own."""
    import torch

    model = toys.make_policy()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "hoe_router" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    model.mark_trained("r0")
    return model


@pytest.fixture(scope="session")
def tokenizer(toys: ModuleType) -> Any:
    return toys.make_tokenizer()


@pytest.fixture(scope="session")
def prompts(toys: ModuleType) -> list[str]:
    return [row["prompt"] for row in toys.PROMPTS[:6]]


def _make_sweep(
    points: Any, *, name: str = "A", preferences: Any = None, noise: float = 0.0, prompts: int = 4, **changes: Any
) -> Sweep:
    """A sweep whose mean rewards are `points` `(K, N)`; prompts differ by `noise` times a number of mean 0."""
    means = np.asarray(points, dtype=float)
    n = means.shape[1]
    offsets = np.resize([1.0, -1.0], prompts)[:, None] * noise
    rewards = (means[:, None] + offsets)[None, :, :, None]
    names = ("a", "b", "c", "d", "e")[:n]
    wanted = np.asarray(preferences if preferences is not None else np.eye(n)[np.arange(len(means)) % n], dtype=float)
    settings: dict[str, Any] = {
        "name": name, "objectives": names, "preferences": wanted, "prompts": [f"prompt {p}" for p in range(prompts)],
        "rewards": rewards, "completions": [[[[f"{name} {k} {p}"] for p in range(prompts)] for k in range(len(means))]],
        "normalizer": RewardNormalizer(np.eye(n), names) if n > 1 else None, "payoff_source": "given", "runs": [{"seed": 0}],
    }  # fmt: skip
    return Sweep(**{**settings, **changes})


@pytest.fixture(scope="session")
def make_sweep() -> Any:
    return _make_sweep
