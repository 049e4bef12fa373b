from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load_toys() -> ModuleType:
    """`router_toys.py` under its own name, which spawned processes import too."""
    spec = importlib.util.spec_from_file_location("router_toys", Path(__file__).with_name("router_toys.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["router_toys"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _own_precision() -> Iterator[None]:
    """transformers 4 leaves `bf16=True` in the environment, where later trainers and spawned processes find it."""
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.pop(name, None)
    yield
    os.environ.pop(name, None)
    if before is not None:
        os.environ[name] = before


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    return _load_toys()


def _maker(name: str, doc: str, needs: str | None = None) -> Any:
    """A fixture that makes trainers by a function of the toys; keywords beside the constructor's change the configuration."""

    def fixture(toys: ModuleType, tmp_path: Path) -> Callable[..., Any]:
        if needs is not None:
            pytest.importorskip(needs)

        def make(
            *,
            model: Any = None,
            output_dir: Path | None = None,
            constructor: dict[str, Any] | None = None,
            **changes: Any,
        ) -> Any:
            return getattr(toys, name)(model, output_dir or tmp_path / "run", constructor or {}, **changes)

        return make

    fixture.__doc__ = doc
    return pytest.fixture(fixture)


make_trainer = _maker("make_trainer", "A HoERouterTrainer on the toy.", "trl.experimental.ppo")
make_grpo = _maker("make_grpo_trainer", "A HoEGRPOTrainer on the toy.", "trl")
make_dpo_trainer = _maker("make_dpo_trainer", "A HoEDPOTrainer on the toy.", "trl")
make_distillation = _maker("make_distillation_trainer", "A HoEDistillationTrainer on the toy.")
