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

pytest.importorskip("trl")

WORKER = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
import router_toys
output = sys.argv[1]
state = router_toys.dpo_updates(output, 2)
torch.save(state, output + "-" + str(state["rank"]) + ".pt")
"""


def launch(tmp_path: Path, processes: int) -> list[dict[str, Any]]:
    script, output = tmp_path / "worker.py", tmp_path / "run"
    script.write_text(WORKER.format(folder=str(Path(__file__).parent)), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
    """Both ranks hold the same router, that of one process on the whole batch, and log what that one logs."""
    first, second = launch(tmp_path, 2)
    alone = toys.dpo_updates(str(tmp_path / "alone"), 4)
    assert all(torch.equal(x, y) for x, y in zip(first["trained"], second["trained"], strict=True))
    for x, y in zip(first["trained"], alone["trained"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
    for name in ("loss/low", "loss/high", "accuracy/low", "margin/high", "router/usage/high"):
        assert float(first["logs"][0][name]) == pytest.approx(float(alone["logs"][0][name]), rel=1e-4), name
