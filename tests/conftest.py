"""Shared fixtures. No test reaches the network."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import pytest
import torch

from peft_hoe import Sweep, versions
from peft_hoe.objectives import RewardNormalizer

# One thread a test process, unless the environment asks for more: `make test` runs a process on each core.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


def pytest_configure(config: pytest.Config) -> None:
    """Where the installed PEFT and transformers do not save together, tests that only load do not care."""
    if versions.refused_without_peft_model():
        config.addinivalue_line("filterwarnings", "ignore:transformers .* asks for peft:peft_hoe.HoEWarning")


# The names of a chain are asked for in one process, from left to right.
_CHAINS = (
    ("peft_hoe", "peft_hoe.demo", "peft_hoe.evaluation", "peft_hoe.policies"),
    ("peft_hoe", "peft_hoe.training", "peft_hoe.metrics.hypervolume"),
)


@pytest.fixture(scope="session")
def imported_by() -> Callable[[str], set[str]]:
    """The names in sys.modules of a fresh process that asked for a name, and for what stands before it in `_CHAINS`."""

    @functools.cache
    def names(chain: tuple[str, ...]) -> dict[str, set[str]]:
        code = "import json, pkgutil, sys\nfor name in sys.argv[1:]:\n"
        code += "    pkgutil.resolve_name(name)\n    print(json.dumps([*sys.modules]))"
        found = subprocess.run([sys.executable, "-c", code, *chain], capture_output=True, text=True, check=True)
        return {name: set(json.loads(line)) for name, line in zip(chain, found.stdout.splitlines(), strict=True)}

    return lambda module: names(next(chain for chain in _CHAINS if module in chain))[module]


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Asserts equality up to rounding, which differs between processors, numbers of threads and places in memory.

    The tolerance is ε of the dtype, times the numbers that are added up on the way, times the largest of what is expected. The
    default is for the output of a small model with two layers: 14 products of some 50 terms, twice. In float32 that is 2e-4.
    """

    def assert_agree(found: torch.Tensor, expected: torch.Tensor, terms: int = 1400) -> None:
        bound = terms * torch.finfo(expected.dtype).eps * max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)

    return assert_agree


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` with models and data: PEFT_HOE_SHARED, or beside the repository."""
    folder = Path(os.environ.get("PEFT_HOE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if folder.is_dir():
        return folder
    reason = f"no folder {folder}; set PEFT_HOE_SHARED to the folder with models and data"
    if os.environ.get("PEFT_HOE_REQUIRE_SHARED"):
        pytest.fail(reason)
    pytest.skip(reason)


def _load_toys() -> ModuleType:
    """`router_toys.py` under its own name, which spawned processes import too."""
    return _load("router_toys")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium with one tab (`browser.py`); tests that need it skip where there is none."""
    found = _load("browser")
    if found.CHROMIUM is None:
        pytest.skip(f"no browser: none of {', '.join(found.NAMES)} is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        opened = found.Browser(profile)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def start_server() -> Callable[..., Any]:
    """`server_process.started`: a server as another process, while a block lasts."""
    return _load("server_process").started  # type: ignore[no-any-return]


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


make_trainer = _maker("make_trainer", "A HoERouterTrainer on the toy.")
make_grpo = _maker("make_grpo_trainer", "A HoEGRPOTrainer on the toy.", "trl")
make_dpo_trainer = _maker("make_dpo_trainer", "A HoEDPOTrainer on the toy.", "trl")
make_distillation = _maker("make_distillation_trainer", "A HoEDistillationTrainer on the toy.")


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Something in the place of the package trackio that keeps what it was given, in `calls`."""
    stub: Any = ModuleType("trackio")
    stub.__spec__, stub.__version__ = ModuleSpec("trackio", None), "0.43.0"
    stub.calls, stub.config = [], _TrackioConfig()
    stub.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    stub.init = lambda **settings: stub.calls.append(("init", settings))
    stub.log = lambda metrics, **options: stub.calls.append(("log", metrics))
    stub.finish = lambda: stub.calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, "trackio", stub)
    if "trl.extras.profiling" in sys.modules:  # it imports trackio where there is one
        monkeypatch.setattr(sys.modules["trl.extras.profiling"], "trackio", stub, raising=False)
    return stub


class _TrackioConfig(dict[str, Any]):
    def update(self, values: Any, allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(values)


@pytest.fixture(scope="session")
def policy(toys: ModuleType) -> Any:
    """Two routers, the first of them trained to something of its own."""
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
