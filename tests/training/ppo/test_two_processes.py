"""Two processes on the CPU (gloo)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner

from peft_hoe.training.run.trained_router import TrainedRouter

pytestmark = pytest.mark.slow

SHARDS = Version(torch.__version__).release >= (2, 7)

# Policies are float64, but advantages and TRL's rewards are float32: off by ε/2 = 6e-8 of sums
# of up to 20, so 1e-6 of a gradient of about 1, which two updates at the rate 0.05, over a hundred tokens each, carry on.
ROUNDING = 2 * 0.05 * 100 * 20 * torch.finfo(torch.float32).eps / 2

Runs = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two processes")


@pytest.fixture(scope="module")
def together(folder: Path, toys: ModuleType) -> Runs:
    """What the two processes have after each run; all runs are made by one pair, which imports everything only once."""
    runs = {
        "replicated": ("two_updates_and_rewards", 4, {}),
        "evaluated": ("evaluated", 5, {}),
        "distilled": ("distillation_updates", 2, {"gradient_accumulation_steps": 2}),
    }
    if SHARDS:
        runs["fully sharded"] = ("save_sharded", 2, {})
        runs["sharded"] = ("two_updates_and_payoff", 4, {"shard_policy": True})
    if find_spec("trl"):
        runs |= {"grpo": ("two_grpo_updates", 4, {}), "dpo": ("dpo_updates", 2, {})}
    found: Runs = toys.launch(folder, runs)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> dict[str, Any]:
    """What one process has."""
    made: dict[str, Any] = toys.two_updates(str(tmp_path_factory.mktemp("alone")), 8)
    return made


def assert_one_process_does_the_same(first: dict[str, Any], second: dict[str, Any], alone: dict[str, Any]) -> None:
    """On the same global rollout the parameters are one process's, and after whole updates both ranks hold the same."""
    for name in ("given", "trained"):
        assert all(torch.equal(x, y) for x, y in zip(first[name], second[name], strict=True))
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-7)
    for x, y in zip(first["given"], alone["given"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=ROUNDING)
    assert not any(torch.equal(x, y) for x, y in zip(first["given"], first["trained"], strict=True))


def test_two_processes_make_the_update_of_one(together: Runs, alone: dict[str, Any]) -> None:
    assert_one_process_does_the_same(*together["replicated"], alone)


def test_processes_share_a_payoff_table_and_lack_rewards_together(
    tmp_path: Path, toys: ModuleType, together: Runs
) -> None:
    """An objective without rewards on one process trains from the other's."""
    first, second = together["replicated"]
    alone = toys.rewards_that_differ(str(tmp_path / "alone"))
    assert torch.equal(first["payoff"], alone["payoff"])
    assert torch.equal(second["payoff"], alone["payoff"])
    assert all(torch.equal(x, y) for x, y in zip(first["partly"], second["partly"], strict=True))
    assert first["reward"] == second["reward"] > 0
    assert first["message"] == second["message"] == alone["message"].replace("any of 8", "any of 16")
    assert "the rewards of ['low', 'high'] returned no number for any of 8 completions" in alone["message"]


def test_two_processes_evaluate_as_one_does(tmp_path: Path, toys: ModuleType, together: Runs) -> None:
    """Five prompts on two processes, and one on two: each counts once, and both processes know the same."""
    first, second = together["evaluated"]
    alone = toys.evaluated(str(tmp_path / "alone"), 5)
    assert first["found"] == second["found"]
    assert first["named"] == second["named"]
    assert first["found"].keys() == alone["found"].keys()
    for kind in ("found", "named"):
        for name, value in alone[kind].items():
            assert first[kind][name] == pytest.approx(value, abs=1e-6), name
    assert alone["named"]["eval_few_reward/low"] != alone["named"]["eval_more_reward/low"]


@pytest.mark.skipif(not SHARDS, reason="fully_shard's ignored_params came with torch 2.7")
def test_a_sharded_policy_makes_the_same_update(
    folder: Path, toys: ModuleType, together: Runs, alone: dict[str, Any]
) -> None:
    """Each process holds half of the base; the router is what it is without shards, and the saved adapter has it."""
    first, second = together["sharded"]
    assert_one_process_does_the_same(first, second, alone)
    for x, y in zip(first["trained"], together["replicated"][0]["trained"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=ROUNDING)
    assert first["held"] == second["held"] == alone["held"] / 2
    assert first["wrapped"] == first["trains"]  # on GPUs accelerate refuses to wrap shards
    assert (first["written"], second["written"]) == (2, 5)  # the first went on calling its layers for the second
    payoffs = [run["payoff"] for run in (first, second, together["replicated"][0])]
    assert all(
        torch.equal(payoff, payoffs[0]) for payoff in payoffs
    )  # one that only one process measured waited for ever
    loaded = PeftModel.from_pretrained(toys.make_base(), folder / "sharded" / "adapter")
    own = TrainedRouter(loaded, "r0").parameters()
    assert all(torch.equal(x.to(y), y) for x, y in zip(first["trained"], own, strict=True))


@pytest.mark.skipif(
    not SHARDS or not hasattr(BaseTuner, "_get_adapter_state_dict"), reason="PEFT asks the tuner since 0.21"
)
def test_a_fully_sharded_model_is_saved_gathered_or_not_at_all(
    folder: Path, toys: ModuleType, together: Runs, agree: Any
) -> None:
    """A user's own FSDP2 over everything; safetensors would say that a data pointer is invalid."""
    for run in together["fully sharded"]:
        assert "is sharded over processes, and an adapter is saved whole" in run["message"]
        assert "hoe_" in run["tensor"]
    loaded = PeftModel.from_pretrained(toys.make_base(), folder / "fully sharded")
    with torch.no_grad():
        logits = loaded(torch.full((2, 3), 5), preference=[0.25, 0.75]).logits
    agree(logits, together["fully sharded"][0]["logits"])
    wanted = toys.make_policy().state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items() if "hoe_" in name)


def test_two_processes_train_with_grpo_as_one_does(tmp_path: Path, toys: ModuleType, together: Runs) -> None:
    """The same for GRPO, where the completions are given; with its own samples both ranks hold the same."""
    pytest.importorskip("trl")
    first, second = together["grpo"]
    alone = toys.two_grpo_updates(str(tmp_path / "alone"), 8)
    for name in ("given", "trained"):
        assert all(torch.equal(x, y) for x, y in zip(first[name], second[name], strict=True))
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["payoff"], second["payoff"])  # the rewards of the two differ
    torch.testing.assert_close(first["payoff"], alone["payoff"])
    torch.testing.assert_close(first["given_weights"], alone["given_weights"], rtol=0, atol=ROUNDING)
    for x, y in zip(first["given"], alone["given"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=ROUNDING)
    assert not any(torch.equal(x, y) for x, y in zip(first["given"], first["trained"], strict=True))


def test_two_processes_train_with_dpo_as_one_does(tmp_path: Path, toys: ModuleType, together: Runs) -> None:
    """Both ranks hold the same router, that of one process on the whole batch, and log what that one logs."""
    pytest.importorskip("trl")
    first, second = together["dpo"]
    alone = toys.dpo_updates(str(tmp_path / "alone"), 4)
    assert all(torch.equal(x, y) for x, y in zip(first["trained"], second["trained"], strict=True))
    for x, y in zip(first["trained"], alone["trained"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=ROUNDING)
    for name in ("loss/low", "loss/high", "accuracy/low", "margin/high", "router/usage/high"):
        assert float(first["logs"][0][name]) == pytest.approx(float(alone["logs"][0][name]), rel=1e-3), name


def test_two_processes_distil_as_one_does(tmp_path: Path, toys: ModuleType, together: Runs) -> None:
    """Texts of different lengths: the mean is over the tokens of all processes, no mean of their means."""
    first, second = together["distilled"]
    alone = toys.distillation_updates(str(tmp_path / "alone"), 8)
    assert all(torch.equal(x, y) for x, y in zip(first["trained"], second["trained"], strict=True))
    for x, y in zip(first["trained"], alone["trained"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-3, atol=0)
    assert all(float(x.abs().max()) > 0.01 for x in alone["trained"] if x.ndim == 2)  # they start at 0
