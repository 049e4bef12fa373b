"""Tiny checkpoints, made when a test needs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_hoe.experts.architecture import read_architecture
from peft_hoe.experts.model_weights import ModelWeights

Change = Callable[[str, torch.Tensor], torch.Tensor]


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    """One layer, width 16, 2 heads."""
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **settings})).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """One layer, width 16; its linear layers are Conv1D."""
    config = GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=32,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def rewrite(source: Path, target: Path, change: Change) -> Path:
    """A copy of a checkpoint with every tensor changed."""
    target.mkdir(parents=True)
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = {name: change(name, tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def noisy(seed: int, scale: float = 0.1) -> Change:
    """A change that a fine-tune could have made: noise on every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _, tensor: tensor + scale * torch.randn(tensor.shape, generator=generator)


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def adapter_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def expert_delta(folder: Path, module: str, index: int) -> torch.Tensor:
    """B_j A_j of one expert, `(d_out, d_in)`."""
    config, tensors = adapter_config(folder), adapter_tensors(folder)
    ranks = config["rank_pattern"].get(module, [expert["r"] for expert in config["experts"]])
    start = sum(ranks[:index])
    stem = f"base_model.model.{module}"
    columns = slice(start, start + ranks[index])
    return tensors[f"{stem}.hoe_B.weight"][:, columns] @ tensors[f"{stem}.hoe_A.weight"][columns]


@pytest.fixture
def tiny() -> SimpleNamespace:
    """The functions of this module; test modules cannot import it."""
    return SimpleNamespace(
        llama=tiny_llama,
        gpt2=tiny_gpt2,
        rewrite=rewrite,
        noisy=noisy,
        tensors=adapter_tensors,
        tensors_of=lambda folder: load_file(folder / "model.safetensors"),
        config=adapter_config,
        delta=expert_delta,
    )


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A base."""
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def policies(llama: Path, tmp_path: Path) -> dict[str, Path]:
    """Two fine-tunes of it."""
    return {
        "kind": rewrite(llama, tmp_path / "kind", noisy(1)),
        "brief": rewrite(llama, tmp_path / "brief", noisy(2)),
    }


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A base with Conv1D layers."""
    torch.manual_seed(0)
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def opened(llama: Path, tmp_path: Path, tiny: SimpleNamespace) -> tuple[Any, Any, Any]:
    """Base, architecture and a function that opens a changed copy as a policy."""
    architecture = read_architecture(llama)

    def change(change: Change, name: str = "changed") -> ModelWeights:
        return ModelWeights(tiny.rewrite(llama, tmp_path / name, change), f"policy {name!r}", architecture)

    return ModelWeights(llama, "the base", architecture), architecture, change
