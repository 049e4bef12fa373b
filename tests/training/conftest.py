from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
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


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    return _load_toys()


@pytest.fixture
def make_trainer(toys: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """A HoERouterTrainer on the toy; keywords beside the constructor's change the configuration."""
    pytest.importorskip("trl.experimental.ppo")

    def make(
        *,
        model: Any = None,
        output_dir: Path | None = None,
        constructor: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Any:
        return toys.make_trainer(model, output_dir or tmp_path / "run", constructor or {}, **changes)

    return make


@pytest.fixture
def make_grpo(toys: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """A HoEGRPOTrainer on the toy; keywords beside the constructor's change the configuration."""
    pytest.importorskip("trl")

    def make(
        *,
        model: Any = None,
        output_dir: Path | None = None,
        constructor: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Any:
        return toys.make_grpo_trainer(model, output_dir or tmp_path / "run", constructor or {}, **changes)

    return make


@pytest.fixture
def make_dpo_trainer(toys: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """A HoEDPOTrainer on the toy; keywords beside the constructor's change the configuration."""
    pytest.importorskip("trl")

    def make(
        *,
        model: Any = None,
        output_dir: Path | None = None,
        constructor: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Any:
        return toys.make_dpo_trainer(model, output_dir or tmp_path / "run", constructor or {}, **changes)

    return make
