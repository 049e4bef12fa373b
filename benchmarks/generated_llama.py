"""Checkpoints of TinyLlama's shapes with as many layers as wanted, made from random numbers: a base, and fine-tunes of it.

A fine-tune differs from the base by a task vector with singular values k^-0.7. Rounding to bfloat16 gives it a flat tail, as
real ones have.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

WIDTH, INNER, KEYS, VOCABULARY = 2048, 5632, 256, 32000
_LINEAR = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
SPREAD = 0.02  # standard deviation of the base's weights
CHANGE = 5e-4  # of a task vector's entries


def task_vector(rows: int, columns: int, generator: torch.Generator, exponent: float = 0.7, terms: int = 512) -> Tensor:
    """A matrix `(rows, columns)` whose leading singular values fall about like k^-exponent."""
    terms = min(terms, rows, columns)
    weights = torch.arange(1, terms + 1) ** -exponent
    left = torch.randn(rows, terms, generator=generator) * weights
    delta = left @ torch.randn(terms, columns, generator=generator)
    return delta * (CHANGE / delta.square().mean().sqrt())


def config(layers: int) -> LlamaConfig:
    """TinyLlama's, but for the number of layers."""
    settings = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=KEYS // (WIDTH // 32), vocab_size=VOCABULARY, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    settings.architectures = ["LlamaForCausalLM"]
    return settings


def make(folder: Path, layers: int, policy: int | None = None, *, ends: bool = False) -> Path:
    """The base, or the fine-tune of a number, in bfloat16, one file for each layer; kept where it is there already.

    A layer is the same however many there are, so its file is shared with folders beside this one that differ by the number
    after the last hyphen. With `ends` a fine-tune has changed its embeddings, its output head and its norms too.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for layer in [None, *range(layers)]:
        name = "model-ends.safetensors" if layer is None else f"model-{layer:03d}.safetensors"
        known = next(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/{name}"), None)
        if known is None:
            save_file(_tensors(layer, policy, ends), folder / name, metadata={"format": "pt"})
        else:
            os.link(known, folder / name)
        with safe_open(folder / name, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config(layers).save_pretrained(folder)  # last: it says that the rest is there
    return folder


def _tensors(layer: int | None, policy: int | None, ends: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0 if layer is None else layer + 1)
    changes = torch.Generator().manual_seed((policy or 0) * 10_000 + (0 if layer is None else layer + 1))
    if layer is None:
        shapes = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH)}
        ones = ["model.norm"]
    else:
        shapes = {f"model.layers.{layer}.{name}": shape for name, shape in _LINEAR.items()}
        ones = [f"model.layers.{layer}.{name}_layernorm" for name in ("input", "post_attention")]
    norm = torch.ones(WIDTH) + (CHANGE * 100 * torch.randn(WIDTH, generator=changes) if ends else 0)
    tensors = {f"{name}.weight": norm.bfloat16() for name in ones}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) * SPREAD
        if policy is not None and (layer is not None or ends):
            weight += task_vector(*shape, changes)
        tensors[f"{name}.weight"] = weight.bfloat16()
    return tensors
