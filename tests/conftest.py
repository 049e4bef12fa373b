"""Shared fixtures. No test reaches the network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch

torch.set_num_threads(1)


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
