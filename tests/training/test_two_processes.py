"""Two processes on the CPU (gloo)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel

from peft_hoe.training.trained_router import TrainedRouter

WORKER = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
import router_toys
output = sys.argv[1]
state = router_toys.{updates}(output, 4, **{changes!r})
if "{updates}" == "two_updates" and not {changes!r}:
    state |= router_toys.rewards_that_differ(output)
torch.save(state, output + "-" + str(state["rank"]) + ".pt")
"""


def launch(tmp_path: Path, processes: int, updates: str = "two_updates", **changes: Any) -> list[dict[str, Any]]:
    script = tmp_path / "worker.py"
    worker = WORKER.format(folder=str(Path(__file__).parent), updates=updates, changes=changes)
    script.write_text(worker, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / f"run{processes}"
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
    }
    shared |= {"ACCELERATE_USE_CPU": "true"}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(output)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        printed = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:  # one that waits for the other's collective would wait on
            child.kill()
    assert [child.returncode for child in children] == [0] * processes, "\n".join(text[-3000:] for text in printed)
    return [torch.load(f"{output}-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes have, each with the whole policy."""
    pytest.importorskip("trl.experimental.ppo")
    return launch(tmp_path_factory.mktemp("replicated"), 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, toys: ModuleType) -> dict[str, Any]:
    """What one process has."""
    pytest.importorskip("trl.experimental.ppo")
    made: dict[str, Any] = toys.two_updates(str(tmp_path_factory.mktemp("alone")), 8)
    return made


def check_against_one_process(first: dict[str, Any], second: dict[str, Any], alone: dict[str, Any]) -> None:
    """On the same global rollout the parameters are one process's, and after whole updates both ranks hold the same."""
    for name in ("given", "trained"):
        assert all(torch.equal(x, y) for x, y in zip(first[name], second[name], strict=True))
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-9)
    for x, y in zip(first["given"], alone["given"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert not any(torch.equal(x, y) for x, y in zip(first["given"], first["trained"], strict=True))


def test_two_processes_make_the_update_of_one(replicated: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    check_against_one_process(*replicated, alone)


def test_processes_share_a_payoff_table_and_lack_rewards_together(
    tmp_path: Path, toys: ModuleType, replicated: list[dict[str, Any]]
) -> None:
    """An objective without rewards on one process trains from the other's."""
    first, second = replicated
    alone = toys.rewards_that_differ(str(tmp_path / "alone"))
    assert torch.equal(first["payoff"], alone["payoff"])
    assert torch.equal(second["payoff"], alone["payoff"])
    assert all(torch.equal(x, y) for x, y in zip(first["partly"], second["partly"], strict=True))
    assert first["reward"] == second["reward"] > 0
    assert first["message"] == second["message"] == alone["message"].replace("any of 8", "any of 16")
    assert "reward 'low' returned no number for any of 8 completions" in alone["message"]


@pytest.mark.skipif(
    Version(torch.__version__).release < (2, 7), reason="fully_shard's ignored_params came with torch 2.7"
)
def test_a_sharded_policy_makes_the_same_update(
    tmp_path: Path, toys: ModuleType, replicated: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    """Each process holds half of the base; the router is what it is without shards, and the saved adapter has it."""
    first, second = launch(tmp_path, 2, shard_policy=True)
    check_against_one_process(first, second, alone)
    for x, y in zip(first["trained"], replicated[0]["trained"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert first["held"] == second["held"] == alone["held"] / 2
    assert first["wrapped"] == first["trains"]  # on GPUs accelerate refuses to wrap shards
    assert (first["written"], second["written"]) == (2, 5)  # the first went on calling its layers for the second
    loaded = PeftModel.from_pretrained(toys.make_base(), tmp_path / "run2" / "adapter")
    own = TrainedRouter(loaded, "r0").parameters()
    assert all(torch.equal(x, y) for x, y in zip(first["trained"], own, strict=True))


def test_two_processes_train_with_grpo_as_one_does(tmp_path: Path, toys: ModuleType) -> None:
    """The same for GRPO, where the completions are given; with its own samples both ranks hold the same."""
    pytest.importorskip("trl")
    first, second = launch(tmp_path, 2, "two_grpo_updates")
    alone = toys.two_grpo_updates(str(tmp_path / "alone"), 8)
    for name in ("given", "trained"):
        assert all(torch.equal(x, y) for x, y in zip(first[name], second[name], strict=True))
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["given_weights"], alone["given_weights"], rtol=0, atol=1e-6)
    for x, y in zip(first["given"], alone["given"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert not any(torch.equal(x, y) for x, y in zip(first["given"], first["trained"], strict=True))
