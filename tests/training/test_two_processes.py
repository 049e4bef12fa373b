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

WORKER = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
import router_toys
output = sys.argv[1]
state = router_toys.{updates}(output, 4)
torch.save(state, output + "-" + str(state["rank"]) + ".pt")
"""


def launch(tmp_path: Path, processes: int, updates: str) -> list[dict[str, Any]]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(Path(__file__).parent), updates=updates), encoding="utf-8")
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
    printed = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0] * processes, "\n".join(text[-3000:] for text in printed)
    return [torch.load(f"{output}-{rank}.pt") for rank in range(processes)]


def test_two_processes_make_the_update_of_one(tmp_path: Path, toys: ModuleType) -> None:
    """On the same global rollout the parameters are one process's, and after whole updates both ranks hold the same."""
    pytest.importorskip("trl.experimental.ppo")
    first, second = launch(tmp_path, 2, "two_updates")
    alone = toys.two_updates(str(tmp_path / "alone"), 8)
    for name in ("given", "trained"):
        assert all(torch.equal(x, y) for x, y in zip(first[name], second[name], strict=True))
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-9)
    for x, y in zip(first["given"], alone["given"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert not any(torch.equal(x, y) for x, y in zip(first["given"], first["trained"], strict=True))


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
